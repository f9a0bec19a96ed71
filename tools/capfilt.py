"""CapFilt (paper 3.4): a captioner's captions beside those of the web, and of all only what fits the image best.

    torchrun -m tools.capfilt --captioner runs/stage2 --ranker runs/stage1 --data web.json --out better.jsonl

The ranker scores --captions sampled captions and the web's; the --keep best of each image are written with all scores,
as JSON lines, or with --out FOLDER/ as tar shards, which hold the images too. Both are --data of a training, which
draws one of the kept at each step. Any number of processes work on blocks of samples, whose batches and random numbers
depend on their position alone. A finished block is a file in a folder beside the output: a stopped command goes on.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip2 import Blip2
from data import Loader, decoding_workers
from engine.device import DEVICES, PRECISIONS, choose_precision, local_device
from engine.distributed import barrier, gather_objects, print0, rank, start_processes, world_size
from engine.draws import sample_rng
from engine.errors import Parser, UserError, at_least_1, expect, run_command
from engine.files import read_json, remove, sha256, whole, write_json
from engine.lock import locked
from engine.progress import clock, progress
from engine.stop import state
from sources.annotations import AnnotationFile
from sources.images import eval_transform
from sources.mixture import Mixture, check_spec, open_images
from sources.text import clean_caption, is_text
from tasks.clip import Clip, clip_transform, is_clip
from weights.load import weight_files

BATCH, BLOCK = 64, 512  # images: captioned together; of a file, which a stopped command may have to make again
SHARD = 19 * BLOCK  # samples of a tar, of at most 10,000
TIMEOUT = 7 * 24 * 60.0  # minutes that a process which has done its blocks waits for the slowest


class Views:
    """Rows of images -> ({row: why it cannot be read}, uint8 images of each transform)."""

    def __init__(self, images: Mixture, transforms: list):
        self.images, self.transforms = images, transforms

    def __getitem__(self, rows: range) -> tuple[dict[int, str], list[Tensor]]:
        broken, views = {}, []
        for row in rows:
            try:
                image = self.images[row].open()
                views.append([transform(image) for transform in self.transforms])
            except UserError as error:
                broken[row] = str(error)
        return broken, [torch.stack(view) for view in zip(*views)]


class CapFilt:
    """The captioner and the ranker, which may be one model, or have one frozen ViT: then it runs once."""

    def __init__(self, args: argparse.Namespace, **where):
        self.args, self.captioner = args, Blip2.from_pretrained(args.captioner, **where)
        if self.captioner.llm is None:
            self.captioner.check_itg(None, 1)
        clip, same = is_clip(args.ranker), os.path.realpath(args.captioner) == os.path.realpath(args.ranker)
        self.ranker = self.captioner if same else (Clip.open if clip else Blip2.from_pretrained)(args.ranker, **where)
        trained = self.ranker.llm is None and args.rank_by not in self.ranker.untrained_heads
        got = f"--ranker {args.ranker} has no trained head for {args.rank_by.upper()}"
        expect(trained, f"{got}: pass a run of stage 1 or retrieval, or for ITC a CLIP; what was in stage 2 has none")
        seen, others = ((model.sources["vit"].sha256, model.image_size) for model in (self.captioner, self.ranker))
        self.one_vit = same or seen == others and seen[0] is not None  # None: trained since
        self.transforms = [partial(eval_transform, size=self.captioner.image_size)]
        if not self.one_vit:
            self.transforms.append(partial(clip_transform if clip else eval_transform, size=self.ranker.image_size))

    def records(self, samples: list, first: int, views: list[Tensor]) -> list[dict]:
        """Caption and filter samples; first: position of their batch, which decides what is drawn."""
        args = self.args
        if not samples:
            return []
        encoded, draws = self.captioner.encode_image(views[0]), torch.Generator(self.captioner.device)
        draws.manual_seed(int(sample_rng(args.seed, first).integers(2**63)))
        how = dict(num_captions=args.captions, num_beams=1, sample=True, top_p=args.top_p, generator=draws)
        drawn = [[own] if isinstance(own, str) else own for own in self.captioner.caption(encoded, **how)]
        texts = [distinct([*sample.captions, *own]) for sample, own in zip(samples, drawn, strict=True)]
        encoded = self.ranker.encode_tokens(encoded.tokens) if self.one_vit else self.ranker.encode_image(views[1])
        owners = torch.tensor([i for i, own in enumerate(texts) for _ in own], dtype=torch.long)
        scores = iter(self.scores(encoded, owners, sum(texts, [])))
        return [self.record(sample, {text: next(scores) for text in own}) for sample, own in zip(samples, texts)]

    def scores(self, images, owners: Tensor, texts: list[str]) -> list[float]:
        """How well each text fits its owner among the encoded images, by ITC's cosine or ITM's probability."""
        encoded = self.ranker.encode_text(texts or ["-"])
        if self.args.rank_by == "itm":  # in double precision, as many are near 1
            logits = self.ranker.match_logits(images, encoded, owners, torch.arange(len(texts)))
            return logits.double().softmax(dim=1)[:, 1].tolist()
        return (images.feats[owners] * encoded.feats[: len(texts), None]).sum(dim=-1).amax(dim=1).tolist()

    def record(self, sample, scores: dict[str, float]) -> dict:
        """What is written of a sample, its texts best first; of equal ones that of the web, then the first drawn."""
        ranked = sorted(scores, key=scores.get, reverse=True)
        if not ranked:
            return {"skipped": f"{sample.name} has no caption, and none with a word was drawn"}
        image, folder = os.path.abspath(sample.name), os.path.abspath(Path(self.args.out).parent)
        image = os.path.relpath(image, folder) if os.path.commonpath((image, folder)) == folder else image
        identity = {key: sample.record[key] for key in ("image_id",) if key in sample.record}
        found = {"image": image, "caption": ranked[: self.args.keep], **identity}
        web = [text for text in sample.captions if text in scores]
        return found | {"scores": {text: float(f"{scores[text]:.6g}") for text in ranked}, "web": web}


def distinct(texts: list[str]) -> list[str]:
    """The texts that have a word, without those that cleaning makes equal to one before."""
    first = {clean_caption(text): text for text in reversed(texts) if is_text(text)}
    return sorted(first.values(), key=texts.index)


# --- blocks ----------------------------------------------------------------------------------------------------------


def begin(folder: Path, out: Path, command: dict) -> None:
    """Go on with the blocks in `folder`; refuse those of another command, or to begin where there is an output."""
    file, blocks = folder / "command.json", list(folder.glob("*.jsonl"))
    if not (file.exists() and blocks):
        there = any(out.iterdir()) if out.is_dir() else out.exists()
        expect(not there, f"--out {out} exists already: remove it, or pass another name")
        for block in blocks:  # of a command that was stopped while it removed them
            block.unlink()
        write_json(file, command)
    known = read_json(file)
    changed = ", ".join(key for key in command if known.get(key) != command[key])
    again = "type it as it was, or remove the folder to begin anew"
    expect(not changed, f"{folder} has finished blocks of this command with another {changed}: {again}")


def write_blocks(capfilt: CapFilt, images: Mixture, blocks: list[int], folder: Path) -> int:
    """Write each block into a file, a line a sample -> how many samples these are."""
    rows = range(len(images))
    batches = [rows[at : at + BATCH] for n in blocks for at in rows[n * BLOCK : (n + 1) * BLOCK : BATCH]]
    how = dict(num_workers=capfilt.args.workers, generator=torch.Generator())
    loader = zip(batches, Loader(Views(images, capfilt.transforms), None, sampler=batches, **how))
    lines, done, started, told = [], 0, time.monotonic(), 0.0
    for batch, (broken, views) in progress(loader, "captions", len(batches)):
        readable = [row for row in batch if row not in broken]
        records = capfilt.records([images[row] for row in readable], batch.start, views)
        made = dict(zip(readable, records)) | {row: {"skipped": why} for row, why in broken.items()}
        lines += [made[row] for row in batch]
        for reason in [made[row]["skipped"] for row in batch if "skipped" in made[row]]:
            print(f"skipped: {reason}", flush=True)
        if batch.stop % BLOCK and batch.stop < len(images):
            continue
        with whole(folder / f"{batch.start // BLOCK:07}.jsonl") as partial_file:
            partial_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done, lines, seconds = done + len(lines), [], time.monotonic() - started
        if seconds > told + 20:
            told = seconds
            print0(f"{done:,} images of this process, {done * world_size() / seconds:.1f} img/s of all")
    return done


def finished(folder: Path, rows: range):
    """Yield (row, its line in the blocks)."""
    for start in range(rows.start, rows.stop, BLOCK):
        yield from enumerate(map(json.loads, open(folder / f"{start // BLOCK:07}.jsonl")), start)


def write_tar(path: Path, folder: Path, images: Mixture, rows: range) -> None:
    """A shard: KEY.jpg, the bytes of the image file, and KEY.json. Without times and owners, so always the same."""
    with whole(path) as partial_file, tarfile.open(partial_file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, record in finished(folder, rows):
            if "skipped" not in record:
                image, key = Path(images[row].name), f"{path.stem}{row - rows.start:04}"
                text = json.dumps(record | {"key": key, "image": image.name}).encode()
                for suffix, content in ((image.suffix.lower(), images[row].read_bytes()), (".json", text)):
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def summary(folder: Path, rows: range) -> list[str]:
    """Counts, and three images with the scores of their captions, to be read by a person."""
    total, lines = Counter(), []
    for row, record in progress(finished(folder, rows), "counting", len(rows)):
        if "skipped" in record:
            total["skipped"] += 1
            continue
        web, kept = record["web"], record["caption"]
        total.update(images=1, kept=len(kept), web=len(web), web_kept=len({*web} & {*kept}))
        if row in (0, len(rows) // 2, len(rows) - 1):
            lines.append(record["image"])
            for text, score in record["scores"].items():
                lines.append(f"  {'keep' * (text in kept):4} {score:8.4f} {'web' if text in web else 'own'}  {text}")
    dropped = total["web"] - total["web_kept"]
    share = f"{dropped:,} of the web's {total['web']:,} dropped ({dropped / max(1, total['web']):.1%})"
    counts = f"{total['images']:,} images, {total['skipped']:,} skipped; {total['kept']:,} captions kept"
    return [*lines, f"{counts}, {total['web_kept']:,} of them the web's; {share}"]


def run(args: argparse.Namespace, folder: Path) -> None:
    """Caption, filter and write."""
    device, out = local_device(args.device), Path(args.out)
    precision, why = choose_precision(device, args.precision)
    capfilt = CapFilt(args, device=device, precision=precision)
    images = open_images(args.data, args.split, capfilt.captioner.image_size, args.images, need_texts=False)
    rows, tars = range(len(images)), args.out.endswith("/") or out.is_dir()
    files = all(isinstance(part, AnnotationFile) for part in images.parts)
    expect(tars or files, f"--data has its images in shards, which --out {out} cannot name: pass --out {out.stem}/")
    if rank() == 0:
        command = {f"--{key}": vars(args)[key] for key in ("captions", "keep", "rank_by", "top_p", "seed")}
        for flag, model in (("captioner", capfilt.captioner), ("ranker", capfilt.ranker)):
            weights = sha256(weight_files(Path(vars(args)[flag])))
            command[f"--{flag}"] = [weights, *(source.sha256 for source in model.sources.values())]
        data = [images.content_sha256(), images.sizes_sha256()]
        begin(folder, out, command | {"--data": data, "--precision": precision})
    barrier()
    state.advice = "type the same command again to go on"
    done = gather_objects({int(path.stem) for path in folder.glob("*.jsonl")})[0]
    left = [block for block in range(-(-len(images) // BLOCK)) if block not in done]
    what = f"{args.captioner} captions, {args.ranker} ranks by {args.rank_by}, on {device}, {precision} ({why})"
    print0(what, f"{len(images):,} images, {len(left):,} blocks of {BLOCK} to do, {len(done):,} are done")
    started = time.monotonic()
    made = sum(gather_objects(write_blocks(capfilt, images, left[rank() :: world_size()], folder)))
    speed = f"{clock(time.monotonic() - started)}, {made / (time.monotonic() - started):.1f} img/s"
    shards = [rows[at : at + SHARD] for at in rows[::SHARD]] if tars else []
    for number in progress(range(rank(), len(shards), world_size()), "writing shards"):
        out.mkdir(exist_ok=True)
        if not (path := out / f"{number:05}.tar").exists():  # else it is whole, and of this command, see `begin`
            write_tar(path, folder, images, shards[number])
    barrier()
    if rank() == 0:
        if not tars:
            with whole(out) as partial_file, open(partial_file, "w") as file:
                file.writelines(json.dumps(r) + "\n" for _, r in finished(folder, rows) if "skipped" not in r)
        print0(*summary(folder, rows), f"written to {args.out}; {speed}")
        remove(folder / "command.json")  # first: the blocks are of no use without it
        remove(folder)


# --- the command line ------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked before anything is loaded."""
    parser = Parser(prog="python -m tools.capfilt", description=__doc__)
    flag, twice = parser.add_argument, dict(action="append")
    flag("--captioner", required=True, help="a run, or a public checkpoint, of any stage that writes captions")
    flag("--ranker", required=True, help="a run, or a public checkpoint, with ITC; or a folder of CLIPModel")
    flag("--data", required=True, **twice, help="images with captions, or alone; may be repeated")
    flag("--images", **twice, help="folder of the images, if not beside the file; may be repeated")
    flag("--split", default="train", help="of Karpathy's files")
    flag("--out", required=True, help="a .jsonl, or FOLDER/ for tar shards")
    flag("--captions", type=partial(at_least_1, most=1000), default=10, help="that are drawn for an image")
    flag("--keep", type=at_least_1, default=2, help="how many of these and the web's")
    flag("--rank-by", choices=("itc", "itm"), default="itc")
    flag("--top-p", type=float, default=0.9, help="of nucleus sampling")
    flag("--seed", type=int, default=0)
    flag("--precision", default="auto", choices=("auto", *PRECISIONS))
    flag("--device", default="auto", choices=DEVICES)
    flag("--workers", type=int, default=decoding_workers(), help="processes that decode images")
    args = parser.parse_args(argv)
    most, out = args.captions + 1, Path(args.out).resolve()
    expect(args.keep <= most, f"got --keep {args.keep}, expected at most {most}: --captions and one of the web's")
    expect(0 < args.top_p <= 1, f"got --top-p {args.top_p}, expected above 0 and at most 1")
    expect(args.seed >= 0, f"got --seed {args.seed}, expected at least 0")
    expect(0 <= args.workers <= 256, f"got --workers {args.workers}, expected 0 to 256")
    for name in ("captioner", "ranker"):
        got = f"--{name} {vars(args)[name]} is no folder: pass a run, or make one by python -m tools.weights export"
        expect(Path(vars(args)[name]).is_dir(), got)
    for spec in args.data:
        expect(spec != "shapes", "--data shapes has no image files: pass an annotation file, or a folder of images")
        check_spec(spec)
        inside = Path(spec).resolve() in (out, *out.parents)
        expect(not inside, f"--out {args.out} is inside of the input {spec}: pass another place")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    start_processes(TIMEOUT)
    folder = Path(args.out).with_name(f".{Path(args.out).name}.blocks")
    with locked(folder):
        run(args, folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
