"""Malformed input of every kind that the commands read, for `tests.faults`.

`INPUTS` names the surfaces. Each is a function (base, folder, rng) that writes one malformed input into `folder` and
returns (what reads it, must it be refused?, a description). What reads it is a command line, or a function; whether it
must be refused is True, False where both may be, or "no".
"""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip2 import Blip2
from engine.errors import expect
from sources.annotations import AnnotatedImage
from sources.images import open_image
from sources.mixture import open_images
from sources.text import BertTokenizer
from weights.load import open_tensors, weight_files

TINY = Path(__file__).resolve().parent.parent / "assets/tiny"
PLAIN = ["--precision", "fp32", "--device", "cpu"]
CAPTION = ["--max-new-tokens", "3", "--beams", "1", *PLAIN]
ASK = ["--prompt", "a", *CAPTION]

# --- mutations --------------------------------------------------------------------------------------------------------

WHOLE = {  # what may stand in the place of a file
    "nothing": b"", "zeros": bytes(5000), "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "html": b"<!DOCTYPE html><html>404</html>", "gzip": gzip.compress(b"[]"), "deep": b"[" * 100_000, "null": b"null",
    "number": b"9" * 5000, "utf-16": "[{}]".encode("utf-16"), "latin-1": b'["caf\xe9"]', "list": b"[]", "object": b"{}",
}  # fmt: skip
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    math.inf,
    math.nan,
    "",
    " ",
    "\0",
    "\ud83d",
    "a\u2028b",
    "x" * 5000,
    [],
    {},
    [[]],
    {"a": 1},
]
ODD += ["@HUGE@", "@DEEP@", -(10**30), 2**63, "../../etc/passwd", "/dev/stdin"]


def mutated(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Some bytes changed, and how."""
    while (found := any_bytes(data, rng))[0] == data:
        pass
    return found


def any_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """See `mutated`; now and then the bytes are the old ones."""
    how = rng.choice(["flip", "flip", "flip", "cut", "zero", "insert", "double", "swap", "whole"])
    at, size = rng.randrange(max(1, len(data))), rng.choice([1, 4, 30, 1000])
    at = rng.randrange(min(len(data), 200) or 1) if rng.random() < 0.5 else at  # headers are at the front
    if how == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(len(data)) if rng.random() < 0.5 else at] ^= 1 << rng.randrange(8)
        return bytes(changed), f"flips from {at}"
    if how == "whole":
        name = rng.choice(list(WHOLE))
        return WHOLE[name], f"replaced by {name}"
    other = data[(b := rng.randrange(max(1, len(data)))) : b + size]
    middle = {"cut": b"", "zero": bytes(size), "insert": rng.randbytes(size) + data[at : at + size], "swap": other}
    tail = b"" if how == "cut" and rng.random() < 0.5 else data[at + size :]
    return data[:at] + middle.get(how, 2 * data[at : at + size]) + tail, f"{how} {size} at {at}"


def nodes(value, path=()):
    """The paths to all values inside of a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(inner, (*path, key))


def changed(value, path: tuple, new=..., copy=True):
    """A copy of a JSON value with another value at a path, or without that one."""
    value = json.loads(json.dumps(value)) if copy else value
    if not path:
        return new
    if len(path) > 1:
        changed(value[path[0]], path[1:], new, copy=False)
    elif new is ...:
        del value[path[0]]
    else:
        value[path[0]] = new
    return value


def mutated_json(value, rng: random.Random) -> tuple[bytes, str]:
    """A JSON value with something odd inside, and what."""
    if rng.random() < 0.25:
        return mutated(json.dumps(value).encode(), rng)
    path = rng.choice(list(nodes(value))[:400])
    new = ... if path and rng.random() < 0.2 else rng.choice(ODD)
    text = json.dumps(changed(value, path, new))
    text = text.replace('"@HUGE@"', "9" * 5000).replace('"@DEEP@"', "[" * 100_000 + "]" * 100_000)
    where = ".".join(map(str, path)) or "all"
    return text.encode(), f"{where} {'removed' if new is ... else 'is ' + repr(new)[:30]}"


def write(path: Path, content: bytes | str | list | dict) -> Path:
    """A file, in the place of a link too."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def linked(source: Path, folder: Path, *left_out: str) -> Path:
    """A folder with links to the files of another, some left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in left_out:
            (folder / path.name).symlink_to(path)
    return folder


# --- images -----------------------------------------------------------------------------------------------------------

FORMATS = "AVIF BLP BMP DDS DIB EPS GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PALM PCX PDF PNG PPM QOI SGI SPIDER TGA TIFF"
MODES = {"MSP": "1", "XBM": "1", "SPIDER": "F", "PALM": "P", "BLP": "P"}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def encoded(form: str, rng: random.Random) -> bytes:
    """A small image in a format."""
    side = 64 if form == "ICNS" else 24
    image = Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side**2))
    image = image.convert(
        MODES.get(form) or rng.choice(["RGB", "RGB", "L" if form in ("PNG", "JPEG", "TIFF", "GIF", "BMP") else "RGB"])
    )
    image.save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A small PNG that says it is a large one."""
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9999)))
    chunks = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def image(base: Path, folder: Path, rng: random.Random):
    """A photo: a changed byte, another format under its name, a bomb, a pipe."""
    path, sure = folder / "x.jpg", True
    special = rng.choice([*["changed"] * 12, "eps", "pdf", "bomb", "bomb in an icon", "pipe", "folder", "loop"])
    if special == "changed":
        form = rng.choice([*FORMATS.split(), "XBM", "WEBP"])
        content, how = mutated(encoded(form, rng), rng)
        special, sure = f"{form}, {how}", False
        write(path, content)
    elif special in ("eps", "pdf"):
        write(path, EPS if special == "eps" else encoded("PDF", rng))
    elif special.startswith("bomb"):
        inner = png(40_000, 40_000)
        icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22)
        write(path, icon + inner if "icon" in special else inner)
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: os.symlink(p, p)}[special](path)

    def read():
        open_image(path)
        AnnotatedImage({"image": "x.jpg", "caption": ["a"]}, [folder]).augment(32, np.random.default_rng(0))

    commands = [["eval.py", "ask", "--image", path, *ASK], read]
    return rng.choices(commands, [0.1, 0.9])[0], sure, special


# --- annotations ------------------------------------------------------------------------------------------------------

ASKED = {"image_id": 1, "question": "what is it?", "question_id": 7}
ANSWERS = [{"answer": "a dog", "answer_id": i, "answer_confidence": "yes"} for i in range(3)]
QAS = [{"image_id": 1, "qa_id": 4, "question": "what is it?", "answer": "A dog."}]
LAYOUTS = {  # name: content of a file
    "karpathy.json": {"images": [{"filename": "1.jpg", "filepath": "", "split": "train", "cocoid": 1, "imgid": 0,
                                  "sentences": [{"raw": "a dog"}, {"raw": "a big dog"}]}]},
    "coco.json": {"images": [{"file_name": "1.jpg", "id": 1, "domain": "in-domain"}],
                  "annotations": [{"image_id": 1, "id": 3, "caption": "a dog"}]},
    "vqa.json": {"questions": [ASKED], "data_type": "mscoco", "data_subtype": "train2014"},
    "gqa.json": {"07": {"imageId": "1", "question": "is it?", "answer": "yes", "types": {"structural": "verify"}}},
    "regions.json": [{"id": 1, "regions": [{"image_id": 1, "phrase": "a dog", "region_id": 2}]}],
    "qas.json": [{"id": 1, "qas": QAS}],
    "aokvqa.json": [ASKED | {"choices": ["a", "b"], "correct_choice_idx": 0, "direct_answers": ["a", "a"]}],
    "records.json": [{"image": "1.jpg", "caption": ["a dog", "a cat"], "image_id": 5},
                     {"image": "2.jpg", "caption": "a"}],
    "questions.json": [{"image": "1.jpg", "question": "is it?", "question_id": 3, "answer": ["yes", "yes", "no"]}],
    "vizwiz.json": [{"image": "1.jpg", "question": "is it?", "answers": ANSWERS, "answer_type": "yes/no"}],
    "records.jsonl": '{"image": "1.jpg", "caption": "a dog"}\n{"image": "2.jpg", "caption": ["a cat"]}\n',
    "flickr.token": "1.jpg#0\ta dog\n1.jpg#1\ta big dog\n2.jpg#0\ta cat\n",
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| a dog\n1.jpg| 1 a big dog\n",
    "table.csv": 'image,caption,caption\n1.jpg,"a dog, sitting",b\n2.jpg,a cat,\n',
    "table.tsv": "image\tquestion\tanswer\n1.jpg\tis it?\tyes\n",
    "folder": "a dog\n\na cat\n",
    "metadata.jsonl": '{"file_name": "1.jpg", "text": "a dog"}\n',
}  # fmt: skip
EMPTIED = [
    ("image", ""),
    ("image", None),
    ("caption", ""),
    ("caption", []),
    ("caption", None),
    ("image", 5),
    ("image", "\0"),
]


def annotations(base: Path, folder: Path, rng: random.Random):
    """An annotation file, of any published layout."""
    for name in ("1.jpg", "2.jpg", "000000000001.jpg", "COCO_train2014_000000000001.jpg"):
        (folder / name).symlink_to(base / "photos/1.png")
    name = rng.choice(list(LAYOUTS))
    content, sure = LAYOUTS[name], False
    if name == "records.json" and rng.random() < 0.6:
        key, value = rng.choice(EMPTIED)
        data, how, sure = (
            json.dumps([record | {key: value} for record in content]).encode(),
            f"{key} is {value!r}",
            True,
        )
    elif isinstance(content, str):
        data, how = mutated(content.encode(), rng)
    else:
        data, how = mutated_json(content, rng)
    path = write(folder / ("1.txt" if name == "folder" else name), data)
    path = folder if name in ("folder", "metadata.jsonl") else path
    asks = name in ("vqa.json", "gqa.json", "qas.json", "aokvqa.json", "questions.json", "vizwiz.json", "table.tsv")
    answers = ()
    if name == "vqa.json" and rng.random() < 0.7:
        notes = {"annotations": [{"question_id": 7, "image_id": 1, "answers": ANSWERS, "answer_type": "other"}]}
        answers, (second, more) = (folder / "answers.json",), mutated_json(notes, rng)
        how, _ = f"{how}; answers: {more}", write(answers[0], second)

    def read():
        images = open_images([str(path)], "train", 32, questions=asks)
        ids = [images.image_id(row) for row in range(len(images))]
        expect(ids, "nothing")
        for row in range(len(images)):
            images[row].texts(), images[row].name, images[row].open()
        images.content_sha256(), images.fingerprint(), images.num_images(99)

    commands = [read, ["-m", "tools.data", "check", path, "--workers", "0"], ["-m", "tools.data", "convert", path]]
    commands[2] += [*answers, "--out", folder / "out.json"]
    return commands[0 if sure else 2 if answers else rng.randrange(3)], sure, f"{name}: {how}"


def texts(base: Path, folder: Path, rng: random.Random):
    """--candidates, --texts and --config files."""
    kind = rng.choice(["candidates", "texts", "config", "config"])
    content = {"candidates": ["a dog", "yes", "no"], "texts": "a dog\na cat\n"}.get(kind)
    content = json.loads((base / "flags.json").read_text()) if kind == "config" else content
    data, how = mutated(content.encode(), rng) if kind == "texts" else mutated_json(content, rng)
    path, out = write(folder / "input.json", data), folder / "out"
    if kind == "config":
        return ["train.py", "--config", path, "--write-config", out, "--device", "cpu"], False, f"--config: {how}"
    if kind == "texts":
        words = [
            "eval.py",
            "features",
            "--checkpoint",
            base / "finished/run",
            "--images",
            base / "one-photo",
            "--workers",
            0,
        ]
        return [*words, *PLAIN, "--texts", path, "--out", out], False, f"--texts: {how}"
    words = ["eval.py", "vqa", "--checkpoint", TINY / "blip2", "--data", base / "questions.json", "--workers", 0]
    return [*words, *PLAIN, "--candidates", path], False, f"--candidates: {how}"


# --- models -----------------------------------------------------------------------------------------------------------


def run_config(base: Path, folder: Path, rng: random.Random):
    """config.json of a run."""
    config = json.loads((TINY / "blip2/config.json").read_text()) | {"train": {"stage": "2"}}
    config |= {part: str(TINY / config[part].removeprefix("../")) for part in ("vit", "bert", "llm")}
    sure = rng.random() < 0.3
    keys = ("image_size", "embed_dim", "ln_vision_eps", "qformer", "max_text_tokens", "vit")
    key, value = rng.choice(keys), rng.choice([None, math.nan, -1, [], "", "x", {}])
    data, how = (
        (json.dumps(config | {key: value}).encode(), f"{key} is {value!r}") if sure else mutated_json(config, rng)
    )
    run = linked(TINY / "blip2", folder / "run", "config.json")
    write(run / "config.json", data)
    inspect = ["-m", "tools.weights", "inspect", run]
    ask = ["eval.py", "ask", "--checkpoint", run, "--image", base / "photos/1.png", *ASK]
    return ask if sure or rng.random() < 0.7 else inspect, sure, f"config.json: {how}"


def part_config(base: Path, folder: Path, rng: random.Random):
    """config.json, preprocessor_config.json, tokenizer files and index files of a ViT, a BERT and language models."""
    part = rng.choice(["vit", "bert", "opt", "t5"])
    norm = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.2, 0.2, 0.2],
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    names = ["config.json", "model.safetensors.index.json"]
    name = rng.choice([*names, "preprocessor_config.json" if part == "vit" else "tokenizer.json"])
    source = linked(TINY / part, folder / part, name)
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").rename(source / "a.safetensors")
        keys = load_file(TINY / part / "model.safetensors")
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "a.safetensors")}
        if rng.random() < 0.1:
            content["weight_map"][next(iter(keys))] = "../" + part + "/a.safetensors"
    else:
        content = norm if name.startswith("pre") else json.loads((TINY / part / name).read_text())
    data, how = mutated_json(content, rng)
    write(source / name, data)

    def read():
        if part in LLM:
            model = Blip2.build(str(TINY / "vit"), str(TINY / "bert"), num_queries=2, image_size=64, embed_dim=64)[0]
            model.attach_llm(str(source))
            model.eval().ask(Image.new("RGB", (64, 64)), "is it?", num_beams=1, max_new_tokens=2)
        else:
            folders = [str(source if name == part else TINY / name) for name in ("vit", "bert")]
            model = Blip2.build(*folders, num_queries=2, image_size=64, embed_dim=64)[0].eval()
            outputs = model.encode_image(Image.new("RGB", (64, 64), "red")), model.encode_text("a red circle")
            expect(all(x.isfinite().all() for x in (outputs[0].query_out, outputs[1].feats)), "not finite")

    def read_tokenizer():
        BertTokenizer(source).encode(["a red circle"])

    return read_tokenizer if (part, name) == ("bert", "tokenizer.json") else read, False, f"{part}/{name}: {how}"


LLM = ("opt", "t5")


def safetensors(base: Path, folder: Path, rng: random.Random):
    """model.safetensors of a run, and of a ViT."""
    part = rng.choice(["blip2", "vit"])
    file, how = (
        TINY / part / "model.safetensors",
        rng.choice(["bytes", "bytes", "header", "nan", "inf", "dtype", "lacks"]),
    )
    data, sure = file.read_bytes(), how not in ("bytes", "header")
    size = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + size]), load_file(file)
    name = rng.choice(sorted(tensors))
    if part == "vit" and (".5." in name or not name.startswith("encoder")):
        name = "encoder.layer.0.norm1.weight"  # one that is used
    if how == "bytes":
        data, how = mutated(data, rng)
    elif how == "header":
        text, how = mutated_json(header, rng)
        data = (
            struct.pack("<Q", len(text) if rng.random() < 0.8 else rng.choice([0, 2**63, 2**40]))
            + text
            + data[8 + size :]
        )
    elif how == "dtype":
        old = header[name]["dtype"]
        header[name]["dtype"] = {"F32": "I32", "F16": rng.choice(["I16", "U16"])}.get(old, "I32")
        text = json.dumps(header).encode()
        data, how = struct.pack("<Q", len(text)) + text + data[8 + size :], f"{name}: {old} as {header[name]['dtype']}"
    run = linked(TINY / part, folder / part, "model.safetensors", "config.json")
    if how in ("nan", "inf", "lacks"):
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = float("nan" if how == "lacks" else how)
        if how == "lacks":
            del tensors[name]
        save_file(tensors, run / "model.safetensors", {"format": "pt"})
        how = f"{name}: {how}"
    else:
        write(run / "model.safetensors", data)
    config = json.loads((TINY / part / "config.json").read_text())
    config |= {key: str(TINY / config[key].removeprefix("../")) for key in ("vit", "bert", "llm") if part == "blip2"}
    write(run / "config.json", config)
    ask = ["eval.py", "ask", "--checkpoint", run, "--image", base / "photos/1.png", *ASK]
    build = lambda: Blip2.build(str(run), str(TINY / "bert"), num_queries=2, image_size=64, embed_dim=64)  # noqa: E731
    return ask if part == "blip2" else build, sure, f"{part}/model.safetensors: {how}"


class Payload:
    """What a pickle that runs code holds."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def pickles(base: Path, folder: Path, rng: random.Random):
    """A LAVIS .pth, or pytorch_model.bin, with bytes changed, or with code that would write `marker`."""
    state, how = torch.load(base / "lavis.pth", weights_only=True), rng.choice(["bytes", "code", "raw code", "odd"])
    path = folder / rng.choice(["x.pth", "vit/pytorch_model.bin"])
    path.parent.mkdir(exist_ok=True)
    if how == "bytes":
        data, how = mutated((base / "lavis.pth").read_bytes(), rng)
        write(path, data)
    elif how == "raw code":
        path.write_bytes(pickle.dumps({"model": Payload(folder / "marker")}, rng.choice([0, 2, 4])))
    else:
        odd = rng.choice(
            [{5: torch.ones(2)}, {"model": 5}, [], torch.ones(3), {"model": {"query_tokens": torch.ones(3)}}]
        )
        code = rng.choice(
            [{"model": state["model"], "x": Payload(folder / "marker")}, {"model": Payload(folder / "marker")}]
        )
        torch.save(odd if how == "odd" else code, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    words = ["-m", "tools.weights", "inspect", path]
    if path.suffix == ".bin":
        shutil.copy(TINY / "vit/config.json", path.parent)
        read = lambda: open_tensors(weight_files(path.parent))  # noqa: E731
        return rng.choice([read, ["-m", "tools.weights", "inspect", path.parent]]), "code" in how, f"{path.name}: {how}"
    ask = ["eval.py", "ask", "--checkpoint", path, "--image", base / "photos/1.png", "--vit", "eva-g"]
    ask += ["--bert", TINY / "bert", *CAPTION]
    return rng.choice([words, ask]), "code" in how, f".pth: {how}"


# --- what a run keeps -------------------------------------------------------------------------------------------------


def resumed(base: Path, folder: Path) -> tuple[list, Path]:
    """A copy of a run at step 2 of 3 -> the command that continues it, the folder of its checkpoint."""
    shutil.copytree(base / "state/run", folder / "run")
    return [*commands(base)["training"], "--out", folder / "run", "--resume"], folder / "run/step-000002"


def commands(base: Path) -> dict[str, list]:
    """The command lines that made the files of `base`."""
    return json.loads((base / "commands.json").read_text())


def sign(folder: Path) -> None:
    """Write the checksums of a checkpoint anew, so that what is read is not refused for them alone."""
    if (sums := folder / "SHA256SUMS").exists():
        names = [line.split(maxsplit=1)[1] for line in sums.read_text().splitlines()]
        lines = [f"{hashlib.sha256((folder / name.strip('* ')).read_bytes()).hexdigest()}  {name}\n" for name in names]
        sums.write_text("".join(lines))


def other_data(base: Path, folder: Path, rng: random.Random):
    """Annotations or images that changed since the checkpoint, without --data-changed."""
    words, _ = resumed(base, folder)
    records = json.loads((base / "photos.json").read_text())
    linked(base / "photos", folder / "photos")
    how, row = rng.choice(["same", "caption", "removed", "added", "reversed", "image"]), rng.randrange(len(records))
    if how == "caption":
        records[row]["caption"] = ["another one"]
    elif how == "removed":
        del records[row]
    elif how == "added":
        records.append(records[row])
    elif how == "reversed":
        records.reverse()
    elif how == "image":
        Image.new("RGB", (64, 64)).save(buffer := io.BytesIO(), "PNG")
        write(folder / "photos" / f"{row}.png", buffer.getvalue())
    words[words.index("--data") + 1] = write(folder / "photos.json", records)
    return words, how != "same" or "no", f"--data: {how}"


def is_spoilt(path: Path) -> bool:
    """Do the checksums in a zip file tell? Some bytes of its headers, and between its entries, mean nothing."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is not None
    except Exception:
        return True


def train_state(base: Path, folder: Path, rng: random.Random):
    """train_state.pt: flipped bits, and states that make no sense under right checksums."""
    words, checkpoint = resumed(base, folder)
    path = checkpoint / "train_state.pt"
    if rng.random() < 0.3:
        data, how = mutated(path.read_bytes(), rng)
        write(path, data)
        return words, is_spoilt(path), f"train_state.pt: {how}"
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"]
    row = moments[rng.choice(sorted(moments))]
    name = rng.choice(["exp_avg", "exp_avg_sq"])
    keys = ("optimizer", "rng", "step", "best")
    how = rng.choice(["shape", "nan", "inf", "huge", "negative", "dtype", "lacks", "type", "step", "no state"])
    if how == "shape":
        row[name] = torch.ones(rng.choice([1, 3, 100_000]))
    elif how in ("nan", "inf", "huge"):
        row[name].view(-1)[rng.randrange(row[name].numel())] = float(how) if how != "huge" else 1e36
    elif how == "negative":
        row["exp_avg_sq"].view(-1)[0] = -1.0
    elif how == "dtype":
        row[name] = row[name].long()
    elif how == "step":
        state["step"] = rng.choice([-5, 10**9, 1.5, True, "2"])
    elif how in ("lacks", "type"):
        key = rng.choice(keys)
        how = f"{how} {key}"
        state[key] = rng.choice([None, "x", {"a": 1}])
        state = {k: v for k, v in state.items() if k != key or how.startswith("type")}
    else:
        state = rng.choice([{}, [], 5, None, torch.ones(3)])
    torch.save(state, path)
    sign(checkpoint)
    return words, how != "huge", f"train_state.pt, checksums right: {how}"


def checkpoint_files(base: Path, folder: Path, rng: random.Random):
    """Any file of the newest checkpoint damaged under its checksums."""
    words, checkpoint = resumed(base, folder)
    path = rng.choice(sorted(p for p in checkpoint.iterdir() if p.name != "SHA256SUMS"))
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    write(path, bytes(data))
    return words, path.suffix != ".pt" or is_spoilt(path), f"{path.name}: bit flipped at {at} of {len(data)}"


def log(base: Path, folder: Path, rng: random.Random):
    """log.jsonl of a run that is continued."""
    words, checkpoint = resumed(base, folder)
    path = checkpoint.parent / "log.jsonl"
    odd = [b"\0" * 500 + b"\n", b"5\n", b"null\n", b"[]\n", b'{"a": "x\xe2\x80\xa8y"}\n', b"\xe9\n", b'{"step": "a"}\n']
    data, how = mutated(path.read_bytes(), rng)
    if rng.random() < 0.5:
        how, at = rng.choice(odd), rng.choice([0, 1])
        data = b"".join([*(lines := path.read_bytes().splitlines(True))[:at], how, *lines[at:]])
    write(path, data)
    return words, False, f"log.jsonl: {how}"


def features(base: Path, folder: Path, rng: random.Random):
    """A file of the feature cache."""
    shutil.copytree(base / "state/features", folder / "features")
    path = rng.choice(sorted((folder / "features").iterdir()))
    data, how = mutated(path.read_bytes(), rng)
    write(path, data)
    return (
        [*commands(base)["training"], "--cache-features", "--out", folder / "run"],
        False,
        f"features/*{path.suffix}: {how}",
    )


def kept(base: Path, folder: Path, rng: random.Random):
    """The kept batches of an interrupted evaluation: lines of a checksum and an object."""
    shutil.copytree(base / "kept", folder / "kept")
    path = next((folder / "kept").rglob("*.jsonl"))
    lines = [line.split(" ", 1) for line in path.read_text().splitlines() if line.endswith("}")]
    data, how = mutated(path.read_bytes(), rng)
    if lines and rng.random() < 0.6:
        data, how = mutated_json(json.loads(lines[0][1]), rng)
        data = f"{lines[0][0]} ".encode() + data
    write(path, data if data.endswith(b"\n") else data + b"\n")
    words = [*commands(base)["evaluation"], "--out", folder / "kept/result.json"]
    return words, False, f"kept batches: {how}"


INPUTS = {  # surface: (what writes it, its weight among the others)
    "image": (image, 30), "annotations": (annotations, 40), "texts": (texts, 6), "run config": (run_config, 6),
    "part config": (part_config, 12), "safetensors": (safetensors, 8), "pickle": (pickles, 8),
    "other data": (other_data, 3), "train state": (train_state, 5), "checkpoint": (checkpoint_files, 3),
    "log": (log, 3), "features": (features, 3), "kept": (kept, 3),
}  # fmt: skip
