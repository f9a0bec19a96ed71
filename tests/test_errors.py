"""A user's mistake gets one sentence: what was got, what was expected, what to type. Nothing is half written."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from test_data import write_photos

import data
import eval as evaluation
import train
from data import Annotations, UserError, open_picture, say_sentence
from vit import PRESETS, ViTConfig


def complaint(main, capsys, *flags) -> str:
    """What a command line prints when it refuses; it exits with 2."""
    try:
        status = say_sentence(lambda: main(list(flags)))
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr().err
    assert status == 2 and printed.startswith("error: ") and "Traceback" not in printed
    return printed


@pytest.fixture
def train_says(capsys, tmp_path):
    flags = [*TINY, "--batch", "2", "--steps", "1", "--queries", "2", "--image-size", "64", "--eval-every", "0"]
    return lambda *more: complaint(train.main, capsys, *flags, "--out", str(tmp_path / "run"), *more)


def finished_run(folder):
    """A run of one step on two photos."""
    photos = str(write_photos(folder, 2, (64, 64)))
    flags = ["--steps", "1", "--batch", "2", "--eval-every", "0", "--image-size", "64", "--queries", "2"]
    train.main([*TINY, *flags, "--data", photos, "--out", str(folder / "run")])


# --- data


def test_missing_data_file(train_says, tmp_path):
    said = train_says("--data", "coco.json")
    assert "--data coco.json does not exist: expected a .json or .jsonl file, or the word shapes" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, got",
    [
        ('{"a": 1}', "an object with ['a']"),
        ("3", "a int"),
        ("[]", "nothing"),
        ("[1, 2]", "record 0 has int"),
        ('[{"img": "a.jpg", "text": "a"}]', "record 0 has ['img', 'text'], expected \"image\" and \"caption\""),
        ("[", "is not valid JSON"),
    ],
)
def test_json_of_the_wrong_shape(train_says, tmp_path, content, got):
    (tmp_path / "a.json").write_text(content)
    said = train_says("--data", str(tmp_path / "a.json"))
    assert "a.json" in said and got in said


def test_jsonl_with_a_broken_line(train_says, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "a"}\n{"image"\n')
    assert "expected one record a line" in train_says("--data", str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("caption", ["", "  ", "...", [], ["fine", ""], None, 5])
def test_empty_caption(train_says, tmp_path, caption):
    said = train_says("--data", str(write_photos(tmp_path, caption=caption)))
    assert "record 0 (0.png) has an empty caption: write one, or take it out" in said


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"question": None}, "question"),
        ({"question": "..."}, "question"),
        ({"question": ["what?"]}, "question"),
        ({"question": "what?", "answer": ["\ud83d"]}, "answer"),  # half of a character
        ({"caption": "\ud83d"}, "caption"),
    ],
)
def test_what_is_no_text_is_refused_before_training_and_told_by_check(tmp_path, capsys, changes, kind):
    path = write_photos(tmp_path, 2)
    asks = "question" in changes
    records = [
        record | ({"question": "is it?", "answer": "yes"} if asks else {}) for record in json.loads(path.read_text())
    ]
    path.write_text(json.dumps([records[0] | changes, records[1], {"caption": "of nothing"}][: 3 - asks]))
    with pytest.raises(UserError, match=f"record 0 .0.png. has an empty {kind}"):
        Annotations(path, questions=asks)
    with pytest.raises(SystemExit):
        data.main(["check", str(path), "--workers", "0"])
    said = capsys.readouterr().out
    assert "with an empty text: 1" in said and ('records without "image": 1' in said) == (not asks)


def test_missing_and_truncated_photos_stop_the_run_above_one_per_cent(train_says, tmp_path, capsys):
    path = write_photos(tmp_path, 4)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    said = train_says("--data", str(path), "--batch", "4")
    assert "2 of 4 photos could not be read, more than 1%" in said and "--images" in said


def test_unreadable_photos_below_one_per_cent_are_named_and_skipped(tmp_path, capsys):
    path = write_photos(tmp_path, 101, (64, 64))
    (tmp_path / "1.png").write_bytes(b"not a picture")
    flags = [*TINY, "--data", str(path), "--image-size", "64", "--batch", "101", "--steps", "1", "--queries", "2"]
    train.main([*flags, "--embed-dim", "4", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 1
    assert f"skipped: {tmp_path / '1.png'} is not a picture that Pillow knows: convert it" in printed


def test_evaluation_needs_every_photo(tmp_path, capsys):
    finished_run(tmp_path)
    (tmp_path / "1.png").unlink()
    said = complaint(
        evaluation.main, capsys, "retrieval", "--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "a.json")
    )
    assert "every photo is needed here, and" in said and "1.png does not exist" in said


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    Image.new("1", (10_001, 10_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was unpacked"))
    with pytest.raises(
        UserError, match="bomb.png has 10001 x 10000 pixels, expected at most 100,000,000: resize it first"
    ):
        open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_a_truncated_photo_is_named_whatever_its_format(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"a.{suffix} is (broken or cut short|not a picture)"):
        open_picture(path)


def test_too_few_photos_for_a_step(train_says, tmp_path):
    said = train_says("--data", str(write_photos(tmp_path, 3)), "--batch", "8")
    assert "3 photos are fewer than one step's 8" in said and "--batch" in said


def test_holding_out_everything(train_says, tmp_path):
    said = train_says("--data", str(write_photos(tmp_path, 3)), "--val-photos", "3")
    assert "--val-photos 3 of 3 photos leaves none to train on" in said


# --- models


def test_folders_that_are_not_there(train_says):
    assert "--vit nowhere does not exist: expected a folder, or a name (eva-g, clip-l, dinov2-s)" in train_says(
        "--vit", "nowhere"
    )
    assert "--bert nowhere does not exist" in train_says("--bert", "nowhere")


def test_folders_that_are_something_else(train_says):
    assert "has model_type 'bert', expected an image encoder" in train_says("--vit", TINY[3])
    assert "has model_type 'dinov2'" in train_says("--bert", TINY[1])


def test_cut_off_weights(train_says, tmp_path):
    for file in (ROOT / "assets/tiny/vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole safetensors file" in train_says("--vit", str(tmp_path))


def test_tokenizer_and_weights_of_different_size(train_says, tmp_path):
    for file in (ROOT / "assets/tiny/bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = len(tokenizer["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "expected the same: use the tokenizer that the weights were trained with" in train_says(
        "--bert", str(tmp_path)
    )


@pytest.fixture
def run(tmp_path):
    """A finished run of one step."""
    finished_run(tmp_path)
    return tmp_path / "run"


def eval_says(capsys, run, *flags):
    capsys.readouterr()
    return complaint(
        evaluation.main, capsys, "retrieval", "--checkpoint", str(run), "--data", str(run.parent / "a.json"), *flags
    )


def test_vit_of_another_width(capsys, run):
    said = eval_says(capsys, run, "--vit", "clip-l")
    assert (
        "was trained over a ViT of width 96, clip-l has width 1024: pass --vit with the encoder it was trained over"
        in said
    )


def test_vit_with_other_weights(capsys, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((ROOT / "assets/tiny/vit/config.json").read_text())
    tensors = load_file(ROOT / "assets/tiny/vit/model.safetensors")
    tensors["embeddings.cls_token"] += 1
    save_file(tensors, other / "model.safetensors")
    assert "holds other weights than" in eval_says(capsys, run, "--vit", str(other))


def test_checkpoint_of_another_size(capsys, run):
    tensors = load_file(run / "model.safetensors")
    tensors["vision_proj.weight"] = tensors["vision_proj.weight"][:5]
    del tensors["temperature"]
    (run / "model.safetensors").unlink()
    save_file(tensors, run / "model.safetensors")
    said = eval_says(capsys, run)
    assert "2 problem(s)" in said and "shape: vision_proj.weight" in said and "missing: nothing for temperature" in said


def test_a_folder_that_is_no_run(capsys, run, tmp_path):
    assert "is not a run: expected config.json and model.safetensors" in eval_says(capsys, tmp_path / "nothing")


def test_lavis_file_needs_its_folders(capsys, run, tmp_path):
    torch.save({"model": {"query_tokens": torch.ones(1, 2, 3)}}, tmp_path / "blip2.pth")
    assert "does not say its architecture: pass --vit eva-g:eva_vit_g.pth and --bert" in eval_says(
        capsys, tmp_path / "blip2.pth"
    )


# --- flags


def test_unknown_flag(train_says):
    said = train_says("--learning-rat", "1")
    assert "unrecognized arguments: --learning-rat 1" in said and "--help lists all flags" in said
    assert "did you mean --min-lr?" in train_says("--min-l", "1")
    assert "did you mean --queries?" in train_says("--querys", "1")


def test_ill_typed_flag(train_says):
    assert "--steps: invalid int value: 'many'" in train_says("--steps", "many")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--losses", "itm"], "got --losses itm, expected itc, with itm and itg or without"),
        (["--losses", "itc,mlm"], "expected itc"),
        (["--stage", "4"], "got --stage 4, expected 1, 2, caption, vqa or retrieval"),
        (["--precision", "int8"], "expected auto, fp32, bf16 or fp16"),
        (["--device", "tpu"], "expected auto, cuda, mps or cpu"),
        (["--steps", "0"], "got --steps 0, expected at least 1"),
        (
            ["--batch", "10", "--micro-batch", "4"],
            "does not divide into 1 processes with micro-batches of 4: pass --batch 12",
        ),
        (["--image-size", "60"], "--image-size 60 is no multiple of the patch size 8 of"),
        (["--image-size", "4"], "--image-size 4 is no multiple of the patch size 8"),
        (["--image-size", "0"], "pass --image-size 8"),
        (["--micro-batch", "-4"], "got --micro-batch -4, expected 0 or more"),
        (
            ["--batch", "12", "--micro-batch", "2", "--itc-batch", "8"],
            "--itc-batch 8 is not made of micro-batches of 2 (over all processes), or --batch 12 not of it: pass "
            "--itc-batch 12",
        ),
        (["--micro-batch", "4"], "pass --batch 4"),
        (["--clip", "0"], "got --clip 0.0, expected above 0"),
        (["--seed", "-1"], "got --seed -1, expected 0 or more"),
        (["--cross-every", "0"], "got --cross-every 0, expected at least 1"),
        (["--max-text-tokens", "100"], "got --max-text-tokens 100, expected 3 to 64, the positions that"),
        (["--val-photos", "2", "--val-data", "a.json"], "got --val-photos and --val-data, expected one of the two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_flags(train_says, flags, expected):
    assert expected in train_says(*flags)


def test_fp16_on_cpu(train_says):
    said = train_says("--precision", "fp16", "--device", "cpu")
    assert "--precision fp16 needs a CUDA card, this is cpu: pass --precision" in said


def test_cuda_where_there_is_none(train_says):
    assert "PyTorch sees no CUDA card here: pass --device cpu" in train_says("--device", "cuda")


# --- runs


def test_an_existing_run_is_not_overwritten_by_accident(capsys, run):
    """Nor by a command that asks for it and is then refused for something else."""
    before = (run / "model.safetensors").read_bytes()
    said = complaint(train.main, capsys, *TINY, "--out", str(run))
    assert "holds a run: pass --resume to go on with it, --out to start another, or --overwrite" in said
    for wrong in (["--steps", "0"], ["--data", "nowhere.json"], ["--vit", "nowhere"], ["--precision", "int8"]):
        complaint(train.main, capsys, *TINY, "--out", str(run), "--overwrite", *wrong)
    assert (run / "model.safetensors").read_bytes() == before
    photos, small = str(run.parent / "a.json"), ["--batch", "2", "--queries", "2", "--image-size", "64"]
    train.main([*TINY, "--out", str(run), "--overwrite", "--data", photos, "--steps", "2", "--keep", "2", *small])
    assert [path.name for path in run.glob("step-*")] == ["step-000002"]


def test_resuming_what_is_not_there_or_was_different(capsys, run, tmp_path, monkeypatch):
    assert "has no checkpoint yet" in complaint(train.main, capsys, "--resume", "--out", str(tmp_path / "none"))
    said = complaint(train.main, capsys, "--resume", "--out", str(run), "--batch", "64")
    assert "was started with --batch 2: leave those flags out" in said
    monkeypatch.setattr(train, "world", lambda: (0, 2))
    said = complaint(train.main, capsys, "--resume", "--out", str(run))
    assert "was trained by 1 processes, here are 2: start it with torchrun --nproc_per_node 1" in said


def test_a_run_is_not_resumed_over_another_encoder(capsys, tmp_path):
    """Its files may have changed under the same name."""
    vit = tmp_path / "vit"
    shutil.copytree(ROOT / "assets/tiny/vit", vit)
    photos = str(write_photos(tmp_path, 2, (64, 64)))
    small = ["--steps", "1", "--batch", "2", "--image-size", "64", "--queries", "2", "--out", str(tmp_path / "run")]
    train.main([*TINY, "--vit", str(vit), "--data", photos, *small])
    tensors = load_file(vit / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, vit / "model.safetensors")
    said = complaint(train.main, capsys, "--resume", "--out", str(tmp_path / "run"))
    assert "holds other weights than the run was trained over" in said


def test_random_weights_cannot_be_opened_again(capsys, run, monkeypatch):
    """They are drawn anew each time, so the numbers would be those of another model."""
    monkeypatch.setitem(PRESETS, "clip-l", ViTConfig(96, depth=1, heads=2, mlp=8))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"vit": "clip-l", "vit_sha256": None}))
    assert "was trained over a ViT of random weights (clip-l), which no file holds" in eval_says(capsys, run)


def test_a_sentence_from_a_loader_worker_is_a_sentence(train_says, tmp_path):
    """The wrong --images is the commonest mistake, and found by another process."""
    path = write_photos(tmp_path, 3, (64, 64))
    said = train_says("--data", str(path), "--images", str(tmp_path / "nowhere"), "--workers", "1")
    assert said.startswith("error: none of 3 photos in a row can be read; the last: ")
    assert said.count("\n") == 1 and "(--images)" in said


def test_evaluation_flags(capsys, run):
    assert "got --k 0, expected at least 1" in eval_says(capsys, run, "--k", "0")
    assert "does not exist, make it first" in eval_says(capsys, run, "--out", "nowhere/a.json")
