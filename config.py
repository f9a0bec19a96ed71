"""Every flag of train.py, the paper's recipes, and what a run takes from another.

`TrainConfig` has one row per flag: default, help, limits, the stages it belongs to, and whether it may change when a
run is resumed. A value of None comes from the recipe: a row of `RECIPES`, chosen by --stage, --data and the model.
"""

import argparse
import dataclasses
import math
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint import checkpoints, read_state
from engine.device import DEVICES, PRECISIONS
from engine.distributed import print0, world_size
from engine.errors import Parser, UserError, expect, read_json
from llm import OPTConfig, T5Config
from model import OBJECTIVES
from sources.annotations import check_spec
from weights.configs import llm_config
from weights.runs import relocated

STAGES = ("1", "2", "caption", "vqa", "retrieval")
WITH_LLM = ("2", "caption", "vqa")
FINE_TUNING = ("caption", "vqa", "retrieval")
CONTRASTIVE = ("1", "retrieval")
BEFORE = {"2": "1", "retrieval": "1", "caption": "2", "vqa": "2"}  # stage -> that of the run which --init names

# Limits of a flag: does a value fit, and what is expected.
AT_LEAST_0 = (lambda x: x >= 0, "0 or more")
AT_LEAST_1 = (lambda x: x >= 1, "at least 1")
ABOVE_0 = (lambda x: x > 0, "above 0")
BELOW_1 = (lambda x: 0 <= x < 1, "0 or more, and below 1")
SHARE = (lambda x: 0 < x <= 1, "above 0 and at most 1")
HAS_PLACE = (lambda x: "{}" in x, "{} in it, where the question goes")
HAS_ITC = (
    lambda x: "itc" in x.split(",") and not Counter(x.split(",")) - Counter(OBJECTIVES),
    "itc, with itm and itg or without",
)


def one_of(*choices: str) -> tuple:
    """Limits of a flag that has choices."""
    return lambda x: x in choices, f"{', '.join(choices[:-1])} or {choices[-1]}"


def flag(default, help: str, fits: tuple | None = None, stages: tuple = STAGES, resume: bool = False):
    """A row of TrainConfig. resume: may it differ from the run that is resumed?"""
    row = dict(help=help, fits=fits, stages=stages, resume=resume)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=row)
    return field(default=default, metadata=row)


@dataclass
class TrainConfig:
    """All flags. What is None is taken from the recipe."""

    stage: str = flag("1", "1: representation (3.2), 2: generative (3.3); caption, vqa, retrieval: fine-tuning")
    init: str = flag("", "run to start from; stage 2 also: none, for a Q-Former fresh from BERT", stages=STAGES[1:])
    llm: str = flag("assets/tiny/opt", "frozen language model: a folder, or a name for random weights", stages=WITH_LLM)
    vit: str = flag("assets/tiny/vit", "frozen image encoder: a folder, a name for random weights, or eva-g:FILE")
    bert: str = flag("assets/tiny/bert", "BERT folder that the Q-Former starts from")
    data: list[str] = flag(["shapes"], "shapes, or an annotation file; may be repeated")
    images: list[str] = flag([], "folders of the images, if not beside the file; may be repeated")
    val_data: str = flag("", "annotations to validate on")
    val_photos: int = flag(0, "or: hold out this many images of --data", AT_LEAST_0)
    out: str = flag("", "folder of the run; runs/stage1, runs/stage2, runs/caption, ... if not given", resume=True)
    resume: bool = flag(False, "continue the run in --out", resume=True)
    overwrite: bool = flag(False, "delete the run in --out first", resume=True)
    losses: str = flag("itc,itm,itg", "which objectives; itc is always needed", HAS_ITC, CONTRASTIVE)
    freeze_vit: bool = flag(False, "leave the ViT frozen", stages=FINE_TUNING)
    vit_lr_decay: float | None = flag(None, "each ViT block learns so much slower than the next", SHARE, FINE_TUNING)
    prompt: str | None = flag(None, "what captions continue", stages=("caption",))
    template: str | None = flag(None, "for questions, with {} for the question", HAS_PLACE, ("vqa",))
    condition: bool = flag(True, "the Q-Former reads the question too (paper, Figure 7)", stages=("vqa",))
    steps: int | None = flag(None, "optimizer steps", AT_LEAST_1)
    epochs: float | None = flag(None, "or: how often each caption, or question, is shown", ABOVE_0)
    batch: int | None = flag(None, "global batch of a step, over all ranks", AT_LEAST_1)
    micro_batch: int = flag(0, "images a rank takes at once; 0: its share of --batch, less accumulates", AT_LEAST_0)
    lr: float | None = flag(None, "peak learning rate", ABOVE_0, resume=True)
    min_lr: float | None = flag(None, "learning rate at the end of the cosine", AT_LEAST_0)
    warmup: int | None = flag(None, "steps from 0 to the peak", AT_LEAST_0)
    beta2: float | None = flag(None, "of AdamW", BELOW_1)
    weight_decay: float | None = flag(None, "of tensors with two or more dimensions", AT_LEAST_0)
    clip: float | None = flag(None, "maximal gradient norm", ABOVE_0)
    gradcache: bool = flag(False, "ITC over all accumulated micro-batches, in two passes", stages=CONTRASTIVE)
    negatives_ramp: int | None = flag(None, "steps until ITM's negatives are hard; 0: at once", AT_LEAST_0, CONTRASTIVE)
    dropout: float | None = flag(None, "of the Q-Former", BELOW_1)
    image_size: int | None = flag(None, "pixels a side", AT_LEAST_1)
    queries: int | None = flag(None, "learned queries", AT_LEAST_1)
    cross_every: int = flag(2, "cross-attention in every n-th block", AT_LEAST_1)
    embed_dim: int | None = flag(None, "width of the space in which ITC compares", AT_LEAST_1)
    max_text_tokens: int = flag(32, "longer texts are truncated", AT_LEAST_1)
    grad_checkpointing: bool | None = flag(None, "recompute blocks of LLM and trained ViT", stages=STAGES[1:])
    cache_features: bool = flag(False, "run the frozen ViT once per image, keep its tokens on disk; no augmentation")
    seed: int = flag(0, "of everything random", AT_LEAST_0)
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", one_of("auto", *PRECISIONS), resume=True)
    device: str = flag("auto", "auto, cuda, mps or cpu", one_of(*DEVICES), resume=True)
    workers: int = flag(-1, "loader processes; -1 chooses", resume=True)
    log_every: int = flag(20, "steps between printed lines", AT_LEAST_1, resume=True)
    eval_every: int | None = flag(None, "steps between validations, 0 for none", AT_LEAST_0, resume=True)
    save_every: int | None = flag(None, "steps between checkpoints", AT_LEAST_1, resume=True)
    keep: int = flag(1, "how many checkpoints are kept beside the best", AT_LEAST_1, resume=True)


FLAGS = {f.name: f for f in dataclasses.fields(TrainConfig)}

# Paper 3.4 gives stage 1 no minimal rate and no clipping; 1e-5 is LAVIS's, whose stage 1 clips nothing, warms up for
# 5,000 steps and takes beta2 0.999. The paper's batch is 1,680 with ViT-g, 2,320 with ViT-L.
PAPER_SIZES = dict(dropout=0.1, image_size=224, queries=32, embed_dim=256)
TINY_SIZES = dict(dropout=0.0, image_size=64, queries=8, embed_dim=64)
ADAMW = dict(beta2=0.98, weight_decay=0.05, clip=1.0)
# Stage 2 of the paper; LAVIS takes batches of 1,024, beta2 0.999 and a minimal rate of 1e-5.
STAGE2 = dict(lr=1e-4, min_lr=5e-5, warmup=2000, eval_every=5000, save_every=5000, **ADAMW, **PAPER_SIZES)
# Fine-tuning on COCO (Table 7), on VQAv2 and Visual Genome (Table 8), on COCO (Table 9). The paper fine-tunes no
# FlanT5-XXL; it takes FlanT5-XL's column here. The minimal rate 0 is LAVIS's.
TUNING = dict(warmup=1000, lr=1e-5, min_lr=0.0, beta2=0.999, weight_decay=0.05, clip=1.0, grad_checkpointing=True,
              eval_every=2000, save_every=2000)  # fmt: skip
CAPTION = dict(batch=256, image_size=364, prompt="a photo of", epochs=5, **TUNING)
VQA = dict(batch=128, image_size=490, template="Question: {} Answer:", epochs=5, **TUNING)
RETRIEVAL = dict(batch=224, image_size=364, negatives_ramp=0, epochs=5, **TUNING)
TINY_TUNING = TUNING | dict(steps=800, batch=32, lr=1e-4, warmup=50, image_size=64, vit_lr_decay=0.8,
                            grad_checkpointing=False, eval_every=400, save_every=800)  # fmt: skip
RECIPES = {
    "stage 1, paper": dict(steps=250_000, batch=1680, lr=1e-4, min_lr=1e-5, warmup=2000, negatives_ramp=0,
                           eval_every=5000, save_every=5000, **ADAMW, **PAPER_SIZES),
    # For the shapes world over the tiny encoders: a few minutes on two CPU cores. A run this short has no time to lose
    # on negatives that are too hard at first.
    "stage 1, tiny": dict(steps=1890, batch=32, lr=1e-3, min_lr=1e-5, warmup=90, negatives_ramp=600,
                          eval_every=945, save_every=945, **ADAMW, **TINY_SIZES),
    "stage 2, paper, OPT": dict(steps=80_000, batch=1920, **STAGE2),
    "stage 2, paper, T5": dict(steps=80_000, batch=1520, **STAGE2),
    "stage 2, tiny": dict(steps=2500, batch=32, lr=1e-3, min_lr=1e-5, warmup=75, eval_every=500, save_every=2500,
                          **ADAMW, **TINY_SIZES),
    "caption, paper, FlanT5": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-2.7B": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-6.7B": dict(**CAPTION, vit_lr_decay=0.95),
    "vqa, paper, FlanT5": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-2.7B": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-6.7B": dict(**VQA, vit_lr_decay=0.9),
    "retrieval, paper, ViT-L": RETRIEVAL | dict(lr=5e-6, beta2=0.98, vit_lr_decay=1.0),
    "retrieval, paper, ViT-g": dict(**RETRIEVAL, vit_lr_decay=0.95),
    # The tiny language model has never seen "a photo of".
    "caption, tiny": TINY_TUNING | dict(steps=1600, lr=3e-4, prompt=""),
    "vqa, tiny": TINY_TUNING,
    "retrieval, tiny": TINY_TUNING | dict(lr=3e-4, negatives_ramp=0),
}  # fmt: skip


def dashed(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


def parse_flags(argv: list[str] | None, description: str) -> tuple[TrainConfig, set[str]]:
    """Command line -> the configuration, and the names of the flags that were given."""
    parser = Parser(prog="python train.py", description=description, argument_default=argparse.SUPPRESS)
    for name, f in FLAGS.items():
        stages, kind = f.metadata["stages"], next(iter(typing.get_args(f.type)), f.type)  # int | None -> int
        about = f.metadata["help"] + f" [stage {', '.join(stages)}]" * (stages != STAGES)
        if kind is bool:
            parser.add_argument(dashed(name), action=argparse.BooleanOptionalAction, help=about)
        elif name in ("data", "images"):
            parser.add_argument(dashed(name), action="append", help=about + " (default: shapes)" * (name == "data"))
        else:
            default = "the recipe's" if f.default is None else f.default
            parser.add_argument(dashed(name), type=kind, help=f"{about} (default: {default})", metavar=kind.__name__)
    given = vars(parser.parse_args(argv))
    return TrainConfig(**given), set(given)


def run_folder(cfg: TrainConfig) -> Path:
    """--out, or runs/stage1, runs/stage2, runs/caption, ..."""
    return Path(cfg.out or "runs/" + (cfg.stage if cfg.stage in FINE_TUNING else f"stage{cfg.stage}"))


def with_steps(cfg: TrainConfig, texts: int) -> TrainConfig:
    """Turn --epochs over so many texts into --steps."""
    if cfg.steps is not None:
        return cfg
    steps = max(1, round(cfg.epochs * texts / cfg.batch))
    shown = "questions" if cfg.stage == "vqa" else "captions"
    print0(f"{cfg.epochs:g} epochs of {texts:,} {shown} are {steps:,} steps")
    return dataclasses.replace(cfg, steps=steps)


# --- a new run -------------------------------------------------------------------------------------------------------


def begin(run: Path, cfg: TrainConfig, given: set[str]) -> TrainConfig:
    """The configuration of a new run in the folder `run`, which the recipe completes; says what was chosen and why."""
    cfg, chosen = complete(cfg, given)
    print0(chosen)
    expect(not run.exists() or run.is_dir(), f"--out {run} is a file, expected a folder: pass another")
    holds = f"{run} holds a run: pass --resume to continue it, --out to start another, or --overwrite"
    expect(cfg.overwrite or not checkpoints(run), holds)
    return cfg


def complete(cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, str]:
    """Fill what was not given from the run that --init names and from the recipe -> the whole configuration, and what
    was chosen and why."""
    fits, expected = one_of(*STAGES)
    expect(fits(cfg.stage), f"got --stage {cfg.stage}, expected {expected}")
    for name in given:
        stages = FLAGS[name].metadata["stages"]
        foreign = f"got {dashed(name)}, a flag of stage {', '.join(stages)}, in stage {cfg.stage}: leave it out"
        expect(cfg.stage in stages, foreign)
    lengths = {"steps", "epochs"}
    expect(not given >= lengths, "got --steps and --epochs, expected one of them: leave the other out")
    inherited = inherit(cfg, given)
    width = inherited.pop("image_width", 0)
    name, why = choose_recipe(cfg, inherited.get("llm", cfg.llm), width)
    known = given | inherited.keys() | (lengths if given & lengths else set())
    recipe = {key: value for key, value in RECIPES[name].items() if key not in known}
    if "min_lr" in recipe:  # the rate never rises again
        recipe["min_lr"] = min(recipe["min_lr"], recipe.get("lr", cfg.lr))
    shown = (f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in recipe.items())
    chosen = f'recipe "{name}", because {why}: {", ".join(shown)}'
    if inherited:
        chosen += f"\nfrom {cfg.init}: " + ", ".join(f"{key} {value}" for key, value in inherited.items())
    return dataclasses.replace(cfg, **recipe, **inherited), chosen


def choose_recipe(cfg: TrainConfig, llm: str, image_width: int) -> tuple[str, str]:
    """Name of the recipe, and the reason."""
    column, why = "tiny", "--data is shapes"
    if cfg.data != ["shapes"]:
        column, why = "paper", "--data is not shapes"
        if cfg.stage in WITH_LLM:
            llm_cfg = llm_config(llm)[0]
            column += paper_column(cfg.stage, llm_cfg)
            why += f" and the language model has width {llm_cfg.width}"
        elif cfg.stage == "retrieval":
            column += ", ViT-g" if image_width > 1024 else ", ViT-L"
            why += f" and the ViT has width {image_width}"
    return f"{'' if cfg.stage in FINE_TUNING else 'stage '}{cfg.stage}, {column}", why


def paper_column(stage: str, llm: OPTConfig | T5Config) -> str:
    """The column of the paper's tables that is nearest to the language model."""
    if stage == "2":
        return ", T5" if isinstance(llm, T5Config) else ", OPT"
    return ", FlanT5" if isinstance(llm, T5Config) else ", OPT-6.7B" if llm.width >= 4096 else ", OPT-2.7B"


def inherit(cfg: TrainConfig, given: set[str]) -> dict:
    """What a run takes from the run it starts from, and the ViT's width; empty if it starts from none. --vit, --llm and
    --dropout may differ, and fine-tuning takes another --image-size."""
    folder, before = Path(cfg.init), BEFORE.get(cfg.stage)
    if before is None or (cfg.stage, cfg.init) == ("2", "none"):
        return {}
    start = f"stage {cfg.stage} starts from a run of stage {before}: pass --init runs/stage{before}"
    expect(cfg.init not in ("", "none"), start + ", or --init none to go without" * (cfg.stage == "2"))
    missing = f"--init {folder} is not a run: train it with --stage {before} --out {folder}"
    expect((folder / "config.json").exists(), missing + ", or pass --init none" * (cfg.stage == "2"))
    run = read_json(folder / "config.json")
    export = f"make one of it with python -m tools.weights export {folder} --format run runs/{folder.name}"
    expect(run.get("model") == "blip2", f"--init {folder} is a public checkpoint, expected a run: {export}")
    has_llm = bool(run.get("llm"))
    differs = f"--init {folder} is a run {'with' if has_llm else 'without'} a language model, {start}"
    expect(cfg.stage == "2" or has_llm == (before == "2"), differs)
    expect(
        not run.get("conditioned") or (cfg.stage == "vqa" and cfg.condition),
        f"--init {folder} was fine-tuned with the question in the Q-Former: continue it in --stage vqa, or start from "
        "the run of stage 2 before it",
    )
    inherited = {name: relocated(run[name], folder) for name in ("vit", "bert", "llm") if run.get(name)}
    q = run["qformer"]
    inherited |= dict(dropout=q["dropout"], queries=q["num_queries"], cross_every=q["cross_every"])
    inherited |= {name: run[name] for name in ("image_size", "embed_dim", "max_text_tokens")}
    if cfg.stage in FINE_TUNING:
        del inherited["image_size"]
    for name in given & inherited.keys() - {"vit", "dropout", "llm"}:
        got, had = getattr(cfg, name), inherited[name]
        expect(got == had, f"got {dashed(name)} {got}, but {folder} has {had}: leave it out")
    return {name: value for name, value in inherited.items() if name not in given} | {"image_width": q["image_width"]}


# --- an old run ------------------------------------------------------------------------------------------------------


def resume(run: Path, cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, Path, dict]:
    """An old run -> its configuration, the folder of its newest checkpoint, its train state.

    Refuses flags that would make another run of it, and another number of processes.
    """
    folders = checkpoints(run)
    expect(folders, f"--resume: {run} has no checkpoint yet: leave --resume out to start it")
    state = read_state(folders[-1])
    saved = saved_config(read_json(folders[-1] / "config.json")["train"])
    may_change = {name for name, f in FLAGS.items() if f.metadata["resume"]}
    other = [name for name in given - may_change if getattr(saved, name) != getattr(cfg, name)]
    was = ", ".join(f"{dashed(name)} {getattr(saved, name)}" for name in other)
    expect(not other, f"--resume: {run} was started with {was}: leave those flags out, or start another run with --out")
    ranks = len(state["rng"])
    trained = f"{run} was trained by {ranks} processes, here are {world_size()}"
    expect(ranks == world_size(), f"--resume: {trained}: start it with torchrun --nproc_per_node {ranks}")
    print0(f"resuming {run} at step {state['step']}")
    changed = {name: getattr(cfg, name) for name in given & may_change}
    if "lr" in changed:  # the rate never rises
        changed["min_lr"] = min(saved.min_lr, cfg.lr)
    return dataclasses.replace(saved, **changed), folders[-1], state


def saved_config(saved: dict) -> TrainConfig:
    """The configuration in a checkpoint; of older runs, without flags that no longer exist."""
    compared = saved.get("itc_batch", 0)
    expect(
        compared in (0, saved["batch"]) and not saved.get("last_block"),
        "--resume: the run was started with --last-block, or with an --itc-batch below --batch, which no longer exist: "
        "start another run with --out",
    )
    known = {name: value for name, value in saved.items() if name in FLAGS}
    return TrainConfig(**{"gradcache": bool(compared)} | known)


# --- limits ----------------------------------------------------------------------------------------------------------


def check(cfg: TrainConfig) -> None:
    """Refuse what cannot work, in a sentence."""
    for name, f in FLAGS.items():
        value, fits = getattr(cfg, name), f.metadata["fits"]
        if fits and value is not None and not fits[0](value):
            raise UserError(f"got {dashed(name)} {value}, expected {fits[1]}")
    expect(cfg.min_lr <= cfg.lr, f"got --min-lr {cfg.min_lr}, expected at most --lr {cfg.lr:g}")
    expect(not (cfg.val_photos and cfg.val_data), "got --val-photos and --val-data, expected one of the two")
    for spec in cfg.data:
        check_spec(spec)
    if cfg.val_data:
        check_spec(cfg.val_data, "val-data")
    beside = "got --data shapes beside other questions, expected one kind: leave it out, or pass it alone"
    expect(cfg.stage != "vqa" or "shapes" not in cfg.data or cfg.data == ["shapes"], beside)
    if cfg.stage in FINE_TUNING and not cfg.freeze_vit:
        for name in ("cache_features", "gradcache"):
            trained = f"{dashed(name)} keeps the tokens of a frozen ViT, here it is trained: add --freeze-vit"
            expect(not getattr(cfg, name), trained)
    share = cfg.batch / world_size()
    micro = cfg.micro_batch or share
    fitting = math.ceil(share / math.ceil(micro)) * math.ceil(micro) * world_size()
    uneven = f"--batch {cfg.batch} does not divide into {world_size()} processes with micro-batches of {micro:g}"
    expect(share % 1 == 0 and share % micro == 0, f"{uneven}: pass --batch {fitting}")
