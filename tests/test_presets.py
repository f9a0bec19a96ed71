"""Evaluations with comparable numbers: presets never change, a result records how it was computed, an interrupted
evaluation continues where it stopped, a wrong flag of eval.py gets a sentence."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import copy_of
from PIL import Image
from safetensors import safe_open
from samples import PRECISE, TINY_RUN, batches_of, caption_file, question_file, write_images

import eval as evaluation
from blip2 import Blip2
from engine.errors import UserError
from engine.files import sha256
from engine.stop import Stopped, signals, state
from tasks.batches import PartialResults
from tasks.presets import PRESETS, partial_folder

# --- presets ---------------------------------------------------------------------------------------------------------


def test_a_preset_never_changes():
    """Numbers of a preset stay comparable: other choices are a -v2."""
    assert {name: hashlib.sha256(repr(sorted(p.items())).encode()).hexdigest()[:8] for name, p in PRESETS.items()} == {
        "captions-v1": "77f901a4",
        "coco-captions-v1": "382b8c7a",
        "nocaps-v1": "a5fad017",
        "vqa-v1": "685c5d15",
        "vqav2-zeroshot-v1": "19081d7f",
        "okvqa-zeroshot-v1": "8668141e",
        "gqa-zeroshot-v1": "15c8f612",
        "gqa-zeroshot-v2": "7add0a73",
        "aokvqa-zeroshot-v1": "0014fdf7",
        "aokvqa-zeroshot-v2": "6dbd6440",
        "vqav2-v1": "02bb0b72",
        "retrieval-v1": "b80e2400",
        "retrieval-v2": "dbb0ac66",
        "coco-retrieval-v1": "6a4e2ece",
        "flickr30k-retrieval-v1": "6a4e2ece",
    }


def test_presets_are_those_of_the_paper():
    """Section 4.1 (zero-shot VQA), Tables 7 to 9; what the paper leaves open is LAVIS's."""
    zero = PRESETS["vqav2-zeroshot-v1"]
    assert (zero["num_beams"], zero["length_penalty"], zero["max_new_tokens"], zero["image_size"]) == (5, -1.0, 10, 224)
    assert zero["template"] is None  # the language model's own: "Question: {} Answer:" or "... Short answer:"
    assert PRESETS["coco-captions-v1"]["prompt"] == "a photo of" and PRESETS["coco-captions-v1"]["num_beams"] == 5
    assert {PRESETS[name]["image_size"] for name in ("coco-captions-v1", "nocaps-v1", "coco-retrieval-v1")} == {364}
    assert PRESETS["vqav2-v1"]["image_size"] == 490
    assert PRESETS["flickr30k-retrieval-v1"]["k"] == 128 and PRESETS["flickr30k-retrieval-v1"]["rerank"] == "itm"


def test_a_result_records_its_preset_weights_and_data(tmp_path):
    """Every choice, what differs from the preset, and hashes of the weights and of the split."""
    data, out = question_file(tmp_path, 3), tmp_path / "out.json"
    evaluation.main(["vqa", "--checkpoint", TINY_RUN, "--data", data, "--beams", "2", "--out", str(out), *PRECISE])
    result = json.loads(out.read_text())
    assert result["preset"]["name"] == "vqa-v1" and result["preset"]["changed"] == ["num_beams"]
    assert result["preset"]["num_beams"] == 2 and result["preset"]["length_penalty"] == -1.0
    assert result["preset"]["template"] == "Question: {} Answer:" and result["preset"]["image_size"] == 64
    assert result["computed"]["precision"] == "fp32" and result["checkpoint"] == TINY_RUN
    assert result["weights"]["sha256"] == sha256([Path(TINY_RUN) / "model.safetensors"]) and result["weights"]["llm"]
    first = result["data"]["sha256"]
    assert "seconds" not in result and not list(tmp_path.glob(".out*"))  # no partial results remain
    question_file(tmp_path, 4)
    evaluation.main(["vqa", "--checkpoint", TINY_RUN, "--data", data, "--out", str(out), *PRECISE])
    assert json.loads(out.read_text())["data"]["sha256"] != first


# --- interrupted evaluations -----------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_continues_where_it_stopped(tmp_path, monkeypatch):
    """Finished batches are not computed again, one whose line was cut off is; the file equals that without the
    interruption."""
    data = caption_file(tmp_path, 20)
    flags = ["captions", "--checkpoint", TINY_RUN, "--data", data, *PRECISE, "--out"]
    calls, caption = [], Blip2.caption

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(2)
        return caption(self, *args, **kwargs)

    with batches_of(8):  # three batches
        evaluation.main([*flags, str(tmp_path / "whole.json")])
        monkeypatch.setattr(Blip2, "caption", interrupted)
        with signals(), pytest.raises(Stopped):
            evaluation.main([*flags, str(tmp_path / "cut.json")])
        assert state.advice() == "type the same command again to go on"
        (lines,) = (tmp_path / ".cut.json.batches").glob("*/*.jsonl")
        assert len(lines.read_text().splitlines()) == 1
        with open(lines, "a") as file:
            file.write('{"captions 1": ["a hal')
        calls.clear()
        with pytest.raises(Stopped):  # after one more batch
            evaluation.main([*flags, str(tmp_path / "cut.json")])
        evaluation.main([*flags, str(tmp_path / "cut.json")])
    assert len(calls) == 3 and not (tmp_path / ".cut.json.batches").exists()
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_partial_results_of_another_preset_split_or_checkpoint_are_not_taken():
    identity = {"preset": {"num_beams": 5}, "checkpoint": TINY_RUN, "data": {"sha256": "1"}}
    others = [partial_folder("x.json", identity | {key: {"sha256": "2"}}) for key in ("preset", "data", "weights")]
    assert len({partial_folder("x.json", identity), *others}) == 4


def test_partial_results_of_other_images_with_the_same_names_are_not_taken(tmp_path, monkeypatch):
    """A control of docs/results.md: the same annotations, a folder of blank images."""
    data, folders = caption_file(tmp_path, 2), []
    (tmp_path / "blank").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"blank/{i}.png")
    monkeypatch.setattr(evaluation, "PartialResults", lambda folder: (folders.append(folder), PartialResults(None))[1])
    for images in (tmp_path, tmp_path / "blank"):
        flags = ["--data", data, "--images", str(images), "--out", str(tmp_path / "out.json")]
        evaluation.main(["captions", "--checkpoint", TINY_RUN, *flags, *PRECISE])
    assert None not in folders and folders[0] != folders[1]


def test_without_an_output_file_no_partial_results_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    partial = PartialResults(None)
    partial.add("x 0", [1])
    assert partial.done == {"x 0": [1]} and not list(tmp_path.iterdir())


# --- features --------------------------------------------------------------------------------------------------------


def features_of(checkpoint, folder, *flags: str) -> dict[str, torch.Tensor]:
    """`eval.py features` of the images of a folder; checks that the file names them."""
    out = folder / "f.safetensors"
    (folder / "images").mkdir()
    write_images(folder / "images", 3)
    evaluation.main(
        ["features", "--checkpoint", str(checkpoint), "--images", str(folder / "images"), "--out", str(out)]
        + [*flags, *PRECISE]
    )
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["images"]) == ["0.png", "1.png", "2.png"]
        assert json.loads(file.metadata()["texts"]) == (["a red star", "two circles"] if flags else [])
        return {name: file.get_tensor(name) for name in file.keys()}


def test_features_are_those_of_the_calls(tmp_path, stage1_run):
    """After stage 1, of images and texts."""
    (tmp_path / "texts.txt").write_text("a red star\ntwo circles\n")
    found = features_of(stage1_run, tmp_path, "--texts", str(tmp_path / "texts.txt"))
    model = Blip2.from_pretrained(stage1_run)
    encoded = model.encode_image([tmp_path / f"images/{i}.png" for i in range(3)])
    expected = {"image_query_outputs": encoded.query_out, "image_features": encoded.feats}
    expected["text_features"] = model.encode_text(["a red star", "two circles"]).feats
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_model_with_a_language_model_has_no_projected_features(tmp_path):
    """Their projections are not trained in stage 2."""
    found = features_of(TINY_RUN, tmp_path)
    encoded = Blip2.from_pretrained(TINY_RUN).encode_image([tmp_path / f"images/{i}.png" for i in range(3)])
    assert found.keys() == {"image_query_outputs"}
    torch.testing.assert_close(found["image_query_outputs"], encoded.query_out)


def test_the_texts_of_a_file_are_its_lines(tmp_path, stage1_run):
    """A line separator of Unicode and a form feed are part of a line."""
    (tmp_path / "texts.txt").write_bytes("a\u2028red star\r\ntwo\fcircles\n\na".encode())
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 1)
    flags = ["--images", str(tmp_path / "images"), "--texts", str(tmp_path / "texts.txt"), *PRECISE]
    evaluation.main(["features", "--checkpoint", str(stage1_run), "--out", str(tmp_path / "f.safetensors"), *flags])
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert json.loads(file.metadata()["texts"]) == ["a\u2028red star", "two\fcircles", "", "a"]
        assert len(file.get_tensor("text_features")) == 4


# --- checkpoints, flags of the search, lost output -------------------------------------------------------------------


def test_each_checkpoint_of_a_run_can_be_evaluated_and_a_wrong_one_names_them(tmp_path, stage1_run):
    data, run = caption_file(tmp_path, 2), copy_of(stage1_run, tmp_path)
    shutil.copytree(run / "step-000004", run / "best")
    for name in ("best", "step-000004"):
        result = evaluation.main(["retrieval", "--checkpoint", str(run / name), "--data", data, *PRECISE])
        assert result["checkpoint"] == str(run / name) and result["images"] == 2
    with pytest.raises(UserError, match="step-000700 does not exist: in .* there are best, step-000004$"):
        evaluation.main(["retrieval", "--checkpoint", str(run / "step-000700"), "--data", data])


def test_flags_of_the_search_reach_it_and_the_result(tmp_path, monkeypatch):
    seen, caption = [], Blip2.caption
    monkeypatch.setattr(Blip2, "caption", lambda *a, **how: seen.append(how) or caption(*a, **how))
    flags = ["--length-penalty", "-1", "--repetition-penalty", "1.5", "--min-new-tokens", "4", *PRECISE]
    given = {"length_penalty": -1.0, "repetition_penalty": 1.5, "min_new_tokens": 4}
    result = evaluation.main(["captions", "--checkpoint", TINY_RUN, "--data", caption_file(tmp_path, 2), *flags])
    assert result["preset"]["changed"] == sorted(given)
    evaluation.main(["ask", "--image", str(tmp_path / "0.png"), *flags])
    assert len(seen) == 2 and all(given.items() <= how.items() for how in seen)


def test_the_table_is_printed_before_a_file_is_written(tmp_path, monkeypatch, capsys):
    """A full disk does not cost the numbers."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_json", full)
    flags = ["--data", caption_file(tmp_path, 2), "--predictions", str(tmp_path / "p.json"), *PRECISE]
    with pytest.raises(OSError, match="No space left"):
        evaluation.main(["captions", "--checkpoint", TINY_RUN, *flags])
    assert "CIDEr" in capsys.readouterr().out


# --- wrong flags -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with captions.json and questions.json."""
    folder = tmp_path_factory.mktemp("data")
    caption_file(folder, 2)
    question_file(folder, 2)
    return folder


def run(flags: str, folder) -> None:
    """eval.py with these flags about the tiny run."""
    names = {"CAPTIONS": "captions.json", "QUESTIONS": "questions.json", "FOLDER": ""}
    for word, name in names.items():
        flags = flags.replace(word, str(folder / name))
    evaluation.main([*flags.split(), "--checkpoint", TINY_RUN])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("captions --data nowhere.json", "--data nowhere.json does not exist: expected an annotation file"),
        ("captions --split nonsense", "got --split nonsense of the shapes world, expected train, val, test"),
        ("captions --data CAPTIONS --out FOLDER", "is a folder: pass the name of a file in it"),
        ("captions --data CAPTIONS --predictions no/p.json", "--predictions no/p.json: the folder no does not exist"),
        ("captions --data CAPTIONS --predictions /proc/p.json", "--predictions /proc/p.json cannot be written ("),
        ("captions --data CAPTIONS --out /proc/o.json", "--out /proc/o.json cannot be written ("),
        ("captions --data CAPTIONS --beams 0", "argument --beams: got 0, expected at least 1"),
        ("captions --data CAPTIONS --repetition-penalty 0", "got --repetition-penalty 0.0, expected above 0"),
    ],
)
def test_a_wrong_flag_gets_a_sentence_before_the_model_is_loaded(data, monkeypatch, capsys, flags, sentence):
    monkeypatch.setattr(Blip2, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises((UserError, SystemExit)) as error:
        run(flags, data)
    assert sentence in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            "vqa --data shapes",
            "eval.py vqa needs --data with questions; for the shapes world use: python eval.py answers",
        ),
        ("vqa --data CAPTIONS", "has ['caption', 'domain', 'image', 'image_id'], expected \"image\" and \"question\""),
        ("vqa --data QUESTIONS --template hi", "got the template 'hi', expected {} in it, where the question goes"),
        ("vqa --data QUESTIONS --candidates CAPTIONS", "is no list of answers: expected"),
        ("retrieval --data CAPTIONS", "has a language model, for which its queries were trained since"),
        ("features --images FOLDER --texts nowhere.txt --out f.safetensors", "nowhere.txt does not exist"),
        ("features --images FOLDER --texts CAPTIONS --out f.safetensors", "texts have features in a run of stage 1"),
        ("features --images nowhere --out f.safetensors", "nowhere has no images in it, expected a folder of files"),
    ],
)
def test_a_flag_that_does_not_fit_the_model_or_the_data_gets_a_sentence(data, flags, sentence):
    with pytest.raises(UserError) as error:
        run(flags, data)
    assert sentence in str(error.value)
