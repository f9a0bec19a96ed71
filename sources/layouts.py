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

from engine.distributed import print0
from engine.errors import UserError, expect, shorten
from engine.files import read_json, read_json_lines, read_text
from engine.progress import progress
from sources.images import images_in

LINES = (".jsonl", ".ndjson")


def read_content(path: str | Path):
    """Values of a .json or .jsonl file, the text of any other."""
    kind = Path(path).suffix.lower()
    return read_json(path) if kind == ".json" else list(read_json_lines(path)) if kind in LINES else read_text(path)


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
    expect(
        not strays,
        f"{path}: {len(strays)} captions have an image_id of no image, {shorten(strays[:3])}: download it again",
    )
    for note in notes:
        captions[note["image_id"]].append((note["caption"] or "").strip())
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
        f"of its {len(found)} answers no question, the first question_ids {shorten((unanswered + strays)[:3])}: "
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
    if isinstance(answer, str) and "direct_answers" in entry:  # tables hold the list as Python writes it: "['a', 'b']"
        answer = [one or other for one, other in re.findall(r"""'([^']*)'|"([^"]*)\"""", answer)]
        expect(answer, f"direct_answers is {entry['direct_answers']!r:.40}, expected a list of answers")
    answer = [answer] if isinstance(answer, str) else answer
    kept = ("question_type", "answer_type", "choices", "difficult_direct_answer", "isBalanced")
    types = {key: entry[key] for key in kept if key in entry}
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


ALIASES = {"img_id": "image_id", "file_name": "image", "text": "caption"}  # LAVIS's NoCaps; Hugging Face's folders
VOID = ("", "none", "nan", "<na>", "{}", "[]")  # an image_id that is none, as pandas and json write it


def plain(content, path, split, answers):
    """Records of this project, LAVIS or VizWiz."""
    return content


def tidy(record):
    """One record by its usual names, caption and answer as lists; non-objects pass through and are reported later."""
    if not isinstance(record, dict):
        return record
    record = {key if ALIASES.get(key, key) in record else ALIASES[key]: value for key, value in record.items()}
    if "answer" not in record and isinstance(record.get("answers"), list):
        record |= answered(record)
        del record["answers"]
    if str(record.get("image_id")).strip().lower() in VOID:
        record.pop("image_id", None)
    return record | {key: [record[key]] for key in ("caption", "answer") if not isinstance(record.get(key, []), list)}


def columns(content: str) -> tuple[list[str], str]:
    """The names in the first line of a table, and what is between them."""
    header = content.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    names = [name.strip(' "').lower() for name in header.split(delimiter)]
    return [ALIASES.get(name, name) for name in names], delimiter


def table(content, path, split, answers):
    """A table with a header, one record a row; columns of one name are several captions. Quotation marks have a meaning
    in CSV, and in TSV only if the header has them too."""
    names, delimiter = columns(content)
    literal = delimiter == "\t" and not content.startswith('"')
    quoting = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    lines = io.StringIO(content, newline="")  # a quoted cell may hold line ends
    rows, start = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True), 1
    try:
        for cells in rows:
            fits = not any(cells[len(names) :]) and not (literal and 0 < len(cells) < len(names))
            expect(fits, f"got {len(cells)} cells, expected {len(names)} as in the header")
            record: dict[str, list[str]] = {}
            for name, cell in zip(names, map(str.strip, cells)):
                if name and cell:
                    record.setdefault(name, []).append(cell)
            if record and start > 1:
                yield {name: texts if name in ("caption", "answer") else texts[0] for name, texts in record.items()}
            start = rows.line_num + 1
    except (UserError, csv.Error) as error:
        quoted = f'put texts with {delimiter!r} or line ends in quotation marks, doubling those inside: "a ""big"" dog"'
        how = "write spaces for the tabs and line ends inside texts" if literal else quoted
        raise UserError(f"{path}: line {start}: {error}: {how}") from None


def folder_records(folder: Path, split: str = "train") -> tuple[str, list[dict]]:
    """(name of the layout, records) of a folder: of its metadata file, else of its images, each line of the .txt beside
    one being a caption."""
    for metadata in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if metadata.exists():
            return open_records(metadata, split)
    records, paths = [], images_in(folder)
    for path in progress(paths, f"reading {folder}"):
        text = path.with_suffix(".txt")
        lines = read_text(text).split("\n") if text.exists() else []
        if captions := [line.strip() for line in lines if line.strip()]:
            records.append({"image": path.name, "caption": captions})
    lone = f"{folder}: no image has a .txt with captions beside it: write {paths[0].stem}.txt, ..."
    expect(records, f"{lone}, or pass an annotation file")
    if alone := len(paths) - len(records):
        print0(f"{folder}: {alone:,} of {len(paths):,} images are left out, which have no .txt with a caption")
    return "a folder of images with texts", records


# --- which layout it is ----------------------------------------------------------------------------------------------


def has(value, *keys: str, under: str | None = None) -> bool:
    """Is it, or what it has `under` a key, an object, or a list that starts with one, with these keys?"""
    if under:
        value = value.get(under) if isinstance(value, dict) else None
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, dict) and set(keys) <= set(value)


def is_table(content) -> bool:
    """A text whose first line names the columns."""
    names = columns(content)[0] if isinstance(content, str) else []
    return "image" in names and ("caption" in names or "question" in names)


def is_gqa(content) -> bool:
    """An object of objects with imageId."""
    return isinstance(content, dict) and has(next(iter(content.values()), None), "imageId", "question")


def is_coco(content) -> bool:
    """Images, and captions or nothing: an instances_*.json, which has boxes, is no caption file."""
    notes = content.get("annotations") if isinstance(content, dict) else None
    return has(content, "file_name", "id", under="images") and (not notes or has(notes, "caption"))


LAYOUTS = {  # name: (does it fit, its records); the first that fits is taken
    "Karpathy's dataset_*.json": (lambda c: has(c, "filename", "sentences", under="images"), karpathy),
    "COCO or NoCaps captions": (is_coco, coco),
    "VQAv2 or OK-VQA questions": (lambda c: has(c, "question_id", under="questions"), vqa),
    "GQA questions": (is_gqa, gqa),
    "Visual Genome regions": (lambda c: isinstance(c, list) and has(c, "regions"), regions),
    "Visual Genome questions": (lambda c: isinstance(c, list) and has(c, "qas"), genome_questions),
    "A-OKVQA": (lambda c: isinstance(c, list) and (has(c, "direct_answers") or has(c, "choices", "question")), aokvqa),
    "Flickr captions": (
        lambda c: isinstance(c, str) and (FLICKR_LINE.match(c) or FLICKR_ROW.match(c) or c.startswith("image_name|")),
        flickr,
    ),
    "a table of records": (is_table, table),
    "a list of records": (lambda c: isinstance(c, list) and (has(c, "image") or has(c, "file_name")), plain),
}


def layout_of(content) -> str | None:
    """Name of the first layout that fits."""
    return next((name for name, (fits, _) in LAYOUTS.items() if content and fits(content)), None)


@contextmanager
def as_published(path: Path, name: str):
    """Report a malformed entry as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever values of other types give
        raise UserError(
            f"{path} looks like {name}, but an entry is not as published ({type(error).__name__}: {shorten(error)}): "
            "download the file again"
        ) from None


def open_records(path: Path, split: str = "train", annotations: Path | None = None) -> tuple[str, list[dict]]:
    """(name of the layout, records) of a file or a folder, or of VQA's two files, in either order."""
    if os.path.isdir(path):
        return folder_records(Path(path), split)
    content, answers = read_content(path), annotations and read_content(annotations)
    if has(answers, "question_id", under="questions"):
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
        records = list(map(tidy, LAYOUTS[name][1](content, path, split, answers)))
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
    lines = read_json_lines(path) if path.suffix.lower() in LINES else iter(())
    first = list(islice(lines, 1))
    if layout_of(first) == "a list of records":
        with as_published(path, "a list of records"):
            yield from map(tidy, chain(first, lines))
    else:
        yield from open_records(path, split)[1]
