"""Experiments that train nothing, or too little to call it training; see lab.py. Each returns what draw.py shows."""

import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from blip2 import TINY, Blip2
from course import changes
from engine.files import remove
from engine.log import rows_of
from sources import shapes
from sources.images import eval_transform
from sources.mixture import open_images
from sources.text import clean_caption
from tasks.metrics import bleu, caption_words, cider, rouge_l
from tasks.shapes_qa import shapes_vqa, true_captions
from tools.make_tiny import cell_labels
from vit import ViT
from weights.open import load_vit

ROOT = Path(__file__).parent.parent

# --- lesson 1: what a frozen ViT knows, block by block ---------------------------------------------------------------


@torch.no_grad()
def probe(lab) -> dict:
    """A linear probe after each block: can one matrix read the colour, or the shape, in a quarter of the image?"""
    with changes.last_block():
        trained = load_vit(str(TINY / "vit"))[0]
    torch.manual_seed(0)
    probes = {"color": ("patches", 1), "shape": ("patches", 2)}
    probes |= {f"{name}, [CLS]": ("[CLS]", what) for name, (_, what) in probes.items()}
    counts, curves = {"train": 40, "val": 40} if lab.small else {"train": 1500, "val": 500}, {}
    stages = ["pixels", "patches", *(f"block {n}" for n in range(1, trained.cfg.depth + 1))]
    for prefix, vit in {"": trained, "random: ": ViT(trained.cfg)}.items():
        sets = [tokens_and_labels(vit, split, count) for split, count in counts.items()]
        for name, (where, what) in probes.items():
            parts = ([features(*part, stage, where, what) for part in sets] for stage in range(len(stages)))
            curves[prefix + name] = [read_out(*train, *val) for train, val in parts]
    steps = list(range(trained.cfg.depth + 1))
    return {
        "title": "What a linear probe reads after each block, % correct",
        "columns": tuple(curves), "bars": (), "curve": "% correct", "unit": "blocks",
        "rows": {stage: {name: [curve[n]] for name, curve in curves.items()} for n, stage in enumerate(stages)},
        "curves": {name: {"step": steps, "values": [curve[1:]]} for name, curve in curves.items()},
    }  # fmt: skip


def tokens_and_labels(vit: ViT, split: str, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens (N, P, V) before the first block and after each, and first of all the pixels (N, P, 192) of each patch,
    zeros for [CLS]; and the labels (N, 4, 3) of `count` images."""
    world, seen = shapes.ShapesWorld(split), []
    hooks = [block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out))) for block in vit.blocks]
    rows = range(0, 2 * count, 2) if split == "train" else range(count)
    images = torch.stack([eval_transform(world.image(row), 64) for row in rows])
    vit(images)
    for hook in hooks:
        hook.remove()
    pixels = F.pad(F.unfold(images.float(), 8, stride=8).transpose(1, 2), (0, 0, 1, 0))
    return [pixels, seen[0][0], *(out for _, out in seen)], torch.stack([cell_labels(world.scene(row)) for row in rows])


def features(tokens: list, labels: torch.Tensor, stage: int, where: str, what: int) -> tuple[torch.Tensor, ...]:
    """Features (N', V) and labels (N',): of each quarter with an object the mean of its patches; or [CLS], for the
    object in the top left quarter."""
    x, truth = tokens[stage].float(), labels[:, :, what]
    if where == "[CLS]":
        x, truth = x[:, :1], truth[:, :1]
    else:
        grid = x[:, 1:].unflatten(1, (2, 4, 2, 4))  # 8 x 8 patches: two quarters of four each way
        x = grid.mean(dim=(2, 4)).flatten(1, 2)  # (N, 4, V)
    there = truth >= 0
    return x[there], truth[there]


def read_out(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor, y_new: torch.Tensor) -> float:
    """Ridge regression to one-hot labels on (x, y) -> % of (x_new, y_new) whose highest output is right."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_new = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (x, x_new))
    matrix = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1]), x.T @ F.one_hot(y).float())
    return 100 * ((x_new @ matrix).argmax(dim=1) == y_new).float().mean().item()


# --- lesson 7: ways to run the same step -----------------------------------------------------------------------------

WAYS = {
    "one process": "",
    "again": "",
    "stopped, resumed": "",
    "two processes": "",
    "4 micro-batches": "--micro-batch 4",
    "the same, gradcache": "--micro-batch 4 --gradcache",
    "bf16": "--precision bf16",
}


def loop(lab) -> dict:
    """Twelve steps of stage 1 in seven ways: how far are losses and weights from those of the first?"""
    steps = 4 if lab.small else 12
    flags = f"--stage 1 --steps {steps} --batch 16 --eval-every 0 --test-images 4 --overwrite --log-every 1".split()
    losses, weights, seconds = {}, {}, {}
    for name, more in WAYS.items():
        run, started = lab.out / f"loop-{name.replace(' ', '-').replace(',', '')}", time.time()
        precision = [] if "--precision" in more else ["--precision", "fp32"]
        command = ["train.py", *flags, *precision, *more.split(), "--out", str(run.resolve())]
        if name == "stopped, resumed":
            stop_and_resume(command, run)
        else:
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            call([*(several if name == "two processes" else []), *command])
        seconds[name] = time.time() - started
        losses[name] = [
            [row[loss] for loss in ("itc", "itm", "itg")] for row in rows_of(run / "log.jsonl") if "loss" in row
        ]
        weights[name] = load_file(run / "model.safetensors")
    first, rows, curves = next(iter(WAYS)), {}, {}
    for name in list(WAYS)[1:]:
        apart = np.abs(np.array(losses[name]) - np.array(losses[first]))  # (steps, 3)
        moved = max((weights[name][key] - weights[first][key]).abs().max().item() for key in weights[first])
        rows[name] = {loss: [most] for loss, most in zip(("itc", "itm", "itg"), apart.max(axis=0).tolist())}
        rows[name] |= {"weights": [moved], "seconds": [seconds[name]]}
        shown = [max(1e-9, value) for value in apart.max(axis=1).tolist()]
        curves[name] = {"step": list(range(1, steps + 1)), "values": [shown]}
    return {
        "title": "Largest difference from one process", "columns": ("itc", "itm", "itg", "weights", "seconds"),
        "rows": rows, "bars": (), "curve": "difference of a loss (1e-9: none)", "curves": curves,
    }  # fmt: skip


def call(command: list[str]) -> None:
    """Run Python quietly in the project's folder; its output, if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])


def stop_and_resume(command: list[str], run: Path) -> None:
    """Start a run, send it SIGTERM when its third step is logged, and continue it."""
    remove(run)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and len(rows_of(run / "log.jsonl")) < 4:  # the header is a row, too
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    call([word for word in command if word != "--overwrite"] + ["--resume"])


# --- lesson 9: decoding ----------------------------------------------------------------------------------------------

WRITTEN = {
    "greedy": dict(num_beams=1),
    "2 beams": dict(num_beams=2),
    "5 beams": dict(num_beams=5),
    "5 beams, length -2": dict(num_beams=5, length_penalty=-2.0),
    "5 beams, length +2": dict(num_beams=5, length_penalty=2.0),
    "5 beams, repetition 1.5": dict(num_beams=5, repetition_penalty=1.5),
    "nucleus 0.9": dict(num_beams=1, sample=True, top_p=0.9),
    "all, temperature 1": dict(num_beams=1, sample=True),
    "all, temperature 2": dict(num_beams=1, sample=True, temperature=2.0),
}


def decoding(lab) -> dict:
    """The tiny model's captions of unseen images, written in nine ways."""
    model, images = Blip2.from_pretrained(TINY / "blip2"), open_images(["shapes"], "test", 64)
    count, rows = 8 if lab.small else 200, {}
    encoded = model.encode_image([images[row].open() for row in range(count)])
    truths = [true_captions(images.parts[0].scene(row)) for row in range(count)]
    for name, how in WRITTEN.items():
        torch.manual_seed(0)
        started = time.time()
        captions = model.caption(encoded, **how)
        seconds = time.time() - started
        alone = (type(encoded)(*(part[row : row + 1] for part in encoded)) for row in range(count))
        log_probs = [model.score(one, [caption]).log_prob.item() for one, caption in zip(alone, captions)]
        right = [caption in truth for caption, truth in zip(captions, truths)]
        rows[name] = {
            "correct, %": [100 * statistics.mean(right)],
            "words": [statistics.mean(len(caption.split()) for caption in captions)],
            "log-probability": [statistics.mean(log_probs)],
            "seconds": [seconds],
        }
        if how.get("sample") or how["num_beams"] >= 5:
            groups = model.caption(encoded, num_captions=5, **how)
            rows[name]["different of 5"] = [statistics.mean(len(set(group)) for group in groups)]
        print(f'{name}: "{captions[2]}"')
    return {
        "title": f"Captions of {count} unseen images", "columns": tuple(rows["5 beams"]), "rows": rows,
        "bars": ("correct, %", "words"),
    }  # fmt: skip


# --- lesson 10: controls ---------------------------------------------------------------------------------------------


def controls(lab) -> dict:
    """The tiny model's answers to questions, beside those without the right image."""
    model, images = Blip2.from_pretrained(TINY / "blip2"), open_images(["shapes"], "test", 64)
    if lab.small:
        images = images.subset(np.arange(0, len(images), 50))
    shares = shapes_vqa(model, images)["accuracy"]
    names = ("the majority answer", "a blank image", "another image", "the image", "the true caption as text")
    rows = {name: {subset: [share] for subset, share in shares[name].items()} for name in names}
    return {
        "title": "Correct answers, %", "columns": tuple(shares["the image"]), "rows": rows,
        "bars": ("all", "held-out pairs"),
    }  # fmt: skip


def metrics(lab) -> dict:
    """What BLEU, ROUGE-L and CIDEr say of captions that are right, and of those that are wrong in every word of
    weight."""
    images = open_images(["shapes"], "test", 64)
    count = 20 if lab.small else 500  # plain ones
    scenes = [images.parts[0].scene(row) for row in range(count)]
    truth = [[clean_caption(text) for text in shapes.captions(scene)] for scene in scenes]
    model = Blip2.from_pretrained(TINY / "blip2")
    tiny = model.caption([images[row].open() for row in range(count)])
    written = {
        "the model": tiny,
        "the model, of another image": tiny[count // 2 :] + tiny[: count // 2],
        "another wording": [texts[-1] for texts in truth],
        "colours exchanged": [exchanged(texts[-1]) for texts in truth],
        "the same for all": [max(tiny, key=tiny.count)] * count,
    }
    rows, references = {}, [[caption_words(text) for text in texts[:-1]] for texts in truth]
    for name, captions in written.items():
        words = [caption_words(caption) for caption in captions]
        right = [caption in true_captions(scene) for caption, scene in zip(captions, scenes)]
        rows[name] = {
            "correct, %": [100 * statistics.mean(right)], "BLEU-4": [100 * bleu(words, references)[3]],
            "ROUGE-L": [100 * rouge_l(words, references)], "CIDEr": [100 * cider(words, references)],
        }  # fmt: skip
    return {
        "title": "Captions, right and wrong", "columns": tuple(rows["the model"]), "rows": rows,
        "bars": ("correct, %", "BLEU-4", "CIDEr"),
    }  # fmt: skip


def exchanged(caption: str) -> str:
    """The caption with each colour replaced by the next in the list of all."""
    colors = list(shapes.COLORS)
    following = dict(zip(colors, colors[1:] + colors[:1]))
    return re.sub("|".join(colors), lambda found: following[found[0]], caption)


STUDIES = {"probe": probe, "loop": loop, "decoding": decoding, "controls": controls, "metrics": metrics}
