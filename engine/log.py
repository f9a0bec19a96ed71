"""What a training prints and writes to log.jsonl."""

import json
import math
import os
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.device import peak_gigabytes
from engine.distributed import LAUNCHER, all_sum, gather_objects, print0, rank, world_size
from engine.errors import UserError, expect
from engine.files import whole, writing
from engine.progress import clock
from engine.sharding import bytes_per_rank
from losses import ITM_PRIOR, smoothing_floor

LAUNCH = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {LAUNCHER}"  # the same for all restarts by torchrun
BROKEN_SHARE = 0.01  # above this share of unreadable images a run stops, and of broken tars a set is refused


# --- before the first step -------------------------------------------------------------------------------------------


def model_summary(model) -> str:
    """A table of the model's parts: parameters, how many are trained, dtypes."""
    parts = {
        "ViT" if model.vit_is_trained else "ViT (frozen)": model.vit,
        "ln_vision": model.ln_vision,
        "Q-Former": model.qformer,
        "ITC projections": nn.ModuleList([model.vision_proj, model.text_proj]),
        "ITM head": model.itm_head,
    }
    if model.llm is not None:
        parts |= {"LLM projection": model.llm_proj, "LLM (frozen)": model.llm}
    rows = [(name, list(part.parameters())) for name, part in parts.items()]
    rows += [("temperature", [model.temperature]), ("all", list(model.parameters()))]
    lines = [f"{'part':18} {'parameters':>14} {'trained':>14}  dtype"]
    for name, parameters in rows:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        lines.append(f"{name:18} {sum(p.numel() for p in parameters):14,} {trained:14,}  {dtypes}")
    return "\n".join(lines)


def memory_estimate(model, micro_batch: int, objectives: tuple[str, ...], cached_images: int = 0) -> dict[str, float]:
    """Estimated bytes of a training step over texts of 16 tokens: weights, gradients, optimizer, activations for the
    backward pass; and with GradCache the ViT tokens of `cached_images`."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = bytes_per_rank(p for p in model.parameters() if not p.requires_grad)
    cfg, vit, Q, T = model.qformer.cfg, model.vit.cfg, model.qformer.cfg.num_queries, 16
    size = 4 if model.amp_dtype is None else 2
    P = vit.tokens(model.image_size)
    # (rows, keys) of the self-attention of each pass of a sample, and how often its queries read an image
    passes = [(Q, Q)] + [(T, T)] * ("itc" in objectives)
    passes += [(Q + T, Q + T)] * 3 * ("itm" in objectives) + [(T, Q + T)] * ("itg" in objectives)
    reads = 1 + 3 * ("itm" in objectives)
    tokens = sum(rows for rows, _ in passes)
    kept = cfg.depth * tokens * (12 * cfg.width + 2 * cfg.mlp)  # inputs of Linears, norms and GELU
    kept += cfg.depth * cfg.heads * sum(2 * rows * keys for rows, keys in passes)  # attention weights
    cross = -(-cfg.depth // cfg.cross_every)
    kept += cross * reads * (Q * (6 * cfg.width + 2 * cfg.heads * P) + 2 * P * cfg.width)
    kept += 3 * P * vit.width
    if model.vit_is_trained:
        block = P * (8 * vit.width + 2 * vit.mlp)
        kept += vit.depth * P * vit.width + block if model.vit.grad_checkpointing else vit.depth * block
    if "itg" in objectives:
        kept += T * cfg.vocab_size * 8 / size  # logits, in fp32 as well
    if "lm" in objectives:  # no weight gradients, so the inputs of Linears are not kept
        lm, S = model.llm.cfg, Q + T
        kept += lm.depth * (S * (8 * lm.width + 2 * lm.mlp) + 2 * lm.heads * S * S) + T * lm.vocab_size * 8 / size
    found = {"frozen": frozen, "weights": trained, "gradients + AdamW": 3 * trained}
    found["activations"] = micro_batch * kept * size
    if cached_images:
        found["ViT tokens"] = cached_images * P * vit.width * model.vit.pos_embed.element_size()
    return found


def print_start(model, optimizer, cfg, objectives: tuple[str, ...], micro_batch: int, candidates: int) -> None:
    """What is trained, the memory it will take, the learning rates of a trained ViT (see `train.vit_lr_scale`), the
    negatives that ITC has, and what the log's lines mean."""
    two_pass = cfg.gradcache and candidates > micro_batch * world_size()
    memory = memory_estimate(model, micro_batch, objectives, cfg.batch // world_size() if two_pass else 0)
    parts = ", ".join(f"{name} {amount / 1e9:.2f}" for name, amount in memory.items())
    print0(model_summary(model), f"estimated memory per process {sum(memory.values()) / 1e9:.1f} GB ({parts})")
    if model.vit_is_trained:
        scales = sorted({group["scale"] for group in optimizer.param_groups})
        rates = ", ".join(f"{cfg.lr * scale:.1e}" for scale in scales[:-1] or scales)
        print0(f"peak learning rate {cfg.lr:.1e}; in the ViT, from below: {rates}")
    elif cfg.bert_lr != 1:
        print0(f"peak learning rate {cfg.lr:.1e}; of what starts as BERT {cfg.lr * cfg.bert_lr:.1e}")
    if "itc" in objectives:
        more = "; accumulation adds none" + " (--gradcache does)" * (not model.vit_is_trained)
        print0(f"ITC: 1 positive + {candidates - 1} negatives per image" + more * (cfg.batch > candidates))
    elif "lm" not in objectives:
        print0("without ITC, ITM's negatives are random, and retrieval, which ITC ranks, is not evaluated")
    bounds = loss_bounds(objectives, candidates, (model.qformer if model.llm is None else model.llm).cfg.vocab_size)
    between = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in bounds.items())
    print0(f"losses, from the minimum under label smoothing to chance: {between}")
    print0("lines: means since the last one; hard: ITM's negatives; norm: of the gradient; images a second, time left")


def loss_bounds(objectives: tuple[str, ...], candidates: int, words: int) -> dict[str, tuple[float, float]]:
    """(minimum under label smoothing, chance level) of each loss."""
    bounds = {
        "itc": (smoothing_floor(candidates), math.log(candidates)),
        "itm": (0.0, ITM_PRIOR),
        "itg": (smoothing_floor(words), math.log(words)),
        "lm": (0.0, math.log(words)),
    }
    return {name: bounds[name] for name in objectives}


# --- steps -----------------------------------------------------------------------------------------------------------


def log_line(rows: list[dict], cfg, objectives: tuple[str, ...], hardness: float) -> str:
    """The steps since the last line in one, under 100 characters: means of losses and gradient norm."""
    last = rows[-1]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in (*objectives, "norm")}
    losses = " ".join(f"{name} {mean[name]:.3f}" for name in objectives)
    hard = f"hard {hardness:.0%} " if "itm" in objectives and hardness < 1 else ""
    temperature = f"temp {last['temperature']:.3f} " if "itc" in objectives else ""
    eta = clock((cfg.steps - last["step"]) * cfg.batch / last["images_per_s"])
    step = f"step {last['step']:{len(str(cfg.steps))}}/{cfg.steps}"
    optimizer = f"{hard}{temperature}lr {last['lr']:.1e} norm {mean['norm']:.1f}"
    return f"{step}  {losses}  {optimizer}  {last['images_per_s']:.0f}/s {eta}"


class Log:
    """log.jsonl: a header, a line per step, a line per validation; written by rank 0. A resumed run drops the lines
    after its checkpoint."""

    def __init__(self, run: Path, start: int, config: dict, machine: str):
        self.path = run / "log.jsonl"
        self.validated: set[int] = set()  # steps, up to `start`
        if rank() > 0:
            return
        rows = [row for row in rows_of(self.path) if row.get("step", 0) <= start] if start else []
        self.validated = {row["step"] for row in rows if "validation" in row}
        self.events = None
        if config.get("tensorboard"):  # which forgets what an earlier command has written after `start`
            self.events = tensorboard().SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        header = {"config": config, "machine": machine, "torch": torch.__version__, "from_step": start}
        with whole(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in [*rows, header | {"launch": LAUNCH}]))

    def write(self, *rows: dict) -> None:
        """Append."""
        if rank() == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                for row in rows if self.events else ():
                    for name in (name for name, value in row.items() if type(value) is float):
                        self.events.add_scalar(name, row[name], row["step"])
                if self.events:
                    self.events.flush()


def tensorboard():
    """torch.utils.tensorboard, whose package only --tensorboard needs. UserError without it."""
    try:
        return import_module("torch.utils.tensorboard")
    except ImportError as error:
        how = "pip install tensorboard, or leave the flag out"
        raise UserError(f"--tensorboard needs the package tensorboard ({error}): {how}") from None


def rows_of(path: Path) -> list[dict]:
    """The rows of a log; without lines that are none, as a power cut leaves them."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last one without its end was cut off
    rows, bad = [], 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            rows.append(row | ({"step": int(row["step"])} if "step" in row else {}))
        except (ValueError, TypeError, OverflowError, RecursionError):
            bad += 1
    if bad:
        print0(f"{path}: {bad} lines are no rows of a log, and are left out")
    return rows


def begun_here(path: Path) -> bool:
    """Has this launch by torchrun begun the run of this log, before a restart?"""
    return any(row.get("launch") == LAUNCH for row in rows_of(path))


class Meter:
    """Numbers of the steps since the last line. They stay on the device until then, so that the host runs ahead."""

    def __init__(self, objectives: tuple[str, ...], batch: int, images: int, device: torch.device, trained_s: float):
        self.objectives, self.batch, self.images, self.device = objectives, batch, images, device
        self.trained_s, self.window_s, self.waited_s = trained_s, time.perf_counter(), 0.0
        self.pending: list[tuple] = []
        self.unreadable: dict[str, str] = {}  # images of this rank, and why
        self.reported: set[str] = set()  # unreadable images of all ranks

    def next_batches(self, batches, count: int) -> list:
        """The micro-batches of a step, on the device; the wait for them is counted."""
        asked = time.perf_counter()
        micro_batches = [next(batches).to(self.device) for _ in range(count)]
        self.waited_s += time.perf_counter() - asked
        return micro_batches

    def add(self, lr: float, losses: Tensor, norm: Tensor, temperature: Tensor, micro_batches: list) -> None:
        """A step."""
        truncated = sum(batch.truncated for batch in micro_batches)
        self.pending.append((lr, losses, norm, temperature.detach().clone(), truncated))
        self.unreadable |= {name: reason for batch in micro_batches for name, reason in batch.broken}

    def read(self, last: int, scaled: bool) -> list[dict]:
        """The steps up to `last`, summed over the ranks, as rows of the log. Here the host waits for the device.

        Raises at the first non-finite value; but with loss scaling a step with an infinite gradient is skipped.
        """
        lrs, losses, norms, temperatures, truncated = zip(*self.pending, strict=True)
        losses = all_sum(torch.stack(losses)).tolist()
        truncated = all_sum(torch.tensor(truncated, device=norms[0].device)).tolist()
        norms, temperatures = torch.stack(norms).tolist(), torch.stack(temperatures).tolist()
        now = time.perf_counter()
        window_s, self.window_s = now - self.window_s, now
        self.trained_s += window_s
        shared = {"images_per_s": len(losses) * self.batch / window_s, "waited": self.waited_s / window_s}
        shared |= {"gigabytes": peak_gigabytes(self.device), "trained_s": self.trained_s}
        saved = "nothing was saved since: start again, or --resume from the last checkpoint"
        rows, steps = [], zip(lrs, losses, norms, temperatures, truncated, strict=True)
        for step, (lr, values, norm, temperature, cut) in enumerate(steps, start=last - len(losses) + 1):
            row = {"step": step, **dict(zip(self.objectives, values, strict=True)), "loss": sum(values), "lr": lr}
            row |= {"norm": norm, "temperature": temperature, "truncated": cut / self.batch}
            for name in self.objectives if scaled else (*self.objectives, "norm"):
                what = "the gradient norm" if name == "norm" else f"the {name} loss"
                how = f"{what} became {row[name]} at step {step}, and {saved}, with a lower --lr or --precision fp32"
                expect(math.isfinite(row[name]), how)
            rows.append(row | shared)
        report_unreadable(self.unreadable, self.reported, self.images)
        self.pending, self.waited_s = [], 0.0
        return rows


def report_unreadable(unreadable: dict[str, str], named: set[str], images: int) -> None:
    """Name the images that a rank could not read, each once; raise on all ranks when there are too many."""
    for part in gather_objects(unreadable):
        for name, reason in part.items():
            if name not in named:
                print0(f"skipped: {reason}")
            named.add(name)
    unreadable.clear()
    share = f"{len(named)} of {images} images could not be read, more than {BROKEN_SHARE:.0%}"
    expect(len(named) <= BROKEN_SHARE * images, f"{share}: repair or remove them, or pass --images with their folder")
