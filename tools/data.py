"""Data before a long run: `python -m tools.data check FILES`, `... convert FILE --out FILE`, `... index SHARDS`."""

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from data import Loader
from engine.distributed import print0, start_processes
from engine.errors import Parser, UserError, at_least_1, expect, run_command
from engine.files import check_output, write_json
from engine.progress import progress
from sources.annotations import AnnotatedImage, record_problem
from sources.layouts import open_records
from sources.shards import TarShards, is_shards
from sources.text import BertTokenizer, is_string, is_text


class Checked:
    """[i] -> name of the image of sample i, hash of its file, and why it cannot be read, or ""."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[str, str, str]:
        sample = self.samples[index]
        try:
            sample.open()
            return sample.name, hashlib.sha256(sample.read_bytes()).hexdigest(), ""
        except UserError as error:
            return sample.name, "", str(error)


def index(args: argparse.Namespace) -> None:
    """Index tar shards, with all processes of torchrun, and print what they hold."""
    start_processes()
    for spec in args.shards:
        expect(is_shards(spec), f"{spec} is no tar, folder of tars, pattern, or text file of their names")
        found = TarShards(spec, args.caption_field)
        print0(f"{spec}: {len(found):,} images, {found.num_texts:,} captions, {len(found.tars):,} tars, {found.path}")


def check(args: argparse.Namespace) -> None:
    """Read every record and every image of annotation files, and print their problems.

    Raises SystemExit(1) if there are any.
    """
    expect(-1 <= args.workers <= 256, f"got --workers {args.workers}, expected up to 256, or -1 for one a core")
    problems: dict[str, list[str]] = defaultdict(list)
    tokenizer = BertTokenizer(args.bert, 10**6) if args.bert else None
    if tokenizer is None:
        print("text lengths are not checked: add --bert FOLDER to see which texts are truncated")
    images_of: dict[Path, dict[str, str]] = {}  # file -> content hash -> the first image with it
    for file in dict.fromkeys(map(Path, args.annotations)):
        folders, records = [Path(f) for f in args.images or [file if file.is_dir() else file.parent]], []
        shards = TarShards(str(file), args.caption_field, need_texts=False) if is_shards(str(file)) else None
        name, every = ("tar shards", ()) if shards else open_records(file, args.split)
        for record in every:
            if isinstance(record, dict) and isinstance(record.get("image"), str):
                records.append(record)
            else:
                problems[f'{file}: records without "image"'].append(json.dumps(record))
        images = [AnnotatedImage(record, folders) for record in records]
        samples = shards or list({image.name: image for image in images}.values())
        if shards:
            records = [{"image": sample.name, "caption": sample.captions} for sample in samples]
        where = ", ".join(map(str, folders))
        print(f"{file}: {name}, {len(records):,} records, {len(samples):,} images in {where}", flush=True)
        found = text_problems(records, tokenizer, args.max_text_tokens)
        problems |= {f"{file}: {kind}": rows for kind, rows in found.items()}
        first, workers = {}, args.workers if args.workers >= 0 else os.cpu_count() or 1
        results = Loader(Checked(samples), None, sampler=range(len(samples)), num_workers=workers)
        for path, content, reason in progress(results, f"checking {file}", len(samples)):
            if reason:
                problems[f"{file}: unreadable images"].append(reason)
            elif first.setdefault(content, path) != path:
                same = f"{path} is the same image as {first[content]}: give their records one image_id"
                problems[f"{file}: duplicate images"].append(same)
        for other, before in images_of.items():
            if shared := [f"{path} is also in {other}" for content, path in first.items() if content in before]:
                problems[f"{file}: images of {other}, fine unless one is to train and one to test"] = shared
        images_of[file] = first
    for kind, rows in problems.items():
        print(f"{kind}: {len(rows):,}", *(f"  {row}" for row in rows[:5]), sep="\n")
        if len(rows) > 5:
            print(f"  and {len(rows) - 5:,} more")
    print(f"{sum(map(len, problems.values())):,} problems" if problems else "fine")
    if problems:
        raise SystemExit(1)


def text_problems(records: list[dict], tokenizer: BertTokenizer | None, limit: int) -> dict[str, list[str]]:
    """Problems with the texts of records, by kind; with a tokenizer, also texts of more than `limit` tokens."""
    found: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    files: dict[str, str] = {}  # image_id -> the first image with it
    is_test = not any(record.get("answer") or record.get("caption") for record in records)
    if is_test:
        print("  no record has a caption or an answer: fine for a test set, nothing to train on")
    for record in records:
        asked = [record["question"]] if "question" in record else []
        texts = record.get("answer" if asked else "caption", [])
        if not texts and not is_test:
            found[f"without {'an answer' if asked else 'a caption'}"].append(json.dumps(record))
        if not (all(map(is_string, texts)) and all(map(is_text, asked or texts))):
            found["with an empty text"].append(json.dumps(record))
        image_id = AnnotatedImage(record, []).key
        if (first := files.setdefault(image_id, record["image"])) != record["image"]:
            found["with the image_id of another file"].append(f"{image_id} for {first} and {record['image']}")
        if (problem := record_problem(record, bool(asked), not is_test)) and "has an " not in problem:
            found["that training refuses"].append(problem)
        read = list(filter(is_string, asked or texts))
        for text, ids in zip(read, tokenizer.encode(read) if tokenizer else []):
            if len(ids) > limit:
                found[f"texts truncated to {limit} tokens (--max-text-tokens)"].append(f"{len(ids)} tokens: {text}")
        key = json.dumps(record, sort_keys=True)
        if key in seen:
            found["duplicate records"].append(key)
        seen.add(key)
    return found


def convert(args: argparse.Namespace) -> None:
    """Write the records of a published annotation file in this project's layout, whole or not at all."""
    name, records = open_records(Path(args.file), args.split, args.answers and Path(args.answers))
    out = Path(args.out)
    check_output("out", out)
    for number, record in enumerate(records):
        keys = record if isinstance(record, dict) else ()
        problem = record_problem(record, "question" in keys, "caption" in keys)
        expect(not problem, f"{args.file}: record {number} {problem}")
    texts = sum(len(record.get("caption", ["one question"])) for record in records)
    what = "questions" if "question" in records[0] else "captions"
    write_json(out, records)
    print(f"{args.file}: {name}, {len({record['image'] for record in records}):,} images, {texts:,} {what}")
    print(f"written to {out}; its images: {records[0]['image']}, ... (pass their folder as --images)")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tools.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="missing and broken images, duplicates, empty and long texts")
    p.add_argument("annotations", nargs="+", help="annotation files; images that several share are reported")
    p.add_argument("--images", action="append", help="folder of the images, if not beside the file; may be repeated")
    p.add_argument("--bert", help="count tokens with this BERT's tokenizer: which texts exceed --max-text-tokens?")
    p.add_argument("--max-text-tokens", type=at_least_1, default=32)
    p.add_argument("--workers", type=int, default=-1, help="processes that read images, by default one a core")
    p.set_defaults(run=check)
    i = commands.add_parser("index", help="index tar shards; with torchrun by several processes")
    i.add_argument("shards", nargs="+", help="patterns, folders, or text files of names")
    i.set_defaults(run=index)
    c = commands.add_parser("convert", help="from a published layout (sources/layouts.py) to this project's records")
    c.add_argument("file", help="captions or questions")
    c.add_argument("answers", nargs="?", help="VQA's second file, the annotations")
    c.add_argument("--out", required=True, help="the .json to write")
    c.set_defaults(run=convert)
    for sub in (p, i):
        sub.add_argument("--caption-field", default="", help="of tar shards: the JSON field with the captions")
    for sub in (p, c):
        sub.add_argument("--split", default="train", help="of Karpathy's files")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_command(main))
