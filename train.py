"""Training. `torchrun train.py --stage 1` or `python train.py --stage 1`; every flag is a field of `TrainConfig`.

Stage 1 trains the Q-Former with ITC, ITM and ITG over a frozen ViT (paper 3.2, 3.4). Stage 2 goes on from a run of
stage 1 (`--stage 2 --init runs/stage1 --llm FOLDER`) with a frozen language model behind the queries (3.3).

Fine-tuning trains the ViT as well (paper 4.2 to 4.4, Tables 7 to 9): `--stage caption` and `--stage vqa` go on from a
run of stage 2, `--stage retrieval` from one of stage 1.

What a run writes, runs/stage1/, runs/stage2/, runs/caption/, runs/vqa/ or runs/retrieval/:

    config.json, model.safetensors, tokenizer.json    the latest model; `Blip2.from_pretrained` opens the folder
    train_state.pt                                    what `--resume` needs besides
    log.jsonl                                         a line a step, a line a validation
    step-000500/                                      the last `--keep` checkpoints, each complete
    best/                                             the model that was best in validation

    retrieval.json, answers.json or captions.json     the evaluation at the end

One process or many, CPU, CUDA or MPS: the same lines. The total batch is fixed by --batch; spreading it over processes
changes the speed only. Micro-batches change what ITC compares and where ITM's negatives come from, because a
micro-batch sees itself only, unless --itc-batch compares several; the data of a step stay the same.
"""

import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blip2 import (
    OBJECTIVES,
    PRECISIONS,
    Blip2,
    choose_precision,
    local_device,
    relocated,
    stage1_totals,
    stage2_totals,
)
from data import (
    BROKEN_SHARE,
    Batch,
    CachedTokens,
    LLMTexts,
    Mixture,
    PromptedTexts,
    QuestionTexts,
    Shapes,
    StepSampler,
    Texts,
    TrainBatches,
    UserError,
    check_annotations,
    cores,
    decoding_workers,
    open_photos,
    picture_loader,
    read_json,
    sample_rng,
    say_sentence,
    train_loader,
)
from llm import OPTConfig, T5Config
from losses import ITM_PRIOR, all_sum, barrier, gather_objects, say, smoothing_floor, start_processes, world
from tasks import PHOTOS, REPORTS, answering, captioning, clock, origin, retrieval, shard, telling, vqa, write_result
from weights import llm_config

# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """All flags. What is None is taken from the recipe."""

    stage: str = "1"  # 1 is representation learning (paper 3.2), 2 generative learning (3.3); caption, vqa, retrieval
    init: str = ""  # the run to start from; for stage 2 also: none, for a Q-Former fresh from BERT
    llm: str = "assets/tiny/opt"  # frozen language model: a folder, or opt-2.7b, ... for random weights
    vit: str = "assets/tiny/vit"  # frozen image encoder: a folder, or eva-g, clip-l for random weights, or eva-g:FILE
    bert: str = "assets/tiny/bert"  # BERT folder that the Q-Former starts from
    data: list[str] = field(default_factory=lambda: ["shapes"])  # shapes, or a .json / .jsonl file; may be repeated
    images: list[str] = field(default_factory=list)  # folders of the photos, if not beside the file; may be repeated
    val_data: str = ""  # annotations to validate on
    val_photos: int = 0  # or: hold out this many photos of --data
    out: str = ""  # folder of the run; runs/stage1, runs/stage2, runs/caption, ... if not given
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # throw away the run in --out
    losses: str = ",".join(OBJECTIVES)  # stage 1, retrieval: which of itc,itm,itg; itc is always needed
    freeze_vit: bool = False  # fine-tuning: leave the ViT as it is
    vit_lr_decay: float | None = None  # fine-tuning: each block of the ViT learns so much slower than the one above it
    prompt: str | None = None  # caption: what captions go on from
    template: str | None = None  # vqa: what questions are put into, with {} for the question
    condition: bool = True  # vqa: the Q-Former reads the question too (paper, Figure 7)
    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # or: how often each caption, or question, is shown
    batch: int | None = None  # total batch of a step, over all processes
    micro_batch: int = 0  # photos a process takes at once; 0 is its whole share of --batch, less is accumulated
    lr: float | None = None  # peak learning rate
    min_lr: float | None = None  # at the end of the cosine
    warmup: int | None = None  # steps from 0 to the peak
    beta2: float | None = None  # of AdamW
    weight_decay: float | None = None  # of tensors with two or more dimensions
    clip: float | None = None  # maximal norm of the gradient
    itc_batch: int = 0  # stage 1, retrieval: with how many texts ITC compares; 0: a micro-batch's, more: in two passes
    negatives_ramp: int | None = None  # stage 1, retrieval: steps until ITM's negatives are hard; 0 is at once
    dropout: float | None = None  # of the Q-Former
    image_size: int | None = None  # pixels a side
    queries: int | None = None  # learned queries
    cross_every: int = 2  # cross-attention in every n-th block
    embed_dim: int | None = None  # of the space in which ITC compares
    max_text_tokens: int = 32  # longer texts are cut
    last_block: bool = False  # use the ViT's last block too; the paper drops it
    grad_checkpointing: bool | None = None  # recompute the blocks of LM and trained ViT: slower, less memory
    compile: bool = False  # torch.compile the blocks: the first steps take minutes, the others less on a card
    cache_features: bool = False  # run the ViT once per photo and keep its tokens on disk; no augmentation then
    seed: int = 0  # of everything random
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    device: str = "auto"  # auto, cuda, mps or cpu
    workers: int = -1  # loader processes; -1 chooses
    log_every: int = 20  # steps between printed lines
    eval_every: int | None = None  # steps between validations, 0 for none
    save_every: int | None = None  # steps between checkpoints
    keep: int = 1  # how many checkpoints are kept beside the best


# Paper 3.4 gives stage 1 no minimal rate and no clipping; 1e-5 is the original's, which clips nothing, warms up for
# 5,000 steps and takes beta2 0.999. The paper's batch is 1,680 with ViT-g, 2,320 with ViT-L.
PAPER_SIZES = dict(dropout=0.1, image_size=224, queries=32, embed_dim=256)
TINY_SIZES = dict(dropout=0.0, image_size=64, queries=8, embed_dim=64)
ADAMW = dict(beta2=0.98, weight_decay=0.05, clip=1.0)
TUNING = dict(
    epochs=5, warmup=1000, lr=1e-5, min_lr=0.0, beta2=0.999, weight_decay=0.05, clip=1.0, grad_checkpointing=True,
    eval_every=2000, save_every=2000,
)  # fmt: skip
CAPTION = dict(batch=256, image_size=364, prompt="a photo of", **TUNING)
VQA = dict(batch=128, image_size=490, template="Question: {} Answer:", **TUNING)
RETRIEVAL = dict(batch=224, image_size=364, negatives_ramp=0, **TUNING)
TINY_TUNING = TUNING | dict(
    epochs=None, steps=800, batch=32, lr=1e-4, warmup=50, image_size=64, vit_lr_decay=0.8, grad_checkpointing=False,
    eval_every=400, save_every=800,
)  # fmt: skip
RECIPES = {
    "stage 1, paper": dict(
        steps=250_000, batch=1680, lr=1e-4, min_lr=1e-5, warmup=2000, negatives_ramp=0, eval_every=5000,
        save_every=5000, **ADAMW, **PAPER_SIZES,
    ),
    # For the shapes world over the tiny encoders: a few minutes on two CPU cores. A run this short has no time to lose
    # on negatives that are too hard at first.
    "stage 1, tiny": dict(
        steps=1890, batch=32, lr=1e-3, min_lr=1e-5, warmup=90, negatives_ramp=600, eval_every=945, save_every=945,
        **ADAMW, **TINY_SIZES,
    ),
    # Stage 2 of the paper; the original takes batches of 1,024, beta2 0.999 and a minimal rate of 1e-5.
    "stage 2, paper, OPT": dict(
        steps=80_000, batch=1920, lr=1e-4, min_lr=5e-5, warmup=2000, eval_every=5000, save_every=5000,
        **ADAMW, **PAPER_SIZES,
    ),
    "stage 2, paper, T5": dict(
        steps=80_000, batch=1520, lr=1e-4, min_lr=5e-5, warmup=2000, eval_every=5000, save_every=5000,
        **ADAMW, **PAPER_SIZES,
    ),
    "stage 2, tiny": dict(
        steps=2500, batch=32, lr=1e-3, min_lr=1e-5, warmup=75, eval_every=500, save_every=2500, **ADAMW, **TINY_SIZES,
    ),
    # Fine-tuning on COCO (Table 7), on VQAv2 and Visual Genome (Table 8), on COCO (Table 9). The paper tuned no
    # FlanT5-XXL; it takes FlanT5-XL's column here. The minimal rate 0 is the original's.
    "caption, paper, FlanT5": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-2.7B": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-6.7B": dict(**CAPTION, vit_lr_decay=0.95),
    "vqa, paper, FlanT5": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-2.7B": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-6.7B": dict(**VQA, vit_lr_decay=0.9),
    "retrieval, paper, ViT-L": dict(**RETRIEVAL | dict(lr=5e-6, beta2=0.98), vit_lr_decay=1.0),
    "retrieval, paper, ViT-g": dict(**RETRIEVAL, vit_lr_decay=0.95),
    # The tiny language model has never read "a photo of".
    "caption, tiny": dict(**TINY_TUNING | dict(lr=3e-4, steps=1600), prompt=""),
    "vqa, tiny": dict(**TINY_TUNING),
    "retrieval, tiny": dict(**TINY_TUNING | dict(lr=3e-4), negatives_ramp=0),
}  # fmt: skip
STAGES = ("1", "2", "caption", "vqa", "retrieval")
WITH_LLM = ("2", "caption", "vqa")
FINE_TUNING = ("caption", "vqa", "retrieval")
ONLY_IN = {
    "losses": ("1", "retrieval"), "negatives_ramp": ("1", "retrieval"), "itc_batch": ("1", "retrieval"),
    "init": ("2", *FINE_TUNING), "llm": WITH_LLM,
    "grad_checkpointing": ("2", *FINE_TUNING), "freeze_vit": FINE_TUNING, "vit_lr_decay": FINE_TUNING,
    "prompt": ("caption",), "condition": ("vqa",), "template": ("vqa",),
}  # fmt: skip

# When a run is resumed, these may differ from what it was started with; the last four change its numbers.
MAY_CHANGE = {
    "resume", "overwrite", "out", "workers", "log_every", "eval_every", "save_every", "keep",
    "device", "precision", "compile", "lr",
}  # fmt: skip
AT_LEAST_1 = ("batch", "queries", "cross_every", "embed_dim", "save_every", "log_every", "keep")
AT_LEAST_0 = (
    "micro_batch", "itc_batch", "warmup", "min_lr", "weight_decay", "negatives_ramp", "val_photos", "seed",
    "eval_every",
)  # fmt: skip
TEMPERATURES = (0.001, 0.5)  # between which ITC's temperature is kept; the original's is free


def parse_flags(argv: list[str] | None) -> tuple[TrainConfig, set[str]]:
    """Command line -> the configuration, and the names of the flags that were given."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainConfig), re.MULTILINE))

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            unknown = re.findall(r"--([\w-]+)", message) if "unrecognized" in message else []
            known = [name.replace("_", "-") for name in comments]
            near = [f"--{hit}" for word in unknown for hit in difflib.get_close_matches(word, known, n=1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            self.exit(2, f"error: {message}{hint} (python train.py --help lists all flags)\n")

    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in dataclasses.fields(TrainConfig):
        flag, about = "--" + f.name.replace("_", "-"), comments[f.name]
        if f.type in (bool, bool | None):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=about)
        elif f.name in ("data", "images"):
            parser.add_argument(flag, action="append", help=f"{about}{' (default: shapes)' * (f.name == 'data')}")
        else:
            kind = f.type if isinstance(f.type, type) else f.type.__args__[0]  # int | None -> int
            default = "the recipe's" if f.default is None else f.default
            parser.add_argument(flag, type=kind, help=f"{about} (default: {default})", metavar=kind.__name__)
    given = vars(parser.parse_args(argv))
    return TrainConfig(**given), set(given)


def complete(cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, str]:
    """Fill what was not given from the run that --init names and from the recipe -> the whole configuration, and what
    was chosen and why."""
    if cfg.stage not in STAGES:
        raise UserError(f"got --stage {cfg.stage}, expected {', '.join(STAGES[:-1])} or {STAGES[-1]}")
    for name in given & set(ONLY_IN):
        if cfg.stage not in ONLY_IN[name]:
            flag, stages = name.replace("_", "-"), ", ".join(ONLY_IN[name])
            raise UserError(f"got --{flag}, a flag of stage {stages}, in stage {cfg.stage}: leave it out")
    if given >= {"steps", "epochs"}:
        raise UserError("got --steps and --epochs, expected one of them: leave the other out")
    if cfg.stage == "2" and not cfg.init:
        raise UserError("stage 2 starts from a run of stage 1: pass --init runs/stage1, or --init none to go without")
    if cfg.stage in FINE_TUNING and cfg.init in ("", "none"):
        before = "1" if cfg.stage == "retrieval" else "2"
        raise UserError(f"stage {cfg.stage} starts from a run of stage {before}: pass --init runs/stage{before}")
    inherited = inherit(cfg, given) if cfg.init not in ("", "none") else {}
    width = inherited.pop("image_width", None)
    if cfg.data == ["shapes"]:
        name, why = "tiny", "--data is shapes"
    else:
        name, why = "paper", "--data is not shapes"
        if cfg.stage in WITH_LLM:
            llm = llm_config(inherited.get("llm", cfg.llm))[0]
            name += paper_column(cfg.stage, llm)
            why += f" and the language model has width {llm.width}"
        elif cfg.stage == "retrieval":
            name += ", ViT-g" if width > 1024 else ", ViT-L"
            why += f" and the ViT has width {width}"
    name = f"{'' if cfg.stage in FINE_TUNING else 'stage '}{cfg.stage}, {name}"
    recipe = RECIPES[name] | ({"epochs": None} if "steps" in given else {"steps": None} if "epochs" in given else {})
    recipe = {key: value for key, value in recipe.items() if key not in given | inherited.keys() and value is not None}
    if "min_lr" in recipe:  # the rate never rises again
        recipe["min_lr"] = min(recipe["min_lr"], recipe.get("lr", cfg.lr))
    chosen = f'recipe "{name}", because {why}: ' + ", ".join(f"{key} {show(value)}" for key, value in recipe.items())
    if inherited:
        chosen += f"\nfrom {cfg.init}: " + ", ".join(f"{key} {value}" for key, value in inherited.items())
    return dataclasses.replace(cfg, **recipe, **inherited), chosen


def paper_column(stage: str, llm: OPTConfig | T5Config) -> str:
    """Which column of the paper's tables fits the language model best."""
    if stage == "2":
        return ", T5" if isinstance(llm, T5Config) else ", OPT"
    return ", FlanT5" if isinstance(llm, T5Config) else ", OPT-6.7B" if llm.width >= 4096 else ", OPT-2.7B"


def show(value) -> str:
    """A value of a recipe, in short."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def inherit(cfg: TrainConfig, given: set[str]) -> dict:
    """What a run takes from the run it starts from, and the ViT's width; of these flags, --vit and --dropout may say
    something else, and fine-tuning takes another --image-size."""
    folder = Path(cfg.init)
    if not (folder / "config.json").exists():
        stage, without = ("2", "") if cfg.stage in ("caption", "vqa") else ("1", "")
        if cfg.stage == "2":
            without = ", or pass --init none"
        raise UserError(f"--init {folder} is not a run: train it with --stage {stage} --out {folder}{without}")
    run = read_json(folder / "config.json")
    if run.get("model") != "blip2":
        raise UserError(
            f"--init {folder} is a public checkpoint, expected a run: make one of it with "
            f"python weights.py export {folder} --format run runs/{folder.name}"
        )
    has_llm, needs_llm = bool(run.get("llm")), cfg.stage in ("caption", "vqa")
    if cfg.stage in FINE_TUNING and has_llm != needs_llm:
        raise UserError(
            f"--init {folder} is a run {'with' if has_llm else 'without'} a language model, stage {cfg.stage} starts "
            f"from one of stage {'2' if needs_llm else '1'}: pass --init runs/stage{'2' if needs_llm else '1'}"
        )
    if run.get("conditioned") and not (cfg.stage == "vqa" and cfg.condition):
        raise UserError(
            f"--init {folder} was fine-tuned with the question in the Q-Former: go on with it in --stage vqa, or start "
            "from the run of stage 2 before it"
        )
    inherited = {
        "vit": relocated(run["vit"], folder),
        "bert": relocated(run["bert"], folder),
        "dropout": run["qformer"]["dropout"],
        "queries": run["qformer"]["num_queries"],
        "cross_every": run["qformer"]["cross_every"],
        **{name: run[name] for name in ("image_size", "embed_dim", "max_text_tokens", "last_block")},
    }
    if has_llm:
        inherited["llm"] = relocated(run["llm"], folder)
    if cfg.stage in FINE_TUNING:
        del inherited["image_size"]
    for name in given & inherited.keys() - {"vit", "dropout", "llm"}:
        if getattr(cfg, name) != inherited[name]:
            flag = name.replace("_", "-")
            raise UserError(f"got --{flag} {getattr(cfg, name)}, but {folder} has {inherited[name]}: leave it out")
    width = run["qformer"]["image_width"]
    return {name: value for name, value in inherited.items() if name not in given} | {"image_width": width}


def check(cfg: TrainConfig) -> None:
    """Refuse what cannot work, in a sentence."""
    objectives = cfg.losses.split(",")
    for flag, got, fine, expected in (
        (
            "losses",
            cfg.losses,
            set(objectives) <= set(OBJECTIVES) and "itc" in objectives and len(set(objectives)) == len(objectives),
            "itc, with itm and itg or without",
        ),
        ("precision", cfg.precision, cfg.precision in ("auto", *PRECISIONS), "auto, fp32, bf16 or fp16"),
        ("device", cfg.device, cfg.device in ("auto", "cuda", "mps", "cpu"), "auto, cuda, mps or cpu"),
        ("lr", cfg.lr, cfg.lr > 0, "above 0"),
        ("min_lr", cfg.min_lr, cfg.min_lr <= cfg.lr, f"at most --lr {cfg.lr:g}"),
        ("clip", cfg.clip, cfg.clip > 0, "above 0"),
        ("beta2", cfg.beta2, 0 <= cfg.beta2 < 1, "0 or more, and below 1"),
        ("dropout", cfg.dropout, 0 <= cfg.dropout < 1, "0 or more, and below 1"),
        ("vit_lr_decay", cfg.vit_lr_decay, 0 < (cfg.vit_lr_decay or 1) <= 1, "above 0 and at most 1"),
        ("template", cfg.template, "{}" in (cfg.template or "{}"), "{} in it, where the question goes"),
        ("epochs", cfg.epochs, cfg.epochs is None or cfg.epochs > 0, "above 0"),
        ("steps", cfg.steps, cfg.steps is None or cfg.steps >= 1, "at least 1"),
        *((name, getattr(cfg, name), getattr(cfg, name) >= 1, "at least 1") for name in AT_LEAST_1),
        *((name, getattr(cfg, name), (getattr(cfg, name) or 0) >= 0, "0 or more") for name in AT_LEAST_0),
    ):
        if not fine:
            raise UserError(f"got --{flag.replace('_', '-')} {got}, expected {expected}")
    if cfg.val_photos and cfg.val_data:
        raise UserError("got --val-photos and --val-data, expected one of the two")
    for flag, specs in (("data", cfg.data), ("val-data", [cfg.val_data] if cfg.val_data else [])):
        for spec in specs:
            check_annotations(spec, flag)
    if cfg.cache_features and cfg.stage in FINE_TUNING and not cfg.freeze_vit:
        raise UserError("--cache-features keeps what a frozen ViT sees, here it is trained: add --freeze-vit")
    share = cfg.batch / world()[1]
    micro = cfg.micro_batch or share
    if share % 1 or share % micro:
        raise UserError(
            f"--batch {cfg.batch} does not divide into {world()[1]} processes with micro-batches of {micro:g}: "
            f"pass --batch {math.ceil(share / math.ceil(micro)) * math.ceil(micro) * world()[1]}"
        )
    at_once = micro * world()[1]
    if cfg.itc_batch and (cfg.itc_batch % at_once or cfg.batch % cfg.itc_batch):
        raise UserError(
            f"--itc-batch {cfg.itc_batch} is not made of micro-batches of {at_once:g} (over all processes), or --batch "
            f"{cfg.batch} not of it: pass --itc-batch {cfg.batch}, or another --micro-batch"
        )
    if cfg.itc_batch > at_once and cfg.stage == "retrieval" and not cfg.freeze_vit:
        raise UserError(
            "--itc-batch keeps what a frozen ViT sees for a second pass, here it is trained: add --freeze-vit"
        )


# --- the pieces of the loop that tests and assets/make_tiny.py use too ------------------------------------------------


def lr_at(step: int, cfg) -> float:
    """Learning rate of the step-th update (from 1): linear from 0 to the peak, then a cosine to min_lr at the last."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def hardness_at(step: int, cfg) -> float:
    """How hard ITM's negatives are at a step: from 0, any other photo, to 1, drawn by ITC's similarity."""
    return min(1.0, step / cfg.negatives_ramp) if cfg.negatives_ramp else 1.0


def build_optimizer(model: nn.Module, cfg) -> torch.optim.AdamW:
    """AdamW over what is trained. Weight decay on matrices and tables; not on biases, norms and the temperature.

    Each group has a "scale" of the learning rate: 1, but for a ViT that is trained, which gets slower block by block.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = vit_lr_scale(name, model.vit.cfg.depth, cfg.vit_lr_decay) if name.startswith("vit.") else 1.0
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    kinds = [
        {"params": params, "weight_decay": cfg.weight_decay if is_matrix else 0.0, "scale": scale}
        for (scale, is_matrix), params in sorted(groups.items(), key=lambda g: (g[0][0], not g[0][1]))
    ]
    device = kinds[0]["params"][0].device.type
    return torch.optim.AdamW(kinds, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=device in ("cpu", "cuda"))


def vit_lr_scale(name: str, depth: int, decay: float) -> float:
    """Layer-wise learning-rate decay of the ViT (paper, Tables 7 to 9): each block learns slower than the one above it,
    by the factor `decay`; what is below the blocks learns slowest. The last block has `decay` itself, as in BEiT."""
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block else 0
    return decay ** (depth + 1 - layer)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def keep_memory() -> None:
    """Let glibc keep freed buffers. By default it gives large ones back to the system, which hands them out again page
    by page: on CPU that took a third of a step. Elsewhere than on Linux there is nothing to do."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: buffers up to 2 GB come from the heap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose top is not given back


# --- what is printed -------------------------------------------------------------------------------------------------


def parts_table(model: Blip2) -> str:
    """What the model consists of: parameters, how many are trained, in which dtype."""
    parts = {
        "ViT" if model.trains_vit else "ViT (frozen)": model.vit,
        "ln_vision": model.ln_vision,
        "Q-Former": model.qformer,
        "ITC projections": nn.ModuleList([model.vision_proj, model.text_proj]),
        "ITM head": model.itm_head,
    }
    if model.llm is not None:
        parts |= {"LM projection": model.llm_proj, "LM (frozen)": model.llm}
    rows = [(name, list(part.parameters())) for name, part in parts.items()]
    rows += [("temperature", [model.temperature]), ("all", list(model.parameters()))]
    lines = [f"{'part':18} {'parameters':>14} {'trainable':>14}  dtype"]
    for name, parameters in rows:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        lines.append(f"{name:18} {sum(p.numel() for p in parameters):14,} {trained:14,}  {dtypes}")
    return "\n".join(lines)


def vit_rates_line(model: Blip2, cfg: TrainConfig) -> str:
    """Of a ViT that is trained, the peak learning rate of each block."""
    depth = model.vit.cfg.depth
    rates = [cfg.lr * vit_lr_scale(f"vit.blocks.{i}.", depth, cfg.vit_lr_decay) for i in range(-1, depth)]
    below, *blocks = (f"{rate:.1e}" for rate in rates)
    return f"peak learning rate {cfg.lr:.1e}; in the ViT {below} below its blocks, then {', '.join(blocks)}"


def memory_estimate(
    model: Blip2, micro_batch: int, objectives: tuple[str, ...], compared: int = 0, text_tokens: int = 16
) -> dict[str, float]:
    """Bytes of a training step by a rough count: weights, gradients and optimizer, what the backward pass keeps; and,
    where ITC compares several micro-batches, the ViT's tokens of the `compared` photos of this process."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    cfg, vit, Q, T = model.qformer.cfg, model.vit.cfg, model.qformer.cfg.num_queries, text_tokens
    size = 4 if model.amp_dtype is None else 2
    P = (model.image_size // vit.patch_size) ** 2 + 1
    # (rows, keys) of the self-attention of each pass of a sample, and how often its queries read the image
    passes = [(Q, Q)] + [(T, T)] * ("itc" in objectives)
    passes += [(Q + T, Q + T)] * 3 * ("itm" in objectives) + [(T, Q + T)] * ("itg" in objectives)
    reads = 1 + 3 * ("itm" in objectives)
    tokens = sum(rows for rows, _ in passes)
    kept = cfg.depth * tokens * (12 * cfg.width + 2 * cfg.mlp)  # inputs of Linears, norms and GELU
    kept += cfg.depth * cfg.heads * sum(2 * rows * keys for rows, keys in passes)  # attention weights
    cross = -(-cfg.depth // cfg.cross_every)
    kept += cross * reads * (Q * (6 * cfg.width + 2 * cfg.heads * P) + 2 * P * cfg.width)
    kept += 3 * P * vit.width
    if model.trains_vit:
        block = P * (8 * vit.width + 2 * vit.mlp)
        kept += vit.depth * P * vit.width + block if model.vit.grad_checkpointing else vit.depth * block
    if "itg" in objectives:
        kept += T * cfg.vocab_size * 8 / size  # logits, in fp32 as well
    if "lm" in objectives:  # no gradients of weights here, so the inputs of Linears need not be kept
        lm, S = model.llm.cfg, Q + T
        kept += lm.depth * (S * (8 * lm.width + 2 * lm.mlp) + 2 * lm.heads * S * S) + T * lm.vocab_size * 8 / size
    return {
        "frozen": frozen,
        "weights": trained,
        "gradients + AdamW": 3 * trained,
        "activations": micro_batch * kept * size,
    } | ({"tokens": compared * P * vit.width * model.vit.pos_embed.element_size()} if compared > micro_batch else {})


def memory_line(model: Blip2, micro_batch: int, objectives: tuple[str, ...], compared: int = 0) -> str:
    """The estimate in one line."""
    memory = memory_estimate(model, micro_batch, objectives, compared)
    parts = ", ".join(f"{name} {amount / 1e9:.2f}" for name, amount in memory.items())
    return f"expected memory of a process {sum(memory.values()) / 1e9:.1f} GB ({parts})"


def negatives_line(texts: int, batch: int, can_compare: bool) -> str:
    """With how many texts ITC compares a picture."""
    line = f"a picture is compared with {texts} texts at once: its own and {texts - 1} negatives"
    more = f"; accumulating {batch // texts} of these adds none{' (--itc-batch does)' if can_compare else ''}"
    return line + (more if batch > texts else "")


def loss_bounds(objectives: tuple[str, ...], texts: int, words: int) -> dict[str, tuple[float, float]]:
    """Of each loss, the least that its label smoothing allows, and what it is when nothing is known."""
    bounds = {
        "itc": (smoothing_floor(texts), math.log(texts)),
        "itm": (0.0, ITM_PRIOR),
        "itg": (smoothing_floor(words), math.log(words)),
        "lm": (0.0, math.log(words)),
    }
    return {name: bounds[name] for name in objectives}


def log_line(step: int, cfg: TrainConfig, row: dict, bounds: dict, eta: float) -> str:
    """A step in one line; behind each loss its floor and what chance gives."""
    losses = "  ".join(f"{name} {row[name]:.3f} ({low:.2f} to {high:.2f})" for name, (low, high) in bounds.items())
    temperature = f"temp {row['temperature']:.3f} | " if "itc" in bounds else ""
    return (
        f"step {step:{len(str(cfg.steps))}}/{cfg.steps} | {losses} | {temperature}"
        f"lr {row['lr']:.1e} | norm {row['norm']:.1f} | {row['photos_per_s']:.0f} photos/s, "
        f"{row['waited']:.0%} waiting for them | {row['gigabytes']:.1f} GB | eta {clock(eta)}"
    )


def gigabytes_used(device: torch.device) -> float:
    """Peak memory: of the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, model: Blip2, train_state: dict, cfg: TrainConfig, is_best: bool = False
) -> None:
    """Write run/step-NNNNNN/ whole or not at all, show it as the run's latest, drop those beyond --keep. What is there
    already, of the same step before its validation, gets a new state only.

    Called on all processes, because each adds the state of its random numbers; the first one writes.
    """
    rng = {"cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    rngs = gather_objects(rng)
    if world()[0] > 0:
        return
    folder = run / f"step-{step:06d}"
    partial = run / f".{folder.name}.partial"
    source = folder if folder.exists() else partial
    if source == partial:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, home=folder, train=asdict(cfg), step=step)
    texts = ("tokenizer.json",) if model.texts is not None else ()
    if is_best:  # before the state says so
        (run / "best").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", *texts):  # config: both folders are as deep
            link(source / name, run / "best" / name)
    torch.save({**train_state, "step": step, "rng": rngs}, source / ".train_state.partial")
    os.replace(source / ".train_state.partial", source / "train_state.pt")
    if source == partial:
        os.replace(partial, folder)
    for name in ("model.safetensors", "train_state.pt", *texts):
        link(folder / name, run / name)
    model.write_config(run, train=asdict(cfg), step=step)
    for old in checkpoints(run)[: -cfg.keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(
        (folder for folder in run.glob("step-*") if folder.name.removeprefix("step-").isdigit()),
        key=lambda folder: int(folder.name.removeprefix("step-")),
    )


def link(source: Path, target: Path) -> None:
    """Make target the same file as source (or a copy, where the disk has no links), in one move."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)


def resume(run: Path, cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, Path, dict]:
    """An old run -> the configuration it was started with, the folder of its newest checkpoint, its train state.

    Refuses flags that would make another run of it, and another number of processes.
    """
    folders = checkpoints(run)
    if not folders:
        raise UserError(f"--resume: {run} has no checkpoint yet: leave --resume out to start it")
    try:
        state = torch.load(folders[-1] / "train_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # missing, cut, or no pickle at all
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--resume: the state in {folders[-1]} cannot be read ({why}): take that folder away, to go on from the "
            "checkpoint before it if there is one (--keep)"
        ) from None
    config = read_json(folders[-1] / "config.json")
    saved = TrainConfig(**config["train"])
    other = [name for name in given - MAY_CHANGE if getattr(saved, name) != getattr(cfg, name)]
    if other:
        was = ", ".join(f"--{name.replace('_', '-')} {getattr(saved, name)}" for name in other)
        raise UserError(
            f"--resume: {run} was started with {was}: leave those flags out, or start another run with --out"
        )
    if len(state["rng"]) != world()[1]:
        raise UserError(
            f"--resume: {run} was trained by {len(state['rng'])} processes, here are {world()[1]}: "
            f"start it with torchrun --nproc_per_node {len(state['rng'])}"
        )
    say(f"resuming {run} at step {state['step']}")
    return dataclasses.replace(saved, **{name: getattr(cfg, name) for name in given & MAY_CHANGE}), folders[-1], state


def restore(folder: Path, state: dict, model: Blip2, optimizer, scaler) -> tuple[float, float]:
    """Put everything where it stood at a checkpoint -> the best score so far, the seconds trained so far."""
    config = read_json(folder / "config.json")
    for part in ("vit", "llm"):
        if config.get(f"{part}_sha256") != model.frozen_sha256(part):
            raise UserError(
                f"--resume: {model.sources[part]} holds other weights than the run was trained over: "
                "put the old ones back, or start another run with --out"
            )
    model.load_trained(folder)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    rng = state["rng"][world()[0]]
    torch.set_rng_state(rng["cpu"])
    if model.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return state["best"], state["trained_s"]


# --- the loop --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """The command line."""
    cfg, given = parse_flags(argv)
    with StopAsked() as stop:
        return train(cfg, given, stop)


def train(cfg: TrainConfig, given: set[str], stop: "StopAsked") -> dict | None:
    """Train as the flags say; `given` are the fields that were given. Returns the final evaluation."""
    start_processes()
    rank, size = world()

    # --- a new run, or an old one
    run = Path(cfg.out or "runs/" + (cfg.stage if cfg.stage in FINE_TUNING else f"stage{cfg.stage}"))
    cfg, folder, resumed = resume(run, cfg, given) if cfg.resume else begin(run, cfg, given)
    check(cfg)
    objectives = ("lm",) if cfg.stage in WITH_LLM else tuple(cfg.losses.split(","))
    device = local_device(cfg.device)
    if device.type == "cpu":
        keep_memory()
        if size > 1:  # torchrun gives each process one thread; PyTorch or OMP_NUM_THREADS chooses those of a single one
            torch.set_num_threads(cores())
    precision, why = choose_precision(device, cfg.precision)
    micro_batch = cfg.micro_batch or cfg.batch // size
    accumulate = cfg.batch // size // micro_batch

    # --- model
    torch.manual_seed(cfg.seed)  # the same new weights on all processes
    model = build_model(cfg, objectives, precision, device, folder).train()
    say(f"{device}, {size} process(es), {precision} because {why}")
    say(parts_table(model), memory_line(model, micro_batch, objectives, cfg.itc_batch // size))
    if model.trains_vit:
        say(vit_rates_line(model, cfg))
    if "itc" in objectives:
        say(negatives_line(cfg.itc_batch or micro_batch * size, cfg.batch, not model.trains_vit))

    # --- data
    photos, val = open_data(cfg, model, run)
    if cfg.steps is None:
        cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * photos.texts() / cfg.batch)))
        what = "questions" if cfg.stage == "vqa" else "captions"
        say(f"{cfg.epochs:g} epochs of {photos.texts():,} {what} are {cfg.steps:,} steps")
    workers = loader_workers(cfg, bool(photos.cached))
    start = resumed["step"] if resumed else 0
    sampler = StepSampler(photos, cfg.seed, micro_batch, accumulate, cfg.steps, start, rank, size)
    say(f"{len(photos):,} training pictures, {sampler.per_epoch:,} steps an epoch, {workers} loader workers")
    batches = TrainBatches(photos, texts_of(model, cfg), cfg.image_size, cfg.seed)
    batches = iter(train_loader(batches, sampler, workers, pin=device.type == "cuda"))

    # --- optimizer, and where an old run stood
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    best, trained_s = -1.0, 0.0
    torch.manual_seed(cfg.seed + rank)  # from here on: dropout
    if resumed:
        best, trained_s = restore(folder, resumed, model, optimizer, scaler)
    if cfg.compile:
        model.compile_blocks()
        say("compiling: the first steps take minutes")
    ddp = model
    if size > 1:  # all processes have the same weights already
        ddp = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)

    # --- log
    words = (model.qformer if model.llm is None else model.llm).cfg.vocab_size
    bounds = loss_bounds(objectives, cfg.itc_batch or micro_batch * size, words)
    say("behind each loss: the least that label smoothing allows, and what knowing nothing gives")
    if rank == 0 and not resumed and checkpoints(run):  # --overwrite: only now, when nothing has been refused
        shutil.rmtree(run)
    log = Log(run, start, asdict(cfg), f"{device}, {precision}")
    unreadable: dict[str, str] = {}  # photos, and why; of this process, since the last line of the log
    named: set[str] = set()  # those of all processes that have been told
    pending, waited_s = [], 0.0

    # --- checkpoint and validation
    def save(step: int, best: float, is_best: bool = False) -> None:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "trained_s": trained_s}
        save_checkpoint(run, step, model, {**state, "best": best}, cfg, is_best)

    def validates(step: int) -> bool:
        return val is not None and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps)

    def validate(step: int, best: float) -> float:
        """-> the best score so far; the model that has it is in best/."""
        with model.uncompiled():
            result = evaluate(model, val, cfg.stage, objectives, workers, quick=True)
            name, score = headline(result)
            say(validation_lines(model, val, result, name, score, score > best))
        if score > best:
            save(step, score, is_best=True)
        log.write({"step": step, "validation": result, name.replace(" ", "_"): score})
        return max(score, best)

    if resumed and validates(start) and not gather_objects(start in log.validated)[0]:
        best = validate(start, best)  # it had been stopped before

    # --- the loop
    window_s = time.perf_counter()
    for step in range(start + 1, cfg.steps + 1):
        set_lr(optimizer, lr := lr_at(step, cfg))
        asked = time.perf_counter()
        micro_batches = [next(batches).to(device) for _ in range(accumulate)]
        waited_s += time.perf_counter() - asked
        losses, norm = optimize(ddp, optimizer, scaler, micro_batches, cfg, objectives, step)
        for batch in micro_batches:
            unreadable |= dict(batch.broken)

        # --- numbers stay on the device until a line is due, so that the host runs ahead of it
        cut = sum(batch.truncated for batch in micro_batches)
        pending.append((lr, losses, norm, model.temperature.detach().clone(), cut))
        due = step % cfg.log_every == 0 or step == cfg.steps
        saves = step % cfg.save_every == 0 or step == cfg.steps
        stopping = bool(all_sum(torch.tensor(float(stop.asked))))  # on the CPU: the host does not wait for the device
        if not (due or validates(step) or saves or stopping):
            continue
        rows = read_numbers(pending, objectives, cfg, step, scaled=scaler.is_enabled())
        now = time.perf_counter()
        trained_s, window_s = trained_s + now - window_s, now - window_s
        speed, waited = len(rows) * cfg.batch / window_s, waited_s / window_s
        for row in rows:
            row |= {
                "photos_per_s": speed,
                "waited": waited,
                "gigabytes": gigabytes_used(device),
                "trained_s": trained_s,
            }
        tell_unreadable(unreadable, named, len(photos))
        log.write(*rows)
        say(log_line(step, cfg, rows[-1], bounds, (cfg.steps - step) * cfg.batch / speed))
        pending, waited_s = [], 0.0

        if saves or stopping:  # first of all, so that whatever happens to the validation costs nothing
            save(step, best)
        if stopping:
            launch = "python" if size == 1 else f"torchrun --nproc_per_node {size}"
            say(f"stopped at step {step}, saved; go on with: {launch} train.py --resume --out {run}")
            return None
        if validates(step):
            best = validate(step, best)
        window_s = time.perf_counter()

    # --- the end
    say(f"trained in {clock(trained_s)}, without validation, checkpoints and caching")
    if cfg.data == ["shapes"]:
        val = open_photos(["shapes"], "test", cfg.image_size, questions=cfg.stage == "vqa")
    if val is None:
        return None
    barrier()  # the first process may still be writing
    if (run / "best").exists():
        model.load_trained(run / "best")
    say(f"evaluating on {len(val):,} pictures")
    with model.uncompiled():
        result = evaluate(model, val, cfg.stage, objectives, workers)
    name, text = REPORTS[result["task"]]
    if rank == 0:
        weights = run / "best" if (run / "best").exists() else run
        files = cfg.data if cfg.data == ["shapes"] or cfg.val_photos else [cfg.val_data]
        write_result(run / name, origin(model, weights, val, files) | result)
    say(text(result))
    return result


def optimize(
    ddp: nn.Module, optimizer, scaler, micro_batches: list[Batch], cfg, objectives: tuple[str, ...], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the optimizer -> the losses (len(objectives),), this process's share, and the gradient's norm.

    ddp: the model, or DistributedDataParallel around it. Nothing here makes the host wait for the device, but for the
    hard negatives that come from other processes (see `losses.fetch_rows`).
    """
    model, size = getattr(ddp, "module", ddp), world()[1]
    compares = max(1, cfg.itc_batch // (len(micro_batches[0]) * size))  # so many micro-batches with each other
    totals = stage2_totals(micro_batches) if "lm" in objectives else stage1_totals(micro_batches, compares)
    generator, parts = torch.Generator(), []  # of the hard negatives
    for first in range(0, len(micro_batches), compares):
        group = micro_batches[first : first + compares]
        generator.manual_seed(hash((cfg.seed, step, first // compares)))
        draw = (generator, hardness_at(step, cfg))
        compared = model.compare(group, totals, *draw) if compares > 1 else [None] * len(group)
        for number, batch in enumerate(group, start=first):
            is_last = number == len(micro_batches) - 1
            with nullcontext() if is_last or size == 1 else ddp.no_sync():
                if "lm" in objectives:
                    losses = ddp(batch, totals)
                else:
                    losses = ddp(batch, objectives, totals, *draw, compared[number - first])
                scaler.scale(sum(losses.values()) * size).backward()  # DDP takes the mean over the processes
            parts.append(torch.stack([losses[name].detach() for name in objectives]))
        del compared  # the tokens of a group, before those of the next come
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        model.temperature.clamp_(*TEMPERATURES)
    return torch.stack(parts).sum(dim=0), norm


# --- the loop's helpers ----------------------------------------------------------------------------------------------


class StopAsked:
    """Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        """The signal handler."""
        self.asked = True
        signal.signal(number, self.before[number])


class Log:
    """log.jsonl: a header, a line a step, a line a validation. A resumed run forgets what came after its checkpoint.

    The first process writes; on the others nothing happens.
    """

    def __init__(self, run: Path, start: int, config: dict, machine: str):
        self.path = run / "log.jsonl"
        self.validated: set[int] = set()  # steps, before `start`
        if world()[0] > 0:
            return
        run.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if start and self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # else it was cut off
        rows = [row for row in rows if row.get("step", 0) <= start]
        self.validated = {row["step"] for row in rows if "validation" in row}
        partial = self.path.with_name(".log.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, self.path)
        self.write({"config": config, "machine": machine, "torch": torch.__version__, "from_step": start})

    def write(self, *rows: dict) -> None:
        """Append."""
        if world()[0] > 0:
            return
        with open(self.path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def loader_workers(cfg: TrainConfig, cached: bool = False) -> int:
    """How many processes load pictures: those to decode keep workers busy, drawn shapes and cached features do not."""
    if cfg.workers >= 0:
        return cfg.workers
    return 0 if cached or cfg.data == ["shapes"] else decoding_workers()


def begin(run: Path, cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, None, None]:
    """A new run: the recipe fills in what was not given. What `resume` returns, of which there is nothing yet."""
    cfg, chosen = complete(cfg, given)
    say(chosen)
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run} is a file, expected a folder: pass another")
    if checkpoints(run) and not cfg.overwrite:
        raise UserError(f"{run} holds a run: pass --resume to go on with it, --out to start another, or --overwrite")
    return cfg, None, None


def build_model(
    cfg: TrainConfig, objectives: tuple[str, ...], precision: str, device: torch.device, resumed_from: Path | None
) -> Blip2:
    """The model at its start; parts that no loss reaches are not trained."""
    where = dict(device=device, precision=precision)
    if cfg.stage in FINE_TUNING:
        where |= dict(llm=cfg.llm) if cfg.stage in WITH_LLM else {}
        model = Blip2.from_pretrained(
            resumed_from or cfg.init, cfg.vit, dropout=cfg.dropout, image_size=cfg.image_size,
            train_vit=not cfg.freeze_vit, **where,
        )  # fmt: skip
        model.vit.grad_checkpointing = cfg.grad_checkpointing and not cfg.freeze_vit
        if cfg.stage in WITH_LLM:
            model.llm.grad_checkpointing = cfg.grad_checkpointing
            model.prompt = cfg.prompt or ""
        if cfg.stage == "vqa":
            model.template = cfg.template or model.template
            if cfg.condition:
                model.condition_on_question()
        if cfg.stage == "retrieval":
            train_heads(model, objectives)
        return model
    if cfg.stage == "2" and resumed_from is not None:  # what it started from may be gone
        model = Blip2.from_pretrained(resumed_from, cfg.vit, llm=cfg.llm, dropout=cfg.dropout, **where)
        model.llm.grad_checkpointing = bool(cfg.grad_checkpointing)
        return model
    if cfg.stage == "2" and cfg.init != "none":
        say(f"Q-Former: from {cfg.init}")
        model = Blip2.from_pretrained(cfg.init, cfg.vit, dropout=cfg.dropout, **where)
    else:
        model, accounts = Blip2.build(
            cfg.vit, cfg.bert, cfg.image_size, cfg.queries, cfg.cross_every, cfg.embed_dim, cfg.max_text_tokens,
            cfg.last_block, cfg.dropout, **where,
        )  # fmt: skip
        say(*accounts)
    if cfg.stage == "2" and (model.llm is None or os.path.realpath(model.sources["llm"]) != os.path.realpath(cfg.llm)):
        say(model.attach_llm(cfg.llm), "the projection to it is new")
    if cfg.stage == "2":
        model.llm.grad_checkpointing = bool(cfg.grad_checkpointing)
    else:
        train_heads(model, objectives)
    return model


def texts_of(model: Blip2, cfg: TrainConfig) -> Texts | LLMTexts | PromptedTexts | QuestionTexts:
    """What makes batches of what is drawn, for the stage."""
    if cfg.stage in ("1", "retrieval"):
        return model.texts
    if cfg.stage == "caption":
        return PromptedTexts(model.llm_texts, model.prompt)
    if cfg.stage == "vqa":
        return QuestionTexts(model.llm_texts, model.template, model.texts if model.conditioned else None)
    return model.llm_texts


def train_heads(model: Blip2, objectives: tuple[str, ...]) -> None:
    """Of the heads of stage 1, train those that a loss reaches; a run says which it lacks."""
    model.sources["lacks"] = [name for name in OBJECTIVES if name not in objectives]
    model.itm_head.requires_grad_("itm" in objectives)
    model.qformer.lm_head.requires_grad_("itg" in objectives)


def open_data(cfg: TrainConfig, model: Blip2, run: Path) -> tuple[Mixture, Mixture | None]:
    """The photos to train on, and those to validate on if there are any; with cached features if asked for."""
    questions = cfg.stage == "vqa"
    photos, val = open_photos(cfg.data, "train", cfg.image_size, cfg.images, questions), None
    unanswered = sum(part.unanswered for part in photos.parts)
    if unanswered:
        raise UserError(no_answers(unanswered, "--data", "learn"))
    if cfg.cache_features:
        photos.cached = cache_tokens(model, photos, run.parent / "features", loader_workers(cfg))
    if cfg.val_photos:
        photos, val = photos.held_out(cfg.val_photos)
    elif cfg.val_data or cfg.data == ["shapes"]:
        val = open_photos([cfg.val_data or "shapes"], "val", cfg.image_size, cfg.images, questions)
        unanswered = sum(part.unanswered for part in val.parts)
        if unanswered:
            raise UserError(no_answers(unanswered, "--val-data", "be compared with"))
        if cfg.cache_features:
            val.cached = cache_tokens(model, val, run.parent / "features", loader_workers(cfg))
    return photos, val


def no_answers(count: int, flag: str, what_for: str) -> str:
    """About questions without answers."""
    return (
        f"{count:,} questions of {flag} have no answer to {what_for}: take them out, or if the answers are in a second "
        "file, type python data.py convert QUESTIONS ANNOTATIONS --out FILE and pass that"
    )


def cache_tokens(model: Blip2, photos: Mixture, folder: Path, workers: int) -> CachedTokens:
    """The frozen ViT's tokens of all photos, evaluation transform, fp16: from the file, or computed into it once.

    The file's name is a hash of the ViT, the transform and the photos, so it is never mistaken for another. Each
    process computes its share; the file appears under its name when it is whole.
    """
    content = model.frozen_sha256("vit") or float(model.vit.patch_embed.weight.float().sum())  # no file: random weights
    encoder = (content, repr(model.vit.cfg), str(model.vit.dtype))
    ids = np.array([photos.image_id(row) for row in range(len(photos))])
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)  # of each photo, the first row
    order = first.argsort()  # photos in the order of the file
    first, slots = first[order], order.argsort()[number]
    what = (encoder, model.image_size, photos.fingerprint(), len(first))
    path = folder / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.npy"
    there, writer = gather_objects((path.exists(), os.getpid()))[0]  # another run may be writing the same
    if not there:
        rank = world()[0]
        started, partial = time.time(), folder / f".{path.stem}.{writer}.partial.npy"
        tokens_each = 1 + (model.image_size // model.vit.cfg.patch_size) ** 2
        shape = (len(first), tokens_each, model.vit.cfg.width)
        say(f"caching the ViT's tokens of {len(first):,} photos in {path}, {2 * math.prod(shape) / 1e9:.1f} GB")
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            np.lib.format.open_memmap(partial, "w+", np.float16, shape).flush()
        barrier()
        tokens, broken = np.lib.format.open_memmap(partial, "r+"), {}
        mine = first[shard(len(first))].tolist()
        batches = [mine[i : i + PHOTOS] for i in range(0, len(mine), PHOTOS)]
        for done, unreadable, pictures in picture_loader(photos, model.image_size, batches, workers):
            broken |= {int(slots[row]): reason for row, reason in unreadable.items()}
            if done:
                tokens[slots[done]] = model.image_tokens(pictures.to(model.device)).half().cpu().numpy()
        tokens.flush()
        broken = {slot: reason for part in gather_objects(broken) for slot, reason in part.items()}
        if rank == 0:
            path.with_suffix(".json").write_text(json.dumps(broken))
            os.replace(partial, path)
        barrier()
        say(f"cached in {clock(time.time() - started)}")
    return CachedTokens(path, slots)


def read_numbers(
    pending: list[tuple], objectives: tuple[str, ...], cfg: TrainConfig, last: int, scaled: bool
) -> list[dict]:
    """The steps since the last line, summed over the processes, as rows of the log. Here the host waits.

    Stops at the first number that is none; but with loss scaling an infinite gradient is skipped, not learned.
    """
    lrs, losses, norms, temperatures, cut = zip(*pending, strict=True)
    losses = all_sum(torch.stack(losses)).tolist()
    cut = all_sum(torch.tensor(cut, device=norms[0].device)).tolist()
    norms, temperatures = torch.stack(norms).tolist(), torch.stack(temperatures).tolist()
    rows = []
    for i, values in enumerate(losses):
        step = last - len(losses) + 1 + i
        numbers = {f"the {name} loss": value for name, value in zip(objectives, values, strict=True)}
        if not scaled:
            numbers["the gradient's norm"] = norms[i]
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} at step {step}, and nothing was saved since: start again, or --resume "
                    "from the last checkpoint, with a lower --lr or with --precision fp32"
                )
        row = {"step": step, **dict(zip(objectives, values, strict=True)), "loss": sum(values), "lr": lrs[i]}
        rows.append({**row, "norm": norms[i], "temperature": temperatures[i], "truncated": cut[i] / cfg.batch})
    return rows


def tell_unreadable(unreadable: dict[str, str], named: set[str], photos: int) -> None:
    """Name the photos that a process could not read, each once; stop all processes when there are too many."""
    for part in gather_objects(unreadable):
        for name, reason in part.items():
            if name not in named:
                say(f"skipped: {reason}")
            named.add(name)
    unreadable.clear()
    if len(named) > BROKEN_SHARE * photos:
        raise UserError(
            f"{len(named)} of {photos} photos could not be read, more than {BROKEN_SHARE:.0%}: mend or remove them, "
            "or pass --images with the folder they are in"
        )


def evaluate(
    model: Blip2, photos: Mixture, stage: str, objectives: tuple[str, ...], workers: int, quick: bool = False
) -> dict:
    """What a stage is for: retrieval (1); answers in the shapes world, captions elsewhere (2); its task, if fine-tuned.
    quick: on the way."""
    if stage not in WITH_LLM:
        return retrieval(model, photos, k=16 if quick else 128, match="itm" in objectives, workers=workers)
    if isinstance(photos.parts[0], Shapes):
        return telling(model, photos) if stage == "caption" else answering(model, photos, controls=not quick)
    return vqa(model, photos, workers) if stage == "vqa" else captioning(model, photos, workers)


def headline(result: dict) -> tuple[str, float]:
    """The one number by which a run is "best", and its name."""
    if result["task"] == "answers":
        return "accuracy", result["accuracy"]["the picture"]["all"]
    if result["task"] != "retrieval":
        name = {"vqa": "accuracy", "captions": "CIDEr", "telling": "captions right"}[result["task"]]
        return name, result[name]
    numbers = result.get("reranked", result["itc"])  # R@1, 5, 10 both ways, re-ranked if the model can
    values = [value for way in numbers.values() for value in way.values()]
    return "mean recall", sum(values) / len(values)


def validation_lines(model: Blip2, val: Mixture, result: dict, name: str, score: float, is_best: bool) -> str:
    """A validation in a few lines: its numbers, and what the model says about two pictures."""
    lines = []
    for stage in ("itc", "reranked"):
        if stage in result:
            i2t, t2i = (way["R@1"] for way in result[stage].values())
            lines.append(f"  validation, {stage}: R@1 picture to caption {i2t:.1f} %, caption to picture {t2i:.1f} %")
    if result["task"] == "answers":
        lines.append(f"  validation: captions that are right {result['captions right']:.1f} %")
    unit = "" if name == "CIDEr" else " %"
    lines.append(f"  {name} {score:.1f}{unit}{', the best so far' if is_best else ''} ({result['seconds']:.0f} s)")
    model.eval()
    for row in (0, len(val) // 2):
        images = model.encode_tokens(val.tokens([row])) if val.cached else model.encode_image(val.picture(row))
        question, text = val.draw(row, sample_rng(0, row))
        said = model.ask(images, [question])[0] if question else model.caption(images)[0]
        asked = f"{question} " if question else ""
        lines.append(f'  {val.name(row)}: {asked}"{said}"; a person: "{text}"')
    model.train()
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(say_sentence(main))
