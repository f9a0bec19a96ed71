"""Annotation files as data sets publish them -> the records of this project.

A record is of one photo with its captions, or of one question:

    {"image": "a.jpg", "caption": ["...", ...], "image_id": ...}
    {"image": "a.jpg", "question": "...", "question_id": ..., "answer": ["...", ...], "image_id": ...}

and where the source has them "question_type", "answer_type", "choices", and NoCaps' "domain". A test file without
answers gives records without "answer". `LAYOUTS` lists what is known; which one a file has is seen from its content.
"""

import csv
import io
import json
import os
import re
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. Its sentence says what was got, what was expected, what to type."""


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path):
    """What may happen to a text file is a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): expected an annotation file, unpacked") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected an annotation file") from None


def read_text(path: Path) -> str:
    """A text file, without the mark that some editors put in front."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: Path):
    """The content of a JSON file, or a sentence about why not."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): write it again, or name it .jsonl if it has one record a line"
        ) from None


def read_json_lines(path: Path):
    """The values of a JSON lines file, one after another."""
    with reading(path), open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: line {number} is not JSON ({error.msg}): expected one record a line"
                ) from None


def read_content(path: Path):
    """What an annotation file holds: of .json and .jsonl the values, of any other file its text."""
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    return list(read_json_lines(path)) if path.suffix == ".jsonl" else read_text(path)


# --- captions --------------------------------------------------------------------------------------------------------


def karpathy(content, path, split, answers):
    """Karpathy's splits of COCO and Flickr: those of one split; "restval" is COCO's, by custom for training."""
    wanted = {"train", "restval"} if split == "train" else {split}
    records = [
        {
            "image": os.path.join(image.get("filepath", ""), image["filename"]),
            "caption": [sentence.get("raw", "") for sentence in image["sentences"]],
            "image_id": image.get("cocoid", image.get("imgid")),
        }
        for image in content["images"]
        if image.get("split", split) in wanted
    ]
    if not records:
        there = ", ".join(sorted({image["split"] for image in content["images"]}))
        raise UserError(
            f"{path} has no photo of the split {split}, only of {there}: pass another file, or eval.py another --split"
        )
    return records


def coco(content, path, split, answers):
    """COCO's caption files and NoCaps': photos here, captions there. A test file's photos have no captions."""
    captions = {image["id"]: [] for image in content["images"]}
    strays = [a["image_id"] for a in content.get("annotations", []) if a["image_id"] not in captions]
    if strays:
        raise UserError(
            f"{path}: {len(strays)} captions are of an image_id that none of its images has, the first {strays[0]!r}: "
            "download the file again"
        )
    for annotation in content.get("annotations", []):
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    return [
        {"image": image["file_name"], "image_id": image["id"]}
        | ({"caption": captions[image["id"]]} if captions[image["id"]] else {})
        | ({"domain": image["domain"]} if "domain" in image else {})
        for image in content["images"]
    ]


def regions(content, path, split, answers):
    """Visual Genome's region descriptions: all phrases about a photo are its captions."""
    return [
        {"image": f"{key}.jpg", "caption": [region["phrase"].strip() for region in photo["regions"]], "image_id": key}
        for photo in content
        if photo["regions"]  # else nobody described it
        for key in [photo["regions"][0].get("image_id", photo.get("id"))]
    ]


FLICKR_LINE = re.compile(r"(?P<image>\S+)#\d+\t(?P<caption>.*)")
FLICKR_ROW = re.compile(
    r"(?P<image>[^|\n]+)\|\s*\d+\s*\|?\s*(?P<caption>.*)"
)  # a row of the real file lacks its second |


def flickr(content, path, split, answers):
    """Flickr's token file (name#number, tab, caption) or results.csv (name| number| caption): captions of a photo."""
    lines = [line for line in content.split("\n") if line.strip()]
    pattern = FLICKR_LINE if FLICKR_LINE.match(lines[0]) else FLICKR_ROW
    captions = {}
    for number, line in enumerate(lines):
        found = pattern.match(line)
        if found:
            captions.setdefault(found["image"].strip(), []).append(found["caption"].strip())
        elif number:  # results.csv has a header
            raise UserError(f"{path}: line {number + 1} is {line[:60]!r}, expected a photo, a number and a caption")
    return [{"image": image, "caption": texts} for image, texts in captions.items()]


# --- questions -------------------------------------------------------------------------------------------------------


def vqa(content, path, split, answers):
    """VQAv2 and OK-VQA: questions here, answers in a second file; test files have questions only."""
    if content.get("data_type", "mscoco") != "mscoco":
        raise UserError(
            f"{path} is about {content['data_type']} pictures, expected mscoco: use the files of real photos"
        )
    where = content.get("data_subtype") or "".join(re.findall(r"(?:train|val|test)20\d\d", Path(path).name)[:1])
    if not where:
        raise UserError(f'{path} does not say which photos it is about: write "data_subtype": "train2014" into it')
    where = where.replace("test-dev", "test")  # its questions are about photos of the whole test set
    records = [
        {
            "image": f"COCO_{where}_{int(question['image_id']):012}.jpg",
            "image_id": question["image_id"],
            "question": question["question"],
            "question_id": question["question_id"],
        }
        for question in content["questions"]
    ]
    if answers is None:
        return records
    found = {annotation["question_id"]: annotation for annotation in answers["annotations"]}
    open_, asked = (
        [r["question_id"] for r in records if r["question_id"] not in found],
        {r["question_id"] for r in records},
    )
    strays = [key for key in found if key not in asked]
    if open_ or strays:
        raise UserError(
            f"{path}: {len(open_)} of {len(records)} questions have no answers in the second file, and "
            f"{len(strays)} of its {len(found)} answers no question, the first question_id {(open_ + strays)[0]!r}: "
            "pass the questions and the annotations of the same split"
        )
    return [record | answered(found[record["question_id"]]) for record in records]


def answered(entry: dict) -> dict:
    """The answers of an entry, whatever they are called there, and its types; nothing where it has none."""
    answer = entry.get("answer", entry.get("direct_answers"))
    if "answers" in entry:
        answer = [a["answer"] if isinstance(a, dict) else a for a in entry["answers"]]
    elif answer is None and entry.get("correct_choice_idx") is not None:
        answer = entry["choices"][entry["correct_choice_idx"]]
    answer = [answer] if isinstance(answer, str) else answer
    types = {key: entry[key] for key in ("question_type", "answer_type", "choices") if key in entry}
    return types | ({} if answer is None else {"answer": answer})


def gqa(content, path, split, answers):
    """GQA: an object of questions by their id. The type is the structural one: query, verify, choose, ..."""
    return [
        {
            "image": f"{entry['imageId']}.jpg",
            "image_id": entry["imageId"],
            "question": entry["question"],
            "question_id": key,
            **answered(entry),
            **({"question_type": entry["types"]["structural"]} if "types" in entry else {}),
        }
        for key, entry in content.items()
    ]


def aokvqa(content, path, split, answers):
    """A-OKVQA, about COCO's photos by the names of 2017."""
    return [
        {
            "image": entry.get("image") or f"{int(entry['image_id']):012}.jpg",
            **{key: entry[key] for key in ("image_id", "question", "question_id") if key in entry},
            **answered(entry),
        }
        for entry in content
    ]


def genome_questions(content, path, split, answers):
    """Visual Genome's questions, by photo. Their answers are sentences, "Green.", where VQAv2 has "green": as that."""
    return [
        {
            "image": f"{qa.get('image_id', photo.get('id'))}.jpg",
            "image_id": qa.get("image_id", photo.get("id")),
            "question": qa["question"],
            "question_id": qa["qa_id"],
            "answer": [qa["answer"].strip().removesuffix(".").lower()],
        }
        for photo in content
        for qa in photo["qas"]
    ]


# --- records as they are ---------------------------------------------------------------------------------------------


def plain(content, path, split, answers):
    """Records already, ours or LAVIS': only one caption or answer becomes a list of one, and VizWiz' answers ours."""
    return map(tidy, content)


def tidy(record):
    """One of them; what is no object stays as it is, to be told."""
    if not isinstance(record, dict):
        return record
    record = {("image_id" if key == "img_id" else key): value for key, value in record.items()}  # LAVIS' NoCaps
    if isinstance(record.get("caption"), str):
        record["caption"] = [record["caption"]]
    if isinstance(record.get("answer"), str):
        record["answer"] = [record["answer"]]
    if "answer" not in record and isinstance(record.get("answers"), list):
        record |= answered(record)
        del record["answers"]
    return record


def table(content, path, split, answers):
    """A table with a header: a row is a record."""
    header = content.split("\n", 1)[0]
    rows = io.StringIO(content, newline="")  # a quoted cell may hold line ends
    rows = csv.DictReader(rows, delimiter="\t" if "\t" in header else ",", skipinitialspace=True)
    return [tidy({key: value for key, value in row.items() if key and value}) for row in rows]


# --- which layout it is ----------------------------------------------------------------------------------------------


def has(value, *keys: str) -> bool:
    """Whether it is an object, or a list that starts with one, with these keys."""
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, dict) and set(keys) <= set(value)


def table_has(content, *words: str) -> bool:
    """Whether it is a text whose first line names one of the columns beside "image"."""
    columns = re.split(r"[,\t]\s*", content.split("\n", 1)[0].strip()) if isinstance(content, str) else []
    return "image" in columns and any(word in columns for word in words)


def is_gqa(content) -> bool:
    """An object of objects with imageId."""
    return isinstance(content, dict) and has(next(iter(content.values()), None), "imageId", "question")


def is_coco(content) -> bool:
    """Photos, and captions or nothing: an instances_*.json, of boxes, is no caption file."""
    notes = content.get("annotations") if isinstance(content, dict) else None
    return has(content, "images") and has(content["images"], "file_name", "id") and (not notes or has(notes, "caption"))


LAYOUTS = {  # name: (does it fit, its records); the first that fits is taken
    "Karpathy's dataset_*.json": (lambda c: has(c, "images") and has(c["images"], "filename", "sentences"), karpathy),
    "COCO or NoCaps captions": (is_coco, coco),
    "VQAv2 or OK-VQA questions": (lambda c: isinstance(c, dict) and has(c.get("questions"), "question_id"), vqa),
    "GQA questions": (is_gqa, gqa),
    "Visual Genome regions": (lambda c: isinstance(c, list) and has(c, "regions"), regions),
    "Visual Genome questions": (lambda c: isinstance(c, list) and has(c, "qas"), genome_questions),
    "A-OKVQA": (lambda c: isinstance(c, list) and (has(c, "direct_answers") or has(c, "choices", "question")), aokvqa),
    "Flickr captions": (
        lambda c: (
            isinstance(c, str) and bool(FLICKR_LINE.match(c) or c.startswith("image_name|") or FLICKR_ROW.match(c))
        ),
        flickr,
    ),
    "a table of records": (lambda c: table_has(c, "caption", "question"), table),
    "a list of records": (lambda c: isinstance(c, list) and has(c, "image"), plain),
}


def layout_of(content) -> str | None:
    """Its name."""
    return next((name for name, (fits, _) in LAYOUTS.items() if content and fits(content)), None)


@contextmanager
def as_published(path: Path, name: str):
    """An entry that is not, inside, is a sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} looks like {name}, but an entry is not as published ({type(error).__name__}: {error}): "
            "download the file again"
        ) from None


def records_of(content, path: Path, split: str = "train", annotations=None) -> tuple[str, list[dict]]:
    """(name of the layout, records) of a file's content; `annotations`: that of VQA's second file, with the answers."""
    if isinstance(annotations, dict) and has(annotations.get("questions"), "question_id"):
        content, annotations = annotations, content  # given the other way round
    answers_only = (
        isinstance(content, dict) and "questions" not in content and has(content.get("annotations"), "answers")
    )
    if answers_only:
        raise UserError(
            f"{path} holds answers without their questions: type python data.py convert QUESTIONS {path} --out FILE"
        )
    name = layout_of(content)
    if name is None:
        raise UserError(f"{path} {describe(content)}, or one of the layouts {', '.join(list(LAYOUTS)[:-1])}")
    if annotations is not None and (LAYOUTS[name][1] is not vqa or not has(annotations, "annotations")):
        raise UserError(
            f"{path} ({name}) and a second file do not belong together: only VQA's *_questions.json goes with a second "
            "file, its *_annotations.json"
        )
    with as_published(path, name):
        records = list(LAYOUTS[name][1](content, path, split, annotations))
    if not records:
        raise UserError(f"{path} ({name}) has no record: expected at least one")
    return name, records


def describe(content) -> str:
    """What a file holds that fits no layout, and what was expected."""
    records = 'expected a list of {"image": ..., "caption": ...} or {"image": ..., "question": ..., "answer": ...}'
    if not content:
        return f"holds nothing, {records}"
    if isinstance(content, list):
        got = sorted(content[0])[:8] if isinstance(content[0], dict) else type(content[0]).__name__
        return f'is a list: record 0 has {got}, expected "image" and "caption", or "image", "question" and "answer"'
    if isinstance(content, str):
        return f"is text that starts with {content[:40]!r}, expected a header with image and caption"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, {records}"
    inner = [
        f", {key} of {sorted(value[0])[:8]}"
        for key, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return f"holds an object with {sorted(content)[:5]}{''.join(inner)}, {records}"


def open_records(path: Path, split: str = "train", annotations: Path | None = None) -> tuple[str, list[dict]]:
    """(name of the layout, records) of a file, or of VQA's two."""
    return records_of(read_content(path), path, split, None if annotations is None else read_content(annotations))


def stream_records(path: Path, split: str = "train"):
    """The records of a file, one after another. Of JSON lines that are records already only one is in memory at a time,
    so that any number of them fits."""
    lines = read_json_lines(path) if path.suffix == ".jsonl" else iter(())
    first = list(islice(lines, 1))
    if layout_of(first) == "a list of records":
        with as_published(path, "a list of records"):
            yield from plain(chain(first, lines), path, split, None)
    else:
        yield from open_records(path, split)[1]
