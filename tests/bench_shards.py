"""Measure tar shards beside single files and beside open_clip's way of reading, on this machine.

    python tests/bench_shards.py                      everything, over sets made in /tmp/shards (8 GB, some minutes)
    python tests/bench_shards.py rate memory          some of: index rate memory

index   a million samples of about a kilobyte: rate of indexing, time to open them again
rate    images a second and CPU time an image: tars, files, webdataset (as open_clip composes it, which needs
        `pip install webdataset`), for 0, 1 and 2 loader workers, of 64 x 64 drawings and of photos of 224 x 224
memory  of a process and of a loader worker, and the sampler's time, at 10,000 to 130 million samples; of the largest
        set there is only the index

Each number comes from a process of its own. CPU time is of the process and its workers, and says more than images a
second on a machine that others use too.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import make_shards  # noqa: E402

from data import StepSampler, TrainSet, collate_captions, train_loader  # noqa: E402
from sources import shards  # noqa: E402
from sources.images import decode_crop, train_transform  # noqa: E402
from sources.mixture import open_images  # noqa: E402
from sources.text import BertTokenizer  # noqa: E402

BATCH = 64
PAPER_BATCH = 2320  # of the sampler's window: the paper's stage 1 over ViT-L
SIZES = {"10,000": 2, "100,000": 20}  # shards of 5,000 each, besides the million
PHOTOS = ROOT.parent / "shared/data/flickr8k"


def collate(targets, seeds, image_ids, **rest):
    """Stage 1's."""
    return collate_captions(BERT, targets, seeds, image_ids, **rest)


BERT = BertTokenizer(ROOT / "assets/tiny/bert")


# --- the sets ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make what is not there yet: the million, 20,000 of it as files, photos as tars, folders of parts by links."""
    make = [sys.executable, ROOT / "tests/make_shards.py"]
    if not (folder / "million/00199.tar").exists():
        subprocess.run([*make, folder / "million", "--shards", "200", "--samples", "5000"], check=True)
    if not (folder / "files/captions.jsonl").exists():
        subprocess.run([*make, folder / "files", "--shards", "4", "--samples", "5000", "--files"], check=True)
    for name, count in SIZES.items():
        part = folder / f"first {name}"
        part.mkdir(exist_ok=True)
        for shard in range(count):
            if not (part / f"{shard:05d}.tar").exists():
                (part / f"{shard:05d}.tar").symlink_to(f"../million/{shard:05d}.tar")
    if PHOTOS.exists() and not (folder / "photos").exists():
        photo_shards(folder / "photos")


def photo_shards(folder: Path) -> None:
    """Flickr8k's 6,000 training photos of 224 x 224 as three tars; links to them for the files."""
    records = json.loads((PHOTOS / "train.json").read_text())
    folder.mkdir()
    with open(folder / "captions.jsonl", "w") as lines:
        for record in records:
            lines.write(json.dumps({"image": str(PHOTOS / record["image"]), "caption": record["caption"][:1]}) + "\n")
    for shard in range(3):
        entries = []
        for number, record in enumerate(records[2000 * shard : 2000 * (shard + 1)]):
            image, texts = (PHOTOS / record["image"]).read_bytes(), record["caption"]
            made = make_shards.Made(number, f"{shard:05d}{number:04d}", image, texts, {"all_captions": texts})
            entries += make_shards.members(made)
        make_shards.write_tar(folder / f"{shard:05d}.tar", entries)


def vast_set(folder: Path) -> Path:
    """130 million samples: 26,000 links to the million's tars, and their index joined from the million's."""
    links = folder / "first 130,000,000"
    links.mkdir(exist_ok=True)
    tars = [links / f"{number:05d}.tar" for number in range(26_000)]
    for number, tar in enumerate(tars):
        if not tar.exists():
            tar.symlink_to(f"../million/{number % 200:05d}.tar")
    index = shards.index_folder(links)
    states = [shards.tar_state(tar, links, "") for tar in tars]
    joint = index / f"{shards.hashed(repr(states))}.index"
    if not joint.exists():
        in_own_process("opening", folder / "million")
        parts = [next((folder / "million/.index").glob(f"{number:05d}.tar.*.npz")) for number in range(200)]
        start = time.perf_counter()
        shards.join(parts * 130, joint, True)
        print(f"joining 26,000 indexes: {time.perf_counter() - start:.0f} s, {joint.stat().st_size / 1e9:.2f} GB")
    return links


def forget(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- what is measured, each in a process of its own -------------------------------------------------------------------


def memory_of(pid: int | str = "self") -> dict[str, float]:
    """MB: resident, its share of what several processes have, and what it alone has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    own = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss": found["Rss"], "pss": found["Pss"], "own": own, "dirty": found["Private_Dirty"]}


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def opening(spec: str) -> dict:
    """Open a set."""
    start, cpu = time.perf_counter(), cpu_seconds()
    images = open_images([spec], "train", 64)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu": cpu_seconds() - cpu, "samples": len(images), **memory_of()}


def our_batches(spec: str, side: int, workers: int, steps: int):
    """Batches as a training reads them."""
    images = open_images([spec], "train", side)
    sampler = StepSampler(images, 0, BATCH, 1, steps, 0, 0, 1)
    return train_loader(TrainSet(images, collate, side, 0), sampler, workers, pin=False)


def webdataset_batches(spec: str, side: int, workers: int, steps: int):
    """open_clip's pipeline (get_wds_dataset in training/data.py) with this project's crop and tokens."""
    import webdataset as wds

    shards = sorted(map(str, Path(spec).glob("*.tar")))
    rng = np.random.default_rng()

    def augment(image):
        return train_transform(*decode_crop(image, side, rng), side, rng, True)

    def to_batch(samples):
        images, texts = zip(*samples)
        return collate([("", text) for text in texts], None, list(range(len(texts))), images=torch.stack(images))

    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.shuffle(2000, initial=500),
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(5000, initial=1000),
        wds.select(lambda sample: "txt" in sample),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=augment, text=lambda text: text),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False, collation_fn=to_batch),
    ).repeat(1000)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    return (batch for batch, _ in zip(loader, range(steps)))


def rate(way: str, spec: str, side: int, workers: int, steps: int) -> dict:
    """Images a second once the first batches are there."""
    torch.set_num_threads(1)
    make = webdataset_batches if way == "webdataset" else our_batches
    cpu, start = cpu_seconds(), time.perf_counter()
    batches = iter(make(spec, side, workers, steps))
    count = len(next(batches))
    first = time.perf_counter()
    for step, batch in enumerate(batches):
        count += len(batch)
        last = time.perf_counter()
        if step == steps // 2:
            memory = [memory_of(child) for child in children()]
    del batches
    return {
        "first": first - start,
        "rate": (count - BATCH) / (last - first),
        "cpu ms": 1000 * (cpu_seconds() - cpu) / count,
        "worker": max((m["dirty"] for m in memory), default=0),
    }


def children() -> list[int]:
    """Process ids of the workers."""
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def memory(spec: str) -> dict:
    """Of a process that trains and of its worker, after reading 100 batches; time of a window."""
    torch.set_num_threads(1)
    before = memory_of()
    start = time.perf_counter()
    images = open_images([spec], "train", 64)
    opened = time.perf_counter() - start
    sampler = StepSampler(images, 0, PAPER_BATCH, 1, 10**6, 0, 0, 1)
    times = []
    for window in (0, 1, sampler.steps // sampler.WINDOW - 1):
        start = time.process_time()
        sampler.window(window)
        times.append(time.process_time() - start)
    found = {"samples": len(images), "open": opened, "window": times}
    sampler = StepSampler(images, 0, BATCH, 1, 130, 0, 0, 1)
    for count, _ in enumerate(train_loader(TrainSet(images, collate, 64, 0), sampler, 1, pin=False)):
        if count == 100:
            found["worker"] = memory_of(children()[0])
    return found | {"before": before, "process": memory_of()}


def in_own_process(function: str, *args) -> dict:
    """Call a function of this file."""
    command = [sys.executable, __file__, "--call", function, *map(str, args)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


# --- tables -----------------------------------------------------------------------------------------------------------


def index_table(folder: Path) -> None:
    """Rate of indexing, cold and warm, and opening."""
    sets = {"cold disk": folder / "million", "in the page cache": folder / "first 100,000"}
    for what, spec in sets.items():
        tars = sorted(spec.glob("*.tar"))
        size = sum(map(os.path.getsize, tars)) / 1e6
        shutil.rmtree(spec / ".index", ignore_errors=True)
        if what == "cold disk":
            forget(tars)
        found = in_own_process("opening", spec)
        if "error" in found:
            print(what, found["error"])
            continue
        count, seconds = found["samples"], found["seconds"]
        print(f"{count:,} samples, {size:,.0f} MB, {what}: {seconds:.1f} s, {count / seconds:,.0f} samples/s, ", end="")
        print(f"{size / seconds:,.0f} MB/s; CPU {1e6 * found['cpu'] / count:.1f} us a sample", flush=True)
    million = sets["cold disk"]
    found = in_own_process("opening", million)
    stored = sum(path.stat().st_size for path in (million / ".index").rglob("*")) / 1e6
    print(f"index files: {stored:,.1f} MB, {stored * 1e6 / found['samples']:.0f} bytes a sample")
    for _ in range(2):
        again = in_own_process("opening", million)
        print(f"opened again: {1000 * again['seconds']:.0f} ms, {again['rss']:.0f} MB resident")


def rate_table(folder: Path) -> None:
    """Images a second."""
    print(f"{'images':12} {'way':11} workers  images/s  CPU ms/image  first batch s  worker's own MB")
    drawings = {"tars": folder / "first 100,000", "files": folder / "files/captions.jsonl"}
    photos = {"tars": folder / "photos", "files": folder / "photos/captions.jsonl"}
    for specs in (drawings, photos):
        in_own_process("opening", specs["tars"])  # index it
    for name, side, specs, steps in (("64 x 64", 64, drawings, 70), ("224 x 224", 224, photos, 40)):
        for workers in (0, 1, 2):
            for way, spec in {**specs, "webdataset": specs["tars"]}.items():
                found = in_own_process("rate", way, spec, side, workers, steps)
                if "error" in found:
                    print(name, way, workers, found["error"])
                    continue
                row = f"{name:12} {way:11} {workers:7}  {found['rate']:8,.0f}  {found['cpu ms']:12.2f}"
                print(f"{row}  {found['first']:13.1f}  {found['worker']:15.0f}", flush=True)


def memory_table(folder: Path) -> None:
    """Of each size."""
    print("MB before, of the process and of its worker: resident/its share/its own without mapped files")
    print(f"{'samples':>11}  open s  window, CPU s (first, next, late)  before | process | worker")
    sets = [*(folder / f"first {name}" for name in SIZES), folder / "million", vast_set(folder)]
    for spec in sets:
        in_own_process("opening", spec)  # index it
        found = in_own_process("memory", spec)
        if "error" in found:
            print(spec.name, found["error"])
            continue
        windows = ", ".join(f"{seconds:.2f}" for seconds in found["window"])
        parts = [found["before"], found["process"], found["worker"]]
        numbers = " | ".join("/".join(f"{part[key]:.0f}" for key in ("rss", "pss", "dirty")) for part in parts)
        print(f"{found['samples']:11,}  {found['open']:6.2f}  {windows}  {numbers}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--call"]:
        name, *args = sys.argv[2:]
        print(json.dumps(globals()[name](*(int(arg) if arg.isdigit() else arg for arg in args))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    tables = {"index": index_table, "rate": rate_table, "memory": memory_table}
    parser.add_argument("tables", nargs="*", choices=[*tables, []], default=list(tables))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/shards"))
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    prepare(args.folder)
    for name in args.tables:
        print(f"\n{name}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        tables[name](args.folder)


if __name__ == "__main__":
    main()
