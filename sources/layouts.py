"""Annotation files as data sets publish them -> the records of this project.

A record is one image with its captions, or one question:

    {"image": "a.jpg", "caption": ["...", ...], "image_id": ...}
    {"image": "a.jpg", "question": "...", "question_id": ..., "answer": ["...", ...], "image_id": ...}

and where the source has them "question_type", "answer_type", "choices", and NoCaps' "domain". A test file without
answers gives records without "answer". `LAYOUTS` lists the known layouts; the content of a file says which it has.
"""

import csv
import io
import os
import re
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from engine.errors import UserError, expect, read_json, read_json_lines, read_text


def read_content(path: str | Path):
    """Values of a .json or .jsonl file, the text of any other."""
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    return list(read_json_lines(path)) if path.suffix == ".jsonl" else read_text(path)


# --- captions --------------------------------------------------------------------------------------------------------


def karpathy(content, path, split, answers):
    """One split of Karpathy's COCO and Flickr files; COCO's "restval" is by custom used for training."""
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
    there = ", ".join(sorted({image["split"] for image in content["images"] if "split" in image}))
    expect(records, f"{path} has no image of the split {split}, only of {there}: pass another file, or eval.py --split")
    return records


def coco(content, path, split, answers):
    """COCO and NoCaps captions: a list of images and a list of captions. Images of a test file have no captions."""
    captions, notes = {image["id"]: [] for image in content["images"]}, content.get("annotations", [])
    strays = [note["image_id"] for note in notes if note["image_id"] not in captions]
    expect(not strays, f"{path}: {len(strays)} captions have an image_id of no image, {strays[:3]}: download it again")
    for note in notes:
        captions[note["image_id"]].append(note["caption"].strip())
    return [
        {"image": image["file_name"], "image_id": image["id"]}
        | ({"caption": captions[image["id"]]} if captions[image["id"]] else {})
        | ({"domain": image["domain"]} if "domain" in image else {})
        for image in content["images"]
    ]


def regions(content, path, split, answers):
    """Visual Genome's region descriptions: all phrases of an image are its captions."""
    return [
        {"image": f"{key}.jpg", "caption": [region["phrase"].strip() for region in image["regions"]], "image_id": key}
        for image in content
        if image["regions"]  # else it has no description
        for key in [image["regions"][0].get("image_id", image.get("id"))]
    ]


FLICKR_LINE = re.compile(r"(?P<image>\S+)#\d+\t(?P<caption>.*)")
# A row of the real file lacks its second |.
FLICKR_ROW = re.compile(r"(?P<image>[^|\n]+)\|\s*\d+\s*\|?\s*(?P<caption>.*)")


def flickr(content, path, split, answers):
    """Flickr's token file (name#number, tab, caption) or results.csv (name| number| caption)."""
    lines = [line for line in content.split("\n") if line.strip()]
    pattern = FLICKR_LINE if FLICKR_LINE.match(lines[0]) else FLICKR_ROW
    captions = {}
    for number, line in enumerate(lines):
        if found := pattern.match(line):
            captions.setdefault(found["image"].strip(), []).append(found["caption"].strip())
        elif number:  # results.csv has a header
            raise UserError(f"{path}: line {number + 1} is {line[:60]!r}, expected an image, a number and a caption")
    return [{"image": image, "caption": texts} for image, texts in captions.items()]


# --- questions -------------------------------------------------------------------------------------------------------


def vqa(content, path, split, answers):
    """VQAv2 and OK-VQA: questions, with their answers in a second file; test files have questions only."""
    kind = content.get("data_type", "mscoco")
    expect(kind == "mscoco", f"{path} has questions about {kind} images, expected mscoco: use the files of real images")
    where = content.get("data_subtype") or "".join(re.findall(r"(?:train|val|test)20\d\d", Path(path).name)[:1])
    expect(where, f'{path} does not name its images: write "data_subtype": "train2014" into it')
    where = where.replace("test-dev", "test")  # its questions use images of the whole test set
    records = [
        {"image": f"COCO_{where}_{int(asked['image_id']):012}.jpg"}
        | {key: asked[key] for key in ("image_id", "question", "question_id")}
        for asked in content["questions"]
    ]
    if answers is None:
        return records
    found = {annotation["question_id"]: annotation for annotation in answers["annotations"]}
    asked = {record["question_id"] for record in records}
    unanswered, strays = [key for key in asked if key not in found], [key for key in found if key not in asked]
    expect(
        not unanswered and not strays,
        f"{path}: {len(unanswered)} of {len(records)} questions have no answers in the second file, and {len(strays)} "
        f"of its {len(found)} answers no question, the first question_ids {(unanswered + strays)[:3]}: "
        "pass the questions and the annotations of the same split",
    )
    return [record | answered(found[record["question_id"]]) for record in records]


def answered(entry: dict) -> dict:
    """The answers of an entry, by any of their names, and its types; no "answer" where it has none."""
    answer = entry.get("answer", entry.get("direct_answers"))
    if "answers" in entry:
        answer = [a["answer"] if isinstance(a, dict) else a for a in entry["answers"]]
    elif answer is None and entry.get("correct_choice_idx") is not None:
        answer = entry["choices"][entry["correct_choice_idx"]]
    answer = [answer] if isinstance(answer, str) else answer
    types = {key: entry[key] for key in ("question_type", "answer_type", "choices") if key in entry}
    return types | ({} if answer is None else {"answer": answer})


def gqa(content, path, split, answers):
    """GQA: questions by their id. The type is the structural one: query, verify, choose, ..."""
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
    """A-OKVQA, over COCO's images by their names of 2017."""
    return [
        {
            "image": entry.get("image") or f"{int(entry['image_id']):012}.jpg",
            **{key: entry[key] for key in ("image_id", "question", "question_id") if key in entry},
            **answered(entry),
        }
        for entry in content
    ]


def genome_questions(content, path, split, answers):
    """Visual Genome's questions, by image. An answer like "Green." becomes "green", as VQAv2 writes it."""
    return [
        {
            "image": f"{qa.get('image_id', image.get('id'))}.jpg",
            "image_id": qa.get("image_id", image.get("id")),
            "question": qa["question"],
            "question_id": qa["qa_id"],
            "answer": [qa["answer"].strip().removesuffix(".").lower()],
        }
        for image in content
        for qa in image["qas"]
    ]


# --- records ---------------------------------------------------------------------------------------------------------


def plain(content, path, split, answers):
    """Records of this project, LAVIS or VizWiz; a single caption or answer becomes a list."""
    return map(tidy, content)


def tidy(record):
    """One record; non-objects pass through and are reported later."""
    if not isinstance(record, dict):
        return record
    record = {("image_id" if key == "img_id" else key): value for key, value in record.items()}  # LAVIS's NoCaps
    if "answer" not in record and isinstance(record.get("answers"), list):
        record |= answered(record)
        del record["answers"]
    return record | {key: [record[key]] for key in ("caption", "answer") if isinstance(record.get(key), str)}


def table(content, path, split, answers):
    """A table with a header, one record a row."""
    header = content.split("\n", 1)[0]
    lines = io.StringIO(content, newline="")  # a quoted cell may hold line ends
    rows = csv.DictReader(lines, delimiter="\t" if "\t" in header else ",", skipinitialspace=True)
    return [tidy({key: value for key, value in row.items() if key and value}) for row in rows]


# --- which layout it is ----------------------------------------------------------------------------------------------


def has(value, *keys: str) -> bool:
    """Is it an object, or a list that starts with one, with these keys?"""
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, dict) and set(keys) <= set(value)


def is_table(content) -> bool:
    """A text whose first line names the columns."""
    columns = re.split(r"[,\t]\s*", content.split("\n", 1)[0].strip()) if isinstance(content, str) else []
    return "image" in columns and ("caption" in columns or "question" in columns)


def is_gqa(content) -> bool:
    """An object of objects with imageId."""
    return isinstance(content, dict) and has(next(iter(content.values()), None), "imageId", "question")


def is_coco(content) -> bool:
    """Images, and captions or nothing: an instances_*.json, which has boxes, is no caption file."""
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
        lambda c: isinstance(c, str) and (FLICKR_LINE.match(c) or FLICKR_ROW.match(c) or c.startswith("image_name|")),
        flickr,
    ),
    "a table of records": (is_table, table),
    "a list of records": (lambda c: isinstance(c, list) and has(c, "image"), plain),
}


def layout_of(content) -> str | None:
    """Name of the first layout that fits."""
    return next((name for name, (fits, _) in LAYOUTS.items() if content and fits(content)), None)


@contextmanager
def as_published(path: Path, name: str):
    """Report a malformed entry as a UserError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} looks like {name}, but an entry is not as published ({type(error).__name__}: {error}): "
            "download the file again"
        ) from None


def open_records(path: Path, split: str = "train", annotations: Path | None = None) -> tuple[str, list[dict]]:
    """(name of the layout, records) of a file, or of VQA's two files, in either order."""
    content, answers = read_content(path), annotations and read_content(annotations)
    if isinstance(answers, dict) and has(answers.get("questions"), "question_id"):
        content, answers = answers, content  # given the other way round
    unasked = isinstance(content, dict) and "questions" not in content and has(content.get("annotations"), "answers")
    expect(
        not unasked,
        f"{path} has answers without questions: type python -m tools.data convert QUESTIONS {path} --out FILE",
    )
    name = layout_of(content)
    if name is None:
        raise UserError(f"{path} {describe(content)}, or one of the layouts {', '.join(list(LAYOUTS)[:-1])}")
    expect(
        annotations is None or (LAYOUTS[name][1] is vqa and has(answers, "annotations")),
        f"{path} ({name}) and a second file do not belong together: only VQA's *_questions.json goes with a second "
        "file, its *_annotations.json",
    )
    with as_published(path, name):
        records = list(LAYOUTS[name][1](content, path, split, answers))
    expect(records, f"{path} ({name}) has no record: expected at least one")
    return name, records


def describe(content) -> str:
    """What a file that fits no layout holds, and what was expected."""
    records = 'expected a list of {"image": ..., "caption": ...} or {"image": ..., "question": ..., "answer": ...}'
    if not content:
        return f"holds nothing, {records}"
    if isinstance(content, list):
        got = sorted(content[0])[:8] if isinstance(content[0], dict) else type(content[0]).__name__
        return f'is a list: record 0 has {got}, expected "image" and "caption", or "image", "question" and "answer"'
    if isinstance(content, str):
        return f"is text that starts with {content[:40]!r}, expected a header with image and caption"
    if not isinstance(content, dict):
        return f"holds {content!r:.40}, {records}"
    inner = [
        f", {key} of {sorted(value[0])[:8]}"
        for key, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return f"holds an object with {sorted(content)[:5]}{''.join(inner)}, {records}"


def stream_records(path: Path, split: str = "train"):
    """Yield the records of a file. JSON lines that are records are read one at a time, so that any number fits."""
    lines = read_json_lines(path) if path.suffix == ".jsonl" else iter(())
    first = list(islice(lines, 1))
    if layout_of(first) == "a list of records":
        with as_published(path, "a list of records"):
            yield from plain(chain(first, lines), path, split, None)
    else:
        yield from open_records(path, split)[1]
