"""CapFilt keeps what fits the image, the same with any number of processes and after any interruption; CLIP."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import FEW_STEPS, TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import TINY_RUN, write_images
from tokenizers.pre_tokenizers import ByteLevel

import train
from blip2 import Blip2
from engine.errors import UserError
from sources.mixture import open_images
from tasks.clip import Clip, clip_transform
from tools import capfilt
from vit import ViT

SMALL = dict(BATCH=4, BLOCK=4, SHARD=8)  # three blocks of 12 images, in two shards


@pytest.fixture(scope="module")
def ranker(tmp_path_factory) -> str:
    """The run that ships with the code as stage 1 left it: without its language model."""
    folder, source = tmp_path_factory.mktemp("ranker"), Path(TINY_RUN)
    config = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if "llm" not in k}
    config |= {"vit": str(source.parent / "vit"), "bert": str(source.parent / "bert")}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "tokenizer.json", folder)
    weights = load_file(source / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("llm")}, folder / "model.safetensors")
    return str(folder)


def web(folder: Path, count: int = 12, seed: int = 0) -> str:
    """Images with a caption each, every second one of another image; one file is missing, one has no caption."""
    world, rng = write_images(folder, count), random.Random(seed)
    records = []
    for i in range(count):
        shown = (i + rng.randrange(1, count)) % count if i % 2 else i
        records.append({"image": f"{i}.png", "caption": world.captions(shown), "image_id": 7 * i})
    records[5]["image"] = "missing.png"
    del records[2]["caption"]
    (folder / "web.json").write_text(json.dumps(records))
    return str(folder / "web.json")


def flags(ranker: str, data: str, out, *more: str) -> list[str]:
    few = ["--captions", "2", "--workers", "0", "--precision", "fp32", "--device", "cpu"]
    return ["--captioner", TINY_RUN, "--ranker", ranker, "--data", data, "--out", str(out), *few, *more]


def records_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out)]


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(capfilt, name, value)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_wrong_web_caption_is_dropped_and_a_right_one_kept(tmp_path, ranker, capsys):
    """The ranker has seen the shapes world; of 64 images half have the caption of another."""
    out = tmp_path / "out.jsonl"
    capfilt.main(flags(ranker, web(tmp_path, 64, seed=3), out, "--captions", "5"))
    kept = {0: [], 1: []}
    for record in records_of(out):
        assert record["caption"] == list(record["scores"])[:2]
        assert list(record["scores"].values()) == sorted(record["scores"].values(), reverse=True)
        kept[record["image_id"] % 2] += [text in record["caption"] for text in record["web"]]
    right, wrong = (sum(part) / len(part) for part in kept.values())
    assert right > 0.4 and wrong < 0.25 and right > 2.5 * wrong, (right, wrong)
    said = capsys.readouterr().out
    dropped = sum(not one for part in kept.values() for one in part)
    counts = f"126 captions kept, {62 - dropped} of them the web's; {dropped} of the web's 62 dropped"
    assert f"63 images, 1 skipped; {counts}" in said
    assert "skipped: " + str(tmp_path / "missing.png") in said and "img/s" in said


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_scores_are_those_of_the_ranker(tmp_path, ranker, by):
    """ITM's are probabilities; texts that are equal but for case and marks count once."""
    data, model = web(tmp_path), Blip2.from_pretrained(ranker)
    capfilt.main(flags(ranker, data, tmp_path / "out.jsonl", "--rank-by", by, "--keep", "1", "--seed", "5"))
    for record in records_of(tmp_path / "out.jsonl")[:4]:
        texts, scores = zip(*record["scores"].items())
        of_model = getattr(model, f"{by}_scores")(tmp_path / record["image"], list(texts))[0]
        assert scores == pytest.approx(of_model.tolist(), abs=2e-5)
        assert len(record["caption"]) == 1 and len({text.lower() for text in texts}) == len(texts)
    assert capfilt.distinct(["A cat!", "a dog", "...", "a cat", "a  dog."]) == ["A cat!", "a dog"]


def test_other_seeds_draw_other_captions(tmp_path, ranker):
    data, drawn = web(tmp_path, 6), []
    for seed in ("0", "1", "2"):
        capfilt.main(flags(ranker, data, tmp_path / f"{seed}.jsonl", "--seed", seed, "--top-p", "1"))
        drawn.append({text for record in records_of(tmp_path / f"{seed}.jsonl") for text in record["scores"]})
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_training_reads_what_was_written(tmp_path, ranker, place):
    """Also where the output is in another folder than the images; each step draws one of the kept captions."""
    (tmp_path / "images").mkdir()
    out = tmp_path / ("images/out.jsonl" if place == "inside" else "out.jsonl")
    out = out if place == "inside" else tmp_path / "elsewhere" / "out.jsonl"
    out.parent.mkdir(exist_ok=True)
    capfilt.main(flags(ranker, web(tmp_path / "images", 12), out))
    images = open_images([str(out)], "train", 64)
    assert len(images) == 11
    sample = images[2]
    assert sample.open().size and os.path.isabs(sample.record["image"]) == (place == "outside")
    assert {sample.sample_text(np.random.default_rng(seed))[1] for seed in range(20)} == set(sample.captions)
    if place == "outside":
        few = [*TINY, *FEW_STEPS, "--queries", "4", "--workers", "0"]
        train.main([*few, "--data", str(out), "--out", str(tmp_path / "run")])
        assert (tmp_path / "run/model.safetensors").exists()


def test_images_go_once_through_a_vit_that_both_models_have(tmp_path, ranker, monkeypatch):
    calls, forward = [], ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    capfilt.main(flags(ranker, web(tmp_path, 12), tmp_path / "two.jsonl"))
    assert calls == [11]
    capfilt.main(flags(ranker, str(tmp_path / "web.json"), tmp_path / "one.jsonl")[2:] + ["--captioner", ranker])
    assert calls == [11, 11]  # one model in both roles; ITG writes


def test_images_alone_get_captions(tmp_path, ranker):
    write_images(tmp_path, 3)
    (tmp_path / "alone.json").write_text(json.dumps([{"image": f"{i}.png"} for i in range(3)]))
    capfilt.main(flags(ranker, str(tmp_path / "alone.json"), tmp_path / "out.jsonl"))
    found = records_of(tmp_path / "out.jsonl")
    assert len(found) == 3 and all(r["caption"] and not r["web"] and "image_id" not in r for r in found)


# --- processes, interruptions, shards --------------------------------------------------------------------------------


def on_ranks(_, argv):
    before = {name: getattr(capfilt, name) for name in SMALL}
    vars(capfilt).update(SMALL)
    try:
        capfilt.main(argv)
    finally:
        vars(capfilt).update(before)


def content_of(out: Path) -> list[bytes]:
    return [out.read_bytes()] if out.is_file() else [path.read_bytes() for path in sorted(out.iterdir())]


@pytest.mark.parametrize("name", ["out.jsonl", "shards/"])
def test_two_processes_write_what_one_does(ranks, tmp_path, ranker, small, name):
    data = web(tmp_path, seed=1)
    one, two = (f"{tmp_path}/{folder}/{name}" for folder in ("a", "b"))
    for out in (one, two):
        Path(out).parent.mkdir()
    capfilt.main(flags(ranker, data, one))
    ranks(2, on_ranks, flags(ranker, data, two))
    assert content_of(Path(one)) == content_of(Path(two))
    assert [path.name for path in Path(two).parent.iterdir()] == [Path(two).name]


def killed(argv: list[str], moment: int, after: bool) -> None:
    """Run, and die at the moment at which a file gets its name for the so-manieth time, before it or after."""
    replace, count = os.replace, iter(range(1, 100))

    def dying(source, target):
        last = next(count) == moment
        if not (last and not after):
            replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    capfilt.main(argv)


@pytest.mark.parametrize("name", ["out.jsonl", "shards/"])
def test_a_killed_command_goes_on_and_writes_the_same(tmp_path, ranker, small, name, capfd):
    """At each write: 1 is the command, 2 to 4 are blocks, then come the output or two shards."""
    data = web(tmp_path, seed=2)
    for folder in "ab":
        (tmp_path / folder).mkdir()
    capfilt.main(flags(ranker, data, f"{tmp_path}/a/{name}"))
    argv, fork = flags(ranker, data, f"{tmp_path}/b/{name}"), multiprocessing.get_context("fork").Process
    for moment, after in ((1, False), (1, True), (2, False), (3, True), (2, False), (1, True)):
        child = fork(target=killed, args=(argv, moment, after))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, (moment, after)
    capfd.readouterr()
    capfilt.main(argv)
    assert "0 blocks of 4 to do, 3 are done" in capfd.readouterr().out
    assert content_of(tmp_path / "b" / name) == content_of(tmp_path / "a" / name)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [Path(name).name]


def test_shards_hold_the_images_and_their_captions(tmp_path, ranker, small):
    data, out = web(tmp_path), tmp_path / "shards"
    capfilt.main(flags(ranker, data, f"{out}/"))
    capfilt.main(flags(ranker, data, tmp_path / "out.jsonl"))
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00001.tar"]
    found, expected = [], records_of(tmp_path / "out.jsonl")
    for path in sorted(out.iterdir()):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        keys = [name[:-5] for name in members if name.endswith(".json")]
        assert set(members) == {f"{key}{kind}" for key in keys for kind in (".png", ".json")}
        found += [(json.loads(members[f"{key}.json"]), members[f"{key}.png"], key) for key in keys]
    assert [key for _, _, key in found[:6]] == [f"00000000{i}" for i in (0, 1, 2, 3, 4, 6)]  # 5 is missing
    for (record, content, key), other in zip(found, expected, strict=True):
        assert record == other | {"key": key} and content == (tmp_path / other["image"]).read_bytes()


def test_other_flags_and_outputs_that_exist_are_refused(tmp_path, ranker, small):
    data, out = web(tmp_path), tmp_path / "out.jsonl"
    child = multiprocessing.get_context("fork").Process(target=killed, args=(flags(ranker, data, out), 3, True))
    child.start()
    child.join()
    with pytest.raises(UserError, match="finished blocks of this command with another --keep, --seed: type it as it"):
        capfilt.main(flags(ranker, data, out, "--keep", "1", "--seed", "1"))
    Path(data).write_text(Path(data).read_text().replace("small", "large"))
    with pytest.raises(UserError, match="with another --data: type it as it was"):
        capfilt.main(flags(ranker, data, out))
    shutil.rmtree(tmp_path / ".out.jsonl.blocks")
    out.write_text("precious")
    with pytest.raises(UserError, match="out.jsonl exists already: remove it, or pass another name"):
        capfilt.main(flags(ranker, data, out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    with pytest.raises(UserError, match="full exists already"):
        capfilt.main(flags(ranker, data, f"{tmp_path}/full/"))
    assert out.read_text() == "precious" and not (tmp_path / ".out.jsonl.blocks").exists()


# --- CLIP ------------------------------------------------------------------------------------------------------------


def clip_folder(folder: Path, seed: int = 0, end: int | None = None, act: str = "quick_gelu"):
    """A random CLIPModel with a tokenizer of letters -> transformers' model and tokenizer."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    end = len(words) - 1 if end is None else end
    text = dict(vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
    text |= dict(hidden_act=act, eos_token_id=end, bos_token_id=len(words) - 2, pad_token_id=len(words) - 1)
    vision = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, hidden_act=act)
    vision |= dict(image_size=28, patch_size=7)
    torch.manual_seed(seed)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


TEXTS = ["a cat", "A large DOG, right of 2 cats!", "x", "caf\u00e9 " * 30, "z" * 200, ""]


@pytest.mark.parametrize("seed, end, act", [(0, None, "quick_gelu"), (1, 2, "gelu")])
def test_both_towers_are_those_of_transformers_clip(tmp_path, seed, end, act):
    """Old configurations have an end token 2, and mean the highest id."""
    model, tokenizer = clip_folder(tmp_path, seed, end, act)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    clip = Clip.open(tmp_path)
    with torch.no_grad():
        theirs = model(**inputs, pixel_values=clip.vit.normalize(pixels))
    assert inputs["input_ids"].shape[1] == 77
    assert torch.allclose(clip.encode_text(TEXTS).feats, theirs.text_embeds, atol=1e-5)
    assert torch.allclose(clip.encode_text(TEXTS, batch_size=2).feats, theirs.text_embeds, atol=1e-5)
    assert torch.allclose(clip.encode_image(pixels).feats[:, 0], theirs.image_embeds, atol=1e-5)


@pytest.mark.parametrize("size", [(53, 41), (41, 90), (28, 28), (20, 300)])
def test_clip_sees_the_middle_of_an_image(size):
    """The pixels of transformers' processor."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    crop = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = transformers.CLIPImageProcessorPil(**crop, do_rescale=False, do_normalize=False)(image)["pixel_values"][0]
    assert np.array_equal(clip_transform(image, 28).numpy(), theirs)


def test_clip_ranks(tmp_path, ranker):
    (tmp_path / "clip").mkdir()
    model, tokenizer = clip_folder(tmp_path / "clip")
    capfilt.main(flags(str(tmp_path / "clip"), web(tmp_path, 6), tmp_path / "out.jsonl"))
    clip = Clip.open(tmp_path / "clip")
    for record in records_of(tmp_path / "out.jsonl"):
        view = clip_transform(Image.open(tmp_path / record["image"]), 28)[None]
        cosines = clip.encode_image(view).feats[0] @ clip.encode_text(list(record["scores"])).feats.T
        assert list(record["scores"].values()) == pytest.approx(cosines[0].tolist(), abs=2e-5)
    with pytest.raises(UserError, match="has no trained head for ITM"):
        capfilt.main(
            flags(str(tmp_path / "clip"), str(tmp_path / "web.json"), tmp_path / "b.jsonl", "--rank-by", "itm")
        )


def test_a_clip_folder_of_other_sizes_than_its_weights_is_refused(tmp_path):
    clip_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, key, value in (("text_config", "hidden_size", 36), ("vision_config", "num_hidden_layers", 3)):
        wrong = config | {part: config[part] | {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="does not fit, nothing was loaded"):
            Clip.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": -1}))
    with pytest.raises(UserError, match="projection_dim -1, expected"):
        Clip.open(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        Clip.open(tmp_path)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, ranker):
    data, out = web(tmp_path, 6), tmp_path / "out.jsonl"
    without = {}
    for head in ("itg", "itc"):
        without[head] = str(shutil.copytree(ranker, tmp_path / head))
        config = json.loads((tmp_path / head / "config.json").read_text())
        (tmp_path / head / "config.json").write_text(json.dumps(config | {"lacks": [head]}))
    wrong = {
        ("--keep", "4"): "got --keep 4, expected at most 3: --captions and one of the web's",
        ("--top-p", "0"): "got --top-p 0.0, expected above 0 and at most 1",
        ("--seed", "-1"): "got --seed -1, expected at least 0",
        ("--workers", "-2"): "got --workers -2, expected 0 to 256",
        ("--out", data): "is inside of the input",
        ("--data", "shapes"): "--data shapes has no image files",
        ("--data", str(tmp_path)): "is inside of the input",
        ("--data", str(tmp_path / "no.json")): "no.json does not exist",
        ("--captioner", "model.pth"): "--captioner model.pth is no folder: pass a run, or make one",
        ("--captioner", without["itg"]): "the head that writes captions .ITG. is not trained here",
        ("--ranker", without["itc"]): "has no trained head for ITC: pass a run of stage 1",
        ("--ranker", TINY_RUN): "has no trained head for ITC: pass a run of stage 1",
    }
    for changed, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence) as error:
            capfilt.main(flags(ranker, data, out, *changed))
        assert not re.search(r"\n", str(error.value))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["itc", "itg", "web.json"]
