# ruff: noqa: E501 (the layouts are written as they are published)
"""Annotation files as published become records of this project; what is wrong with a file is told before a long run."""

import json

import pytest
from PIL import Image

import data
import layouts
from data import Annotations, UserError
from layouts import open_records

QUESTION = {"image_id": 42, "question": "What is it?", "question_id": 420}
VQA = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
ANSWERS = [
    {"answer": word, "answer_confidence": "yes", "answer_id": i + 1} for i, word in enumerate(["dog"] * 9 + ["cat"])
]
NOTE = {"question_type": "what is", "multiple_choice_answer": "dog", "answers": ANSWERS, "image_id": 42,
        "answer_type": "other", "question_id": 420}  # fmt: skip
ASKED = {"image": "COCO_val2014_000000000042.jpg", **QUESTION}

# The published layouts, in small: (name of the file, its content, [its second file], the first record that comes of it).
FILES = {
    "COCO captions": (
        "captions_val2014.json",
        {
            "info": {}, "licenses": [],
            "images": [{"license": 3, "file_name": "COCO_val2014_000000000042.jpg", "coco_url": "u", "height": 4, "width": 6,
                        "date_captured": "d", "flickr_url": "f", "id": 42}],
            "annotations": [{"image_id": 42, "id": 1, "caption": "A dog.\n"}, {"image_id": 42, "id": 2, "caption": "A cat"}],
        },
        None,
        {"image": "COCO_val2014_000000000042.jpg", "image_id": 42, "caption": ["A dog.", "A cat"]},
    ),
    "NoCaps": (
        "nocaps_val_4500_captions.json",
        {
            "licenses": [], "info": {},
            "images": [{"id": 0, "open_images_id": "0013ea2087020901", "license": 0, "height": 1024, "width": 732,
                        "coco_url": "https://s3/val/0013ea2087020901.jpg", "date_captured": "d",
                        "file_name": "0013ea2087020901.jpg", "domain": "near-domain"}],
            "annotations": [{"image_id": 0, "id": 0, "caption": "A baby"}],
        },
        None,
        {"image": "0013ea2087020901.jpg", "image_id": 0, "caption": ["A baby"], "domain": "near-domain"},
    ),
    "Karpathy": (
        "dataset_coco.json",
        {"images": [
            {"filepath": "val2014", "sentids": [1], "filename": "a.jpg", "imgid": 0, "split": "restval", "cocoid": 42,
             "sentences": [{"tokens": ["a", "dog"], "raw": "A dog", "imgid": 0, "sentid": 1}]},
            {"filepath": "val2014", "filename": "b.jpg", "imgid": 1, "split": "test", "cocoid": 43, "sentences": []}],
         "dataset": "coco"},
        None,
        {"image": "val2014/a.jpg", "caption": ["A dog"], "image_id": 42},
    ),
    "LAVIS' Karpathy": (
        "coco_karpathy_train.json",
        [{"caption": "A dog", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}],
        None,
        {"caption": ["A dog"], "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
    ),
    "VQAv2": (
        "v2_OpenEnded_mscoco_val2014_questions.json", {**VQA, "questions": [QUESTION]},
        {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}, "annotations": [NOTE]},
        {**ASKED, "answer": ["dog"] * 9 + ["cat"], "question_type": "what is", "answer_type": "other"},
    ),
    "VQAv2 test": (
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {**VQA, "data_subtype": "test-dev2015", "questions": [QUESTION]}, None,
        {**ASKED, "image": "COCO_test2015_000000000042.jpg"},
    ),
    "OK-VQA": (
        "OpenEnded_mscoco_val2014_questions.json", {**VQA, "questions": [QUESTION]},
        {"annotations": [{"image_id": 42, "answer_type": "other", "question_type": "one", "question_id": 420, "confidence": 3,
                          "answers": [{"answer_id": 1, "raw_answer": "dogs", "answer_confidence": "yes", "answer": "dog"}]}]},
        {**ASKED, "answer": ["dog"], "question_type": "one", "answer_type": "other"},
    ),
    "GQA": (
        "testdev_balanced_questions.json",
        {"201307251": {"semantic": [], "entailed": [], "equivalent": ["201307251"], "question": "Is it red?",
                       "imageId": "n161313", "isBalanced": True, "groups": {"global": None, "local": "l"}, "answer": "no",
                       "semanticStr": "s", "annotations": {}, "types": {"detailed": "d", "semantic": "attr",
                                                                        "structural": "verify"}, "fullAnswer": "No."}},
        None,
        {"image": "n161313.jpg", "image_id": "n161313", "question": "Is it red?", "question_id": "201307251", "answer": ["no"],
         "question_type": "verify"},
    ),
    "A-OKVQA": (
        "aokvqa_v1p0_val.json",
        [{"split": "val", "image_id": 42, "question_id": "22jbM6", "question": "What?", "choices": ["a", "b", "c", "d"],
          "correct_choice_idx": 1, "direct_answers": ["b"] * 10, "difficult_direct_answer": False, "rationales": ["r"]}],
        None,
        {"image": "000000000042.jpg", "image_id": 42, "question": "What?", "question_id": "22jbM6", "answer": ["b"] * 10,
         "choices": ["a", "b", "c", "d"]},
    ),
    "Visual Genome regions": (
        "region_descriptions.json",
        [{"regions": [{"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green", "y": 57,
                       "x": 421}], "id": 1}],
        None,
        {"image": "1.jpg", "caption": ["the clock is green"], "image_id": 1},
    ),
    "Visual Genome questions": (
        "question_answers.json",
        [{"id": 1, "qas": [{"a_objects": [], "question": "What color?", "image_id": 1, "qa_id": 986768, "answer": "Green.",
                            "q_objects": []}]}],
        None,
        {"image": "1.jpg", "image_id": 1, "question": "What color?", "question_id": 986768, "answer": ["green"]},
    ),
    "LAVIS' VQA": (
        "vqa_val.json",
        [{"image": "a.jpg", "question": "What?", "question_id": 1, "answer": ["dog"] * 10, "dataset": "vqa"}], None,
        {"image": "a.jpg", "question": "What?", "question_id": 1, "answer": ["dog"] * 10, "dataset": "vqa"},
    ),
    "Flickr30k tokens": (
        "results_20130124.token", "1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo men .\n", None,
        {"image": "1000092795.jpg", "caption": ["Two young guys .", "Two men ."]},
    ),
    "Flickr30k csv": (
        "results.csv", "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys .\n1000092795.jpg| 1| Two .\n",
        None,
        {"image": "1000092795.jpg", "caption": ["Two young guys .", "Two ."]},
    ),
}  # fmt: skip


def write(folder, name: str, content) -> str:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_becomes_records(name, tmp_path, capsys):
    file, content, second, record = FILES[name]
    paths = [write(tmp_path, file, content)] + ([write(tmp_path, "second.json", second)] if second else [])
    assert open_records(*paths[:1], annotations=paths[1] if second else None)[1][0] == record
    data.main(["convert", *paths, "--out", f"{tmp_path}/out.json"])
    assert json.loads((tmp_path / "out.json").read_text())[0] == record
    assert "1 photos, " in capsys.readouterr().out
    asks = "question" in record
    opened = Annotations(tmp_path / "out.json", questions=asks)  # what is converted opens
    again = Annotations(paths[0], questions=asks) if not second else opened  # and so does a single file as it is
    assert opened.record(0) == again.record(0)


def test_tables_keep_the_line_ends_and_bars_in_their_captions(tmp_path):
    table = write(tmp_path, "a.csv", 'image,caption\na.jpg,"a dog\nthat runs"\nb.jpg,a | 3 cats\n')
    assert [record["caption"] for record in open_records(table)[1]] == [["a dog\nthat runs"], ["a | 3 cats"]]


@pytest.mark.parametrize(
    "content, second, sentence",
    [
        ({"annotations": [NOTE]}, None, "holds answers without their questions: type python data.py convert QUESTIONS"),
        (
            {**VQA, "questions": [QUESTION]},
            {"annotations": [{**NOTE, "question_id": 7}]},
            "1 of 1 questions have no answers in the second file, and 1 of its 1 answers no question",
        ),
        ({"images": [{"id": 1}]}, None, "holds an object with ['images'], images of ['id'], expected a list of"),
        ([], None, "holds nothing, expected a list of"),
        ([1], None, 'is a list: record 0 has int, expected "image" and "caption"'),
        ([{"image": "a.jpg", "caption": "x"}], {"annotations": []}, "do not belong together"),
        (
            {**VQA, "questions": [{"question_id": 1, "question": "?"}]},
            None,
            "but an entry is not as published (KeyError",
        ),
    ],
)
def test_what_fits_no_layout_gets_a_sentence(content, second, sentence, tmp_path):
    paths = [write(tmp_path, "a.json", content)] + ([write(tmp_path, "b.json", second)] if second else [])
    with pytest.raises(UserError) as error:
        data.main(["convert", *paths, "--out", f"{tmp_path}/out.json"])
    assert sentence in str(error.value) and not (tmp_path / "out.json").exists()


def checked(*args, capsys) -> tuple[int, str]:
    status = 0
    try:
        data.main(["check", *map(str, args), "--workers", "0"])
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out


def test_check_tells_what_is_wrong_before_a_long_run(tmp_path, capsys):
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("copy.png", "red")):
        Image.new("RGB", (20, 20), color).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    good = {"image": "b.png", "caption": ["a blue square"]}
    records = [
        {"image": "a.png", "caption": ["a square"]}, good, good, {"image": "copy.png", "caption": ["a red star " * 20]},
        {"image": "broken.png", "caption": [" . "]}, {"image": "nowhere.png", "caption": ["a dog"]},
        {"image": "b.png", "question": "what?"},
    ]  # fmt: skip
    train, val = write(tmp_path, "train.json", records), write(tmp_path, "val.json", [good])
    status, out = checked(train, val, "--bert", "assets/tiny/bert", capsys=capsys)
    assert status == 1 and "a list of records, 7 records, 5 photos in" in out
    for line in (
        "photos that cannot be read: 2", "broken.png is ", "nowhere.png cannot be read (No such file or directory)",
        "photos that are there twice: 1", "copy.png is the same picture as ", "with an empty text: 1",
        "records that are there twice: 1", "without an answer: 1", "texts that are cut at 32 tokens (--max-text-tokens): 1",
        f"photos of {train}, fine unless one is to train and one to test: 1", "8 problems",
    ):  # fmt: skip
        assert line in out, line
    code, out = checked(val, capsys=capsys)
    assert code == 0 and out.endswith(f"{val}: a list of records, 1 records, 1 photos in {tmp_path}\nfine\n")
    assert out.startswith("the lengths of texts are not checked: add --bert FOLDER")


def test_lines_come_one_by_one_and_mean_what_the_whole_file_means(tmp_path, monkeypatch):
    """Of JSON lines with records of ours not all are in memory; other layouts, and what is wrong, are told as ever."""
    good = [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": ["two"], "img_id": 5}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, good)))
    assert list(layouts.stream_records(path)) == layouts.open_records(path)[1]
    monkeypatch.setattr(layouts, "read_content", None)  # which reads a file whole
    assert len(list(layouts.stream_records(path))) == 2
    bad = {"image": "a.jpg", "question": "q", "answers": [{"confidence": "yes"}]}
    path.write_text("\n".join(map(json.dumps, [*good, bad])))
    with pytest.raises(UserError, match="looks like a list of records, but an entry is not as published"):
        list(layouts.stream_records(path))
    path.write_text('{"image": "a.jpg", "caption": "one"}\n\n{"image": oops}\n')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        list(layouts.stream_records(path))
