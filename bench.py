"""Speed and memory: what the work costs, beside the machine's limit and beside transformers.

    python bench.py stage1                            a training step of stage 1; or stage2
    python bench.py stage2 --vs transformers          alternating with the same work done by transformers' classes
    python bench.py generate                          captions
    python bench.py retrieval                         ITM of images with texts
    python bench.py load --checkpoint DIR             a checkpoint from the disk into the model
    python bench.py data --data a.json                images from the disk into batches; without --data, 640 x 480 noise
    torchrun --nproc_per_node 2 bench.py stage1       several ranks, and the bytes that they send each other

Weights, words and images are random: speed does not depend on them. --vit, --bert and --llm are names or folders.

FLOPs are counted (torch's FlopCounterMode): two for each multiply-and-add of the matrix products. MFU is their rate
over that of the best of ten products of 4096 x 4096 matrices, in the same dtype, on the same device, in the same run.
"""

import argparse
import io
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from blip2 import TINY, Blip2
from data import Batch, StepSampler, TrainSet, collate_captions, llm_batch, qformer_batch, train_loader
from engine.cuda_graph import CUDAGraphed
from engine.device import (
    DEVICES,
    PRECISIONS,
    choose_precision,
    cores,
    local_device,
    peak_gigabytes,
    prepare_cpu,
    vit_dtype,
)
from engine.distributed import print0, rank, start_processes, world_size
from engine.errors import Parser, UserError, at_least_1, expect, run_command
from engine.files import check_output
from engine.step_graph import StepGraph, for_training
from generate import generate
from llm import T5, CausalDecoder, T5Decoder
from model import OBJECTIVES, Blip2Model
from qformer import QFormerConfig
from sources.mixture import open_images
from sources.text import BertTokenizer
from train import build_optimizer, optimize
from weights.open import build_qformer, load_bert, load_vit

BATCHES = {"stage1": 16, "stage2": 8, "generate": 8, "retrieval": 8}
CALLS = ("all_gather", "all_reduce", "all_to_all_single")  # collectives of a training step


# --- the clock and the counters --------------------------------------------------------------------------------------


def sync(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable, device: torch.device) -> float:
    """Seconds of one run."""
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """The best of ten matrix products; on a GPU, where one takes less than a millisecond, of ten times ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    together = 10 if device.type == "cuda" else 1

    def products():
        for _ in range(together):
            a @ b

    products()
    return 2 * size**3 * together / min(seconds(products, device) for _ in range(10))


@contextmanager
def eager():
    """Inside, nothing runs as a CUDA graph, in which nothing is counted or timed."""
    with (
        mock.patch.object(CUDAGraphed, "__call__", lambda self, function, x: function(x)),
        mock.patch.object(StepGraph, "__call__", lambda self, losses_of, batch: self.module(losses_of, batch)),
    ):
        yield


def counted_flops(run: Callable, device: torch.device) -> int:
    """FLOPs of the matrix products of a run. On a CPU attention runs unfused, whose fused kernel is not counted."""
    unfused = nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    epilogue = {torch.ops.aten._addmm_activation: lambda bias, a, b, *_, **__: 2 * math.prod(a) * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=epilogue)
    # Its tracker of modules, of which only totals by module need it, fails on a parameter's view under no_grad.
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda *_: None)
    with eager(), unfused, counter:
        run()
    return counter.get_total_flops()


@contextmanager
def timed_methods(methods: dict[str, list], spent: dict[str, float], device: torch.device):
    """Inside, the seconds of each method are added to its part. methods: part -> [(object, method's name)]."""

    def timed(part: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            sync(device)
            start = time.perf_counter()
            out = original(*args, **kwargs)
            sync(device)
            spent[part] += time.perf_counter() - start
            return out

        return call

    with ExitStack() as stack:
        for part, places in methods.items():
            for thing, name in places:
                stack.enter_context(mock.patch.object(thing, name, timed(part, getattr(thing, name))))
        yield


@contextmanager
def counted_bytes(sent: dict[str, int]):
    """Inside, count the bytes that this rank passes to each collective. (In a ring all-reduce about twice as many
    travel.)"""

    def counting(name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            sent[name] += (args[0] if name == "all_reduce" else args[1]).nbytes
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in CALLS}):
        yield


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What is timed, and the same done by transformers."""

    unit: str  # what is counted
    amount: float  # how many of them a run does
    run: Callable
    parts: dict[str, list]  # part -> methods, see `timed_methods`
    result: Callable | None = None  # what both have to agree on, if not what `run` returns
    peer: Callable | None = None  # builds the Work that transformers does
    ddp: DistributedDataParallel | None = None  # what exchanges gradients with other ranks


def build_model(args: argparse.Namespace, with_llm: bool) -> Blip2:
    """Names give random weights, folders theirs."""
    encoder, _, source = load_vit(args.vit, vit_dtype(args.precision, args.device), args.device)
    sizes = dict(image_width=encoder.cfg.width, num_queries=args.queries, dropout=args.dropout)
    torch.manual_seed(0)
    if args.bert == "bert-base":
        qformer = build_qformer("bert-base", QFormerConfig(**sizes), {}, {".*": "random"}, args.device)
    else:
        qformer = load_bert(args.bert, **sizes)[0]
    model = Blip2(encoder, qformer, BertTokenizer(TINY / "bert"), args.image_size)
    model.sources["vit"] = source
    model.set_precision(args.precision, args.device)
    if with_llm:
        model.attach_llm(args.llm)
    return model


def random_batch(args: argparse.Namespace, model: Blip2, rows: int, number: int = 0) -> Batch:
    """A batch of noise with captions of --words random words."""
    number = number * world_size() + rank()
    generator, ids = torch.Generator().manual_seed(number), list(range(number * rows, (number + 1) * rows))
    images = torch.randint(0, 256, (rows, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=generator)
    words = (model.qformer if model.llm is None else model.llm).cfg.vocab_size
    texts = torch.randint(words // 2, words - 2, (rows, args.words), generator=generator).tolist()
    if model.llm is None:
        return qformer_batch([[101, *text, 102] for text in texts], 0, ids, images=images).to(args.device)
    tokenizer = model.llm_tokenizer
    prompts, targets = [tokenizer.encode_prompts([""])[0]] * rows, [[*text, tokenizer.end_id] for text in texts]
    return llm_batch(prompts, targets, tokenizer, ids, images=images).to(args.device)


def training(
    model: nn.Module, batches: list[Batch], objectives: tuple[str, ...], args: argparse.Namespace, ours: bool = True
) -> Work:
    """An optimizer step over micro-batches, as train.py takes it; that of transformers without a CUDA graph."""
    recipe = SimpleNamespace(lr=1e-6, beta2=0.98, weight_decay=0.05, vit_lr_decay=1.0, bert_lr=1.0, clip=1.0, seed=0)
    recipe.gradcache, recipe.negatives_ramp = len(batches) > 1, 0
    optimizer, scaler = build_optimizer(model, recipe), torch.amp.GradScaler(enabled=args.precision == "fp16")
    wrapped = for_training(model, graphs=ours and len(batches) == 1 and not scaler.is_enabled())
    ddp = wrapped if world_size() > 1 else None

    def step():
        optimize(wrapped, optimizer, scaler, batches, recipe, objectives, 1)

    def result():  # without dropout, so that two models can be compared
        model.eval()
        losses_of = Blip2Model.stage2_losses
        if "lm" not in objectives:
            losses_of = partial(Blip2Model.stage1_losses, generator=torch.Generator())
        with torch.no_grad():
            losses = (ddp or model)(losses_of, batches[0])
        model.train()
        return sum(losses.values())

    parts = {
        "forward, all": [(ddp or model, "forward")],
        "backward": [(Tensor, "backward")],
        "optimizer": [(nn.utils, "clip_grad_norm_"), (optimizer, "step")],
    }
    return Work("images", sum(map(len, batches)), step, parts, result, ddp=ddp)


def stage1(args: argparse.Namespace) -> Work:
    """A training step of stage 1."""
    model = build_model(args, with_llm=False).train()
    batches = [random_batch(args, model, args.batch, number) for number in range(args.gradcache)]

    def work_of(model, ours):
        work, qformer = training(model, batches, OBJECTIVES, args, ours), model.qformer
        losses = ("itc_similarity", "itc_loss", "draw_negatives", "itm_loss", "itg_loss")
        work.parts = {
            "frozen ViT": [(model, "image_tokens")],
            "image keys and values": [(model, "image_kv")],
            "unimodal passes (ITC)": [(qformer, "encode_queries"), (qformer, "encode_text")],
            "joint pass (ITM)": [(qformer, "forward")],
            "text after queries (ITG)": [(qformer, "decode_text")],
            "vocabulary": [(qformer, "lm_logits")],
            "losses": [(model_module, name) for name in losses],
        } | work.parts
        return work

    work = work_of(model, True)
    work.peer = lambda: work_of(peers().their_stage1(model), False)
    return work


def stage2(args: argparse.Namespace) -> Work:
    """A training step of stage 2."""
    model = build_model(args, with_llm=True).train()
    batch = random_batch(args, model, args.batch)
    work = training(model, [batch], ("lm",), args)
    work.parts = {
        "frozen ViT": [(model, "image_tokens")],
        "image keys and values": [(model, "image_kv")],
        "queries": [(model.qformer, "encode_queries")],
        "language model": [(model.llm, "forward")],
        "losses": [(model_module, "lm_loss")],
    } | work.parts
    work.peer = lambda: training(peers().TheirStage2(model, batch).train(), [batch], ("lm",), args, False)
    return work


def generation(args: argparse.Namespace) -> Work:
    """Beam search, encoding included; always --new-tokens of them."""
    model = build_model(args, with_llm=True).eval().requires_grad_(False)
    batch, new = random_batch(args, model, args.batch), args.new_tokens
    settings = dict(max_new_tokens=new, min_new_tokens=new, num_beams=args.beams)

    @torch.no_grad()
    def run() -> Tensor:
        query_out = model.encode_image(batch.images).query_out
        prefix, mask = model.llm_prefix(query_out, batch.prompt_ids, batch.prompt_mask)
        decoder = model.llm.decoder_for(prefix, mask, new)
        groups = generate(decoder, end_id=model.llm_tokenizer.end_id, **settings)
        return torch.tensor([group[0] for group in groups])

    kind = T5Decoder if isinstance(model.llm, T5) else CausalDecoder
    parts = {
        "encoding": [(model, "encode_image")],
        "prompt": [(model.llm, "decoder_for"), (kind, "start")],
        "steps": [(kind, "step")],
        "reordering": [(kind, "select")],
    }
    work = Work("tokens", args.batch * new, run, parts)
    work.peer = lambda: replace(work, run=peers().their_generation(model, batch, settings))
    return work


def retrieval(args: argparse.Namespace) -> Work:
    """ITM of --batch images with --texts texts each."""
    model = build_model(args, with_llm=False).eval().requires_grad_(False)
    images, batch = random_batch(args, model, args.batch).images, random_batch(args, model, args.texts)
    words = [ids[mask].tolist() for ids, mask in zip(batch.text_ids, batch.text_mask)]
    model.tokenizer.encode = lambda texts: words

    parts = {
        "encoding of images": [(model, "encode_image")],
        "encoding of texts": [(model, "encode_text")],
        "image keys and values": [(model, "image_kv")],
        "pairs": [(model.qformer, "forward")],
    }
    work = Work("pairs", args.batch * args.texts, lambda: model.itm_scores(images, [""] * args.texts), parts)
    work.peer = lambda: replace(work, run=peers().their_retrieval(model, images, batch))
    return work


def peers():
    """tests/peer.py, where transformers is imported."""
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    import peer

    return peer


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(work: Work, args: argparse.Namespace) -> dict:
    """Times, rates, memory, and the parts of a run."""
    device = args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup):
        work.run()
    times = [seconds(work.run, device) for _ in range(args.repeats)]
    memory, median = peak_gigabytes(device), statistics.median(times)
    peak = peak_flops(device, PRECISIONS[args.precision] or torch.float32)
    flops = counted_flops(work.run, device)
    numbers = {
        "seconds": median,
        "fastest": min(times),
        "slowest": max(times),
        f"{work.unit} a second": work.amount / median,
        "peak memory, GB": memory,
        f"GFLOPs per {work.unit.removesuffix('s')}": flops / work.amount / 1e9,
        "GFLOP/s": flops / median / 1e9,
        "GFLOP/s of the best matrix product": peak / 1e9,
        "MFU, %": 100 * flops / median / peak,
    }
    spent, sent = defaultdict(float), defaultdict(int)
    calls = {f"waiting for {name}": [(dist, name)] for name in CALLS} if world_size() > 1 else {}
    with eager(), timed_methods(work.parts | calls, spent, device), counted_bytes(sent):
        whole = seconds(work.run, device)
    numbers |= {f"part: {part}, %": 100 * spent[part] / whole for part in work.parts | calls}
    numbers |= {f"sent by {name}, MB": count / 1e6 for name, count in sent.items()}
    if work.ddp:
        with work.ddp.no_sync():
            alone = statistics.median(seconds(work.run, device) for _ in range(args.repeats))
        numbers["part: gradients not hidden by the backward pass, %"] = 100 * (median - alone) / median
        numbers["sent as gradients, MB"] = sum(p.nbytes for p in work.ddp.parameters() if p.requires_grad) / 1e6
    return numbers


def versus(work: Work, args: argparse.Namespace) -> dict:
    """The same work by transformers: first the same result, then alternating; the ratio pair by pair."""
    peer = work.peer()
    ours, theirs = ((one.result or one.run)().float().cpu() for one in (work, peer))
    difference = (ours - theirs).abs().max().item()
    tolerance = 1e-3 if args.precision == "fp32" else 5e-2
    same = difference <= tolerance * max(1.0, theirs.abs().max().item())
    if not same and (args.precision == "fp32" or work.unit != "tokens"):  # rounding may change a half-precision text
        raise UserError(f"the results differ by {difference:g}, expected the same: this is a bug, please report it")
    for run in (work.run, peer.run) * args.warmup:
        run()
    pairs = [(seconds(work.run, args.device), seconds(peer.run, args.device)) for _ in range(args.repeats)]
    ratios = [slow / fast for fast, slow in pairs]
    flops = [counted_flops(run, args.device) for run in (work.run, peer.run)]
    return {
        "largest difference of the results": difference,
        "seconds, alternating": statistics.median(fast for fast, _ in pairs),
        "seconds of transformers, alternating": statistics.median(slow for _, slow in pairs),
        "times as fast, median of the pairs": statistics.median(ratios),
        "times as fast, worst pair": min(ratios),
        "times as fast, best pair": max(ratios),
        "times as many FLOPs in transformers": flops[1] / flops[0],
    }


def load(args: argparse.Namespace) -> dict:
    """Seconds from a checkpoint to a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.checkpoint or folder)
        if not args.checkpoint:
            model = build_model(args, with_llm=False)
            peers().transformers_twin(model).save_pretrained(path)
            shutil.copy(TINY / "bert/tokenizer.json", path)
            del model
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        ours = partial(Blip2.from_pretrained, path, device=args.device, precision=args.precision)
        with redirect_stdout(io.StringIO()):  # the load report
            times = [seconds(ours, args.device) for _ in range(args.repeats)]
        numbers = {"seconds": statistics.median(times), "checkpoint, GB": size / 1e9}
        numbers |= {"GB a second": size / 1e9 / numbers["seconds"], "peak memory, GB": peak_gigabytes(args.device)}
        if args.vs:
            theirs = peers().their_load(path, PRECISIONS[args.precision] or torch.float32, args.device)
            times = [seconds(theirs, args.device) for _ in range(args.repeats)]
            numbers["seconds of transformers"] = statistics.median(times)
    return numbers


def noise_images(folder: Path, count: int) -> Path:
    """An annotation file with JPEGs of 640 x 480 pixels of coarse noise, about as many bytes as photos have."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        records.append({"image": f"{i}.jpg", "caption": ["a picture of coarse noise"] * 5})
    (folder / "images.json").write_text(json.dumps(records))
    return folder / "images.json"


def data(args: argparse.Namespace) -> dict:
    """Images a second from JPEGs on the disk to batches, in this process and with a worker per core."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or noise_images(Path(folder), 256)
        images = open_images([str(path)], "train", args.image_size, args.images)
        collate, numbers = partial(collate_captions, BertTokenizer(TINY / "bert")), {}
        steps = max(1, min(512, len(images)) // args.batch)
        for workers in dict.fromkeys((0, cores())):
            sampler = StepSampler(images, 0, args.batch, 1, 2 * steps, 0, 0, 1)
            batches = iter(train_loader(TrainSet(images, collate, args.image_size, 0), sampler, workers, pin=False))
            for _ in range(steps):  # workers start, the disk's cache fills
                next(batches)
            start = time.perf_counter()
            for _ in range(steps):
                next(batches)
            name = "this process" if workers == 0 else f"{workers} workers"
            numbers[f"images a second, {name}"] = steps * args.batch / (time.perf_counter() - start)
        opened = seconds(lambda: [images[i].open() for i in range(steps * args.batch)], torch.device("cpu"))
        numbers["of this: whole decoding, ms an image"] = 1000 * opened / (steps * args.batch)
    return numbers


def show(title: str, numbers: dict) -> None:
    """Print as a table."""
    print0(title, *(f"  {name:50} {value:>14,.4g}" for name, value in numbers.items()))


# --- the command line ------------------------------------------------------------------------------------------------

WORKS = {"stage1": stage1, "stage2": stage2, "generate": generation, "retrieval": retrieval}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(prog="python bench.py", description=__doc__)
    parser.add_argument("what", choices=[*WORKS, "load", "data"])
    parser.add_argument("--vit", default="dinov2-s", help="a name for random weights, or a folder")
    parser.add_argument("--bert", default="bert-base", help="bert-base for random weights, or a folder")
    parser.add_argument("--llm", default="opt-125m", help="a name for random weights, or a folder")
    parser.add_argument("--batch", type=at_least_1, help="images of a rank (default: 16 in stage 1, else 8)")
    parser.add_argument("--gradcache", type=at_least_1, default=1, help="stage1: so many micro-batches of --batch")
    parser.add_argument("--words", type=at_least_1, default=12, help="of a caption")
    parser.add_argument("--texts", type=at_least_1, default=64, help="retrieval: texts, each with each image")
    parser.add_argument("--new-tokens", type=at_least_1, default=20, help="generate: of each caption")
    parser.add_argument("--beams", type=at_least_1, default=5, help="generate")
    parser.add_argument("--image-size", type=at_least_1, default=224, help="pixels a side")
    parser.add_argument("--queries", type=at_least_1, default=32)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the Q-Former, in training")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--vs", choices=["transformers"], help="compare with it, alternating")
    parser.add_argument("--warmup", type=int, default=3, help="runs before the clock starts")
    parser.add_argument("--repeats", type=at_least_1, default=7, help="timed runs")
    parser.add_argument("--checkpoint", help="load: its folder (default: random weights)")
    parser.add_argument("--data", help="data: an annotation file (default: noise)")
    parser.add_argument("--images", action="append", help="data: folder of the images")
    parser.add_argument("--json", help="write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """The command line."""
    args = parse(argv)
    check_output("json", args.json)
    fits = args.gradcache == 1 or (args.what == "stage1" and not args.vs)
    expect(fits, "--gradcache is of stage1, and nothing that transformers does: leave it or --vs out")
    expect(not args.vs or args.what != "data", "transformers has nothing like this to compare with: leave --vs out")
    start_processes()
    args.device = local_device(args.device)
    args.precision = choose_precision(args.device, args.precision)[0]
    args.batch = args.batch or BATCHES.get(args.what, 16)
    if args.device.type == "cpu":
        prepare_cpu(world_size())
    elif args.device.type == "cuda" and args.precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.processor() or "CPU"
    title = f"{args.what}, {args.precision}, {machine}, {torch.get_num_threads()} threads, {world_size()} process(es)"
    title += f", torch {torch.__version__}"
    print0(title)
    if args.what not in WORKS:
        numbers = {"load": load, "data": data}[args.what](args)
        show("", numbers)
    else:
        work = WORKS[args.what](args)
        numbers = measure(work, args)
        show(f"{args.vit}, {args.image_size} px, batch {args.batch}", numbers)
        if args.vs:
            comparison = versus(work, args)
            show("beside transformers", comparison)
            numbers |= comparison
    settings = {name: str(value) for name, value in vars(args).items() if value is not None and name != "json"}
    record = {"title": title, "settings": settings, "numbers": numbers}
    if rank() == 0:
        print(json.dumps(record))
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(run_command(main))
