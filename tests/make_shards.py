"""Write synthetic tar shards of any size as img2dataset and webdataset write them, or the same images as files.

    python tests/make_shards.py OUT --shards 200 --samples 5000

A sample is a function of its number: a small JPEG of its own, captions of 3 to 24 words of which the last one is the
number, and a JSON record. A million take a few minutes, because only some hundred images are encoded: the others differ
in a comment and in the record. `ODDITIES` are what shards in the wild have.
"""

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ENCODED = 256  # different images; as many in a set of any size
WORDS = "a the red green blue large small old dog cat house tree above below beside with and of on two".split()
ODDITIES = {
    "order": "members of a sample in any order",
    "scattered": "members of a shard in any order, so that samples are torn apart",
    "twice": "the second sample of a shard has the key of the first, as in LAION",
    "empty": "every fifth caption is empty",
    "pax": "every third sample has pax headers and a name of 150 letters",
    "gnu": "every third sample has a name of 150 letters in GNU tar's way",
    "broken": "every seventh image is cut short",
    "cut": "the last shard ends in the middle of an image",
    "none": "the last shard has no members",
    "folders": "names begin with ./, with entries for folders, and macOS's ._ files beside them",
}


@dataclass
class Made:
    """One sample as it was written."""

    number: int
    key: str
    image: bytes
    captions: list[str]
    record: dict = field(default_factory=dict)
    broken: bool = False


@functools.lru_cache(maxsize=4)
def encoded(side: int, seed: int) -> list[bytes]:
    """ENCODED different JPEGs: two gradients with a rectangle, about a kilobyte at 64 pixels."""
    rng, found = np.random.default_rng([seed, 0]), []
    for _ in range(ENCODED):
        x = np.linspace(0, 255, side)
        blue = np.full((side, side), rng.integers(256))
        pixels = np.stack([np.tile(x, (side, 1)), np.tile(x[:, None], (1, side)), blue], 2)
        top, left = rng.integers(0, side // 2, 2)
        pixels[top : top + side // 2, left : left + side // 2] = rng.integers(0, 256, 3)
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(out, "JPEG", quality=int(rng.integers(60, 90)))
        found.append(out.getvalue())
    return found


def made(number: int, key: str, side: int = 64, captions: int = 1, seed: int = 0, kind: str = "img2dataset") -> Made:
    """The sample of a number."""
    rng, plain = random.Random(seed << 40 | number), encoded(side, seed)[number % ENCODED]
    comment = f"sample {number} of {seed}".encode()
    image = plain[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + plain[2:]
    texts = [" ".join([*rng.choices(WORDS, k=rng.randrange(2, 24)), str(number)]) for _ in range(captions)]
    record = {"caption": texts[0], "url": f"https://example.org/{number}.jpg", "key": key}
    if kind == "img2dataset":
        record |= {"status": "success", "error_message": None, "width": side, "height": side, "original_width": side}
        record |= {"original_height": side, "exif": "{}", "sha256": hashlib.sha256(image).hexdigest()}
    if captions > 1:
        similarities = [round(rng.random(), 3) for _ in texts]
        record |= {"top_caption": texts[0], "all_captions": texts, "all_similarities": similarities}
    return Made(number, key, image, texts, record)


def members(sample: Made, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """Names and contents: image, text, record."""
    text = sample.captions[0].encode()
    content = [(suffix, sample.image), ("txt", text), ("json", json.dumps(sample.record).encode())]
    return [(f"{sample.key}.{end}", data) for end, data in content]


def header(name: str, size: int, odd: tuple[str, ...] = (), is_folder: bool = False) -> bytes:
    """The blocks of a tar before a member's content."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type = size, 0o644, tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
    if "pax" in odd and len(name) > 100:
        info.pax_headers = {"comment": "with headers", "mtime": "1700000000.123456789"}
    return info.tobuf(tarfile.PAX_FORMAT if "pax" in odd else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def write_tar(path: Path, entries: list[tuple[str, bytes]], odd: tuple[str, ...] = ()) -> None:
    """A tar of these members."""
    end = 0  # where it is cut: amid the last image
    with open(path, "wb") as file:
        if "folders" in odd:
            file.write(header(".", 0, is_folder=True))
        for name, data in entries:
            if "folders" in odd:
                file.write(header(f"./._{name}", 163) + bytes(512))
                name = f"./{name}"
            file.write(header(name, len(data), odd))
            end = file.tell() + len(data) // 2 if name.endswith((".jpg", ".png", ".webp")) else end
            file.write(data + bytes(-len(data) % 512))
        file.write(bytes(1024) + bytes(-(file.tell() + 1024) % 10240))
        if "cut" in odd:
            file.truncate(end)


def write_shard(
    folder: Path, shard: int, samples: int, kind="img2dataset", odd=(), side=64, captions=1, seed=0, suffix="jpg"
) -> list[Made]:
    """One shard -> its samples in their order, without what a reader cannot see (the part of a tar that is cut off)."""
    rng, all_made, entries = random.Random(f"{seed} {shard}"), [], []
    first = shard * samples
    for place in range(0 if "none" in odd else samples):
        number = first + place
        key = f"{shard:05d}{place:04d}" if kind == "img2dataset" else f"sample{place:06d}"
        if {"pax", "gnu"} & set(odd) and place % 3 == 0:
            key = f"{'x' * 70}/{'y' * 70}/{key}"
        if "twice" in odd and place == 1:
            key = all_made[0].key
        sample = made(number, key, side, captions, seed, kind)
        if "empty" in odd and place % 5 == 4:
            sample.captions = [""] * captions
            sample.record["caption"] = ""
        if "broken" in odd and place % 7 == 6:
            sample.image, sample.broken = sample.image[: len(sample.image) // 2], True
        parts = members(sample, suffix)
        if "order" in odd:
            rng.shuffle(parts)
        all_made.append(sample)
        entries += parts
    if "scattered" in odd:
        rng.shuffle(entries)
    write_tar(folder / f"{shard:05d}.tar", entries, odd)
    if kind == "img2dataset" and "cut" not in odd:
        stats = {"count": len(all_made), "successes": len(all_made), "failed_to_download": 0, "failed_to_resize": 0}
        stats |= {"start_time": 0.0, "end_time": 1.0, "duration": 1.0, "status_dict": {"success": len(all_made)}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return all_made[:-1] if "cut" in odd else all_made


def write_shards(folder: Path, shards: int = 3, samples: int = 8, odd: tuple[str, ...] = (), **how) -> list[Made]:
    """Several shards in a folder -> all samples a reader can see, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    oddities = (odd_of(shard, shards, odd) for shard in range(shards))
    return [sample for n, mine in enumerate(oddities) for sample in write_shard(folder, n, samples, odd=mine, **how)]


def odd_of(shard: int, shards: int, odd) -> tuple[str, ...]:
    """The oddities of one shard: only the last one is cut or empty."""
    return tuple(x for x in odd if x not in ("cut", "none") or shard == shards - 1)


def write_files(folder: Path, shards: int, samples: int, side=64, captions=1, seed=0, **_) -> Path:
    """The same images as single files, a thousand in a folder, and their annotation file -> it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.jsonl", "w") as lines:
        for number in range(shards * samples):
            sample = made(number, str(number), side, captions, seed)
            path = folder / "images" / f"{number // 1000:05d}" / f"{number:09d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample.image)
            lines.write(json.dumps({"image": str(path.relative_to(folder)), "caption": sample.captions}) + "\n")
    return folder / "captions.jsonl"


def _shard(job) -> None:
    folder, shard, samples, odd, how = job
    write_shard(folder, shard, samples, odd=odd, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--captions", type=int, default=1, help="of each image; several: also in all_captions")
    parser.add_argument("--kind", choices=("img2dataset", "webdataset"), default="img2dataset")
    parser.add_argument("--odd", nargs="*", choices=ODDITIES, default=[], help=str(ODDITIES))
    parser.add_argument("--files", action="store_true", help="write single files and an annotation file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    how = dict(side=args.side, captions=args.captions, seed=args.seed, kind=args.kind)
    if args.files:
        print(write_files(args.out, args.shards, args.samples, **how))
        return
    jobs = [(args.out, n, args.samples, odd_of(n, args.shards, args.odd), how) for n in range(args.shards)]
    with multiprocessing.Pool(args.jobs) as pool:
        for done, _ in enumerate(pool.imap_unordered(_shard, jobs), start=1):
            print(f"\r{done} of {args.shards} shards", end="", flush=True)
    print(f": {args.shards * args.samples:,} samples in {args.out}")


if __name__ == "__main__":
    main()
