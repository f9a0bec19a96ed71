"""The experiments behind the lessons: `python course/lab.py leak-itg` changes one thing, trains, and compares.

Every experiment trains the unchanged model and one or more changed ones (course/changes.py) in the shapes world for a
few hundred steps, measures both on 400 unseen images, prints a table, and writes a picture and all numbers:

    runs/lab/leak-itg.svg, leak-itg.json       the picture, the numbers
    runs/lab/unchanged-300-seed0/ ...          the runs, trained once for all experiments; unchanged-300-seed0.txt

--seeds 3 repeats it with three seeds: mean and standard deviation. Two runs train side by side, one on each core.
A stopped experiment goes on when its command is typed again. A changed run knows nothing of its change: train.py and
eval.py open its folder as if it were unchanged.
"""

import argparse
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from blip2 import TINY  # noqa: E402
from course import changes  # noqa: E402
from course.draw import picture, table  # noqa: E402
from course.studies import STUDIES  # noqa: E402
from engine.device import cores  # noqa: E402
from engine.errors import Parser, at_least_1, expect, run_command  # noqa: E402
from engine.files import whole, write_json  # noqa: E402
from engine.log import loss_bounds, rows_of  # noqa: E402
from engine.progress import clock  # noqa: E402
from sources.mixture import Mixture, open_images  # noqa: E402
from tasks.batches import evaluation  # noqa: E402
from tasks.retrieval import retrieval  # noqa: E402
from tasks.shapes_qa import shapes_captioning, shapes_vqa  # noqa: E402
from tools import make_tiny  # noqa: E402
from vit import ViTConfig  # noqa: E402

STEPS = 300
POINTS = 60  # of a curve


@dataclass(frozen=True)
class Variant:
    """A way to train: a change of the code, flags of train.py, or both."""

    about: str
    change: Callable = nullcontext
    flags: str = ""
    after: str = ""  # the variant whose run it starts from
    share: float = 1.0  # of the steps of the experiment


def stage2(about: str, flags: str = "", after: str = "", change: Callable = nullcontext, share: float = 0.2) -> Variant:
    """Stage 2 for few steps: what stage 1 has learned, shows early."""
    return Variant(about, change, f"--stage 2 {flags}" + " --init none" * (not after), after, share)


VARIANTS = {
    "unchanged": Variant("as the product has it"),
    # Stage 1
    "leak-itg": Variant("text may look ahead in ITG", changes.leak_itg),
    "leak-itc": Variant("text and queries see each other in ITC", changes.leak_itc),
    "temperature-1": Variant("the temperature is 1", changes.temperature_1),
    "mean-over-queries": Variant("the mean of the queries instead of the highest", changes.mean_over_queries),
    "random-negatives": Variant("negatives of ITM are random", changes.random_negatives),
    "hard-at-once": Variant("negatives of ITM are hard from step 1", flags="--negatives-ramp 0"),
    "without-itg": Variant("ITC and ITM only", flags="--losses itc,itm"),
    "without-itm": Variant("ITC and ITG only", flags="--losses itc,itg"),
    "zero-queries": Variant("queries start at zero", changes.zero_queries),
    "1-query": Variant("1 query instead of 8", flags="--queries 1"),
    "32-queries": Variant("32 queries", flags="--queries 32"),
    "one-feed-forward": Variant("queries share the feed-forward of the text", changes.one_feed_forward),
    "last-block": Variant("the ViT keeps its last block", changes.last_block),
    "40-steps": Variant("a whole run of 2/15 of the steps", share=2 / 15),
    "accumulated": Variant("batch 32 as 4 micro-batches of 8", flags="--micro-batch 8"),
    "gradcache": Variant("the same with --gradcache", flags="--micro-batch 8 --gradcache"),
    # Stage 2
    "opt": stage2("OPT, after stage 1", after="unchanged"),
    "opt-alone": stage2("OPT, without stage 1"),
    "t5": stage2("T5 (prefix LM), after stage 1", "--llm {tiny}/t5", "unchanged"),
    "t5-alone": stage2("T5 (prefix LM), without stage 1", "--llm {tiny}/t5"),
    "opt-blank": stage2("OPT, trained on blank images", after="unchanged", change=changes.blank_images),
    # Other parts; {parts} is where `make_part` puts them
    "vit-24": Variant("a ViT of width 24 instead of 96", flags="--vit {parts}/vit-24"),
    "opt-32": stage2("an OPT of width 32", "--llm {parts}/opt-32", "unchanged"),
    "opt-64": stage2("an OPT of width 64", "--llm {parts}/opt-64", "unchanged"),
    "opt-128": stage2("an OPT of width 128", "--llm {parts}/opt-128", "unchanged"),
    "vit-random": Variant("a ViT that has learned nothing", flags="--vit {parts}/vit-random"),
    "after": stage2("after stage 1, over a random ViT", after="vit-random"),
    "after-long": stage2("the same, five times as long", after="vit-random", share=1.0),
    "alone": stage2("without stage 1, over a random ViT", "--vit {parts}/vit-random"),
    "alone-long": stage2("the same, five times as long", "--vit {parts}/vit-random", share=1.0),
}
for n, of in ((1, "1-query"), (8, "unchanged")):  # fine-tuning for VQA (paper 4.3, Figure 7) with few queries
    VARIANTS[f"opt-{n}q"] = stage2(f"stage 2, queries: {n}", after=of)
    VARIANTS[f"vqa-{n}q"] = Variant(f"VQA, queries: {n}", flags="--stage vqa", after=f"opt-{n}q", share=0.5)
    plain = f"VQA, queries: {n}, that do not read the question"
    VARIANTS[f"vqa-{n}q-plain"] = Variant(plain, flags="--stage vqa --no-condition", after=f"opt-{n}q", share=0.5)


def make_part(folder: Path, small: bool) -> None:
    """Train a ViT of another width than the tiny one, as `tools.make_tiny` does, or an OPT for 1,500 steps."""
    kind, width = folder.name.split("-")
    if (folder / "model.safetensors").exists():
        return
    if kind == "opt":
        sizes = make_tiny.TINY_SIZES["opt"] | dict(width=int(width), mlp=4 * int(width), embed_width=int(width))
        with redirect_stdout(io.StringIO()):
            make_tiny.make_llm("opt", folder, make_tiny.ShapesText(), sizes, 10 if small else 1500, 32)
        return
    steps = 0 if width == "random" else 10 if small else make_tiny.STEPS["vit"]
    sizes = {} if width == "random" else dict(width=int(width), mlp=4 * int(width))
    smaller = patch.object(make_tiny, "ViTConfig", lambda **tiny: ViTConfig(**(tiny | sizes)))
    with smaller, redirect_stdout(io.StringIO()):
        make_tiny.make_vit(folder, steps)


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """What the command line says."""

    out: Path
    steps: int = STEPS
    seeds: int = 1
    jobs: int = 1
    small: bool = False  # a trial of seconds: few steps, few images; its numbers mean nothing

    def run(self, variant: str, seed: int) -> Path:
        """The folder of a run."""
        return self.out / f"{variant}-{self.steps}-seed{seed}"


def some_images(small: bool) -> Mixture:
    """Of the test split, 200 plain images and 100 pairs that differ by a swap only."""
    images = open_images(["shapes"], "test", 64)
    subsets = np.array(images.parts[0].subsets)
    rows = [np.flatnonzero(subsets == name)[: 4 if small else 200] for name in ("plain", "swapped")]
    return Mixture(images.parts, np.concatenate(rows))


@evaluation
def measure(model, objectives: tuple[str, ...], small: bool) -> dict:
    """The numbers of a trained model, in per cent."""
    images = some_images(small)
    plain = images.subset(np.arange(len(images) // 2))
    if "lm" in objectives:
        found = shapes_vqa(model, plain)
        names = {"answers": "the image", "blank image": "a blank image", "another image": "another image"}
        names |= {"majority answer": "the majority answer", "true caption as text": "the true caption as text"}
        shares = {name: found["accuracy"][key]["all"] for name, key in names.items()}
        return shares | {"captions": found["correct captions"]}
    found, numbers = retrieval(model, images, k=16, rerank="itm", match="itm" in objectives), {}
    for ranking, name in (("itc", "R@1"), ("reranked", "R@1 re-ranked")):
        if ranking in found:
            numbers[name] = statistics.mean(way["R@1"] for way in found[ranking].values())
    numbers |= {f"twins by {name.upper()}": share for name, share in found["twins"].items()}
    if "itg" in objectives:
        numbers["captions"] = shapes_captioning(model, plain)["correct captions"]
    return numbers


def train_one(lab: Lab, name: str, seed: int) -> dict:
    """Train a variant, unless it has been -> its numbers, with the losses of the last tenth of the steps and curves."""
    run, variant, started = lab.run(name, seed), VARIANTS[name], time.time()
    if (run / "numbers.json").exists():
        return json.loads((run / "numbers.json").read_text())
    if lab.jobs > 1:
        torch.set_num_threads(max(1, cores() // lab.jobs))
    steps = max(2, round(lab.steps * variant.share))
    flags = f"--steps {steps} --seed {seed} --eval-every 0 --precision fp32 --overwrite".split()
    flags += [word.format(parts=lab.out / "parts", tiny=TINY) for word in variant.flags.split()] + ["--out", str(run)]
    flags += ["--batch", "8"] * (lab.small and "--micro-batch" not in flags)
    flags += ["--init", str(lab.run(variant.after, seed))] * bool(variant.after)
    sizes = {}

    def final_evaluation(model, val, cfg, objectives, workers, run):
        words = (model.qformer if model.llm is None else model.llm).cfg.vocab_size
        candidates = cfg.batch if cfg.gradcache else cfg.micro_batch or cfg.batch
        sizes["bounds"] = loss_bounds(objectives, candidates, words)
        return measure(model, objectives, lab.small)

    run.mkdir(parents=True, exist_ok=True)
    with open(Path(f"{run}.txt"), "w") as log, redirect_stdout(log), variant.change():
        with patch.object(train, "final_evaluation", final_evaluation):
            numbers = train.main(flags)
    rows = [row for row in rows_of(run / "log.jsonl") if "loss" in row]
    losses = [name for name in (*sizes["bounds"], "norm", "temperature") if name in rows[0]]
    last = rows[-max(1, len(rows) // 10) :]
    numbers |= {key: statistics.mean(row[key] for row in last) for key in losses if key != "norm"}
    numbers |= {"first norm": rows[0]["norm"], "images a second": rows[-1]["images_per_s"]}
    every = -(-len(rows) // POINTS)
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    curves = {key: [round(statistics.mean(row[key] for row in part), 5) for part in parts] for key in losses}
    curves["step"] = [part[-1]["step"] for part in parts]
    numbers = {"numbers": numbers, "curves": curves, "bounds": sizes["bounds"], "seconds": round(time.time() - started)}
    write_json(run / "numbers.json", numbers)
    return numbers


def train_all(lab: Lab, names: tuple[str, ...]) -> dict[str, list[dict]]:
    """All variants with all seeds, and first what they start from -> the numbers of each, by seed."""
    before = tuple(dict.fromkeys(VARIANTS[name].after for name in names if VARIANTS[name].after))
    if before:
        train_all(lab, before)
    for name in names:
        for part in re.findall(r"{parts}/(\S+)", VARIANTS[name].flags):
            torch.manual_seed(0)
            make_part(lab.out / "parts" / part, lab.small)
    pairs = [(name, seed) for seed in range(lab.seeds) for name in names]
    fresh = [pair for pair in pairs if not (lab.run(*pair) / "numbers.json").exists()]
    if lab.jobs == 1:
        for pair in fresh:
            tell(pair, train_one(lab, *pair))
    else:
        with ProcessPoolExecutor(lab.jobs, get_context("spawn")) as pool:
            tasks = [pool.submit(train_one, lab, *pair) for pair in fresh]
            try:
                for pair, task in zip(fresh, tasks):
                    tell(pair, task.result())
            except BaseException:  # a stop, or an error: do not begin the others
                pool.shutdown(cancel_futures=True)
                raise
    return {name: [train_one(lab, name, seed) for seed in range(lab.seeds)] for name in names}


def tell(pair: tuple[str, int], found: dict) -> None:
    """Say that a run is done."""
    name, seed = pair
    print(f"{name}, seed {seed}: {VARIANTS[name].about}: {clock(found['seconds'])}", flush=True)


# --- the experiments -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Variants to compare: the columns of the table, the curve and the columns that the picture shows."""

    title: str
    variants: tuple[str, ...]
    columns: tuple[str, ...]
    curve: str
    bars: tuple[str, ...]

    def __call__(self, lab: Lab) -> dict:
        """Train and compare -> what `draw.table` and `draw.picture` show."""
        runs = train_all(lab, self.variants)
        first = runs[self.variants[0]][0]
        shown = {"title": self.title, "columns": self.columns, "curve": self.curve, "bars": self.bars}
        shown["rows"] = {
            name: {
                column: [run["numbers"][column] for run in of] for column in self.columns if column in of[0]["numbers"]
            }
            for name, of in runs.items()
        }
        shown["curves"] = {
            name: {"step": of[0]["curves"]["step"], "values": [run["curves"][self.curve] for run in of]}
            for name, of in runs.items()
            if self.curve in of[0]["curves"]
        }
        shown["bounds"] = first["bounds"].get(self.curve)
        shown["seconds"] = {name: [run["seconds"] for run in of] for name, of in runs.items()}
        return shown


RECALL = ("R@1", "R@1 re-ranked", "twins by ITC", "twins by ITM")
ANSWERS = ("lm", "answers", "blank image", "another image", "majority answer", "true caption as text")
EXPERIMENTS = {
    "queries": Experiment(
        "How many queries", ("1-query", "unchanged", "32-queries"), ("itg", *RECALL, "captions"), "itg",
        ("R@1", "captions"),
    ),
    "zero-queries": Experiment(
        "Queries that start at zero", ("unchanged", "zero-queries"), ("first norm", "itc", *RECALL[:2], "captions"),
        "norm", ("R@1", "captions"),
    ),
    "leak-itg": Experiment(
        "Text that may look ahead in ITG", ("unchanged", "leak-itg"), ("itg", "R@1", "captions"), "itg", ("captions",),
    ),
    "leak-itc": Experiment(
        "Text and queries that see each other in ITC", ("unchanged", "leak-itc"), ("itc", *RECALL), "itc", ("R@1",),
    ),
    "temperature": Experiment(
        "A temperature of 1", ("unchanged", "temperature-1"), ("itc", "temperature", *RECALL), "itc",
        ("R@1", "twins by ITC"),
    ),
    "mean": Experiment(
        "The mean over queries in the place of the highest", ("unchanged", "mean-over-queries"), ("itc", *RECALL),
        "itc", ("R@1", "twins by ITC"),
    ),
    "negatives": Experiment(
        "Random and hard negatives", ("unchanged", "hard-at-once", "random-negatives"), ("itm", *RECALL), "itm",
        ("R@1 re-ranked", "twins by ITM"),
    ),
    "rerank": Experiment(
        "When ITM starts to help", ("40-steps", "unchanged"), ("itm", *RECALL), "itm", ("R@1", "R@1 re-ranked"),
    ),
    "objectives": Experiment(
        "What each loss adds", ("unchanged", "without-itg", "without-itm"), ("itc", "itm", "itg", *RECALL, "captions"),
        "itc", ("R@1", "R@1 re-ranked"),
    ),
    "accumulation": Experiment(
        "Accumulation is no larger batch for ITC", ("unchanged", "accumulated", "gradcache"),
        ("itc", "itg", *RECALL), "itc", ("R@1", "twins by ITC"),
    ),
    "stranger": Experiment(
        "A language model in front of a stranger", ("opt", "opt-alone", "opt-blank", "t5", "t5-alone"), ANSWERS, "lm",
        ("answers", "blank image"),
    ),
    "parts": Experiment(
        "Parts that may be taken away", ("unchanged", "last-block", "one-feed-forward"),
        ("itc", "itm", "itg", *RECALL, "captions"), "itg", ("R@1", "captions"),
    ),
    # The paper's claims (results.md)
    "vit": Experiment(
        "A better ViT", ("vit-random", "vit-24", "unchanged"), ("itc", "itg", *RECALL, "captions"), "itc",
        ("R@1", "captions"),
    ),
    "llm": Experiment("A larger language model", ("opt-32", "opt-64", "opt-128"), ANSWERS, "lm", ("answers",)),
    "figure-5": Experiment(
        "Stage 1, where language model and encoder never met", ("after", "alone", "after-long", "alone-long"), ANSWERS,
        "lm", ("answers", "blank image"),
    ),
    "condition": Experiment(
        "Queries that read the question", tuple(f"vqa-{n}q{how}" for n in (1, 8) for how in ("", "-plain")),
        ("lm", "answers", "blank image"), "lm", ("answers",),
    ),
}  # fmt: skip
EVERY = {**EXPERIMENTS, **STUDIES}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python course/lab.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiment", choices=[*EVERY], metavar="experiment", help=", ".join(EVERY))
    parser.add_argument("--seeds", type=at_least_1, default=1, help="of what is trained; mean and deviation")
    parser.add_argument("--steps", type=at_least_1, default=STEPS, help=f"of stage 1 (default {STEPS})")
    parser.add_argument("--jobs", type=at_least_1, default=cores(), help="runs that train side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--small", action="store_true", help="a trial of seconds; its numbers mean nothing")
    args = parser.parse_args(argv)
    trains = args.experiment in EXPERIMENTS or args.seeds == 1
    expect(trains, f"got --seeds {args.seeds} for {args.experiment}, which compares no seeds: leave it out")
    lab = Lab(args.out, args.steps, args.seeds, args.jobs)
    if args.small:
        lab = Lab(args.out / "small", 6, args.seeds, 1, small=True)
    started = time.time()
    shown = EVERY[args.experiment](lab) | {"steps": lab.steps, "seeds": lab.seeds}
    print("", *table(shown), sep="\n")
    lab.out.mkdir(parents=True, exist_ok=True)
    write_json(lab.out / f"{args.experiment}.json", shown)
    with whole(drawing := lab.out / f"{args.experiment}.svg") as partial:
        partial.write_text(picture(shown))
    print(f"{clock(time.time() - started)}; the picture: {drawing}")


if __name__ == "__main__":
    sys.exit(run_command(main))
