"""What the paper's runs take, by model and number of GPUs: `python -m tools.scale` writes the tables of docs/scale.md.

Calculated, but for the FLOPs a second of an H100, which were measured (`SPEEDS`). FLOPs are counted by bench.py, over
tensors without data; memory is what a training prints at its start. Waiting, for GPUs or images, is in no number.
"""

import math
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from unittest import mock

from torch import device, nn

import bench
from engine.log import memory_estimate
from model import OBJECTIVES
from recipes import RECIPES
from tools.results import ROOT, log, table, with_tables

PAGE, META, GPUS, ROOM = ROOT / "docs/scale.md", device("meta"), (1, 8, 16, 32), 80e9
# Stage -> logs of a step over ViT-g on one H100, from small to large batches; other models are taken to be as fast.
SPEEDS = {"1": ("bench-stage1-h100-batch64", "bench-stage1-h100"), "2": ("bench-stage2-h100",)}
RUNS = {  # title -> --vit, --llm, recipe
    "stage 1, ViT-L": ("clip-l", "", "stage 1, paper, ViT-L"),
    "stage 1, ViT-g": ("eva-g", "", "stage 1, paper, ViT-g"),
    "stage 2, OPT-2.7B": ("eva-g", "opt-2.7b", "stage 2, paper, OPT"),
    "stage 2, OPT-6.7B": ("eva-g", "opt-6.7b", "stage 2, paper, OPT"),
    "stage 2, FlanT5-XL": ("eva-g", "flan-t5-xl", "stage 2, paper, T5"),
    "stage 2, FlanT5-XXL": ("eva-g", "flan-t5-xxl", "stage 2, paper, T5"),
}


@cache
def run_of(vit: str, llm: str, recipe: str, **sizes) -> SimpleNamespace:
    """A run: its model on the meta device, objectives, batch, number of images shown; FLOPs of an image, counted in a
    step of 8 and, in stage 1, of twice 8 with --gradcache. sizes: of bench.py, for other models than the paper's."""
    args = dict(bert="bert-base", image_size=224, queries=32, dropout=0.1, words=12, device=META, precision="bf16")
    args, row, flops = SimpleNamespace(vit=vit, llm=llm, **args | sizes), RECIPES[recipe], []
    model, objectives = bench.build_model(args, bool(llm)).train(), ("lm",) if llm else OBJECTIVES
    model.amp_dtype, amp = None, model.amp_dtype  # autocast knows no meta tensors, nor does it change FLOPs
    with mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()):
        for count in (1,) if llm else (1, 2):
            batches = [bench.random_batch(args, model, 8, number) for number in range(count)]
            flops.append(bench.counted_flops(bench.training(model, batches, objectives, args).run, META) / 8 / count)
    model.amp_dtype, images = amp, row["steps"] * row["batch"]
    return SimpleNamespace(model=model, objectives=objectives, batch=row["batch"], images=images, flops=flops)


def saved_by_sharding(llm: nn.Module, gpus: int) -> int:
    """Bytes that --shard-llm saves a GPU, which keeps its rows of each tensor and has whole, for a time, the largest
    block and what is in no block, such as the word embedding."""
    blocks = [block for name, block in llm.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return sum(sizes) - max(sizes) - sum(math.ceil(len(p) / gpus) * p.nbytes // len(p) for p in llm.parameters())


def memory(run: SimpleNamespace, gpus: int, micro_batch: int) -> float:
    """Bytes of a GPU that takes so many images at once; in stage 1 by --gradcache if its share has more."""
    cached = math.ceil(run.batch / gpus) if micro_batch < run.batch / gpus and not run.model.llm else 0
    return sum(memory_estimate(run.model, micro_batch, run.objectives, cached).values())


def speeds(run: SimpleNamespace, gpus: int, micro_batch: int) -> tuple[list[float], bool]:
    """Images a second by the logs of the nearest smaller and larger batches; is there none of a smaller one?"""
    logs = map(log, SPEEDS["2" if run.model.llm else "1"])
    rates = {int(found["settings"]["batch"]): found["numbers"]["GFLOP/s"] * 1e9 for found in logs}
    near = [size for size in rates if size <= micro_batch][-1:] + [size for size in rates if size > micro_batch][:1]
    flops = run.flops[-1 if run.batch / gpus > micro_batch else 0]
    return [gpus * rates[size] / flops for size in near], near[0] > micro_batch


def sent(run: SimpleNamespace, gpus: int, tokens: int = 16) -> list[float]:
    """Bytes that a GPU sends in a step, around a ring: gradients; ITC's features, their gradient, and texts of so many
    tokens; ITM's image tokens, if all are of other GPUs; the language model, gathered forward and backward."""
    model, share, ring = run.model, math.ceil(run.batch / gpus), (gpus - 1) / gpus
    gradients = 2 * ring * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if model.llm:
        return [gradients, 0, 0, 2 * ring * sum(p.nbytes for p in model.llm.parameters())]
    features = share * (model.qformer.cfg.num_queries + 1) * model.embed_dim * 4
    image = model.vit.cfg.tokens(model.image_size) * model.vit.cfg.width * 2  # half precision
    return [gradients, (gpus - 1) * (3 * features + share * (3 * 8 + 9 * tokens)), ring * share * image, 0]


def models() -> str:
    """What a model takes on any number of GPUs."""
    head = ("", "frozen, GB", "trained", "with AdamW, GB", "MB an image", "GFLOPs an image", "million images", "EFLOPs")
    rows = []
    for title, run in ((title, run_of(*spec)) for title, spec in RUNS.items()):
        frozen, weights, moments, kept = memory_estimate(run.model, 1, run.objectives).values()
        cells = f"{frozen / 1e9:.1f}", f"{weights / 4e6:.1f} M", f"{(weights + moments) / 1e9:.1f}", f"{kept / 1e6:.0f}"
        cost = run.flops[0] / 1e9, run.images / 1e6, run.flops[0] * run.images / 1e18
        rows.append((title, *cells, *(f"{number:,.0f}" for number in cost)))
    return table(head, *rows)


def runs() -> str:
    """The paper's runs on several numbers of GPUs."""
    rows = [("", "GPUs", "images a GPU", "memory, GB", "sharded", "images a second", "hours", "GPU-hours")]
    rows[0] += ("MB sent: gradients", "features", "image tokens", "sharded")
    for title, spec, gpus in ((title, spec, gpus) for title, spec in RUNS.items() for gpus in GPUS):
        share = math.ceil((run := run_of(*spec)).batch / gpus)
        micro = next(m for m in range(share, 0, -1) if share % m == 0 and memory(run, gpus, m) <= ROOM)
        whole, saved = memory(run, gpus, micro), saved_by_sharding(run.model.llm, gpus) if spec[1] and gpus > 1 else 0
        cells = [f"{gpus}", f"{micro}" + f" x {share // micro}" * (micro < share), f"{whole / 1e9:.0f}"]
        cells, (rates, bound) = [*cells, f"{(whole - saved) / 1e9:.0f}" * bool(saved)], speeds(run, gpus, micro)
        hours = [run.images / rate / 3600 for rate in rates[::-1]]
        for values, sign in ((rates, "≤ "), (hours, "≥ "), ([gpus * x for x in hours], "≥ ")):
            cells.append(sign * bound + " to ".join(f"{value:,.0f}" for value in values))
        rows.append((title, *cells, *(f"{size / 1e6:,.0f}" if size else "" for size in sent(run, gpus))))
    return table(*rows)


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text(), [models, runs]))


if __name__ == "__main__":
    main()
