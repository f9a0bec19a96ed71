"""Makes the tiny ViT and BERT that ship with the code: `python assets/make_tiny.py` writes assets/tiny/.

    vit    a ViT in DINOv2's layout that has learned attributes: [CLS] names size, colour and shape of what is in each
           quarter of the picture; every patch, already after the second-last block, of what is in its own quarter
    bert   a BERT that has learned to fill in masked words of captions, and by [CLS] which two captions mean the same
           (as sentence encoders like MiniLM learn; with masked words alone, [CLS] would mean nothing)

Each knows its own side only: the ViT never saw a word, BERT never saw a picture. And neither saw what the shapes world
holds out: the pairs of colour and shape, the wordings, the scenes of the test and validation splits.
Both are saved in fp16 under the names of their public models, so that transformers opens them too.
"""

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the files are used in place

import shapes
from blip2 import choose_precision
from data import Texts, eval_transform, pad
from qformer import QFormer, QFormerConfig
from train import build_optimizer, keep_memory, lr_at, set_lr
from vit import ViT, ViTConfig
from weights import BERT, DINOV2, unload

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
        sentences += [sentence for pair in shapes.questions(scene) for sentence in pair]
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
        cls = F.normalize(project(bert.encode_text(ids, mask)[:, 0]).float(), dim=-1)
        first, second = cls.chunk(2)
        same = torch.arange(len(first))
        paraphrase = F.cross_entropy(first @ second.T / 0.1, same) + F.cross_entropy(second @ first.T / 0.1, same)
        # Which word is behind the mask?
        masked = (torch.rand(ids.shape) < 0.15) & mask & (ids > mask_id)  # words, not special tokens
        hidden = bert.encode_text(ids.masked_fill(masked, mask_id), mask)
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


def save(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """A checkpoint folder, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}, indent=2) + "\n")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["vit", "bert"], help="make one of the two")
    parser.add_argument("--vit-steps", type=int, default=2000)
    parser.add_argument("--bert-steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=HERE / "tiny")
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    if args.only != "bert":
        make_vit(args.out / "vit", args.vit_steps)
    if args.only != "vit":
        make_bert(args.out / "bert", args.bert_steps)
