"""Makes the tiny parts that ship with the code: `python assets/make_tiny.py` writes assets/tiny/.

    vit      a ViT in DINOv2's layout that has learned attributes: [CLS] names size, colour and shape of what is in each
             quarter of the picture; every patch, already after the second-last block, of what is in its own quarter
    bert     a BERT that has learned to fill in masked words of captions, and by [CLS] which two captions mean the same
             (as sentence encoders like MiniLM learn; with masked words alone, [CLS] would mean nothing)

    opt, t5  language models that have learned to go on from a description: with the same in another wording, or with
             the answer to a question about it

Each knows its own side only: the ViT never saw a word, the others never saw a picture. And none saw what the shapes
world holds out: the pairs of colour and shape, the wordings, the scenes of the test and validation splits.
All are saved in fp16 under the names of their public models, so that transformers opens them too.

    python assets/make_tiny.py --only blip2 --run runs/stage2      assets/tiny/blip2, from a run of stage 2, in fp16
    python assets/make_tiny.py --only opt --text a.txt --out W     W/opt, 10 M parameters, from the lines of a text
"""

import argparse
import gzip
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the files are used in place

import shapes
from blip2 import choose_precision
from data import LLMTexts, Texts, ask_in, clean_caption, cut_in_two, eval_transform, pad
from formats import BERT, DINOV2, OPT_TABLE, T5_TABLE
from llm import OPT, T5, OPTConfig, T5Config, build_llm
from losses import lm_loss
from qformer import QFormer, QFormerConfig
from train import build_optimizer, keep_memory, lr_at, set_lr
from vit import ViT, ViTConfig
from weights import unload

PICTURE = 64  # pixels a side


def optimize(model: nn.Module, loss_of_step, steps: int, lr: float) -> None:
    """The usual loop: `loss_of_step(step)` is minimised."""
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
IGNORE = -100  # a label that counts for nothing


def cell_labels(scene: shapes.Scene) -> Tensor:
    """(4, 3): size, colour and shape in each cell; an empty one has size 0, and no colour or shape to be named."""
    labels = torch.tensor([[0, IGNORE, IGNORE]]).repeat(len(shapes.CELLS), 1)
    for thing in scene:
        what = SIZES.index(thing.size) + 1, COLORS.index(thing.color), SHAPES.index(thing.shape)
        labels[shapes.CELLS.index((thing.row, thing.column))] = torch.tensor(what)
    return labels


def make_vit(folder: Path, steps: int, batch: int = 64) -> None:
    """Train and save the ViT; prints how often it names a whole unseen picture correctly."""
    cfg = ViTConfig(width=96, depth=6, heads=3, mlp=384, patch_size=8, image_size=PICTURE)
    vit = ViT(cfg)  # with its last block, which stage 1 will drop
    counts = (len(SIZES) + 1, len(COLORS), len(SHAPES))
    norm, patch_norm = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
    all_cells, own_cell = nn.Linear(cfg.width, len(shapes.CELLS) * sum(counts)), nn.Linear(cfg.width, sum(counts))
    model = nn.ModuleList([vit, norm, patch_norm, all_cells, own_cell])
    second_last = []
    vit.blocks[-2].register_forward_hook(lambda block, inputs, tokens: second_last.append(tokens))
    world = shapes.ShapesWorld("train", PICTURE)
    grid = PICTURE // cfg.patch_size
    half = torch.arange(grid) // (grid // 2)  # the row or column of cells that a patch lies in
    cell_of_patch = (2 * half[:, None] + half).flatten()

    def see(world: shapes.ShapesWorld, rows) -> tuple[Tensor, Tensor, Tensor]:
        """-> what [CLS] says of the 4 cells, what each patch says of its own cell, the truth."""
        pictures = torch.stack([eval_transform(world.picture(row), PICTURE) for row in rows])
        labels = torch.stack([cell_labels(world.scene(row)) for row in rows])  # (B, 4, 3)
        by_cls = all_cells(norm(vit(pictures))[:, 0]).unflatten(1, (len(shapes.CELLS), sum(counts)))
        return by_cls, own_cell(patch_norm(second_last.pop()[:, 1:])), labels

    def loss_of_step(step: int) -> Tensor:
        rows = 2 * torch.arange((step - 1) * batch, step * batch)  # the even ones: a twin shows nothing new to a ViT
        by_cls, by_patches, labels = see(world, rows.tolist())
        return sum(
            F.cross_entropy(logits.flatten(0, 1), truth[:, :, i].flatten(), ignore_index=IGNORE)
            for said, truth in ((by_cls, labels), (by_patches, labels[:, cell_of_patch]))
            for i, logits in enumerate(said.float().split(counts, dim=2))
        )

    optimize(model, loss_of_step, steps, lr=1e-3)
    with torch.no_grad():
        by_cls, by_patches, labels = see(shapes.ShapesWorld("val", PICTURE), range(500))
        for who, said, truth in (("[CLS]", by_cls, labels), ("every patch", by_patches, labels[:, cell_of_patch])):
            right = torch.stack([part.argmax(dim=2) for part in said.split(counts, dim=2)], dim=2) == truth
            right |= truth == IGNORE
            share = right.flatten(1).all(dim=1).float().mean()
            print(f"vit: {who} names all it should of an unseen picture: {share:.1%}")
    tensors = unload(vit, DINOV2)
    tensors["layernorm.weight"], tensors["layernorm.bias"] = norm.weight.detach(), norm.bias.detach()
    tensors["embeddings.mask_token"] = torch.zeros(1, cfg.width)
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "mlp_ratio": cfg.mlp // cfg.width,
        "patch_size": cfg.patch_size,
        "image_size": cfg.image_size,
        "layer_norm_eps": cfg.eps,
        "layerscale_value": 1.0,
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
    }
    save(folder, tensors, config)


# --- the text encoder ------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Special tokens, the words of the shapes world, and letters, from which any other word can be spelled."""
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
    """Sines and cosines as a start: "the word before" is the same rotation everywhere, not to be learned 64 times."""
    places, width = positions.shape
    frequencies = torch.exp(-torch.arange(width // 2) * math.log(places) / (width // 2))
    angles = torch.arange(places)[:, None] * frequencies
    positions.copy_(2**0.5 * std * torch.cat((angles.sin(), angles.cos()), dim=1))


def make_bert(folder: Path, steps: int, batch: int = 128) -> None:
    """Train and save the Q-Former's text side, on masked words and on which two captions mean the same."""
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()
    texts = Texts(folder)
    cfg = QFormerConfig(
        texts.vocab_size,
        width=128,
        depth=4,
        heads=4,
        mlp=512,
        max_positions=64,
        num_queries=1,
        image_width=1,
        dropout=0,
        # So a Linear keeps the size of what goes through it. The usual 0.02 does at a width of 768 and more; here words
        # would be so faint that [CLS] took "red circle above blue square" and "blue circle above red square" for one.
        init_std=128**-0.5,
    )
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
        told = [rng.sample(shapes.captions(scene), 2) for scene in scenes]
        ids, mask = pad(texts.encode([first for first, _ in told] + [second for _, second in told]), texts.pad_id)
        # Which two wordings tell of one scene? [CLS] has to hold the whole meaning.
        cls = F.normalize(project(bert.encode_text(ids, mask)).float(), dim=-1)
        first, second = cls.chunk(2)
        same = torch.arange(len(first))
        paraphrase = F.cross_entropy(first @ second.T / 0.1, same) + F.cross_entropy(second @ first.T / 0.1, same)
        # Which word is behind the mask?
        masked = (torch.rand(ids.shape) < 0.15) & mask & (ids > mask_id)  # words, not special tokens
        hidden = bert.run(bert.embed(ids.masked_fill(masked, mask_id)), 0, mask[:, None, None])
        return paraphrase + F.cross_entropy(bert.lm_logits(hidden[masked]).float(), ids[masked])

    optimize(model, loss_of_step, steps, lr=1e-3)
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp,
        "max_position_embeddings": cfg.max_positions,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.dropout,
        "layer_norm_eps": cfg.eps,
        "initializer_range": cfg.init_std,
        "pad_token_id": 0,
    }
    tensors = unload(bert, BERT)
    tensors = {key if key.startswith("cls.") else f"bert.{key}": tensor for key, tensor in tensors.items()}
    save(folder, tensors, config)


# --- the language models ---------------------------------------------------------------------------------------------

# What the models learn from: (description, prompt, [(text, learned?), ...]), texts behind the other two of which some
# are to be learned. A description is a list of chunks, each a word or several, and each becomes one embedding, the sum
# of its words'.
Document = tuple[list[str], str, list[tuple[str, bool]]]

TINY_SIZES = {
    "opt": dict(width=128, depth=6, heads=4, mlp=512, max_positions=128, embed_width=128),
    "t5": dict(width=128, depth=4, decoder_depth=4, heads=4, head_width=32, mlp=256),
}
LEARNING_RATES = {"opt": 1e-3, "t5": 6e-4}  # T5's unscaled attention does not bear more
TEXT_SIZES = {  # about 10 M parameters, with 4,096 tokens
    "opt": dict(width=320, depth=7, heads=5, mlp=1280, max_positions=256, embed_width=320),
    "t5": dict(width=256, depth=4, decoder_depth=4, heads=4, head_width=64, mlp=704),
}


class ShapesText:
    """Sentences about scenes of the training split: descriptions, and questions with answers. No picture."""

    tokens = 1000  # more than there are words, so that each becomes one token

    def scene(self, rng: random.Random) -> shapes.Scene:
        """One that training may show."""
        while shapes.split_of(scene := shapes.draw_scene(rng)) != "train":
            pass
        return scene

    def sentences(self) -> list[str]:
        """For the tokenizer."""
        rng, sentences = random.Random(0), []
        for _ in range(2000):
            scene = self.scene(rng)
            sentences += captions_of(scene)
            said = [f"{wording} {q.answer}" for q in shapes.questions(scene) for wording in q.wordings]
            sentences += [ask_in(kind.layout.template, words) for kind in (OPT, T5) for words in said]
        return sentences

    def description(self, scene: shapes.Scene, rng: random.Random) -> list[str]:
        """A caption, or what is at which place, in chunks: its words, or all words of a thing (and its place) at once.

        For the embeddings that stage 2 will put there are fewer than the words of a caption, so each has to say
        several; and how two things stand to each other is nothing that a single one of them could say.
        """
        places = [f"{thing.words} at the {thing.place}" for thing in rng.sample(scene, len(scene))]
        told = rng.choice((rng.choice(captions_of(scene)), ", ".join(places)))
        thing = r" ?a (?:small|large) \w+ \w+(?: at the \w+ \w+)?|"
        return re.findall(rng.choice((thing, "")) + r" ?\w+|,", told)

    def documents(self, step: int, count: int, layout) -> list[Document]:
        """Of `count` scenes a quarter of captions in another wording; of the others several questions, because one
        alone teaches little. OPT answers them in a conversation, T5, which reads before it writes, one by one.
        """
        rng, cuts, documents = random.Random(step), np.random.default_rng(step), []
        for number in range(count):
            scene = self.scene(rng)
            chunks, caption = self.description(scene, rng), rng.choice(captions_of(scene))
            if number % 4 == 0:
                prompt, text = cut_in_two(caption, cuts) if layout.prefix_lm else ("", caption)
                documents.append((chunks, prompt, [(text, True)]))
                continue
            asked = [(rng.choice(q.wordings), q.answer) for q in shapes.questions(scene)]
            asked = rng.sample(asked, min(rng.randint(1, 4), len(asked)))
            turns = [(ask_in(layout.template, question), answer) for question, answer in asked]
            if layout.prefix_lm:
                documents += [(chunks, prompt, [(answer, True)]) for prompt, answer in turns]
            else:
                (prompt, answer), *more = turns
                texts = [(answer, True)]
                for question, answer in more:
                    texts += [(f". {question}", False), (f" {answer}", True)]
                documents.append((chunks, prompt, texts))
        return documents


def captions_of(scene: shapes.Scene) -> list[str]:
    """The wordings of training, cleaned as stage 2 will have them."""
    return [clean_caption(caption) for caption in shapes.captions(scene)]


class FileText:
    """The lines of a text file (or .gz), cleaned as captions are. Half of them stand behind some of their own words in
    any order: so the model learns to say what it is told, which is all that stage 2 will ask of it."""

    tokens = 4096

    def __init__(self, path: Path):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            self.lines = [caption for line in file if (caption := clean_caption(line))]
        self.orders: dict[int, np.ndarray] = {}  # of the epoch that is being read

    def sentences(self) -> list[str]:
        """For the tokenizer."""
        return self.lines + [OPT.layout.template, T5.layout.template]

    def documents(self, step: int, count: int, layout) -> list[Document]:
        """Every line once before any twice."""
        rng, cuts, documents = random.Random(step), np.random.default_rng(step), []
        for place in range(step * count, (step + 1) * count):
            epoch, row = divmod(place, len(self.lines))
            if epoch not in self.orders:
                self.orders = {epoch: np.random.default_rng(epoch).permutation(len(self.lines))}
            caption = self.lines[self.orders[epoch][row]]
            words = caption.split()
            told = rng.sample(words, rng.randint(1, len(words))) if place % 2 else []
            prompt, text = cut_in_two(caption, cuts) if layout.prefix_lm else ("", caption)
            documents.append(([f" {word}" for word in told], prompt, [(text, True)]))
        return documents


def make_tokenizer(folder: Path, sentences: list[str], kind: str, tokens: int) -> None:
    """Byte-level BPE, with the special tokens of OPT or of T5, which also puts a space before every text."""
    special = {"opt": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "t5")
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def look_around(llm: T5) -> None:
    """As a start, two heads of T5 look at a neighbour, the word before and the one behind it (in the decoder, the one
    before that): a bias would need thousands of steps to grow as large. And words are made no larger than what the
    blocks add to them."""
    llm.word_embedding.weight.mul_(0.25)
    behind = llm.cfg.buckets // 2 + 1  # the encoder's bucket of one word to the right
    for stack, buckets in ((llm.encoder, (1, behind)), (llm.decoder, (1, 2))):
        stack.position_bias.weight.zero_()
        for head, bucket in enumerate(buckets):
            stack.position_bias.weight[bucket, head] = 4.0


def embed_chunks(llm: nn.Module, rows: list[list[list[int]]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of chunks of tokens -> embeddings (B, n, L), a chunk the sum of its tokens', and their mask (B, n)."""
    _, mask = pad([list(range(len(row))) for row in rows], 0, side, multiple=1)
    tokens = torch.tensor([token for row in rows for chunk in row for token in chunk])
    chunk_of = [number for number, chunk in enumerate(chunk for row in rows for chunk in row) for _ in chunk]
    place = mask.flatten().nonzero().squeeze(1)[torch.tensor(chunk_of)]
    embedded = torch.zeros(mask.numel(), llm.width).index_add(0, place, llm.embed(tokens))
    return embedded.view(*mask.shape, -1), mask


def make_llm(kind: str, folder: Path, corpus: ShapesText | FileText, sizes: dict, steps: int, batch: int) -> None:
    """Train and save an OPT or a T5 on the documents of a corpus."""
    make_tokenizer(folder, corpus.sentences(), kind, corpus.tokens)
    config, layout = {"opt": (OPTConfig, OPT.layout), "t5": (T5Config, T5.layout)}[kind]
    texts = LLMTexts(folder, layout, max_tokens=64)
    cfg = config(vocab_size=texts.vocab_size, **sizes)
    llm = build_llm(cfg)
    llm.init_weights()
    if kind == "opt":
        place_by_waves(llm.position_embedding.weight, std=cfg.width**-0.5)
    else:
        look_around(llm)
    print(f"{kind}: {sum(p.numel() for p in llm.parameters()):,} parameters, {texts.vocab_size:,} tokens", flush=True)

    def loss_of_step(step: int) -> Tensor:
        read, targets, learned = [], [], []
        for chunks, prompt, written in corpus.documents(step - 1, batch, layout):
            told = texts.encode(chunks) if chunks else []
            read.append(told + [[token] for token in texts.encode_prompts([prompt])[0]])
            said = texts.encode([layout.glue * bool(prompt) + written[0][0], *(text for text, _ in written[1:])])
            targets.append([*sum(said, []), texts.end_id])
            learned.append([flag for ids, (_, flag) in zip(said, written) for _ in ids] + [True])
        targets, _ = pad(targets, texts.pad_id)
        rows = pad(learned, False)[0].flatten().nonzero().squeeze(1)
        logits = llm(*embed_chunks(llm, read, layout.pads), targets, rows)
        return lm_loss(logits, targets.flatten()[rows])

    optimize(llm, loss_of_step, steps, LEARNING_RATES[kind])
    if kind == "opt":
        tensors = unload(llm, OPT_TABLE)
        tensors = {key if key.startswith("lm_head") else f"model.decoder.{key}": t for key, t in tensors.items()}
        config = {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.width,
            "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.heads,
            "ffn_dim": cfg.mlp,
            "max_position_embeddings": cfg.max_positions,
            "word_embed_proj_dim": cfg.embed_width,
            "do_layer_norm_before": cfg.pre_norm,
            "activation_function": "relu",
            **{"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
        }
    else:
        tensors = unload(llm, T5_TABLE)
        config = {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "vocab_size": cfg.vocab_size,
            "d_model": cfg.width,
            "num_layers": cfg.depth,
            "num_decoder_layers": cfg.decoder_depth,
            "num_heads": cfg.heads,
            "d_kv": cfg.head_width,
            "d_ff": cfg.mlp,
            "relative_attention_num_buckets": cfg.buckets,
            "relative_attention_max_distance": cfg.max_distance,
            "layer_norm_epsilon": cfg.eps,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            **{"pad_token_id": cfg.pad_id, "eos_token_id": 1, "decoder_start_token_id": cfg.pad_id},
        }
    save(folder, tensors, config)


def make_blip2(folder: Path, run: Path) -> None:
    """A run of stage 2, in fp16 and without what only further training needs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    del config["train"]  # paths of the machine it was trained on
    for part in ("vit", "bert", "llm"):  # all in assets/tiny
        config[part] = f"../{Path(config[part]).name}"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(run / "tokenizer.json", folder)
    tensors = {name: tensor.half() for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    rng = random.Random(776)  # a scene of the test split: a large green star right of a small white cross
    shapes.draw(shapes.draw_scene(rng, count=2), rng, size=256).save(folder.parent / "picture.png")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


def save(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """A checkpoint folder, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}, indent=2) + "\n")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["vit", "bert", "opt", "t5", "blip2"], help="make one of them")
    parser.add_argument("--vit-steps", type=int, default=2000)
    parser.add_argument("--bert-steps", type=int, default=1200)
    parser.add_argument("--opt-steps", type=int, default=5000)
    parser.add_argument("--t5-steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="documents of a step of opt and t5")
    parser.add_argument("--text", type=Path, help="make a larger opt or t5 from the lines of this file (.txt or .gz)")
    parser.add_argument("--run", type=Path, help="make blip2 from this run of stage 2")
    parser.add_argument("--out", type=Path, default=HERE / "tiny")
    args = parser.parse_args()
    keep_memory()
    for part in ("vit", "bert", "opt", "t5"):
        torch.manual_seed(0)
        if args.only not in (None, part) or (args.text and part in ("vit", "bert")):
            continue
        if part == "vit":
            make_vit(args.out / part, args.vit_steps)
        elif part == "bert":
            make_bert(args.out / part, args.bert_steps)
        else:
            corpus, sizes = (FileText(args.text), TEXT_SIZES) if args.text else (ShapesText(), TINY_SIZES)
            steps = {"opt": args.opt_steps, "t5": args.t5_steps}[part]
            make_llm(part, args.out / part, corpus, sizes[part], steps, args.batch)
    if args.only == "blip2":
        make_blip2(args.out / "blip2", args.run)
