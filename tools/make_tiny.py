"""Train the tiny parts that ship with the code: `python -m tools.make_tiny` writes assets/tiny/.

    vit      a ViT in DINOv2's layout, trained on attributes: [CLS] predicts size, colour and shape in each quarter of
             the image; every patch, already after the second-last block, those in its own quarter
    bert     a BERT, trained on masked words of captions, and by [CLS] on which two captions are paraphrases (as MiniLM
             and other sentence encoders are; with masked words alone, [CLS] would carry no meaning)
    opt, t5  language models, trained to continue a description: with a paraphrase, or with the answer to a question;
             and llama, only if it is named

Each knows its own modality only: the ViT never saw a word, the others never saw an image. And none saw what the shapes
world holds out: colour-shape pairs, wordings, scenes of the test and validation splits.
All are saved in fp16 under the keys of their public models, so that transformers opens them too.

    python -m tools.make_tiny --only blip2 --run runs/stage2      assets/tiny/blip2, from a run of stage 2, in fp16
    python -m tools.make_tiny --only llama --out W                W/llama
    python -m tools.make_tiny --only opt --text a.txt --out W     W/opt, 10 M parameters, from the lines of a text
"""

import gzip
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from blip2 import TINY
from engine.device import choose_precision, keep_freed_memory
from engine.errors import Parser
from llm import OPT, T5, Llama, LlamaConfig, OPTConfig, T5Config
from losses import IGNORE, lm_loss
from qformer import QFormer, QFormerConfig
from sources import shapes
from sources.images import eval_transform
from sources.prompts import FORMATS
from sources.text import BertTokenizer, LLMTokenizer, clean_caption, fill_template, pad, split_prefix
from train import build_optimizer, lr_at, set_lr
from vit import ViT, ViTConfig
from weights.configs import BERT_FIELDS, DINOV2_FIELDS, LLAMA_FIELDS, OPT_FIELDS, T5_FIELDS, write_fields
from weights.load import unload
from weights.tables import BERT, DINOV2, LLAMA_TABLE, OPT_TABLE, T5_TABLE

PIXELS = 64  # a side of an image
STEPS = {"vit": 2000, "bert": 1200, "opt": 5000, "t5": 4000, "llama": 5000}


def optimize(model: nn.Module, loss_of_step, steps: int, lr: float) -> None:
    """Minimise `loss_of_step(step)`."""
    cfg = SimpleNamespace(steps=steps, lr=lr, min_lr=lr / 100, warmup=steps // 20, beta2=0.98, weight_decay=0.05)
    optimizer = build_optimizer(model, cfg)
    for step in range(1, steps + 1):
        set_lr(optimizer, lr_at(step, cfg))
        with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision(torch.device("cpu"))[0] == "bf16"):
            loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)


# --- the image encoder -----------------------------------------------------------------------------------------------

SIZES, COLORS, SHAPES = tuple(shapes.SIZES), tuple(shapes.COLORS), shapes.SHAPES


def cell_labels(scene: shapes.Scene) -> Tensor:
    """(4, 3): size, colour and shape in each cell; an empty one has size 0 and no colour or shape label."""
    labels = torch.tensor([[0, IGNORE, IGNORE]]).repeat(len(shapes.CELLS), 1)
    for thing in scene:
        what = SIZES.index(thing.size) + 1, COLORS.index(thing.color), SHAPES.index(thing.shape)
        labels[shapes.CELLS.index((thing.row, thing.column))] = torch.tensor(what)
    return labels


def make_vit(folder: Path, steps: int, batch: int = 64) -> None:
    """Train and save the ViT; prints how often it is right about a whole unseen image."""
    cfg = ViTConfig(width=96, depth=6, heads=3, mlp=384, patch_size=8, image_size=PIXELS)
    vit = ViT(cfg)  # with its last block, which stage 1 drops
    counts = (len(SIZES) + 1, len(COLORS), len(SHAPES))
    norm, patch_norm = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
    all_cells, own_cell = nn.Linear(cfg.width, len(shapes.CELLS) * sum(counts)), nn.Linear(cfg.width, sum(counts))
    model = nn.ModuleList([vit, norm, patch_norm, all_cells, own_cell])
    second_last = []
    vit.blocks[-2].register_forward_hook(lambda block, inputs, tokens: second_last.append(tokens))
    world = shapes.ShapesWorld("train", PIXELS)
    grid = PIXELS // cfg.patch_size
    half = torch.arange(grid) // (grid // 2)  # row or column of cells of a patch
    cell_of_patch = (2 * half[:, None] + half).flatten()

    def predict(world: shapes.ShapesWorld, rows) -> list[tuple[str, Tensor, Tensor]]:
        """-> (name, logits, labels) of [CLS] for the 4 cells, and of each patch for its own cell."""
        images = torch.stack([eval_transform(world.image(row), PIXELS) for row in rows])
        labels = torch.stack([cell_labels(world.scene(row)) for row in rows])  # (B, 4, 3)
        by_cls = all_cells(norm(vit(images))[:, 0]).unflatten(1, (len(shapes.CELLS), sum(counts)))
        by_patches = own_cell(patch_norm(second_last.pop()[:, 1:]))
        return [("[CLS]", by_cls, labels), ("patches", by_patches, labels[:, cell_of_patch])]

    def loss_of_step(step: int) -> Tensor:
        rows = 2 * torch.arange((step - 1) * batch, step * batch)  # even ones: a twin is nothing new to a ViT
        return sum(
            F.cross_entropy(logits.flatten(0, 1), truth[:, :, i].flatten(), ignore_index=IGNORE)
            for _, predicted, truth in predict(world, rows.tolist())
            for i, logits in enumerate(predicted.float().split(counts, dim=2))
        )

    optimize(model, loss_of_step, steps, lr=1e-3)
    with torch.no_grad():
        for name, logits, truth in predict(shapes.ShapesWorld("val", PIXELS), range(500)):
            right = torch.stack([part.argmax(dim=2) for part in logits.split(counts, dim=2)], dim=2) == truth
            right |= truth == IGNORE
            share = right.flatten(1).all(dim=1).float().mean()
            print(f"vit: unseen images with all attributes correct, by {name}: {share:.1%}")
    tensors = unload(vit, DINOV2)
    tensors["layernorm.weight"], tensors["layernorm.bias"] = norm.weight.detach(), norm.bias.detach()
    tensors["embeddings.mask_token"] = torch.zeros(1, cfg.width)
    more = {"layerscale_value": 1.0, "image_mean": list(cfg.mean), "image_std": list(cfg.std)}
    config = write_fields(DINOV2_FIELDS, cfg) | {"mlp_ratio": cfg.mlp // cfg.width} | more
    save_public(folder, tensors, "Dinov2Model", "dinov2", config)


# --- the text encoder ------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Special tokens, the words of the shapes world, and letters, which spell any other word."""
    rng, words = random.Random(0), set()
    for count in (1, 2, 3) * 100:
        scene = shapes.draw_scene(rng, count=count)
        sentences = shapes.captions(scene) + shapes.captions(scene, held_out=True)
        sentences += [part for asked in shapes.questions(scene) for part in (asked.wordings[0], asked.answer)]
        words |= {word for sentence in sentences for word in re.findall(r"\w+", sentence.lower())}
    words |= {*shapes.COLORS, *shapes.SHAPES, *shapes.SIZES, "yes", "no", "question", "answer"}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "?", "'", "-"]
    return special + sorted(words - set(letters)) + letters + [f"##{letter}" for letter in letters]


@torch.no_grad()
def place_by_waves(positions: nn.Parameter, std: float) -> None:
    """Initialize with sines and cosines: "the previous word" is the same rotation everywhere, not learned 64 times."""
    places, width = positions.shape
    frequencies = torch.exp(-torch.arange(width // 2) * math.log(places) / (width // 2))
    angles = torch.arange(places)[:, None] * frequencies
    positions.copy_(2**0.5 * std * torch.cat((angles.sin(), angles.cos()), dim=1))


def make_bert(folder: Path, steps: int, batch: int = 128) -> None:
    """Train and save the Q-Former's text side, on masked words and on which two captions mean the same."""
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    BertWordPieceTokenizer({word: i for i, word in enumerate(words)}).save(str(folder / "tokenizer.json"))
    tokenizer = BertTokenizer(folder)
    sizes = dict(width=128, depth=4, heads=4, mlp=512, max_positions=64, num_queries=1, image_width=1)
    # A Linear keeps the variance of its input. The usual 0.02 does at a width of 768; here words would be so faint that
    # [CLS] could not tell "red circle above blue square" from "blue circle above red square".
    cfg = QFormerConfig(tokenizer.vocab_size, dropout=0, init_std=128**-0.5, **sizes)
    bert = QFormer(cfg)
    place_by_waves(bert.position_embedding.weight, std=2 * cfg.init_std)
    mask_id = words.index("[MASK]")

    project = nn.Linear(cfg.width, cfg.width)  # of the second task only, not saved
    model = nn.ModuleList([bert, project])

    def loss_of_step(step: int) -> Tensor:
        rng, scenes = random.Random(step), []
        while len(scenes) < batch // 2:  # with twins, so that every word counts
            scene = shapes.draw_scene(rng)
            twins = [scene, shapes.swapped(scene, rng)] if len(scene) == 2 else [scene]
            if all(shapes.split_of(t) == "train" and not shapes.has_held_out_pair(t) for t in twins):
                scenes += twins
        pairs = [rng.sample(shapes.captions(scene), 2) for scene in scenes]
        ids, mask = pad(tokenizer.encode([a for a, _ in pairs] + [b for _, b in pairs]), tokenizer.pad_id)
        # Which two wordings describe one scene? [CLS] has to hold the whole meaning.
        cls = F.normalize(project(bert.encode_text(ids, mask)).float(), dim=-1)
        first, second = cls.chunk(2)
        same = torch.arange(len(first))
        paraphrase = F.cross_entropy(first @ second.T / 0.1, same) + F.cross_entropy(second @ first.T / 0.1, same)
        # Which word is masked?
        masked = (torch.rand(ids.shape) < 0.15) & mask & (ids > mask_id)  # words, not special tokens
        hidden = bert.run(bert.embed(ids.masked_fill(masked, mask_id)), 0, mask[:, None, None])
        return paraphrase + F.cross_entropy(bert.lm_logits(hidden[masked]).float(), ids[masked])

    optimize(model, loss_of_step, steps, lr=1e-3)
    tensors = {key if key.startswith("cls.") else f"bert.{key}": tensor for key, tensor in unload(bert, BERT).items()}
    more = {"vocab_size": len(words), "type_vocab_size": 2, "hidden_act": "gelu"}  # the words without [DEC]
    more |= {"attention_probs_dropout_prob": cfg.dropout, "pad_token_id": 0}
    save_public(folder, tensors, "BertForMaskedLM", "bert", write_fields(BERT_FIELDS, cfg) | more)


# --- the language models ---------------------------------------------------------------------------------------------

# (description, prompt, [(text, trained?), ...]): texts after the other two, of which some are targets. A description is
# a list of chunks of one or several words; each chunk becomes one embedding, the sum of its tokens'.
Document = tuple[list[str], str, list[tuple[str, bool]]]

TINY_SIZES = {
    "opt": dict(width=128, depth=6, heads=4, mlp=512, max_positions=128, embed_width=128),
    "t5": dict(width=128, depth=4, decoder_depth=4, heads=4, head_width=32, mlp=256),
    "llama": dict(width=128, depth=6, heads=4, kv_heads=2, head_width=32, mlp=352, max_positions=128, rope_theta=1e4),
}
LEARNING_RATES = {"opt": 1e-3, "t5": 6e-4, "llama": 1e-3}  # T5's unscaled attention diverges at more
TEXT_SIZES = {  # about 10 M parameters, with 4,096 tokens
    "opt": dict(width=320, depth=7, heads=5, mlp=1280, max_positions=256, embed_width=320),
    "t5": dict(width=256, depth=4, decoder_depth=4, heads=4, head_width=64, mlp=704),
    "llama": dict(width=320, depth=7, heads=5, kv_heads=5, mlp=864, max_positions=256, rope_theta=1e4),
}


class ShapesText:
    """Sentences about scenes of the training split: descriptions, and questions with answers. No image."""

    tokens = 1000  # more than there are words, so that each becomes one token

    def scene(self, rng: random.Random) -> shapes.Scene:
        """A scene of the training split."""
        while shapes.split_of(scene := shapes.draw_scene(rng)) != "train":
            pass
        return scene

    def sentences(self) -> list[str]:
        """For the tokenizer."""
        rng, sentences = random.Random(0), []
        for _ in range(2000):
            scene = self.scene(rng)
            sentences += captions_of(scene)
            answered = [f"{wording} {q.answer}" for q in shapes.questions(scene) for wording in q.wordings]
            templates = [kind.prompt_format.template for kind in (OPT, T5)]
            sentences += [fill_template(template, words) for template in templates for words in answered]
        return sentences

    def description(self, scene: shapes.Scene, rng: random.Random) -> list[str]:
        """A caption, or a list of objects with places, in chunks: single words, or an object (with its place) at once.

        The visual embeddings of stage 2 are fewer than the words of a caption, so each has to stand for several.
        """
        places = [f"{thing.words} at the {thing.place}" for thing in rng.sample(scene, len(scene))]
        text = rng.choice((rng.choice(captions_of(scene)), ", ".join(places)))
        thing = r" ?a (?:small|large) \w+ \w+(?: at the \w+ \w+)?|"
        return re.findall(rng.choice((thing, "")) + r" ?\w+|,", text)

    def documents(self, step: int, count: int, prompt_format) -> Iterator[Document]:
        """For a quarter of `count` scenes a caption in another wording, for the others several questions, because one
        alone teaches little. OPT answers them in a conversation, T5, which reads before it writes, one by one.
        """
        rng, cuts = random.Random(step), np.random.default_rng(step)
        for number in range(count):
            scene = self.scene(rng)
            chunks, caption = self.description(scene, rng), rng.choice(captions_of(scene))
            if number % 4 == 0:
                prompt, text = split_prefix(caption, cuts) if prompt_format.prefix_lm else ("", caption)
                yield chunks, prompt, [(text, True)]
                continue
            asked = [(rng.choice(q.wordings), q.answer) for q in shapes.questions(scene)]
            asked = rng.sample(asked, min(rng.randint(1, 4), len(asked)))
            turns = [(fill_template(prompt_format.template, question), answer) for question, answer in asked]
            if prompt_format.prefix_lm:
                yield from ((chunks, prompt, [(answer, True)]) for prompt, answer in turns)
            else:
                (prompt, answer), *more = turns
                texts = [(answer, True)]
                for question, answer in more:
                    texts += [(f". {question}", False), (f" {answer}", True)]
                yield chunks, prompt, texts


def captions_of(scene: shapes.Scene) -> list[str]:
    """The training wordings, cleaned as in stage 2."""
    return [clean_caption(caption) for caption in shapes.captions(scene)]


class FileText:
    """The lines of a text file (or .gz), cleaned as captions are. Half of them follow some of their own words in random
    order: so the model learns to write what it is given, which is all that stage 2 requires."""

    tokens = 4096

    def __init__(self, path: Path):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            self.lines = [caption for line in file if (caption := clean_caption(line))]
        self.orders: dict[int, np.ndarray] = {}  # of the current epoch

    def sentences(self) -> list[str]:
        """For the tokenizer."""
        return self.lines + [OPT.prompt_format.template, T5.prompt_format.template]

    def documents(self, step: int, count: int, prompt_format) -> Iterator[Document]:
        """Every line once per epoch."""
        rng, cuts = random.Random(step), np.random.default_rng(step)
        for place in range(step * count, (step + 1) * count):
            epoch, row = divmod(place, len(self.lines))
            if epoch not in self.orders:
                self.orders = {epoch: np.random.default_rng(epoch).permutation(len(self.lines))}
            caption = self.lines[self.orders[epoch][row]]
            words = caption.split()
            given = rng.sample(words, rng.randint(1, len(words))) if place % 2 else []
            prompt, text = split_prefix(caption, cuts) if prompt_format.prefix_lm else ("", caption)
            yield [f" {word}" for word in given], prompt, [(text, True)]


def make_tokenizer(folder: Path, sentences: list[str], kind: str, tokens: int) -> None:
    """Byte-level BPE with the special tokens of OPT or of T5, which also puts a space before every text."""
    special = ["<pad>", "</s>", "<unk>"] if kind == "t5" else ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "t5")
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=tokens, special_tokens=special, **settings)
    tokenizer.train_from_iterator(sentences, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def look_around(llm: T5) -> None:
    """Initialize two heads of T5 to attend to a neighbour, the word before and the one after it (in the decoder, the
    one before that): a bias would take thousands of steps to grow as large. And scale words to what blocks add."""
    llm.word_embedding.weight.mul_(0.25)
    next_word = llm.cfg.buckets // 2 + 1  # the encoder's bucket of one word to the right
    for stack, buckets in ((llm.encoder, (1, next_word)), (llm.decoder, (1, 2))):
        stack.position_bias.weight.zero_()
        for head, bucket in enumerate(buckets):
            stack.position_bias.weight[bucket, head] = 4.0


def embed_chunks(llm: nn.Module, rows: list[list[list[int]]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of chunks of tokens -> embeddings (B, n, L), one per chunk, the sum of its tokens', and mask (B, n)."""
    _, mask = pad([list(range(len(row))) for row in rows], 0, side, multiple=1)
    tokens = torch.tensor([token for row in rows for chunk in row for token in chunk])
    chunk_of = [number for number, chunk in enumerate(chunk for row in rows for chunk in row) for _ in chunk]
    place = mask.flatten().nonzero().squeeze(1)[torch.tensor(chunk_of)]
    embedded = torch.zeros(mask.numel(), llm.width).index_add(0, place, llm.embed(tokens))
    return embedded.view(*mask.shape, -1), mask


def make_llm(kind: str, folder: Path, corpus: ShapesText | FileText, sizes: dict, steps: int, batch: int) -> None:
    """Train and save an OPT, a T5 or a Llama on the documents of a corpus."""
    make_tokenizer(folder, corpus.sentences(), kind, corpus.tokens)
    model, config = {"opt": (OPT, OPTConfig), "t5": (T5, T5Config), "llama": (Llama, LlamaConfig)}[kind]
    form = model.prompt_format or replace(FORMATS["plain"], text_end="</s>", padding="</s>")
    tokenizer = LLMTokenizer(folder, form, max_tokens=64)
    cfg = config(vocab_size=tokenizer.vocab_size, **sizes)
    llm = model(cfg)
    llm.init_weights()
    if kind == "opt":
        place_by_waves(llm.position_embedding.weight, std=cfg.width**-0.5)
    elif kind == "t5":
        look_around(llm)
    parameters = sum(parameter.numel() for parameter in llm.parameters())
    print(f"{kind}: {parameters:,} parameters, {tokenizer.vocab_size:,} tokens", flush=True)

    def loss_of_step(step: int) -> Tensor:
        prompts, targets, trained = [], [], []
        for chunks, prompt, texts in corpus.documents(step - 1, batch, form):
            described = tokenizer.encode(chunks) if chunks else []
            prompts.append(described + [[token] for token in tokenizer.encode_prompts([prompt])[0]])
            ids = tokenizer.encode([form.separator * bool(prompt) + texts[0][0], *(text for text, _ in texts[1:])])
            targets.append([*sum(ids, []), tokenizer.end_id])
            trained.append([flag for part, (_, flag) in zip(ids, texts) for _ in part] + [True])
        targets, _ = pad(targets, tokenizer.pad_id)
        labels = torch.where(pad(trained, 0)[0].bool(), targets, IGNORE)
        return lm_loss(llm(*embed_chunks(llm, prompts, form.padding_side), targets), labels)

    optimize(llm, loss_of_step, steps, LEARNING_RATES[kind])
    if kind == "opt":
        tensors = unload(llm, OPT_TABLE)
        tensors = {key if key.startswith("lm_head") else f"model.decoder.{key}": t for key, t in tensors.items()}
        more = {"activation_function": "relu", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
        save_public(folder, tensors, "OPTForCausalLM", "opt", write_fields(OPT_FIELDS, cfg) | more)
    elif kind == "llama":
        more = {"rope_theta": cfg.rope_theta, "bos_token_id": None, "eos_token_id": 2}
        tensors = {f"model.{key}": tensor for key, tensor in unload(llm, LLAMA_TABLE).items()}
        save_public(folder, tensors, "LlamaForCausalLM", kind, write_fields(LLAMA_FIELDS, cfg) | more)
    else:
        more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        config = write_fields(T5_FIELDS, cfg) | more | {"eos_token_id": 1, "decoder_start_token_id": cfg.pad_id}
        save_public(folder, unload(llm, T5_TABLE), "T5ForConditionalGeneration", "t5", config)


def make_blip2(folder: Path, run: Path) -> None:
    """A run of stage 2 in fp16, without its training configuration."""
    config = json.loads((run / "config.json").read_text())
    del config["train"]  # paths of the machine it was trained on
    for part in ("vit", "bert", "llm"):  # all in assets/tiny
        config[part] = f"../{Path(config[part]).name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "tokenizer.json", folder)
    save(folder, load_file(run / "model.safetensors"), config)
    rng = random.Random(776)  # a scene of the test split: a large green star right of a small white cross
    shapes.draw(shapes.draw_scene(rng, count=2), rng, size=256).save(folder.parent / "picture.png")


def save_public(folder: Path, tensors: dict[str, Tensor], architecture: str, model_type: str, config: dict) -> None:
    """A checkpoint folder of a public model."""
    head = {"architectures": [architecture], "model_type": model_type}
    save(folder, tensors, head | config | {"torch_dtype": "float16"})


def save(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """A checkpoint folder, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else only its owner can read it
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tools.make_tiny", description=__doc__)
    parser.add_argument("--only", choices=[*STEPS, "blip2"], help="make one of them")
    for part, steps in STEPS.items():
        parser.add_argument(f"--{part}-steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=32, help="documents of a step of a language model")
    parser.add_argument("--text", type=Path, help="make a larger one from the lines of this file (.txt or .gz)")
    parser.add_argument("--run", type=Path, help="make blip2 from this run of stage 2")
    parser.add_argument("--out", type=Path, default=TINY)
    args = parser.parse_args(argv)
    keep_freed_memory()
    for part in STEPS:
        torch.manual_seed(0)
        left_out = ("llama",) + ("vit", "bert") * bool(args.text)  # unless named
        if args.only != part and (args.only or part in left_out):
            continue
        folder, steps = args.out / part, vars(args)[f"{part}_steps"]
        if part in ("vit", "bert"):
            {"vit": make_vit, "bert": make_bert}[part](folder, steps)
        else:
            corpus, sizes = (FileText(args.text), TEXT_SIZES) if args.text else (ShapesText(), TINY_SIZES)
            make_llm(part, folder, corpus, sizes[part], steps, args.batch)
    if args.only == "blip2":
        make_blip2(args.out / "blip2", args.run)


if __name__ == "__main__":
    main()
