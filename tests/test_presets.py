"""Evaluations with comparable numbers: presets, result files, predictions, resumption, any number of processes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_many, shared, stage2_model
from PIL import Image
from safetensors import safe_open

import eval as evaluation
import tasks
from blip2 import Blip2
from data import UserError, clean_question, open_photos
from eval import PRESETS
from shapes import ShapesWorld
from tasks import Gallery, Kept, captioning, retrieval, shares, vqa, vqa_table, write_result
from weights import sha256

RUN = str(ROOT / "assets/tiny/blip2")
PRECISE = ["--precision", "fp32", "--device", "cpu"]


def question_file(folder, count: int = 12, answers: int = 10, **more) -> str:
    world, records = ShapesWorld("val"), []
    for i in range(count):
        world.picture(i).save(folder / f"{i}.png")
        for kind, question, answer in world.questions(i)[1:4]:  # without counts: "two" is normalized to "2"
            records.append({"image": f"{i}.png", "question": question, "question_id": 100 + len(records)})
            records[-1] |= {"answer": [answer] * answers, "question_type": kind, **more}
            records[-1]["answer_type"] = {"color": "color", "yes or no": "yes/no"}.get(kind, "other")
    (folder / "questions.json").write_text(json.dumps(records))
    return str(folder / "questions.json")


def caption_file(folder, count: int = 12, **more) -> str:
    world = ShapesWorld("val")
    for i in range(count):
        world.picture(i).save(folder / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": world.captions(i), "image_id": 7 * i} for i in range(count)]
    records = [record | {"domain": ("in-domain", "near-domain")[i % 2]} for i, record in enumerate(records)]
    (folder / "captions.json").write_text(json.dumps(records))
    return str(folder / "captions.json")


# --- presets


def test_a_preset_never_changes():
    """Numbers of a preset stay comparable: who wants others adds a -v2."""
    assert {name: hashlib.sha256(repr(sorted(p.items())).encode()).hexdigest()[:8] for name, p in PRESETS.items()} == {
        "captions-v1": "77f901a4",
        "coco-captions-v1": "382b8c7a",
        "nocaps-v1": "a5fad017",
        "vqa-v1": "685c5d15",
        "vqav2-zeroshot-v1": "19081d7f",
        "okvqa-zeroshot-v1": "8668141e",
        "gqa-zeroshot-v1": "15c8f612",
        "aokvqa-zeroshot-v1": "0014fdf7",
        "vqav2-v1": "02bb0b72",
        "retrieval-v1": "b80e2400",
        "coco-retrieval-v1": "6a4e2ece",
        "flickr30k-retrieval-v1": "6a4e2ece",
    }


def test_presets_are_the_papers():
    """Section 4.1 (zero-shot VQA), Tables 7 to 9; what they leave open is the original's."""
    zero = PRESETS["vqav2-zeroshot-v1"]
    assert (zero["num_beams"], zero["length_penalty"], zero["max_new_tokens"], zero["image_size"]) == (5, -1.0, 10, 224)
    assert zero["template"] is None  # the language model's own: "Question: {} Answer:" or "... Short answer:"
    assert PRESETS["coco-captions-v1"]["prompt"] == "a photo of" and PRESETS["coco-captions-v1"]["num_beams"] == 5
    assert {PRESETS[name]["image_size"] for name in ("coco-captions-v1", "nocaps-v1", "coco-retrieval-v1")} == {364}
    assert PRESETS["vqav2-v1"]["image_size"] == 490
    assert PRESETS["flickr30k-retrieval-v1"]["k"] == 128 and PRESETS["flickr30k-retrieval-v1"]["rerank"] == "itm"


def test_the_result_says_how_it_came_about(tmp_path):
    """Every choice, what was changed of the preset, and a hash of the split."""
    data, out = question_file(tmp_path, 3), tmp_path / "out.json"
    evaluation.main(["vqa", "--checkpoint", RUN, "--data", data, "--beams", "2", "--out", str(out), *PRECISE])
    result = json.loads(out.read_text())
    assert result["preset"]["name"] == "vqa-v1" and result["preset"]["changed"] == ["num_beams"]
    assert result["preset"]["num_beams"] == 2 and result["preset"]["length_penalty"] == -1.0
    assert result["preset"]["template"] == "Question: {} Answer:" and result["preset"]["image_size"] == 64
    assert result["computed"]["precision"] == "fp32" and result["checkpoint"] == RUN
    assert result["weights"]["sha256"] == sha256([Path(RUN) / "model.safetensors"]) and result["weights"]["llm"]
    first = result["data"]["sha256"]
    assert "seconds" not in result and not list(tmp_path.glob(".out*"))  # nothing is left behind
    question_file(tmp_path, 4)
    evaluation.main(["vqa", "--checkpoint", RUN, "--data", data, "--out", str(out), *PRECISE])
    assert json.loads(out.read_text())["data"]["sha256"] != first


# --- questions


def test_vqa_counts_by_type_and_beside_the_majority(tmp_path):
    """On pictures of the shapes world, in the layout of VQAv2's converted files."""
    photos = open_photos([question_file(tmp_path)], "val", 64, questions=True)
    result = vqa(Blip2.from_pretrained(RUN), photos)
    assert result["metric"] == "vqa" and result["questions"] == len(photos) == 36 and result["photos"] == 12
    right = [answer["answer"] == photos.record(row)["answer"][0] for row, answer in enumerate(result["predictions"])]
    assert result["accuracy"] == round(100 * sum(right) / 36, 2) > result["accuracy of the majority answer"] > 0
    kinds = [photos.record(row)["answer_type"] for row in range(36)]
    for kind, value in result["by answer_type"].items():
        chosen = [ok for ok, other in zip(right, kinds) if other == kind]
        assert value == round(100 * sum(chosen) / len(chosen), 2)
    assert set(result["by question_type"]) <= {"color", "size", "place", "shape", "relation", "yes or no"}
    assert [p["question_id"] for p in result["predictions"]] == list(range(100, 136))
    assert "accuracy of the lemmas" not in result
    assert vqa(Blip2.from_pretrained(RUN), photos, lemmatized=True)["accuracy of the lemmas"] == result["accuracy"]
    assert "by answer_type: " in vqa_table(result) and "always " in vqa_table(result)


def test_each_photo_is_encoded_once_for_all_its_questions(tmp_path, monkeypatch):
    model, seen, encode = Blip2.from_pretrained(RUN), [], Blip2.image_tokens
    monkeypatch.setattr(Blip2, "image_tokens", lambda self, images: seen.append(len(images)) or encode(self, images))
    vqa(model, open_photos([question_file(tmp_path)], "val", 64, questions=True))
    assert sum(seen) == 12


def test_candidates_are_ranked_instead_of_written(tmp_path):
    """Only these are answered; the likeliest, as `rank` says."""
    photos = open_photos([question_file(tmp_path, 4)], "val", 64, questions=True)
    model = Blip2.from_pretrained(RUN)
    result = vqa(model, photos, candidates=["one", "two", "red"])
    assert {p["answer"] for p in result["predictions"]} <= {"one", "two", "red"}
    ((first,),) = model.rank([photos.picture(0)], [[photos.record(0)["question"]]], ["one", "two", "red"])
    assert result["predictions"][0]["answer"] == first[0].answer


def test_a_test_set_without_answers_gives_predictions_alone(tmp_path):
    data, out = question_file(tmp_path, 2), tmp_path / "server.json"
    records = json.loads((tmp_path / "questions.json").read_text())
    (tmp_path / "questions.json").write_text(
        json.dumps([{k: v for k, v in r.items() if k != "answer"} for r in records])
    )
    result = evaluation.main(["vqa", "--checkpoint", RUN, "--data", data, "--predictions", str(out), *PRECISE])
    assert result["metric"] is None and "accuracy" not in result
    server = json.loads(out.read_text())  # what the VQA server reads
    assert [sorted(row) for row in server] == [["answer", "question_id"]] * len(records)
    assert all(isinstance(row["question_id"], int) and isinstance(row["answer"], str) for row in server)


def test_questions_are_cleaned_as_in_the_original_only_for_zero_shot(tmp_path, monkeypatch):
    """FACTS: lower case, `. ! " ( ) * # : ; ~` deleted, the question mark kept."""
    assert clean_question('What IS "this" (here)?  ') == "what is this here?"
    assert clean_question("a b " * 40).count(" ") == 49
    asked, ask = [], Blip2.ask
    monkeypatch.setattr(Blip2, "ask", lambda self, i, q, *a, **k: asked.append(q) or ask(self, i, q, *a, **k))
    (tmp_path / "q.json").write_text(json.dumps([{"image": "0.png", "question": "What IS it?", "answer": ["x"]}]))
    question_file(tmp_path, 1)
    for preset in ("vqa-v1", "vqav2-zeroshot-v1"):
        flags = ["--data", str(tmp_path / "q.json"), "--preset", preset, "--image-size", "64", *PRECISE]
        evaluation.main(["vqa", "--checkpoint", RUN, *flags])
    assert asked == [[["What IS it?"]], [["what is it?"]]]


# --- captions


def test_captions_by_domain_and_for_the_server(tmp_path):
    """NoCaps counts its domains apart; each is scored as a data set of its own."""
    data, out = caption_file(tmp_path), tmp_path / "server.json"
    result = evaluation.main(["captions", "--checkpoint", RUN, "--data", data, "--predictions", str(out), *PRECISE])
    assert list(result["domains"]) == ["in-domain", "near-domain"]
    assert {"BLEU-4", "ROUGE-L", "CIDEr"} <= result["domains"]["in-domain"].keys() and result["ROUGE-L"] > 30
    server = json.loads(out.read_text())  # what the COCO server and pycocoevalcap read
    assert [row["image_id"] for row in server] == [7 * i for i in range(12)]
    assert server[0]["caption"] == list(result["captions"].values())[0]


def test_photos_without_captions_are_told_of_for_the_server(tmp_path):
    """COCO's and NoCaps' test sets; retrieval needs captions, and says so."""
    caption_file(tmp_path, 3)
    images = [{"file_name": f"{i}.png", "id": i} for i in range(3)]
    (tmp_path / "test.json").write_text(json.dumps({"images": images, "info": {}}))
    out, data = tmp_path / "server.json", str(tmp_path / "test.json")
    result = evaluation.main(["captions", "--checkpoint", RUN, "--data", data, "--predictions", str(out), *PRECISE])
    assert "CIDEr" not in result and len(json.loads(out.read_text())) == 3
    with pytest.raises(UserError, match='expected "image" and "caption"'):
        open_photos([data], "test", 64)


def test_photos_of_coco_are_told_by_their_number(tmp_path):
    """The COCO server and pycocoevalcap know no other; LAVIS's files of val and test have no image_id, its train file
    has one of its own."""
    records = [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "a"}]
    records.append({"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "a", "image_id": "coco_17"})
    records.append({"image": "COCO_val2014_000000000007.jpg", "caption": "a", "image_id": 9})
    records.append({"image": "other.jpg", "caption": "a"})
    (tmp_path / "a.json").write_text(json.dumps(records))
    gallery = Gallery(open_photos([str(tmp_path / "a.json")], "test", 64))
    assert [gallery.public_id(photo) for photo in range(4)] == [42, 522418, 9, "other.jpg"]


def test_the_prompt_of_a_run_is_used_by_itself(tmp_path):
    model = stage2_model("opt")
    model.prompt = "a photo of"
    images = model.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert model.caption(images) == model.caption(images, "a photo of") != model.caption(images, "")


# --- resumption, any number of processes


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What was done is not done again, a line that was cut off is; the file is the same as without the interruption."""
    data = caption_file(tmp_path, 150)  # three batches
    flags = ["captions", "--checkpoint", RUN, "--data", data, *PRECISE, "--out"]
    evaluation.main([*flags, str(tmp_path / "whole.json")])
    calls, caption = [], Blip2.caption

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return caption(self, *args, **kwargs)

    monkeypatch.setattr(Blip2, "caption", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([*flags, str(tmp_path / "cut.json")])
    (kept,) = (tmp_path / ".cut.json.partial").glob("*/*.jsonl")
    assert len(kept.read_text().splitlines()) == 1
    with open(kept, "a") as file:
        file.write('{"captions 1": ["a hal')
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # after one more batch, by a process of the same number
        evaluation.main([*flags, str(tmp_path / "cut.json")])
    evaluation.main([*flags, str(tmp_path / "cut.json")])
    assert len(calls) == 3 and not (tmp_path / ".cut.json.partial").exists()
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_what_another_preset_or_split_has_left_is_not_taken(tmp_path):
    said = {"preset": {"num_beams": 5}, "checkpoint": RUN, "data": {"sha256": "1"}}
    other = [
        evaluation.partial_folder("x.json", said | {key: {"sha256": "2"}}) for key in ("preset", "data", "weights")
    ]
    assert len({evaluation.partial_folder("x.json", said), *other}) == 4


def test_what_was_done_on_other_photos_of_the_same_names_is_not_taken(tmp_path, monkeypatch):
    """The control of a README's table: the same annotations, a folder of blank pictures."""
    data, folders = caption_file(tmp_path, 2), []
    (tmp_path / "blank").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"blank/{i}.png")
    monkeypatch.setattr(evaluation, "Kept", lambda folder: (folders.append(folder), Kept(None))[1])
    for images in (tmp_path, tmp_path / "blank"):
        flags = ["--data", data, "--images", str(images), "--out", str(tmp_path / "out.json")]
        evaluation.main(["captions", "--checkpoint", RUN, *flags, *PRECISE])
    assert folders[0] != folders[1]


def test_shares_are_whole_batches_and_cover_all(monkeypatch):
    for count, processes in ((0, 1), (1, 3), (130, 2), (640, 4), (5000, 8)):
        monkeypatch.setattr(tasks, "world", lambda n=processes: (0, n))
        parts = shares(count)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        assert all(part.start % 64 == 0 for part in parts if part.stop > part.start)


def three_results(folder, captions: str, questions: str) -> None:
    model = Blip2.from_pretrained(RUN)
    write_result(folder / "captions.json", captioning(model, open_photos([captions], "val", 64)))
    write_result(folder / "vqa.json", vqa(model, open_photos([questions], "val", 64, questions=True)))
    write_result(folder / "retrieval.json", retrieval(model, open_photos([captions], "val", 64), k=5))


def test_two_processes_write_the_file_of_one(tmp_path):
    """Batches are formed before they are spread over the processes, in fp32: the same bytes."""
    captions, questions = caption_file(tmp_path, 70), question_file(tmp_path, 70)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    three_results(tmp_path / "one", captions, questions)
    run_many(2, two_processes, tmp_path / "two", captions, questions)
    for name in ("captions.json", "vqa.json", "retrieval.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def two_processes(rank, folder, captions, questions):
    """All processes evaluate, the first writes."""
    if rank > 0:
        global write_result
        write_result = lambda *_: None  # noqa: E731
    three_results(folder, captions, questions)


def test_kept_without_a_folder_keeps_nothing():
    kept = Kept(None)
    kept.add("x 0", [1])
    assert kept.done == {"x 0": [1]} and kept.folder is None


# --- features


def test_features_are_what_the_calls_give(tmp_path):
    """Named by what they are; of a model with a language model no projected ones, which nothing has trained since."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        ShapesWorld("val").picture(i).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "texts.txt").write_text("a red star\ntwo circles\n")
    out = tmp_path / "f.safetensors"
    evaluation.main(
        ["features", "--checkpoint", RUN, "--images", str(tmp_path / "photos"), "--out", str(out), *PRECISE]
    )
    model = Blip2.from_pretrained(RUN)
    encoded = model.encode_image([tmp_path / f"photos/{i}.png" for i in range(3)])
    with safe_open(out, "pt") as file:
        assert list(file.keys()) == ["image_query_outputs"] and json.loads(file.metadata()["images"])[0] == "0.png"
        torch.testing.assert_close(file.get_tensor("image_query_outputs"), encoded.query_out)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            "vqa --data shapes",
            "eval.py vqa needs --data with questions; for the shapes world use: python eval.py answers",
        ),
        ("vqa --data CAPTIONS", "has ['caption', 'domain', 'image', 'image_id'], expected \"image\" and \"question\""),
        ("captions --data CAPTIONS --beams 0", "got --beams 0, expected at least 1"),
        ("captions --data nowhere.json", "--data nowhere.json does not exist: expected a .json or .jsonl file"),
        ("captions --split nonsense", "got --split nonsense of the shapes world, expected train, val, test"),
        ("captions --data CAPTIONS --out FOLDER", "is a folder: pass the name of a file in it"),
        (
            "vqa --data QUESTIONS --template hello",
            "got the template 'hello', expected {} in it, where the question goes",
        ),
        ("vqa --data QUESTIONS --candidates CAPTIONS", "is no list of answers: expected"),
        ("retrieval --data CAPTIONS", "has a language model, for which its queries were trained since"),
        ("features --images FOLDER --texts nowhere.txt --out f.safetensors", "nowhere.txt does not exist"),
        ("features --images FOLDER --texts CAPTIONS --out f.safetensors", "texts have features in a run of stage 1"),
        (
            "captions --data CAPTIONS --predictions nowhere/p.json",
            "--predictions nowhere/p.json: the folder nowhere does",
        ),
        ("features --images nowhere --out f.safetensors", "nowhere has no pictures in it, expected a folder of files"),
    ],
)
def test_wrong_flags_get_a_sentence(tmp_path, flags, sentence):
    for name, path in (("CAPTIONS", caption_file(tmp_path, 2)), ("QUESTIONS", question_file(tmp_path, 2))):
        flags = flags.replace(name, path)
    with pytest.raises(UserError) as error:
        evaluation.main([*flags.replace("FOLDER", str(tmp_path)).split(), "--checkpoint", RUN])
    assert sentence in str(error.value)


def test_daquar_is_read_as_it_is(tmp_path):
    """A file in the layout of LAVIS: any of the answers counts, because there are fewer than ten."""
    records = json.loads(shared("data/daquar/val.json").read_text())[:6]
    folder = shared("data/daquar")
    (tmp_path / "a.json").write_text(json.dumps(records))
    photos = open_photos([str(tmp_path / "a.json")], "val", 64, [str(folder)], questions=True)
    result = vqa(Blip2.from_pretrained(RUN), photos)
    assert result["metric"] == "any" and len(result["predictions"]) == 6
