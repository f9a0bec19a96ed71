"""Where the queries look: their cross-attention over a photo, and what of it speaks for a word.

    python eval.py ask --attention out.png                      the mean over the queries, and single queries
    python eval.py ask --attention out.png --word green         and what speaks for a word

The queries are a set: number 3 is not "the third thing", and what a query looks at differs from training to training.
Letters: C blocks with cross-attention, H heads, Q queries, P image tokens, h x w patches.
"""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import UserError, pad

TILE, LINE = 224, 18  # pixels of a picture's side and of the text over it


@contextmanager
def watched(qformer):
    """Inside, a list gets the attention probabilities (B, H, Q, P) of each cross-attention that runs, as parts of the
    graph. The fused kernel does not give them, so that they are computed here and the block goes on with them."""
    seen: list[Tensor] = []

    def hook(module, inputs, _):
        x, (k, v) = inputs
        q = module.q(x).unflatten(2, (module.heads, -1)).transpose(1, 2)
        probabilities = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
        seen.append(probabilities)
        return module.ln(x + module.proj((probabilities @ v).transpose(1, 2).flatten(2)))

    handles = [block.cross.register_forward_hook(hook) for block in qformer.blocks if block.cross is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def on_patches(model, maps: Tensor) -> Tensor:
    """(..., P) -> (..., h, w): the patches in their places. [CLS], the first token, has none and is left out."""
    grid = model.image_size // model.vit.cfg.patch_size
    return maps[..., 1:].unflatten(-1, (grid, grid))


@torch.no_grad()
def attention_maps(model, photo, question: str = "") -> Tensor:
    """Where each query looks in a photo, in each cross-attention: (C, Q, h, w), the mean over the heads.

    question: for a model whose Q-Former reads it too.
    """
    tokens = model.encode_image([photo]).tokens
    with model.autocast(), watched(model.qformer) as seen:
        look(model, model.image_kv(tokens), question if model.conditioned else None)
    return on_patches(model, torch.cat(seen).float().mean(dim=1))


def look(model, image_kv, text: str | None) -> Tensor:
    """The queries read the photo, and a text if there is one -> query_out (1, Q, D)."""
    if text is None:
        return model.qformer.encode_queries(image_kv)
    ids, mask = pad(model.texts.encode([text]), model.texts.pad_id)
    return model.qformer.encode_pairs(ids.to(model.device), mask.to(model.device), image_kv)


def word_map(model, photo, word: str, prompt: str = "", question: str = "") -> Tensor:
    """Where in a photo that is which speaks for the word: (h, w), the largest is 1.

    Attention times the positive part of its gradient, summed over heads and queries, as ALBEF draws it (Li et al.,
    2021, after Grad-CAM); of the last block, where it is sharpest. The gradient is that of the word's log-probability
    behind the prompt, or without a language model that of the verdict "this text and this photo match". question: of
    which the prompt is made, for a model whose Q-Former reads it too.
    """
    text = word if model.llm is None else question if model.conditioned else None
    if not word.strip():
        raise UserError(f"got the word {word!r}, in which there is nothing to look for")
    tokens = model.encode_image([photo]).tokens
    with torch.enable_grad(), watched(model.qformer) as seen:
        tokens = tokens.detach().requires_grad_()  # so that there is a graph even where all weights are frozen
        with model.autocast():
            query_out = look(model, model.image_kv(tokens), text)
        if model.llm is None:
            score = model.itm_logits(query_out)[0, 1]
        else:
            score = word_log_prob(model, query_out, word, prompt)
        (gradient,) = torch.autograd.grad(score, seen[-1:])
    found = on_patches(model, (seen[-1] * gradient.clamp(min=0)).detach().float().sum(dim=(0, 1, 2)))
    return found / found.max().clamp(min=1e-12)


def word_log_prob(model, query_out: Tensor, word: str, prompt: str) -> Tensor:
    """Log-probability of the word behind photo and prompt, its end not counted."""
    texts = model.llm_texts
    prompt_ids, mask = pad(texts.encode_prompts([prompt]), texts.pad_id, texts.layout.pads, multiple=1)
    (target,) = texts.encode_texts([word], [prompt])
    target = torch.tensor([target[:-1]], device=model.device)
    rows = torch.arange(target.shape[1], device=model.device)
    embedded, mask = model.llm_prompt(query_out, prompt_ids.to(model.device), mask.to(model.device))
    logits = model.llm(embedded, mask, target, rows)
    return logits.float().log_softmax(dim=-1).gather(1, target.T).sum()


def overlay(photo: Image.Image, found: Tensor) -> Image.Image:
    """The photo, darkened where the map (h, w) is low and reddened where it is high."""
    weight = (found / found.max().clamp(min=1e-12)).cpu().numpy().astype(np.float32)
    weight = np.asarray(Image.fromarray(weight).resize((TILE, TILE), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    pixels = np.asarray(photo.resize((TILE, TILE), Image.Resampling.BICUBIC), dtype=np.float32)
    red = np.array([255, 48, 0], dtype=np.float32)
    return Image.fromarray((pixels * (0.55 + 0.05 * weight) + red * 0.4 * weight).clip(0, 255).astype(np.uint8))


def sheet(photo: Image.Image, maps: dict[str, Tensor]) -> Image.Image:
    """The photo, and over it each map under its name, in rows of four."""
    tiles = [("", photo.resize((TILE, TILE), Image.Resampling.BICUBIC))]
    tiles += [(name, overlay(photo, found)) for name, found in maps.items()]
    rows = -(-len(tiles) // 4)
    page = Image.new("RGB", (TILE * min(4, len(tiles)), (TILE + LINE) * rows), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for number, (name, tile) in enumerate(tiles):
        left, top = TILE * (number % 4), (TILE + LINE) * (number // 4)
        draw.text((left + 4, top + 3), name, "black", font)
        page.paste(tile, (left, top + LINE))
    return page


def draw_attention(
    model, photo: Image.Image, caption: str, queries: list[int], word: str = "", prompt: str = "", question: str = ""
) -> Image.Image:
    """The sheet of `eval.py ask --attention`: the mean over all queries, some queries, and what speaks for a word.

    queries: their numbers; if none are given, the three that look at the fewest places. Without a prompt the word is
    looked for behind the words that stand before it in the caption.
    """
    each = attention_maps(model, photo, question).mean(dim=0)  # (Q, h, w), the mean over the blocks
    if not all(0 <= query < len(each) for query in queries):
        raise UserError(f"got the queries {queries}, expected numbers from 0 to {len(each) - 1}")
    peaked = each.flatten(1).amax(dim=1) / each.flatten(1).sum(dim=1)
    maps = {"mean of the queries": each.mean(dim=0)}
    maps |= {
        f"query {query}": each[query] for query in queries or sorted(peaked.topk(min(3, len(each))).indices.tolist())
    }
    if word:
        if not prompt and model.llm is not None:
            if word not in caption.split():  # behind nothing, the score is about what a caption begins with
                raise UserError(
                    f'--word {word} is not in the caption "{caption}": add the --question, or the --prompt, it answers'
                )
            prompt = caption[: f" {caption} ".index(f" {word} ")].rstrip()
        maps[f'for "{word}"' + f' behind "{prompt}"' * bool(prompt)] = word_map(model, photo, word, prompt, question)
    return sheet(photo, maps)
