"""Training: `torchrun train.py --stage 1` or `python train.py --stage 1`; flags: config.py, recipes: recipes.py.

    stage 1             the Q-Former with ITC, ITM and ITG over a frozen ViT (paper 3.2, 3.4)
    stage 2             a frozen language model after the queries (3.3): --stage 2 --init runs/stage1 --llm FOLDER
    caption, vqa        fine-tuning with the ViT (4.2, 4.3), from a run of stage 2
    retrieval           fine-tuning with the ViT (4.4), from a run of stage 1

What a run writes, runs/stage1/ and so on:

    config.json, model.safetensors, tokenizer.json    the latest model; `Blip2.from_pretrained` opens the folder
    train_state.pt, SHA256SUMS                        what else `--resume` needs, and checksums
    log.jsonl                                         JSON lines: a header, steps, validations
    step-000500/                                      the last `--keep` checkpoints, each complete
    best/                                             the model with the best validation
    retrieval.json, answers.json or captions.json     the final evaluation
    report.html, samples.json                         the run as a page (tools/report.py), and the images it shows

A signal ends a run after its step, with a checkpoint (engine/stop.py); `torchrun --max-restarts 9` continues one.
The same code runs in one process or many, on CPU, CUDA or MPS. --batch is the global batch; without accumulation, the
number of ranks changes the speed only. ITC and ITM see one micro-batch of all ranks at a time, unless --gradcache.
"""

import math
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2 import Blip2
from config import TrainConfig, begin, check, continues, parse_flags, resume, run_folder
from data import Batch, StepSampler, TrainSet, collate_for, loader_workers, open_train, split_validation, train_loader
from engine import stop
from engine.checkpoint import advice, clear, finish_writing, restore, save_checkpoint, tell_room
from engine.device import choose_precision, local_device, prepare_cpu
from engine.distributed import all_max, gather_objects, print0, rank, start_processes, world_size
from engine.errors import run_command
from engine.gradcache import two_pass_losses
from engine.health import Health
from engine.lock import locked
from engine.log import Log, Meter, log_line, print_start
from engine.progress import clock
from engine.sharding import sharded_parts
from engine.step_graph import for_training
from model import Blip2Model
from recipes import FINE_TUNING, SMALL_DATA, WITH_LLM
from tasks.features import cache_tokens
from tasks.validation import final_evaluation, validate

STARTS_AS_BERT = re.compile(r"qformer\.(word_|position_|embedding_ln|lm_head|blocks\.\d+\.(attn|ffn))")
TEMPERATURES = (0.001, 0.5)  # bounds of ITC's temperature; LAVIS has none

# --- schedule and optimizer ------------------------------------------------------------------------------------------


def lr_at(step: int, cfg) -> float:
    """Learning rate of the step-th update (from 1): linear warm-up from 0, then cosine to min_lr at the last."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def hardness_at(step: int, cfg) -> float:
    """Hardness of ITM's negatives (`draw_negatives`): linear from 0, uniform, to 1, by ITC's similarity."""
    return min(1.0, step / cfg.negatives_ramp) if cfg.negatives_ramp else 1.0


def vit_lr_scale(name: str, depth: int, decay: float) -> float:
    """Layer-wise learning-rate decay of the ViT (paper, Tables 7 to 9): each block has `decay`
    times the rate of the next, the embeddings `decay` times that of block 0. The last block has `decay`, as in BEiT."""
    block = re.match(r"vit\.blocks\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block else 0
    return decay ** (depth + 1 - layer)


def build_optimizer(model: nn.Module, cfg) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Weight decay on tensors of two or more dimensions: no bias, norm, temperature.

    Each group has a "scale" of the learning rate: `bert_lr` for what starts as BERT; for a trained ViT `vit_lr_scale`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = cfg.bert_lr if STARTS_AS_BERT.match(name) else 1.0
            scale = vit_lr_scale(name, model.vit.cfg.depth, cfg.vit_lr_decay) if name.startswith("vit.") else scale
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    kinds = [
        {"params": params, "weight_decay": cfg.weight_decay if is_matrix else 0.0, "scale": scale}
        for (scale, is_matrix), params in sorted(groups.items(), key=lambda g: (g[0][0], not g[0][1]))
    ]
    device = kinds[0]["params"][0].device.type
    return torch.optim.AdamW(kinds, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=device in ("cpu", "cuda"))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


# --- one step --------------------------------------------------------------------------------------------------------


def optimize(
    ddp: nn.Module, optimizer, scaler, micro_batches: list[Batch], cfg, objectives: tuple[str, ...], step: int
) -> tuple[Tensor, Tensor]:
    """One optimizer step -> the losses (len(objectives),), this rank's share, and the gradient norm.

    ddp: what `for_training` returns. The host does not wait for the device, except for hard negatives from other ranks
    (`fetch_rows`).
    """
    model, generator, hardness = getattr(ddp, "module", ddp), torch.Generator(), hardness_at(step, cfg)
    generator.manual_seed(hash((cfg.seed, step, 0)))  # hard negatives of GradCache; else seeded again below
    if "lm" in objectives:
        losses_of = partial(Blip2Model.stage2_losses, totals=model.stage2_totals(micro_batches))
    elif cfg.gradcache and len(micro_batches) > 1:
        losses_of = two_pass_losses(model, micro_batches, objectives, generator, hardness)
    else:
        how = dict(totals=model.stage1_totals(micro_batches), generator=generator, hardness=hardness)
        losses_of = partial(Blip2Model.stage1_losses, objectives=objectives, **how)
    parts = []
    for number, batch in enumerate(micro_batches):
        generator.manual_seed(hash((cfg.seed, step, number)))  # a hash of ints is the same in all processes
        is_last = number == len(micro_batches) - 1
        with nullcontext() if is_last or world_size() == 1 else ddp.no_sync():
            losses = ddp(losses_of, batch)
            scaler.scale(sum(losses.values()) * world_size()).backward()  # DDP takes the mean over the ranks
        parts.append(torch.stack([losses[name].detach() for name in objectives]))
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        model.temperature.clamp_(*TEMPERATURES)
    return torch.stack(parts).sum(dim=0), norm


# --- the run ---------------------------------------------------------------------------------------------------------


def build_model(
    cfg: TrainConfig, objectives: tuple[str, ...], precision: str, device: torch.device, resumed_from: Path | None
) -> Blip2:
    """The model at the start of its stage; parts that no loss reaches are not trained."""
    where = dict(device=device, precision=precision, sharded=sharded_parts(cfg))
    init = "" if cfg.init == "none" else cfg.init
    train_vit = cfg.stage in FINE_TUNING and not cfg.freeze_vit
    if cfg.stage == "1" or not (init or resumed_from):
        sizes = dict(num_queries=cfg.queries, cross_every=cfg.cross_every, dropout=cfg.dropout)
        sizes |= dict(image_size=cfg.image_size, embed_dim=cfg.embed_dim, max_text_tokens=cfg.max_text_tokens)
        model, reports = Blip2.build(cfg.vit, cfg.bert, **sizes, **where)
        print0(*reports)
    else:
        llm = cfg.llm if cfg.stage in WITH_LLM and (resumed_from or cfg.stage != "2") else None
        where |= dict(dropout=cfg.dropout, image_size=cfg.image_size, train_vit=train_vit)
        model = Blip2.from_pretrained(resumed_from or init, cfg.vit, llm=llm, **where)
    if cfg.stage == "2" and not resumed_from:
        had = model.sources.get("llm")
        if had is None or cfg.prompt_format or Path(had.spec).resolve() != Path(cfg.llm).resolve():
            print0(model.attach_llm(cfg.llm, form=cfg.prompt_format), "the projection to it is new")
    if cfg.stage in WITH_LLM:
        model.llm.grad_checkpointing = bool(cfg.grad_checkpointing)
    else:
        model.train_heads(objectives)
    model.vit.grad_checkpointing = bool(cfg.grad_checkpointing) and train_vit
    if cfg.stage in ("2", "caption"):
        model.prompt = cfg.prompt or ""
    if cfg.stage == "vqa":
        model.template = cfg.template or model.template
        if cfg.condition:
            model.condition_on_question()
    return model


def train(cfg: TrainConfig, given: set[str], run: Path) -> dict | None:
    """Train in the folder `run` as the flags say; given: names of the flags passed. Returns the final evaluation."""
    # --- a new or a resumed run
    folder, resumed = None, None
    if continues(run, cfg):
        cfg, folder, resumed = resume(run, cfg, given)
    images = open_train(cfg)  # before the recipe, which depends on their number
    if not resumed:
        cfg = begin(cfg, given, images.num_images(10 * SMALL_DATA), images.num_texts())
    check(cfg)
    objectives = ("lm",) if cfg.stage in WITH_LLM else tuple(cfg.losses.split(","))
    device = local_device(cfg.device)
    if device.type == "cpu":
        prepare_cpu(world_size())
    precision, why = choose_precision(device, cfg.precision)
    print0(f"{device}, {world_size()} process(es), {precision} ({why})")
    micro_batch = cfg.micro_batch or cfg.batch // world_size()
    accumulate = cfg.batch // world_size() // micro_batch
    candidates = cfg.batch if cfg.gradcache else micro_batch * world_size()  # texts that ITC compares an image with

    # --- model and optimizer
    torch.manual_seed(cfg.seed)  # the same new weights on all ranks
    model = build_model(cfg, objectives, precision, device, folder).train()
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    print_start(model, optimizer, cfg, objectives, micro_batch, candidates)
    tell_room(run, model, cfg.keep)

    # --- data
    data = {"records of --data": images.content_sha256(), "images of --data": images.sizes_sha256()}
    images, val = split_validation(cfg, images)
    data |= {"records of --val-data": val.content_sha256()} if val is not None and cfg.val_data else {}
    if cfg.cache_features:
        for part in filter(None, (images, val)):
            part.cached = cache_tokens(model, part, run.parent / "features", loader_workers(cfg, part))
    workers, start = loader_workers(cfg, images), resumed["step"] if resumed else 0
    where = rank(), world_size(), cfg.shuffle_shards
    sampler = StepSampler(images, cfg.seed, micro_batch, accumulate, cfg.steps, start, *where)
    print0(f"{len(images):,} training images, {sampler.per_epoch:,.1f} steps an epoch, {workers} loader workers",
           *sampler.shares())  # fmt: skip
    train_set = TrainSet(images, collate_for(cfg.stage, model), cfg.image_size, cfg.seed)
    batches = iter(train_loader(train_set, sampler, workers, pin=device.type == "cuda"))

    # --- the state of a resumed run
    best, trained_s = -1.0, 0.0
    torch.manual_seed(cfg.seed + rank())  # dropout from here on
    if resumed:
        best, trained_s = restore(folder, resumed, model, optimizer, scaler, data, cfg.data_changed)
    ddp = for_training(model, graphs=accumulate == 1 and not (cfg.grad_checkpointing or scaler.is_enabled()))

    # --- log, checkpoint, validation
    if rank() == 0:  # after all checks have passed
        clear(run, cfg.overwrite and not resumed)
    log = Log(run, start, asdict(cfg), f"{device}, {precision}")
    meter, health = Meter(objectives, cfg.batch, len(images), device, trained_s), Health(cfg, TEMPERATURES)

    def save(step: int, best: float, is_best: bool = False) -> None:
        state = {"scaler": scaler.state_dict(), "trained_s": meter.trained_s, "best": float(best), "data": data}
        save_checkpoint(run, step, model, optimizer, state, cfg, is_best)

    def validates(step: int) -> bool:
        return val is not None and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps)

    if resumed and validates(start) and not gather_objects(start in log.validated)[0]:  # stopped before this validation
        best = validate(model, val, cfg, objectives, workers, start, best, save, log)

    # --- the loop
    stop.be_patient()
    stop.state.advice = partial(advice, run)
    meter.window_s = time.perf_counter()
    for step in range(start + 1, cfg.steps + 1):
        stop.state.place = f"step {step}"
        set_lr(optimizer, lr := lr_at(step, cfg))
        micro_batches = meter.next_batches(batches, accumulate)
        losses, norm = optimize(ddp, optimizer, scaler, micro_batches, cfg, objectives, step)
        meter.add(lr, losses, norm, model.temperature, micro_batches)

        due = step % cfg.log_every == 0 or step in (start + 1, cfg.steps)
        saves = step % cfg.save_every == 0 or step == cfg.steps or validates(step)  # a validation may be left
        asked = int(all_max(torch.tensor(stop.state.asked)))  # a signal; on the CPU: the host does not wait
        if not (due or saves or asked):
            continue
        finish_writing(wait=False)  # a full disk is told here
        rows = meter.read(step, scaled=scaler.is_enabled())
        log.write(*rows)
        hardness = hardness_at(step, cfg)
        print0(log_line(rows, cfg, objectives, hardness), *health.unusual(rows, hardness))
        if saves or asked:
            save(step, best)
        if asked:
            raise stop.Stopped(asked)
        if validates(step):
            best = validate(model, val, cfg, objectives, workers, step, best, save, log)
        meter.window_s = time.perf_counter()

    print0(f"trained in {clock(meter.trained_s)}, without validation, checkpoints and caching")
    return final_evaluation(model, val, cfg, objectives, workers, run)


def main(argv: list[str] | None = None) -> dict | None:
    """The command line."""
    cfg, given = parse_flags(argv, __doc__.split("\n")[0])
    run = run_folder(cfg)
    start_processes(cfg.timeout, run)
    with nullcontext() if cfg.write_config else locked(run):
        try:
            return train(cfg, given, run)
        finally:
            finish_writing()


if __name__ == "__main__":
    sys.exit(run_command(main))
