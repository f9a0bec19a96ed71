"""Tar shards: whatever img2dataset or webdataset has written is read whole, in an exact order, in constant memory."""

import json
import multiprocessing
import os
import random
import signal
import sys
import tarfile
import time
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from make_shards import ODDITIES, Made, made, members, write_shard, write_shards, write_tar
from PIL import Image
from test_data import sampler, train_set

import train
from data import StepSampler, train_loader
from engine.errors import UserError
from engine.permutation import permute, permute_blocks
from sources.annotations import Source
from sources.mixture import Mixture, open_images
from sources.shards import TarShards


def seen(source) -> list[tuple]:
    """What a reader gives: the captions and the bytes of each sample."""
    return sorted((tuple(sample.captions), sample.read_bytes()) for sample in (source[i] for i in range(len(source))))


def expected(samples: list[Made]) -> list[tuple]:
    """What was written, without what has no caption."""
    return sorted((tuple(sample.captions), sample.image) for sample in samples if any(sample.captions))


def number(sample) -> int:
    """By its caption's last word."""
    return int(sample.captions[0].split()[-1])


# --- what is in the wild ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["img2dataset", "webdataset"])
@pytest.mark.parametrize("odd", ["", *(name for name in ODDITIES if name != "broken")])
def test_every_sample_of_odd_shards_is_read_with_its_own_caption(tmp_path, odd, kind):
    written = write_shards(tmp_path, 3, 10, (odd,), kind=kind, side=16)
    assert seen(TarShards(str(tmp_path))) == expected(written)


@pytest.mark.parametrize("suffix, format", [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG")])
def test_images_of_all_common_kinds(tmp_path, suffix, format):
    out = BytesIO()
    Image.new("RGB", (12, 8), (250, 0, 0)).save(out, format)
    write_tar(tmp_path / "0.tar", [(f"0.{suffix}", out.getvalue()), ("0.txt", b"a red square")])
    sample = TarShards(str(tmp_path / "0.tar"))[0]
    assert sample.captions == ["a red square"] and sample.read_bytes() == out.getvalue()
    image = sample.open()
    assert image.mode == "RGB" and image.size == (12, 8) and image.getpixel((5, 5))[0] > 240


@pytest.mark.parametrize("spec", ["{}", "{}/*.tar", "{}/{{00000..00002}}.tar", "{}/0000{{0,1,2}}.tar", "{}/list.txt"])
def test_ways_to_name_shards(tmp_path, spec):
    """A folder, a pattern, braces, and a text file of names, relative to itself."""
    written = write_shards(tmp_path, 3, 4, side=16)
    (tmp_path / "list.txt").write_text("00000.tar\n\n{00001..00002}.tar\n")
    source = TarShards(spec.format(tmp_path))
    assert [number(source[i]) for i in range(len(source))] == [sample.number for sample in written]


def test_the_same_shards_named_in_another_way_are_the_same_set(tmp_path):
    write_shards(tmp_path, 2, 4, side=16)
    sets = [TarShards(f"{tmp_path}{end}") for end in ("", "/*.tar", "/{00000..00001}.tar")]
    assert len({source.content_sha256() for source in sets}) == 1
    assert len({source.image_id(3) for source in sets}) == 1


@pytest.mark.parametrize("field", ["", "caption", "top_caption", "all_captions"])
def test_captions_come_from_the_text_or_a_field_of_the_record(tmp_path, field):
    written = write_shards(tmp_path, 1, 6, side=16, captions=3)
    source = TarShards(str(tmp_path), field)
    want = [sample.captions if field == "all_captions" else sample.captions[:1] for sample in written]
    assert [source[i].captions for i in range(6)] == want
    assert source.num_texts == sum(map(len, want))
    rng = np.random.default_rng(0)
    drawn = {source[0].sample_text(rng)[1] for _ in range(40)}
    assert drawn == set(want[0])


def test_a_sample_without_caption_is_left_out_and_counted_unless_none_is_needed(tmp_path, capsys):
    written = write_shards(tmp_path, 2, 10, ("empty",), side=16)
    source = TarShards(str(tmp_path))
    assert len(source) == source.num_texts == 16 and all(source[i].captions for i in range(16))
    told = capsys.readouterr()
    assert "4 " in told.out + told.err and "caption" in told.out + told.err
    images = TarShards(str(tmp_path), need_texts=False)
    assert [images[i].read_bytes() for i in range(20)] == [sample.image for sample in written]


def test_a_missing_field_is_said_with_the_fields_there_are(tmp_path):
    write_shards(tmp_path, 1, 4, side=16)
    with pytest.raises(UserError, match="blip_caption"):
        TarShards(str(tmp_path), "blip_caption")


@pytest.mark.parametrize("where", ["amid an image", "amid a header", "between samples", "garbage"])
def test_a_shard_cut_short_is_named_and_read_up_to_there(tmp_path, capsys, where):
    """tarfile itself ends silently at a broken header."""
    write_shards(tmp_path, 2, 6, side=16)
    path = tmp_path / "00001.tar"
    with tarfile.open(path) as tar:
        image = tar.getmember("000010004.jpg")
    cut = {"amid an image": image.offset_data + 9, "amid a header": image.offset + 100, "between samples": image.offset}
    with open(path, "r+b") as file:
        if where == "garbage":
            file.seek(image.offset)
            file.write(b"\xa7" * 512)
        else:
            file.truncate(cut[where])
    source = TarShards(str(tmp_path))
    assert [number(source[i]) for i in range(len(source))] == list(range(10))
    told = capsys.readouterr()
    assert "00001.tar" in told.out + told.err


@pytest.mark.parametrize("how", ["missing", "no tar"])
def test_a_missing_or_unreadable_shard_is_named_and_the_others_are_read(tmp_path, capsys, how):
    write_shards(tmp_path, 2, 4, side=16)
    if how == "missing":
        (tmp_path / "00001.tar").unlink()
    else:
        (tmp_path / "00001.tar").write_bytes(b"<html>404 not found</html>" * 100)
    source = TarShards(str(tmp_path / "{00000..00001}.tar"))
    assert [number(source[i]) for i in range(len(source))] == [0, 1, 2, 3]
    assert "00001.tar" in capsys.readouterr().out


def test_many_broken_shards_are_refused(tmp_path):
    write_shards(tmp_path, 1, 4, side=16)
    with pytest.raises(UserError, match="3 of 4 tars of .* are broken or missing"):
        TarShards(str(tmp_path / "{00000..00003}.tar"))


def test_a_shard_that_vanishes_after_indexing_is_named_and_replaced(tmp_path):
    """As on a disk that is lost for a while."""
    write_shards(tmp_path, 2, 4, side=16)
    images = open_images([str(tmp_path)], "train", 8)
    (tmp_path / "00001.tar").rename(tmp_path / "away")
    batch = train_set(images)[[(0, 3), (1, 5)]]
    assert len(batch) == 2 and len(batch.broken) == 3 and all("00001.tar" in name for name, _ in batch.broken)


@pytest.mark.parametrize("odd", [("none",), ("empty",)])
def test_shards_without_a_sample_are_refused_in_a_sentence(tmp_path, odd):
    write_shards(tmp_path, 1, 4, odd, side=16)
    if odd == ("empty",):
        write_tar(tmp_path / "00000.tar", [("0.jpg", b"x"), ("0.txt", b"  ")])
    with pytest.raises(UserError, match=str(tmp_path)):
        TarShards(str(tmp_path))


@pytest.mark.parametrize("spec", ["none.tar", "{00000..00003}.tar", "*.tar"])
def test_shards_that_do_not_exist_are_refused_in_a_sentence(tmp_path, spec):
    with pytest.raises(UserError, match="exist"):
        open_images([f"{tmp_path}/{spec}"], "train", 8)


def test_a_broken_image_is_named_with_its_shard_replaced_and_counted(tmp_path):
    written = write_shards(tmp_path, 2, 7, ("broken",), side=32)
    images = open_images([str(tmp_path)], "train", 8)
    batch = train_set(images)[[(0, 5), (1, 6), (2, 7)]]
    assert len(batch) == 3 and len(batch.broken) == 1
    name, reason = batch.broken[0]
    assert "00000.tar" in name and written[6].key in name and "broken or cut short" in reason
    assert batch.image_ids.tolist() == [images.image_id(i) for i in (5, 7, 7)]


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["another size", "the same size"])
def test_a_shard_that_changed_is_indexed_again(tmp_path, how):
    write_shards(tmp_path, 2, 4, side=16)
    before = TarShards(str(tmp_path)).content_sha256()
    os.utime(tmp_path / "00001.tar", ns=(10**18, 10**18))
    if how == "another size":
        written = write_shard(tmp_path, 1, 5, side=16)
    else:
        written = write_shard(tmp_path, 1, 4, side=16, seed=1)
    source = TarShards(str(tmp_path))
    assert [number(source[i]) for i in range(4, len(source))] == [sample.number for sample in written]
    assert seen(source)[-1] and source.content_sha256() != before


def test_what_has_not_changed_is_not_indexed_again(tmp_path, monkeypatch):
    write_shards(tmp_path, 3, 4, side=16)
    first = TarShards(str(tmp_path))
    opened = []
    monkeypatch.setattr(tarfile, "open", lambda *args, **rest: opened.append(args))
    again = TarShards(str(tmp_path))
    assert not opened and seen(again) == seen(first) and again.content_sha256() == first.content_sha256()


def test_a_part_of_the_index_that_is_removed_is_made_again(tmp_path):
    written = write_shards(tmp_path, 2, 6, side=16)
    TarShards(str(tmp_path))
    files = sorted(path for path in (tmp_path / ".index").rglob("*") if path.is_file())
    assert len(files) >= 3
    for path in files:
        path.unlink()
        assert seen(TarShards(str(tmp_path))) == expected(written), path.name


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/.cache"))
    written = write_shards(tmp_path / "tars", 2, 4, side=16)
    (tmp_path / "tars/.index").write_text("no folder can be made here")
    before = sorted(os.listdir(tmp_path / "tars"))
    assert seen(TarShards(str(tmp_path / "tars"))) == expected(written)
    assert sorted(os.listdir(tmp_path / "tars")) == before and any((tmp_path / "home").rglob("*"))


def open_at_once(folder: str, started, results) -> None:
    """In a process of its own."""
    started.wait()
    source = TarShards(folder)
    results.put((source.content_sha256(), [number(source[i]) for i in range(len(source))]))


def test_processes_that_index_together_get_the_same_index(tmp_path):
    """Started at the same moment by hand, on no common group."""
    write_shards(tmp_path, 6, 200, side=16)
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=open_at_once, args=(str(tmp_path), started, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = [results.get(timeout=10) for _ in workers]
    assert found[0] == found[1] == found[2] and found[0][1] == list(range(1200))
    left = [path.name for path in (tmp_path / ".index").rglob("*") if path.is_file()]
    assert not [name for name in left if "tmp" in name or "part" in name]


def index_on_ranks(rank: int, folder: str, lines: Path) -> None:
    """As ranks of one training."""
    source = TarShards(folder)
    (lines / str(rank)).write_text(json.dumps([source.content_sha256(), len(source), source.image_id(7)]))


def test_ranks_index_together(tmp_path, ranks):
    write_shards(tmp_path / "tars", 5, 20, side=16)
    ranks(2, index_on_ranks, str(tmp_path / "tars"), tmp_path)
    alone = TarShards(str(tmp_path / "tars"))
    for rank in range(2):
        want = [alone.content_sha256(), 100, alone.image_id(7)]
        assert json.loads((tmp_path / str(rank)).read_text()) == want


def index_own_disk(rank: int, folder: Path) -> None:
    """As the only rank of its machine."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert len(TarShards(str(folder / f"machine {rank}"))) == 100


def test_machines_without_a_shared_disk_index_their_own_copies(tmp_path, ranks):
    for rank in range(2):
        write_shards(tmp_path / f"machine {rank}", 5, 20, side=16)
    ranks(2, index_own_disk, tmp_path)


# --- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ["", "order", "empty", "pax", "gnu", "folders"])
def test_webdataset_reads_the_same_images_and_captions(tmp_path, odd):
    wds = pytest.importorskip("webdataset")
    write_shards(tmp_path, 2, 9, (odd,), side=16)
    tars = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = wds.DataPipeline(wds.SimpleShardList(tars), wds.tarfile_to_samples())
    theirs = [(s["txt"].decode(), s["jpg"]) for s in theirs if "jpg" in s]
    source = TarShards(str(tmp_path), need_texts=False)
    ours = [("".join(source[i].captions), source[i].read_bytes()) for i in range(len(source))]
    assert sorted(ours) == sorted(theirs) and len(ours) == 18


# --- the permutation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [*range(1, 130), 1000, 4095, 4096, 4097, 65_537, 999_983])
def test_the_order_of_an_epoch_has_each_sample_once(count):
    order = permute(count, [3, count], np.arange(count))
    assert np.array_equal(np.sort(order), np.arange(count))
    few = np.random.default_rng(0).integers(0, count, 20)
    assert np.array_equal(permute(count, [3, count], few), order[few])  # place by place, nothing is stored


def test_billions_are_permuted_at_once_and_without_collisions():
    places = np.arange(2_000_000_000, 2_000_100_000)
    found = permute(5_000_000_000, [1], places)
    assert len(np.unique(found)) == len(places) and 0 <= found.min() and found.max() < 5_000_000_000


@pytest.mark.parametrize("count", [997, 10_000, 100_003])
def test_the_order_of_an_epoch_looks_random(count):
    """For eight seeds: neighbours' distance is uniform, and neither neighbours nor epochs nor place and sample go
    together. Limits: four standard deviations of what a true shuffle gives."""
    places = np.arange(count)
    for seed in range(8):
        order, later = (permute(count, [seed, epoch], places) for epoch in (0, 1))
        for lag in (1, 2, int(np.sqrt(count)), int(np.sqrt(count)) + 1):
            counts = np.bincount((order[lag:] - order[:-lag]) % count * 20 // count, minlength=20)
            chi = ((counts - counts.mean()) ** 2).sum() / counts.mean()
            assert chi < 19 + 4 * np.sqrt(2 * 19), (seed, lag)
            assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 4 / np.sqrt(count)
        assert abs(np.corrcoef(order, later)[0, 1]) < 4 / np.sqrt(count)
        assert abs(np.corrcoef(order, places)[0, 1]) < 4 / np.sqrt(count)
        assert (order == places).sum() < 9 and (order == later).sum() < 9  # Poisson with mean 1


@pytest.mark.parametrize("together", range(8))
def test_blocks_are_gone_through_a_few_at_a_time(together):
    """Each thing once, also with empty blocks; no block of a later group is touched before a group is through."""
    bounds = np.array([10, 15, 15, 22, 30, 41, 50])  # six blocks, one of them empty
    for seed in range(20):
        order = permute_blocks(bounds, together, [seed], np.arange(40))
        assert sorted(order) == list(range(10, 50))
        assert np.array_equal(permute_blocks(bounds, together, [seed], np.arange(40)[::-3]), order[::-3])
        block = np.searchsorted(bounds, order, side="right") - 1
        if 0 < together < 6:
            first = {b: np.flatnonzero(block == b) for b in set(block)}
            open_at = [sum(p[0] <= place <= p[-1] for p in first.values()) for place in range(40)]
            assert max(open_at) <= together


# --- the order of a training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """48 samples in four shards, each image another."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 4, 12, side=16, seed=3)
    return str(folder)


def loaded(spec: str, workers: int, **place) -> list:
    """Batches as train.py reads them; global batches of 24."""
    images = open_images([spec], "train", 8)
    return list(train_loader(train_set(images), sampler(images, **place), workers, pin=False))


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_sample_of_an_epoch_exactly_once(shards, world, workers):
    """For any number of ranks and workers; and each step has the samples that one process has in it."""
    steps = [[] for _ in range(4)]
    for rank in range(world):
        batches = loaded(shards, workers, batch=24 // world, steps=4, rank=rank, world=world)
        for step, batch in zip(steps, batches, strict=True):
            step += batch.image_ids.tolist()
    images = open_images([shards], "train", 8)
    every = {images.image_id(i) for i in range(48)}
    assert len(every) == 48
    counts = [sum(steps, []).count(name) for name in every]
    assert counts == [2] * 48
    one = [batch.image_ids.tolist() for batch in loaded(shards, 0, batch=24, steps=4)]
    assert steps == one


@pytest.mark.parametrize("together", [0, 1, 3])
@pytest.mark.parametrize("count, batch", [(48, 4), (43, 4), (7, 5), (48, 48)])
def test_each_epoch_is_the_draws_of_one_number_of_samples(shards, together, count, batch):
    """Where epochs end amid a step too: n samples, then n more, each n different."""
    images = open_images([shards], "train", 8).subset(np.arange(count))
    steps = StepSampler(images, 0, batch, 1, 200, 0, 0, 1, together)
    drawn = dict(pair for step in steps for pair in step)
    assert sorted(drawn) == list(range(200 * batch))
    orders = [[drawn[p] for p in range(epoch * count, (epoch + 1) * count)] for epoch in range(200 * batch // count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    shown = np.bincount(list(drawn.values()), minlength=count)
    assert shown.max() - shown.min() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_a_run_continues_exactly_at_a_random_step_with_other_workers(shards, seed):
    rng = random.Random(seed)
    start, before, after = rng.randrange(1, 40), rng.choice([0, 1, 2]), rng.choice([0, 1, 3])
    place = dict(batch=rng.choice([5, 8]), steps=42, seed=seed)
    straight = loaded(shards, 0, **place)
    images = open_images([shards], "train", 8)
    interrupted = iter(train_loader(train_set(images), sampler(images, **place), before, pin=False))
    first = [next(interrupted) for _ in range(start)]
    interrupted.close()
    for batch, want in zip(first + loaded(shards, after, start=start, **place), straight, strict=True):
        assert torch.equal(batch.images, want.images) and torch.equal(batch.text_ids, want.text_ids)
        assert batch.image_ids.tolist() == want.image_ids.tolist()


def test_a_training_that_is_killed_goes_on_with_the_samples_that_it_had_not_seen(shards, tmp_path):
    """kill -9 in the middle of an epoch, then another number of workers: the losses of each step are the same."""
    flags = [*TINY, "--data", shards, "--queries", "4", "--batch", "5", "--steps", "10", "--no-cache-features"]
    flags += ["--eval-every", "0", "--log-every", "1", "--precision", "fp32", "--device", "cpu", "--image-size", "16"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_in_a_process([*flags, "--workers", "0", "--save-every", "10", "--out", str(straight)], straight)
    train_in_a_process([*flags, "--workers", "2", "--save-every", "2", "--out", str(killed)], killed, kill_at=5)
    assert "step-000010" not in os.listdir(killed)
    train_in_a_process(["--resume", "--workers", "1", "--out", str(killed)], killed)
    logs = []
    for run in (straight, killed):
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append({row["step"]: row["loss"] for row in rows if "loss" in row})
    assert list(logs[0]) == list(range(1, 11)) and logs[1] == logs[0]


def train_in_a_process(words: list[str], run: Path, kill_at: int | None = None) -> None:
    """A training in a process of its own, killed once its log has a step."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            torch.set_num_threads(1)
            train.final_evaluation = lambda *_: None
            train.main(words)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    ended, until = 0, time.time() + 120
    while not ended and time.time() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        log = run / "log.jsonl"
        if kill_at and log.exists() and f'"step": {kill_at},' in log.read_text():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)
    assert ended and status == 0 and not kill_at


@pytest.mark.parametrize("together", [1, 2, 3])
def test_shuffle_shards_reads_few_shards_at_a_time_and_still_each_sample_once(tmp_path, together):
    """Within any stretch of a window no more shards than the two groups that meet there."""
    write_shards(tmp_path, 12, 40, side=16)
    images = open_images([str(tmp_path)], "train", 8)
    steps = list(StepSampler(images, 0, 2, 1, 480, 0, 0, 1, together))
    assert sorted(index for step in steps for _, index in step) == sorted(2 * list(range(480)))
    shards = [{index // 40 for _, index in sum(steps[i : i + 16], [])} for i in range(0, 480, 16)]  # windows
    assert max(map(len, shards)) <= 2 * together
    assert np.mean(list(map(len, shards))) < 1.7 * together
    opened = [shard for window in shards[: len(shards) // 2] for shard in window]
    stretches = [opened.count(shard) for shard in range(12)]
    assert max(stretches) <= together * 40 // 32 + 2  # a shard is done with when its group is


def test_a_sampler_of_ten_million_needs_no_more_memory_than_one_of_ten_thousand(monkeypatch):
    peaks = []
    for count in (10_000, 10_000_000):
        source = Numbers(count)
        tracemalloc.start()
        steps = iter(StepSampler(Mixture([source]), 0, 64, 1, 10**9, 0, 0, 1))
        for _ in range(40):
            next(steps)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 3e6


class Numbers(Source):
    """A source of any number of samples, none of which exists."""

    def __init__(self, count: int):
        self.count, self.num_texts = count, count

    def __len__(self) -> int:
        return self.count

    def words(self, rows, rngs) -> list[int]:
        return (3 + rows % 20).tolist()


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[str]:
    """Three sets of other sizes and other lengths of captions: 40 of 4 words, 80 of 9, 120 of 20."""
    sets = []
    for size, words in ((40, 4), (80, 9), (120, 20)):
        folder = tmp_path_factory.mktemp(f"set{words}")
        entries = []
        for n in range(size):
            sample = made(n, f"{n:09d}", 16, kind="webdataset", seed=words)
            sample.captions = [" ".join(["word"] * (words - 1) + [str(n)])]
            entries += members(sample)
        write_tar(folder / "0.tar", entries)
        sets.append(str(folder / "0.tar"))
    return sets


def parts_of(images: Mixture, steps) -> np.ndarray:
    """(steps, parts): how many samples of a step each set gives."""
    return np.array([np.bincount([images.locate(i)[0] for _, i in step], minlength=3) for step in steps])


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (2, 1, 1), (0.1, 5, 0.7)])
def test_batches_mix_the_sets_by_weight_even_though_sorted_by_length(three, weights):
    specs = three if weights is None else [f"{spec}:{weight}" for spec, weight in zip(three, weights)]
    images = open_images(specs, "train", 8)
    share = np.array(weights or (40, 80, 120)) / sum(weights or (40, 80, 120))
    steps = list(sampler(images, 32, steps=300))
    counts = parts_of(images, steps)
    assert np.abs(counts - 32 * share).max() <= 2  # each batch has its share of each set
    assert np.abs(counts.sum(axis=0) - 300 * 32 * share).max() <= 3
    drawn = [
        np.bincount([images.locate(i)[1] for s in steps for _, i in s if images.locate(i)[0] == part])
        for part in range(3)
    ]
    for shown, size in zip(drawn, (40, 80, 120)):  # each set has epochs of its own
        assert len(shown) == size or shown.sum() < size
        assert shown.max() - (shown.min() if len(shown) == size else 0) <= 1


def test_texts_of_one_set_are_sorted_within_a_mixture(tmp_path):
    """The set that varies is still sorted by length: few of its lengths meet in one batch."""
    write_shards(tmp_path / "a", 2, 100, side=16)
    write_shards(tmp_path / "b", 2, 100, side=16, seed=5)
    images = open_images([str(tmp_path / "a"), str(tmp_path / "b")], "train", 8)
    spread = []
    for step in sampler(images, 16, steps=24):
        words = [len(images[i].captions[0].split()) for _, i in step]
        spread.append(max(words) - min(words))
    assert np.mean(spread) < 6  # of 3 to 24


def test_a_mixture_of_a_resumed_run_goes_on(three):
    images = open_images([f"{three[0]}:1", f"{three[1]}:3"], "train", 8)
    whole = list(sampler(images, 8, steps=70))
    for start in (1, 15, 16, 17, 33, 69):
        assert list(sampler(images, 8, steps=70, start=start)) == whole[start:]
    for world in (2, 4):
        ranks = [list(sampler(images, 8 // world, steps=70, rank=rank, world=world)) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks)] == whole


@pytest.mark.parametrize("specs, match", [
    (("{}:2", "{}"), "weight"), (("{}:0", "{}:1"), "weight above 0"), (("{}:x", "{}"), "exist"),
])  # fmt: skip
def test_wrong_weights_are_refused_in_a_sentence(three, specs, match):
    with pytest.raises(UserError, match=match):
        open_images([spec.format(name) for spec, name in zip(specs, three)], "train", 8)


def test_one_image_of_two_sets_is_one_image_where_its_hash_says_so(tmp_path):
    """As COCO and VG share images. Plain numbers count within their set."""
    write_shards(tmp_path / "a", 1, 6, side=16)
    write_shards(tmp_path / "same", 1, 6, side=16, captions=2)
    write_shards(tmp_path / "other", 1, 6, side=16, seed=1)
    images = open_images([str(tmp_path / name) for name in ("a", "same", "other")], "train", 8)
    ids = [images.image_id(i) for i in range(18)]
    assert ids[:6] == ids[6:12] and len(set(ids)) == 12


@pytest.mark.parametrize("own, one", [(57870, False), ("57870", False), ("coco_57870", True)])
def test_equal_image_ids_of_two_sets_are_one_image_unless_plain_numbers(tmp_path, own, one):
    records = []
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        records.append({"image": "0.png", "caption": "a dog", "image_id": own})
        (tmp_path / name / "a.json").write_text(json.dumps(records[-1:]))
    write_tar(tmp_path / "0.tar", [
        ("0.png", (tmp_path / "a/0.png").read_bytes()), ("0.json", json.dumps(records[0]).encode()),
    ])  # fmt: skip
    images = open_images([str(tmp_path / x) for x in ("a/a.json", "b/a.json", "0.tar")], "train", 8)
    assert len({images.image_id(i) for i in range(3)}) == (1 if one else 3)


def test_equal_keys_of_different_shards_are_different_images(tmp_path):
    """Also of shards of one name in two folders, as two downloads have them."""
    write_shards(tmp_path / "a", 2, 6, kind="webdataset", side=16)
    write_shards(tmp_path / "b", 2, 6, kind="webdataset", side=16, seed=1)
    images = open_images([f"{tmp_path}/{{a,b}}/*.tar"], "train", 8)
    assert len(images) == 24 and len({images.image_id(i) for i in range(24)}) == 24


def test_twins_and_odd_batches(monkeypatch):
    """The shapes world's twins stay together; a step has its size where that is odd too."""
    images = open_images(["shapes"], "train", 8)
    for batch, steps in ((3, 5), (5, 33), (16, 7)):
        assert [len(step) for step in sampler(images, batch, steps=steps)] == [batch] * steps
