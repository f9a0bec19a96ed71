"""A user's mistake gets one sentence: what was got, what was expected, what to type; no traceback, and nothing half
written. (Of flags: test_config; of weights: test_weights_in.)"""

import io
import os
import runpy
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image, ImageFile
from test_data import sampler, train_set
from test_sources import write, write_annotations

import eval as evaluation
import train
from data import train_loader
from engine import log
from engine.errors import UserError, run_command
from engine.files import read_json
from engine.stop import Stopped
from sources.annotations import AnnotationFile
from sources.images import images_in, open_image
from sources.mixture import open_images
from tasks.batches import PartialResults
from tasks.features import CachedTokens
from tools import data as data_command


def complaint(main, capsys, *flags) -> str:
    """What a command prints when it refuses; it exits with 2."""
    capsys.readouterr()
    status = run_command(lambda: main([str(flag) for flag in flags]))
    printed = capsys.readouterr().err
    assert status == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    return printed.removeprefix("error: ")


SMALL = [*TINY, "--steps", "1", "--batch", "2", "--queries", "2", "--image-size", "64", "--eval-every", "0"]


@pytest.fixture
def train_says(capsys, tmp_path):
    """train_says(*flags): the complaint of a training."""
    return lambda *flags: complaint(train.main, capsys, *SMALL, "--out", tmp_path / "run", *flags)


def test_a_users_error_is_printed_without_a_traceback_and_any_other_is_not_hidden(capsys):
    def fail(error: Exception):
        raise error

    assert run_command(lambda: None) == 0 and run_command(lambda: fail(UserError("got 3, expected 4"))) == 2
    assert capsys.readouterr().err == "error: got 3, expected 4\n"
    assert run_command(lambda: fail(RuntimeError("a bug"))) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "RuntimeError: a bug\n" in said
    assert said.endswith("error: rank 0: RuntimeError, a fault of the program: please report it with the lines above\n")
    assert run_command(lambda: fail(Stopped(15))) == 143 and capsys.readouterr().err == "stopped\n"


def test_what_a_terminal_cannot_show_is_printed_in_ascii(monkeypatch):
    """Of a caption, or of a file name that is not UTF-8."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", terminal)
    assert run_command(lambda: print("caf\xe9 \U0001f415 \udce9", flush=True)) == 0
    assert terminal.buffer.getvalue() == b"caf\xe9 \\U0001f415 \\udce9\n"


def test_a_system_without_the_module_resource_can_train(monkeypatch):
    """Windows; only the memory is not told."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runpy.run_path(str(ROOT / "engine/device.py"))["peak_gigabytes"](torch.device("cpu")) == 0


# --- annotation files ------------------------------------------------------------------------------------------------

FILES = [  # name, content, what the sentence says after the name
    ("a.json", '{"a": 1}', " holds an object with ['a'], expected a list of"),
    ("a.json", "3", " holds 3, expected a list of"),
    ("a.json", "[]", " holds nothing, expected a list of"),
    ("a.jsonl", "\n", " holds nothing, expected a list of"),
    ("a.json", '[{"messages": [], "images": ["a.jpg"]}]', " is a list: record 0 has ['images', 'messages'], expected"),
    ("a.jsonl", '{"images": [{"id": 1}], "annotations": []}', " is a list: record 0 has ['annotations', 'images'], ex"),
    ("a.json", "[1, 2]", ' is a list: record 0 has int, expected "image" and "caption"'),
    ("a.json", '[{"img": "a.jpg", "text": "a"}]', " is a list: record 0 has ['img', 'text'], expected \"image\" and"),
    ("a.json", '[{"image": "a.jpg"}]', ': record 0 has [\'image\'], expected "image" and "caption"'),
    ("a.json", "[", " is not valid JSON ("),
    ("a.jsonl", '{"image": "a.jpg", "caption": "a"}\n{"image"\n', ": line 2 is not JSON ("),
    ("a.json", "[" * 100_000, " is not valid JSON (too many brackets"),
    ("a.json", "[" * 800 + "]" * 800, " is not valid JSON (too many brackets"),
    ("a.jsonl", '{"a":' * 100_000, ": line 1 is not JSON (too many brackets"),
    ("a.json", "9" * 5000, " is not valid JSON (a number of too many digits)"),
    ("a.txt", "a.jpg a dog", " is text that starts with 'a.jpg a dog', expected a header with image and caption"),
]


@pytest.mark.parametrize("name, content, said", FILES)
def test_an_annotation_file_of_the_wrong_shape(tmp_path, name, content, said):
    with pytest.raises(UserError) as error:
        AnnotationFile(write(tmp_path, name, content))
    assert str(error.value).startswith(f"{tmp_path}/{name}{said}")
    if "JSON" in said:
        assert "one record a line" in str(error.value)  # what .jsonl is for


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match="a.json is not UTF-8 text .*: expected an unpacked text file"):
        AnnotationFile(tmp_path / "a.json")
    with pytest.raises(UserError, match="nowhere.json does not exist: check the path"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(
        UserError, match="--data .*/b.json does not exist: expected an annotation file, a folder of imag"
    ):
        AnnotationFile(tmp_path / "b.json")


def test_a_folder_without_captions(tmp_path):
    with pytest.raises(UserError, match="has no images in it, expected a folder of files that end in .jpg"):
        AnnotationFile(tmp_path)
    write_annotations(tmp_path, 2)
    write(tmp_path, "1.txt", " \n\n")
    with pytest.raises(
        UserError, match="no image has a .txt with captions beside it: write 0.txt, ..., or pass an annot"
    ):
        AnnotationFile(tmp_path)


TABLES = [  # name, content, what the sentence says after the name
    (
        "a.csv",
        "image,caption\na.jpg,a dog\nb.jpg,a dog, a cat\n",
        ": line 3: got 3 cells, expected 2 as in the header: put",
    ),
    (
        "a.csv",
        'image,caption\na.jpg,"a\ndog"\nb.jpg,"a cat\nc.jpg,x\n',
        ": line 4: unexpected end of data: put texts wi",
    ),
    (
        "a.tsv",
        'image\tcaption\na.jpg\t"a\ndog"\n',
        ": line 3: got 1 cells, expected 2 as in the header: write spaces for",
    ),
    (
        "a.tsv",
        "image\tcaption\na.jpg\ta\tdog\n",
        ": line 2: got 3 cells, expected 2 as in the header: write spaces for",
    ),
    ("a.csv", "image,caption\na.jpg," + 140_000 * "a", ": line 2: field larger than field limit (131072)"),
    ("a.csv", "image,caption\n", " (a table of records) has no record: expected at least one"),
]


@pytest.mark.parametrize("name, content, said", TABLES)
def test_a_table_of_which_a_text_would_be_lost(tmp_path, name, content, said):
    with pytest.raises(UserError) as error:
        AnnotationFile(write(tmp_path, name, content))
    assert str(error.value).startswith(f"{tmp_path}/{name}{said}")


@pytest.mark.parametrize("caption", ["", "  ", "...", [], ["!", ""], None, 5])
def test_an_empty_caption(tmp_path, caption):
    with pytest.raises(UserError, match="record 0 .0.png. has an empty caption: write one, or remove it"):
        AnnotationFile(write_annotations(tmp_path, caption=caption))


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"question": None}, "question"),
        ({"question": "..."}, "question"),
        ({"question": ["what?"]}, "question"),
        ({"question": "what?", "answer": ["\ud83d"]}, "answer that is no text"),  # half of a character
        ({"question": "what?", "answer": ["yes", None]}, "answer that is no text"),
        ({"caption": "\ud83d"}, "caption"),
    ],
)
def test_what_is_no_text_is_refused_before_training_and_found_by_check(tmp_path, capsys, changes, kind):
    asks = "question" in changes
    text = {"question": "is it?", "answer": "yes"} if asks else {"caption": "a dog"}
    records = [{"image": "0.png"} | text | changes, {"image": "1.png"} | text]
    path = write_annotations(tmp_path, 2)
    write(tmp_path, "a.json", records if asks else [*records, {"caption": "of nothing"}])
    with pytest.raises(UserError, match=f"record 0 .0.png. has an (empty )?{kind}: write one"):
        AnnotationFile(path, questions=asks)
    with pytest.raises(SystemExit):
        data_command.main(["check", path, "--workers", "0"])
    said = capsys.readouterr().out
    assert "with an empty text: 1" in said and ('records without "image": 1' in said) == (not asks)


def test_only_the_first_bad_records_are_listed(tmp_path):
    records = [{"image": f"{i}.png", "caption": "" if i else "fine"} for i in range(8)]
    with pytest.raises(UserError) as error:
        AnnotationFile(write(tmp_path, "a.json", records))
    assert str(error.value).count("has an empty caption") == 3 and str(error.value).endswith("(and 4 more)")
    assert "record 1 (1.png)" in str(error.value)


def test_holding_out_all_images(tmp_path):
    with pytest.raises(UserError, match="--val-photos 3 of 3 images leaves none to train on: pass a smaller number"):
        open_images([write_annotations(tmp_path, 3)], "train", 8).held_out(3)


def test_a_refused_file_leaves_no_run(train_says, tmp_path):
    said = train_says("--data", write(tmp_path, "a.json", [{"image": "0.png", "caption": "..."}]))
    assert said.startswith(f"{tmp_path}/a.json: record 0 (0.png) has an empty caption")
    assert train_says("--data", write_annotations(tmp_path, 3), "--batch", "8").startswith(
        "3 images are fewer than one"
    )
    assert not (tmp_path / "run").exists()


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_a_truncated_image_of_any_format_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sample = AnnotationFile(write(tmp_path, "a.json", [{"image": path.name, "caption": "a dog"}]))[0]
    for read in (sample.open, lambda: sample.augment(8, np.random.default_rng(0))):
        with pytest.raises(UserError, match=f"a.{suffix} is (broken or cut short|not an image that Pillow can read)"):
            read()


def test_an_image_of_a_wrong_name_or_kind(tmp_path):
    with pytest.raises(UserError, match=r"0.jpg does not exist: check the name, and .* the folder \(--images\)"):
        open_image(tmp_path / "0.jpg")
    with pytest.raises(UserError, match="a.jpg is not an image that Pillow can read: convert it to JPEG or PNG"):
        open_image(write(tmp_path, "a.jpg", "text"))
    with pytest.raises(UserError, match="a.jpg is empty: copy it again"):
        open_image(write(tmp_path, "a.jpg", ""))
    for value, said in ((-1, "-1 to -1"), (70_000, "70000 to 70000"), (np.nan, "nan to nan")):
        Image.new("F", (4, 4), value).save(tmp_path / "a.tif")
        with pytest.raises(
            UserError, match=f"a.tif has values from {said}, expected 0 to 1 or 255 or 65535: scale them"
        ):
            open_image(tmp_path / "a.tif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images in it, expected a folder of files that end in .jpg, "):
        images_in(tmp_path / "empty")


def test_whatever_pillow_raises_is_a_broken_image(tmp_path, monkeypatch):
    """RuntimeError of AVIF, NotImplementedError of DDS, struct.error, ..."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: next(iter(())))
    with pytest.raises(UserError, match="0.png is broken or cut short"):
        AnnotationFile(write_annotations(tmp_path))[0].open()


@pytest.mark.parametrize("kind", ["png", "ico", "icns"])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, kind):
    """Also within an icon, which Pillow decodes when it opens it."""
    bomb = tmp_path / f"bomb.{kind}"
    Image.new("1", (10_001, 10_000)).save(bomb, "PNG")
    png = bomb.read_bytes()
    if kind == "ico":
        bomb.write_bytes(struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png)
    if kind == "icns":
        bomb.write_bytes(struct.pack(">4sI4sI", b"icns", 16 + len(png), b"ic10", 8 + len(png)) + png)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=f"bomb.{kind} has 100,010,000 pixels, expected at most 100,000,000: resize it"):
        open_image(bomb)


@pytest.mark.parametrize(
    "name, said",
    [
        ("fifo", "is a pipe or a device, expected an image"),
        ("folder", "is a folder, expected an image"),
        ("a" * 300, "cannot be read .File name too long.: expected an image"),
        ("a" * 5000, "a{100}... .5,.* letters. cannot be read .File name too long."),
        ("a\0", "cannot be read .embedded null byte."),
        ("\ud83d", "cannot be read .'utf-8' codec can't encode"),
    ],
)
def test_what_is_no_file_is_no_image_nor_text(tmp_path, name, said):
    """It neither hangs, nor ends in a traceback; annotations may name any."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=said):
        AnnotationFile(write(tmp_path, "a.json", [{"image": name, "caption": "a dog"}]))[0].open()
    with pytest.raises(UserError, match=said.replace("an image", "a text file")):
        read_json(tmp_path / name)


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path):
    """A few bytes each, every one costs a pass over all pixels: hours for a file of some megabytes."""
    Image.new("L", (64, 64)).save(tmp_path / "a.jpg", progressive=True)
    assert open_image(tmp_path / "a.jpg").size == (64, 64)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 1000 + content[-2:])
    with pytest.raises(UserError, match="a.jpg has 1,0.. scans, expected fewer than 500: save it again"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind, top", [("<i2", 32767), (">u2", 65535), ("<i4", 255), ("<i4", 65535), ("<f4", 1)])
def test_a_grey_image_of_any_numbers_is_scaled(tmp_path, kind, top):
    """Half of the most is grey, of signed numbers too; written as TIFF by its definition."""
    data = np.array([[0, top / 2, top]]).astype(kind).tobytes()
    bits, sign = len(data) // 3 * 8, {"u": 1, "i": 2, "f": 3}[kind[1]]
    values = {256: 3, 257: 1, 258: bits, 259: 1, 262: 1, 273: 122, 277: 1, 279: len(data), 339: sign}
    order = kind[0]
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(values))
    (tmp_path / "a.tif").write_bytes(head + tags + bytes(4) + data)
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == pytest.approx([0, 127.5, 255], abs=1)


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the name of the file."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage"
    with pytest.raises(UserError, match="x.jpg is not an image that Pillow can read"):
        open_image(write(tmp_path, "x.jpg", eps))


def test_unreadable_images_above_one_per_cent_stop_a_training(train_says, tmp_path):
    path = write_annotations(tmp_path, 4)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    said = train_says("--data", path, "--batch", "4")
    assert said.startswith("2 of 4 images could not be read, more than 1%: repair or remove them, or pass --images")
    log.report_unreadable({"0.png": "0.png is broken"}, set(), 100)
    with pytest.raises(UserError, match="2 of 199 images could not be read, more than 1%"):
        log.report_unreadable({"0.png": "it is broken"}, {"1.png"}, 199)


def test_fewer_unreadable_images_are_each_named_once_and_skipped(tmp_path, monkeypatch, capsys):
    path = write_annotations(tmp_path, 4, (64, 64))
    (tmp_path / "1.png").write_bytes(b"not an image")
    monkeypatch.setattr(log, "BROKEN_SHARE", 0.5)
    train.main([*SMALL, "--data", path, "--batch", "4", "--steps", "2", "--log-every", "1", "--out", f"{tmp_path}/run"])
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 1  # in two epochs
    assert f"skipped: {tmp_path}/1.png is not an image that Pillow can read: convert it to JPEG or PNG\n" in printed


def test_an_error_in_a_loader_worker_is_one_sentence_too(tmp_path, capsys):
    """A wrong --images is found by another process."""
    images = open_images([write_annotations(tmp_path, 3)], "train", 8, [str(tmp_path / "nowhere")])
    batches = train_loader(train_set(images), sampler(images, batch=2, steps=1), workers=1, pin=False)
    said = complaint(lambda _: next(batches), capsys)
    assert said.startswith("none of 3 images in a row can be read; the last: ") and "(--images)" in said


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_needs_every_image(tmp_path, capsys):
    """Leaving one out would make the numbers incomparable."""
    flags = ["--checkpoint", ROOT / "assets/tiny/blip2", "--workers", "0", "--data", write_annotations(tmp_path, 2)]
    (tmp_path / "1.png").unlink()
    said = complaint(evaluation.main, capsys, "captions", *flags)
    assert said.startswith(f"every image is needed here, and {tmp_path}/1.png does not exist: check the name")


def test_output_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    """Before a model, or a large file, is loaded."""
    for main, *flags in (
        (evaluation.main, "retrieval", "--checkpoint", "nowhere", "--out"),
        (evaluation.main, "captions", "--checkpoint", "nowhere", "--predictions"),
    ):
        said = complaint(main, capsys, *flags, "nowhere/a.json")
        assert said == f"{flags[-1]} nowhere/a.json: the folder nowhere does not exist, create it first\n"
        said = complaint(main, capsys, *flags, tmp_path)
        assert said == f"{flags[-1]} {tmp_path} is a folder: pass the name of a file in it\n"
    said = complaint(data_command.main, capsys, "convert", write_annotations(tmp_path), "--out", "nowhere/a.json")
    assert said.startswith("--out nowhere/a.json: the folder nowhere does not exist")


GOOD = {"image": "0.png", "caption": "a dog"}
LABELS = [True, [1], {"a": 1}, float("inf"), "9" * 5000]  # an image_id that is none
BAD_RECORDS = [None, "a.jpg", 5, {"caption": "a dog"}, GOOD | {"image": ["a.jpg"]}, GOOD | {"image": None}]
BAD_RECORDS += [GOOD | {"caption": None}, GOOD | {"domain": [[]]}, *[GOOD | {"image_id": value} for value in LABELS]]


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_check_finds_what_a_training_refuses(tmp_path, capsys, record):
    path = write_annotations(tmp_path, 1)
    write(tmp_path, "a.json", [GOOD, record])
    with pytest.raises(UserError, match=f"{path}: record 1 "):
        AnnotationFile(path)
    with pytest.raises(SystemExit):
        data_command.main(["check", path, "--workers", "0"])
    assert "problems" in capsys.readouterr().out


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_a_list_with_other_things_than_records_is_not_converted(tmp_path, capsys, record):
    path = write(tmp_path, "a.json", [{"image": "0.png", "caption": "a dog"}, record])
    said = complaint(data_command.main, capsys, "convert", path, "--out", tmp_path / "b.json")
    assert said.startswith(f"{path}: record 1 ") and "has " in said and not (tmp_path / "b.json").exists()


DAMAGED = [b"", b"{}", b"[1]\n", b"\0" * 99, b"\xff\xfe\n", b"00000000\n", b'{"a 0": 5}\n', b'00000000 {"a 0": 5}\n']


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_kept_results_are_computed_again(tmp_path, content):
    kept = PartialResults(tmp_path)
    kept.add("a 1", [0.5])
    (tmp_path / "0-0.jsonl").write_bytes(content)
    assert PartialResults(tmp_path).done == {"a 1": [0.5]}
    kept.file.write_bytes(kept.file.read_bytes().replace(b"0.5", b"1e9"))
    assert PartialResults(tmp_path).done == {}


def test_a_damaged_feature_cache_is_named(tmp_path):
    path, slots = tmp_path / "a.npy", np.arange(2)
    np.save(path, np.zeros((2, 5, 3), np.float16))
    path.with_suffix(".json").write_text('{"1": "it is broken"}')
    with pytest.raises(UserError, match="it is broken"):
        CachedTokens(path, slots).tokens(slots)
    whole, said = path.read_bytes(), "a.npy is no whole feature cache .*: remove it and a.json: they are then computed"
    damaged = [whole[:-4], b"", b"x" * 99, whole.replace(b"(2, 5, 3)", b"(3, 5, 2)"), whole.replace(b"<f2", b"<i2")]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            CachedTokens(path, slots)
    path.write_bytes(whole)
    for content in ("", "[]", "null", '{"a": "b"}', "[" * 100_000):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(UserError, match=said):
            CachedTokens(path, slots)


@pytest.mark.parametrize("flags", [["retrieval", "--k"], ["captions", "--beams"], ["vqa", "--max-new-tokens"]])
def test_a_number_of_an_evaluation_is_at_least_one(flags, capsys):
    said = complaint(evaluation.main, capsys, *flags, "0", "--checkpoint", "nowhere")
    assert said.startswith(f"argument {flags[1]}: got 0, expected at least 1 (python ")
