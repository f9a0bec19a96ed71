"""Every flag of train.py, the paper's recipes and those for less data, and what a run takes from another.

`TrainConfig` has one row per flag: default, help, limits, the stages it belongs to, and whether it may change when a
run is resumed. A value of None comes from the recipe: a row of `RECIPES`, chosen by --stage, --data and the model.
"""

import argparse
import dataclasses
import math
import os
import sys
import textwrap
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoint import checkpoints, everywhere, read_state
from engine.device import DEVICES, PRECISIONS
from engine.distributed import RESTARTS, TIMEOUT, gather_objects, print0, rank, world_size
from engine.errors import Parser, UserError, expect
from engine.files import check_output, read_json, write_json
from engine.log import begun_here, tensorboard
from model import OBJECTIVES
from recipes import (
    CONTRASTIVE,
    FINE_TUNING,
    RECIPES,
    SMALL_DATA,
    STAGES,
    WITH_LLM,
    fit_to,
    paper_column,
    recipe_values,
    scaled,
)
from sources.mixture import check_spec
from sources.prompts import FORMATS
from weights.configs import check_run, llm_config, read_config
from weights.open import find_vit
from weights.runs import relocated

BEFORE = {"2": "1", "retrieval": "1", "caption": "2", "vqa": "2"}  # stage -> that of the run which --init names

# Limits of a flag: does a value fit, and what is expected.
AT_LEAST_0 = (lambda x: x >= 0, "0 or more")
AT_LEAST_1 = (lambda x: x >= 1, "at least 1")
ABOVE_0 = (lambda x: x > 0, "above 0")
BELOW_1 = (lambda x: 0 <= x < 1, "0 or more, and below 1")
SHARE = (lambda x: 0 < x <= 1, "above 0 and at most 1")
SIDE = (lambda x: 1 <= x <= 4096, "1 to 4096")
WIDTH = (lambda x: 1 <= x <= 65_536, "1 to 65536")
SEED = (lambda x: 0 <= x < 2**63, "0 or more, and below 2^63")
WORKERS = (lambda x: -1 <= x <= 256, "-1 to 256")
NOT_EMPTY = (bool, "at least one")
HAS_PLACE = (lambda x: "{}" in x, "{} in it, where the question goes")
OBJECTIVE_CHOICE = (lambda x: not Counter(x.split(",")) - Counter(OBJECTIVES), "any of itc, itm, itg, with commas")


def one_of(*choices: str) -> tuple:
    """Limits of a flag that has choices."""
    return lambda x: x in choices, f"{', '.join(choices[:-1])} or {choices[-1]}"


def flag(default, help: str, fits: tuple | None = None, stages: tuple = STAGES, resume: bool = False, alone=None):
    """A row of TrainConfig. resume: may it differ from the run that is resumed? alone: the value without one."""
    row = dict(help=help, fits=fits, stages=stages, resume=resume, alone=alone)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=row)
    return field(default=default, metadata=row)


TINY = os.path.relpath(Path(__file__).parent / "assets/tiny")  # the parts that ship with the code


@dataclass
class TrainConfig:
    """All flags, in the groups of --help. What is None is taken from the recipe."""

    stage: str = flag("1", "1: representation (3.2), 2: generative (3.3); caption, vqa, retrieval: fine-tuning")
    init: str = flag("", "run to start from; stage 2 also: none, for a Q-Former fresh from BERT", stages=STAGES[1:])

    vit: str = flag(f"{TINY}/vit", "frozen image encoder: a folder, a name for random weights, or eva-g:FILE",
                    resume=True)  # fmt: skip
    bert: str = flag(f"{TINY}/bert", "BERT folder that the Q-Former starts from", resume=True)
    llm: str = flag(f"{TINY}/opt", "frozen language model: a folder, or a name for random weights", stages=WITH_LLM,
                    resume=True)  # fmt: skip
    prompt_format: str | None = flag(None, "what a model of the Llama family reads, if not what its folder says",
                                     one_of(*FORMATS), ("2",))  # fmt: skip
    shard_vit: bool = flag(False, "spread the frozen ViT over all processes", resume=True)
    shard_llm: bool = flag(False, "spread the language model over all processes", stages=WITH_LLM, resume=True)
    freeze_vit: bool | None = flag(None, "leave the ViT frozen", stages=FINE_TUNING)
    image_size: int | None = flag(None, "pixels a side", SIDE)
    queries: int | None = flag(None, "learned queries", SIDE)
    cross_every: int = flag(2, "cross-attention in every n-th block", AT_LEAST_1)
    embed_dim: int | None = flag(None, "width of the space in which ITC compares", WIDTH)
    max_text_tokens: int = flag(32, "longer texts are truncated", AT_LEAST_1)
    dropout: float | None = flag(None, "of the Q-Former", BELOW_1)

    data: list[str] = flag(["shapes"], "shapes, an annotation file, a folder, tar shards; several: each may have a "
                           "weight, as FILE:2", NOT_EMPTY, resume=True)  # fmt: skip
    images: list[str] = flag([], "folders of the images, if not beside the file; may be repeated", resume=True)
    caption_field: str = flag("", "of tar shards: the JSON field with the captions; by default the .txt, or caption")
    shuffle_shards: int = flag(0, "of tar shards: read this many at a time, for slow disks; 0: all", AT_LEAST_0)
    val_data: str = flag("", "annotations to validate on", resume=True)
    val_photos: int | None = flag(None, "or: hold out this many images of --data", AT_LEAST_0)
    test_images: int = flag(0, "images of the final evaluation, 0 for all", AT_LEAST_0, resume=True)
    cache_features: bool | None = flag(None, "run the frozen ViT once per image, keep its tokens; no augmentation")
    workers: int = flag(-1, "loader processes; -1 chooses", WORKERS, resume=True)

    losses: str = flag("itc,itm,itg", "which objectives", OBJECTIVE_CHOICE, CONTRASTIVE)
    negatives_ramp: int | None = flag(None, "steps until ITM's negatives are hard; 0: at once", AT_LEAST_0, CONTRASTIVE)
    gradcache: bool = flag(False, "ITC over all accumulated micro-batches, in two passes", stages=CONTRASTIVE)
    prompt: str | None = flag(None, "what captions continue", stages=("caption",))
    template: str | None = flag(None, "for questions, with {} for the question", HAS_PLACE, ("vqa",))
    condition: bool = flag(True, "the Q-Former reads the question too (paper, Figure 7)", stages=("vqa",))

    steps: int | None = flag(None, "optimizer steps; what is counted in steps is scaled with them", AT_LEAST_1)
    epochs: float | None = flag(None, "or: how often each caption, or question, is shown", ABOVE_0)
    batch: int | None = flag(None, "global batch of a step, over all ranks", AT_LEAST_1)
    micro_batch: int = flag(0, "images a rank takes at once; 0: its share of --batch, less accumulates", AT_LEAST_0,
                            resume=True)  # fmt: skip
    lr: float | None = flag(None, "peak learning rate", ABOVE_0, resume=True)
    bert_lr: float = flag(1.0, "learning rate of what starts as BERT, as a share of --lr", ABOVE_0, ("1",))
    min_lr: float | None = flag(None, "learning rate at the end of the cosine", AT_LEAST_0)
    warmup: int | None = flag(None, "steps from 0 to the peak", AT_LEAST_0)
    beta2: float | None = flag(None, "of AdamW", BELOW_1)
    weight_decay: float | None = flag(None, "of tensors with two or more dimensions", AT_LEAST_0)
    clip: float | None = flag(None, "maximal gradient norm", ABOVE_0)
    vit_lr_decay: float | None = flag(None, "each ViT block learns so much slower than the next", SHARE, FINE_TUNING)
    grad_checkpointing: bool | None = flag(None, "recompute blocks of LLM and trained ViT", stages=STAGES[1:])

    out: str = flag("", "folder of the run; runs/stage1, runs/stage2, runs/caption, ... if not given", resume=True)
    resume: str = flag("", "continue the run in --out; --resume auto starts it if there is none",
                       one_of("", "always", "auto"), resume=True, alone="always")  # fmt: skip
    data_changed: bool = flag(False, "with --resume: go on though data or images have changed", resume=True)
    overwrite: bool = flag(False, "delete the run in --out first", resume=True)
    seed: int = flag(0, "of everything random", SEED)
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", one_of("auto", *PRECISIONS), resume=True)
    device: str = flag("auto", "auto, cuda, mps or cpu", one_of(*DEVICES), resume=True)
    log_every: int = flag(20, "steps between printed lines", AT_LEAST_1, resume=True)
    eval_every: int | None = flag(None, "steps between validations, 0 for none", AT_LEAST_0, resume=True)
    save_every: int | None = flag(None, "steps between checkpoints", AT_LEAST_1, resume=True)
    timeout: float = flag(TIMEOUT, "minutes that a process waits for the others", ABOVE_0, resume=True)
    keep: int = flag(1, "how many checkpoints are kept beside the best", AT_LEAST_1, resume=True)
    tensorboard: bool = flag(False, "write the numbers of log.jsonl for TensorBoard too", resume=True)
    config: str = flag("", "take flags from this file: a run's config.json, or of --write-config", resume=True)
    write_config: str = flag("", "write the whole configuration to this file, and stop", resume=True)


GROUPS = {  # of --help: the first flag of each
    "stage": "what is trained", "vit": "model", "data": "data", "losses": "objective", "steps": "optimization",
    "out": "run",
}  # fmt: skip
ONCE = {"out", "resume", "data_changed", "overwrite", "config", "write_config"}  # of one command, not of a run
FLAGS = {f.name: f for f in dataclasses.fields(TrainConfig)}


def dashed(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


def kind_of(row: dataclasses.Field) -> type:
    """The type of a flag's value: int of int | None, list of list[str]."""
    return list if typing.get_origin(row.type) is list else next(iter(typing.get_args(row.type)), row.type)


def parse_flags(argv: list[str] | None, description: str) -> tuple[TrainConfig, set[str]]:
    """Command line -> the configuration, and the names of the flags that were given, in a --config file too."""
    early = Parser(prog="python train.py", add_help=False)
    early.add_argument("--stage", default="1")
    stage = early.parse_known_args(argv)[0].stage  # --help shows its flags and recipes
    parser = Parser(
        prog="python train.py", usage="python train.py [flags]", description=description,
        argument_default=argparse.SUPPRESS,
        epilog="flags and recipes of the other stages: --stage 2 --help, or caption, vqa, retrieval",
    )  # fmt: skip
    for name, f in FLAGS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind = kind_of(f)
        default = "shapes" if name == "data" else recipe_values(stage, name) if f.default is None else f.default
        shown = f" (default: {default})" if default not in ("", False, dataclasses.MISSING) else ""
        foreign = stage in STAGES and stage not in f.metadata["stages"]
        about = argparse.SUPPRESS if foreign else f.metadata["help"] + shown
        if kind is bool:
            group.add_argument(dashed(name), action=argparse.BooleanOptionalAction, help=about)
        elif kind is list:
            group.add_argument(dashed(name), action="append", help=about, metavar="PATH")
        else:
            more = {} if (alone := f.metadata["alone"]) is None else dict(nargs="?", const=alone)
            group.add_argument(dashed(name), type=kind, help=about, metavar=kind.__name__, **more)
    given = vars(parser.parse_args(argv))
    if "config" in given:
        other = {"steps": "epochs", "epochs": "steps", "val_data": "val_photos", "val_photos": "val_data"}
        replaced = {other.get(name) for name in given}
        saved = flags_of(Path(given["config"]), stage)
        given = {name: value for name, value in saved.items() if name not in replaced} | given
    check_limits(cfg := TrainConfig(**given))  # before anything is computed from them
    return cfg, set(given)


def flags_of(path: Path, stage: str) -> dict:
    """The flags in a --write-config, or in the config.json of a run; those that belong to no one run."""
    saved = read_json(path)
    saved = saved.get("train", saved) if isinstance(saved, dict) else saved
    expect(isinstance(saved, dict), f"--config {path} holds no object: expected flags and their values")
    saved = {name: value for name, value in saved.items() if name not in ONCE}
    if saved.get("steps"):
        saved.pop("epochs", None)
    unknown = sorted(saved.keys() - FLAGS)
    expect(not unknown, f"--config {path} has {', '.join(unknown[:5])}, which are no flags: remove them")
    check_types(saved, f"--config {path}")
    stage = saved.get("stage", stage)
    mine = {name for name in saved if stage in FLAGS[name].metadata["stages"]}
    return {name: saved[name] for name in mine if saved[name] is not None}


def check_types(saved: dict, where: str) -> None:
    """Refuse values in a file that a command line cannot give."""
    for name, value in saved.items():
        kind, whole = kind_of(FLAGS[name]), type(value) is int
        fits = value is None or type(value) is kind or (kind is float and whole)
        fits = fits and all(isinstance(item, str) for item in (value if kind is list and value else ()))
        fits = fits and "\0" not in "".join((value or ()) if kind is list else str(value))
        expect(fits, f"{where} has {name} {value!r:.40}, expected {kind.__name__}")


def run_folder(cfg: TrainConfig) -> Path:
    """--out, or runs/stage1, runs/stage2, runs/caption, ..."""
    run = Path(cfg.out or "runs/" + (cfg.stage if cfg.stage in FINE_TUNING else f"stage{cfg.stage}"))
    expect(not os.path.exists(run) or os.path.isdir(run), f"--out {run} is a file, expected a folder: pass another")
    return run


def restarted(run: Path) -> bool:
    """Has torchrun started this run before and restarts it now?"""
    return RESTARTS > 0 and begun_here(run / "log.jsonl")


def continues(run: Path, cfg: TrainConfig) -> bool:
    """Is the run in this folder to be continued? A new run must not find another there."""
    asked, found = bool(cfg.resume) or restarted(run), bool(checkpoints(run))
    asked, found = gather_objects((asked, found))[0]  # the disk may not show the same to all
    holds = f"{run} holds a run: pass --resume to continue it, --out to start another, or --overwrite"
    expect(asked or cfg.overwrite or not found, holds)
    none = f"--resume: {run} has no checkpoint yet: leave --resume out to start it, or pass --resume auto"
    expect(found or RESTARTS or cfg.resume != "always", none)
    return asked and found


# --- a new run -------------------------------------------------------------------------------------------------------


def begin(cfg: TrainConfig, given: set[str], images: int, texts: int) -> TrainConfig:
    """The configuration of a new run on so many images with so many texts, which the recipe completes; says what was
    chosen and why, and what to expect of parts that do not fit. With --write-config it ends here."""
    cfg, chosen = complete(cfg, given, images, texts)
    print0(chosen)
    if unfit := unfit_parts(cfg):
        print0(unfit)
    if cfg.write_config:
        check(cfg)
        check_output("write-config", cfg.write_config)
        if rank() == 0:
            write_json(Path(cfg.write_config), dataclasses.asdict(cfg), indent=2)
        print0(f"written to {cfg.write_config}; to start this run: python train.py --config {cfg.write_config}")
        sys.exit(0)
    return cfg


def complete(cfg: TrainConfig, given: set[str], images: int, texts: int) -> tuple[TrainConfig, str]:
    """Fill what was not given from the run that --init names and from the recipe -> the whole configuration, and what
    was chosen and why."""
    fits, expected = one_of(*STAGES)
    expect(fits(cfg.stage), f"got --stage {cfg.stage}, expected {expected}")
    for name in given:
        stages = FLAGS[name].metadata["stages"]
        foreign = f"got {dashed(name)}, a flag of stage {', '.join(stages)}, in stage {cfg.stage}: leave it out"
        expect(cfg.stage in stages, foreign)
    expect(not given >= {"steps", "epochs"}, "got --steps and --epochs, expected one of them: leave the other out")
    inherited = inherit(cfg, given)
    width = inherited.pop("image_width", 0)
    name, why = choose_recipe(cfg, inherited.get("llm", cfg.llm), width, images)
    recipe, reasons = dict(RECIPES[name]), []
    if name.endswith("small"):
        small, reasons = fit_to(images, cfg, given)
        recipe = small | recipe
        inherited.pop("dropout", None)
    elif cfg.stage in FINE_TUNING:
        inherited.pop("image_size", None)
    recipe |= {"val_photos": 0, "cache_features": False, "freeze_vit": False} | recipe
    recipe |= scaled(recipe, cfg, given, texts, reasons)
    recipe = {key: value for key, value in recipe.items() if key not in given | inherited.keys()}
    if "min_lr" in recipe:  # the rate never rises again
        recipe["min_lr"] = min(recipe["min_lr"], recipe.get("lr", cfg.lr))
    chosen = [f'recipe "{name}", because {why}: {listed(recipe)}', *reasons]
    if inherited:
        chosen.append(f"from {cfg.init}: {listed(inherited)}")
    chosen = [textwrap.fill(line, 98, subsequent_indent="  ", break_long_words=False) for line in chosen]
    return dataclasses.replace(cfg, **recipe, **inherited), "\n".join(chosen)


def listed(values: dict) -> str:
    """Flags and their values, without what is off."""
    told = [(name, value) for name, value in values.items() if value is not None and value is not False]
    told = [(name, f"{value:g}" if isinstance(value, float) else value) for name, value in told]
    return ", ".join(f"{name} {value}" for name, value in told if (name, value) != ("val_photos", 0))


def choose_recipe(cfg: TrainConfig, llm: str, image_width: int, images: int) -> tuple[str, str]:
    """Name of the recipe, and the reason."""
    column, why = "tiny", "--data is shapes"
    if cfg.data != ["shapes"] and images < SMALL_DATA:
        column, why = "small", f"{images:,} images are fewer than {SMALL_DATA:,}"
    elif cfg.data != ["shapes"]:
        column, why = "paper", f"{images:,} images are {SMALL_DATA:,} or more"
        if cfg.stage in WITH_LLM:
            llm_cfg = llm_config(llm)[0]
            column += paper_column(cfg.stage, llm_cfg)
            why += f" and the language model has width {llm_cfg.width}"
        else:
            width = image_width or find_vit(cfg.vit)[0].width  # no run is started from in stage 1
            column += ", ViT-g" if width > 1024 else ", ViT-L"
            why += f" and the ViT has width {width}"
    return f"{'' if cfg.stage in FINE_TUNING else 'stage '}{cfg.stage}, {column}", why


# What to fetch in the place of the tiny parts: repository of the hub, files, size.
DOWNLOADS = {
    "vit": ("facebook/dinov2-small", "config.json,preprocessor_config.json,model.safetensors", "88 MB"),
    "bert": ("sentence-transformers/all-MiniLM-L6-v2", "config.json,tokenizer.json,model.safetensors", "91 MB"),
    "llm": ("facebook/opt-125m", "config.json,vocab.json,merges.txt,pytorch_model.bin", "251 MB"),
}


def unfit_parts(cfg: TrainConfig) -> str:
    """What to pass in the place of the tiny parts if the images are real; empty if there is nothing to say."""
    parts = ("vit", "bert") + ("llm",) * (cfg.stage in WITH_LLM)
    tiny = [part for part in parts if Path(getattr(cfg, part)).resolve().parent == Path(TINY).resolve()]
    if not tiny or "shapes" in cfg.data:
        return ""
    flags = " ".join(f"--{part} W/{Path(DOWNLOADS[part][0]).name}" for part in tiny)
    lines = [
        f"WARNING: {', '.join(map(dashed, tiny))}: the tiny parts that ship with the code know drawn shapes alone, "
        f"and a run over them learns next to nothing of photos. Fetch real ones, once, and pass {flags}:"
    ]
    for repository, files, size in (DOWNLOADS[part] for part in tiny):
        where = f"W/{Path(repository).name}/#1"
        url = f"https://huggingface.co/{repository}/resolve/main/{{{files}}}"
        lines.append(f'  curl -L --create-dirs -o "{where}" "{url}"  # {size}')
    return "\n".join(lines)


def inherit(cfg: TrainConfig, given: set[str]) -> dict:
    """What a run takes from the run it starts from, and the ViT's width; empty if it starts from none. --vit, --llm and
    --dropout may differ, and fine-tuning takes another --image-size."""
    folder, before = Path(cfg.init), BEFORE.get(cfg.stage)
    if before is None or (cfg.stage, cfg.init) == ("2", "none"):
        return {}
    start = f"stage {cfg.stage} starts from a run of stage {before}: pass --init runs/stage{before}"
    expect(cfg.init not in ("", "none"), start + ", or --init none to go without" * (cfg.stage == "2"))
    missing = f"--init {folder} is not a run: train it with --stage {before} --out {folder}"
    expect(os.path.exists(folder / "config.json"), missing + ", or pass --init none" * (cfg.stage == "2"))
    run = read_config(folder)
    export = f"make one of it with python -m tools.weights export {folder} --format run runs/{folder.name}"
    expect(run.get("model") == "blip2", f"--init {folder} is a public checkpoint, expected a run: {export}")
    (q, _), has_llm = check_run(run, folder / "config.json"), bool(run.get("llm"))
    differs = f"--init {folder} is a run {'with' if has_llm else 'without'} a language model, {start}"
    expect(cfg.stage == "2" or has_llm == (before == "2"), differs)
    expect(
        not run.get("conditioned") or (cfg.stage == "vqa" and cfg.condition),
        f"--init {folder} was fine-tuned with the question in the Q-Former: continue it in --stage vqa, or start from "
        "the run of stage 2 before it",
    )
    inherited = {name: relocated(run[name], folder) for name in ("vit", "bert", "llm") if run.get(name)}
    inherited |= dict(dropout=q.dropout, queries=q.num_queries, cross_every=q.cross_every)
    inherited |= {name: run[name] for name in ("image_size", "embed_dim", "max_text_tokens")}
    free = {"vit", "dropout", "llm"} | ({"image_size"} if cfg.stage in FINE_TUNING else set())
    for name in given & inherited.keys() - free:
        got, had = getattr(cfg, name), inherited[name]
        expect(got == had, f"got {dashed(name)} {got}, but {folder} has {had}: leave it out")
    return {name: value for name, value in inherited.items() if name not in given} | {"image_width": q.image_width}


# --- an old run ------------------------------------------------------------------------------------------------------


def resume(run: Path, cfg: TrainConfig, given: set[str]) -> tuple[TrainConfig, Path, dict]:
    """An old run -> its configuration, the folder of its newest checkpoint, its train state.

    Refuses flags that would make another run of it. Data and frozen parts may have moved: `restore` compares their
    hashes. The number of processes may be another (see `share_out`).
    """
    folder = everywhere(gather_objects(checkpoints(run)[-1:])[0][0])
    state = read_state(folder)
    config, where = read_config(folder), folder / "config.json"
    check_run(config, where)
    parts = {name: relocated(config[name], folder) for name in ("vit", "bert", "llm") if config.get(name)}
    saved = dataclasses.replace(saved_config(config.get("train") or {}, where), **parts)
    may_change = {name for name, f in FLAGS.items() if f.metadata["resume"]}
    other = [name for name in given - may_change if getattr(saved, name) != getattr(cfg, name)]
    was = ", ".join(f"{dashed(name)} {getattr(saved, name)}" for name in other)
    expect(not other, f"--resume: {run} was started with {was}: leave those flags out, or start another run with --out")
    print0(f"resuming {run} at step {state['step']}")
    changed = {name: getattr(cfg, name) for name in given & may_change}
    changed["micro_batch"] = share_out(saved, len(state["rng"]), changed.get("micro_batch", 0))
    if "lr" in changed:  # the rate never rises
        changed["min_lr"] = min(saved.min_lr, cfg.lr)
    return dataclasses.replace(saved, **changed), folder, state


def share_out(saved: TrainConfig, ranks: int, asked: int) -> int:
    """--micro-batch with which a run of so many ranks goes on here. ITC and ITM compare as many images as before; where
    they compare those of a whole step, or none, a process takes no more at once than `asked`, or than before."""
    world, before = world_size(), saved.micro_batch or max(1, saved.batch // ranks)
    alone = saved.gradcache or saved.stage in WITH_LLM  # no micro-batch sees another
    whole = saved.batch if alone else before * ranks
    if world != ranks:
        fitting = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        images = f"--batch {whole} does" if alone else f"{whole} images, which ITC and ITM compare at a time, do"
        expect(whole % world == 0, f"--resume: {images} not divide into {world} processes: start one of {fitting}")
        goes_on = "samples and losses go on; dropout draws other random numbers"
        print0(f"resumed with {world} process(es) instead of {ranks}: {goes_on}")
    most = min(asked or before, whole // world) if alone else whole // world
    micro_batch = max(n for n in range(1, most + 1) if whole // world % n == 0)
    if asked not in (0, micro_batch):
        print0(f"--micro-batch {asked} is {micro_batch} now, so that as many images are compared as before")
    return 0 if micro_batch * world == saved.batch else micro_batch


def saved_config(saved: dict, where: str | Path = "config.json") -> TrainConfig:
    """The configuration in a checkpoint; of older runs, without flags that no longer exist."""
    lacks = [name for name in ("stage", "data", "batch", "steps") if name not in saved]
    expect(not lacks, f"{where} has no {', '.join(lacks)} in train, expected them as train.py writes them")
    compared = saved.get("itc_batch", 0)
    expect(
        compared in (0, saved["batch"]) and not saved.get("last_block"),
        "--resume: the run was started with --last-block, or with an --itc-batch below --batch, which no longer exist: "
        "start another run with --out",
    )
    known = {name: value for name, value in saved.items() if name in FLAGS and name not in ONCE}
    check_types(known, str(where))
    return TrainConfig(**{"gradcache": bool(compared)} | known)


# --- limits ----------------------------------------------------------------------------------------------------------


def check_limits(cfg: TrainConfig) -> None:
    """Refuse a value that its flag cannot have."""
    for name, f in FLAGS.items():
        value, fits = getattr(cfg, name), f.metadata["fits"]
        expect(not isinstance(value, float) or math.isfinite(value), f"got {dashed(name)} {value}, expected a number")
        if fits and value is not None and not fits[0](value):
            raise UserError(f"got {dashed(name)} {value}, expected {fits[1]}")


def check(cfg: TrainConfig) -> None:
    """Refuse what cannot work, in a sentence."""
    check_limits(cfg)
    if cfg.tensorboard:
        tensorboard()
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
        trained = "--shard-vit spreads a frozen ViT, here it is trained: add --freeze-vit, or leave the flag out"
        expect(not cfg.shard_vit, trained)
    alone = not cfg.gradcache or "itc" in cfg.losses.split(",")
    expect(alone, f"--gradcache is for ITC, which --losses {cfg.losses} leaves out: leave it out too")
    share = cfg.batch / world_size()
    micro = cfg.micro_batch or share
    fitting = math.ceil(share / math.ceil(micro)) * math.ceil(micro) * world_size()
    uneven = f"--batch {cfg.batch} does not divide into {world_size()} processes with micro-batches of {micro:g}"
    expect(share % 1 == 0 and share % micro == 0, f"{uneven}: pass --batch {fitting}")
