"""Where the queries look: cross-attention maps over an image, and Grad-CAM for a word.

    python eval.py ask --attention out.png                      the mean over the queries, and single queries
    python eval.py ask --attention out.png --word green         also Grad-CAM for a word

The queries are a set: number 3 is not "the third object", and what a query attends to differs from run to run.
Letters: C blocks with cross-attention, h x w patches; see also the glossary of qformer.py.
"""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.errors import expect
from sources.text import pad

TILE, LINE = 224, 18  # pixels of an image's side and of the text above it


@contextmanager
def recorded_attention(qformer):
    """Yields a list that collects the attention probabilities (B, H, Q, P) of each cross-attention that runs inside, in
    the autograd graph. The fused kernel does not return them, so they are computed here and the block continues with
    them."""
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
    """(..., P) -> (..., h, w), without [CLS], which is first where an encoder has one."""
    grid = model.image_size // model.vit.cfg.patch_size
    return maps[..., -grid * grid :].unflatten(-1, (grid, grid))


@torch.no_grad()
def attention_maps(model, image, question: str = "") -> Tensor:
    """Where each query attends to in an image, in each cross-attention: (C, Q, h, w), the mean over the heads.

    image: or `EncodedImages` of one. question: for a model whose Q-Former reads it too.
    """
    tokens = model.encode_image(image).tokens
    with model.autocast(), recorded_attention(model.qformer) as seen:
        encode_queries(model, model.image_kv(tokens), question if model.conditioned else None)
    return on_patches(model, torch.cat(seen).float().mean(dim=1))


def encode_queries(model, image_kv, text: str | None) -> Tensor:
    """The queries read the image, and a text if given -> query_out (1, Q, D)."""
    if text is None:
        return model.qformer.encode_queries(image_kv)
    ids, mask = pad(model.tokenizer.encode([text]), model.tokenizer.pad_id)
    return model.qformer("itm", ids.to(model.device), mask.to(model.device), image_kv)[0]


def word_map(model, image, word: str, prompt: str = "", question: str = "") -> Tensor:
    """Grad-CAM for a word: where the evidence is in an image, (h, w), the maximum is 1.

    Attention times the positive part of its gradient, summed over heads and queries, as in ALBEF (Li et al., 2021), in
    the last block, where it is sharpest. The gradient is that of the word's log-probability after the prompt, or
    without a language model that of the ITM logit. question: the one in the prompt, for a model whose Q-Former reads
    it too.
    """
    text = word if model.llm is None else question if model.conditioned else None
    expect(word.strip(), f"got --word {word!r}, expected a word")
    tokens = model.encode_image([image]).tokens
    with torch.enable_grad(), recorded_attention(model.qformer) as seen:
        tokens = tokens.detach().requires_grad_()  # so that there is a graph even if all weights are frozen
        with model.autocast():
            query_out = encode_queries(model, model.image_kv(tokens), text)
        has_llm = model.llm is not None
        score = word_log_prob(model, query_out, word, prompt) if has_llm else model.itm_logits(query_out)[0, 1]
        (gradient,) = torch.autograd.grad(score, seen[-1:])
    found = on_patches(model, (seen[-1] * gradient.clamp(min=0)).detach().float().sum(dim=(0, 1, 2)))
    return found / found.max().clamp(min=1e-12)


def word_log_prob(model, query_out: Tensor, word: str, prompt: str) -> Tensor:
    """Log-probability of the word after image and prompt, without its end token."""
    tokenizer = model.llm_tokenizer
    prompt_ids, mask = tokenizer.pad_prompts(tokenizer.encode_prompts([prompt]))
    (target,) = tokenizer.encode_targets([word], [prompt])
    target = torch.tensor([target[:-1]], device=model.device)
    prefix, mask = model.llm_prefix(query_out, prompt_ids.to(model.device), mask.to(model.device))
    logits = model.llm(prefix, mask, target)  # (1, T, W)
    return logits.float().log_softmax(dim=-1).gather(2, target[..., None]).sum()


def overlay(image: Image.Image, found: Tensor) -> Image.Image:
    """The image (TILE x TILE), darkened where the map (h, w) is low and red where it is high."""
    weight = (found / found.max().clamp(min=1e-12)).cpu().numpy().astype(np.float32)
    weight = np.asarray(Image.fromarray(weight).resize((TILE, TILE), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    pixels, red = np.asarray(image, dtype=np.float32), np.array([255, 48, 0], dtype=np.float32)
    return Image.fromarray((pixels * (0.55 + 0.05 * weight) + red * 0.4 * weight).clip(0, 255).astype(np.uint8))


def sheet(image: Image.Image, maps: dict[str, Tensor]) -> Image.Image:
    """The image, then its overlay with each map under the map's name, in rows of four."""
    image = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    tiles = [("", image), *((name, overlay(image, found)) for name, found in maps.items())]
    rows = -(-len(tiles) // 4)
    page = Image.new("RGB", (TILE * min(4, len(tiles)), (TILE + LINE) * rows), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for number, (name, tile) in enumerate(tiles):
        left, top = TILE * (number % 4), (TILE + LINE) * (number // 4)
        draw.text((left + 4, top + 3), name, "black", font)
        page.paste(tile, (left, top + LINE))
    return page


def draw_attention(
    model, image: Image.Image, caption: str, queries: list[int], word: str = "", prompt: str = "", question: str = ""
) -> Image.Image:
    """The sheet of `eval.py ask --attention`: the mean over all queries, some queries, and Grad-CAM for a word.

    queries: their numbers; by default the three with the most concentrated attention. Without a prompt the word is
    taken after the words before it in the caption.
    """
    each = attention_maps(model, image, question).mean(dim=0)  # (Q, h, w), the mean over the blocks
    Q = len(each)
    expect(set(queries) <= set(range(Q)), f"got --queries {queries}, expected numbers from 0 to {Q - 1}")
    peaked = each.flatten(1).amax(dim=1) / each.flatten(1).sum(dim=1)
    queries = queries or sorted(peaked.topk(min(3, Q)).indices.tolist())
    maps = {"mean of the queries": each.mean(dim=0)} | {f"query {query}": each[query] for query in queries}
    if word:
        if not prompt and model.llm is not None:
            # At the start, the score would be about how captions begin.
            missing = f'--word {word} is not in the caption "{caption}"'
            expect(word in caption.split(), f"{missing}: add the --question, or the --prompt, it answers")
            prompt = caption[: f" {caption} ".index(f" {word} ")].rstrip()
        maps[f'for "{word}"' + f' after "{prompt}"' * bool(prompt)] = word_map(model, image, word, prompt, question)
    return sheet(image, maps)
