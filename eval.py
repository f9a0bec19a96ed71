"""Evaluation, and questions about an image.

    python eval.py ask                                          answers about a built-in image; --image for your own
    python eval.py retrieval --checkpoint runs/stage1           captions for images and images for captions
    python eval.py answers --checkpoint runs/stage2             questions about images of the shapes world
    python eval.py captions --checkpoint runs/stage2 --data a.json      BLEU, ROUGE-L and CIDEr
    python eval.py vqa --checkpoint runs/vqa --data a.json      VQA accuracy
    python eval.py features --checkpoint runs/stage1 --images DIR --out features.safetensors

Every choice of an evaluation (prompt, beams, lengths, resolution, ...) is fixed in a preset (tasks/presets.py), and
written into the result together with a hash of the split. With --out, an interrupted evaluation continues.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

from PIL import Image

from blip2 import TINY, Blip2, chunked
from data import ImageFiles, decoding_workers, image_loader
from engine.device import DEVICES, PRECISIONS, choose_precision, local_device
from engine.distributed import gather_objects, print0, rank, start_processes
from engine.errors import Parser, at_least_1, expect, run_command, shorten
from engine.files import check_output, read_json, read_text, whole, write_json
from engine.lock import locked
from engine.progress import clock, progress
from engine.sharding import sharded_parts
from engine.stop import Stopped, state
from sources.images import images_in, open_image
from sources.mixture import check_spec, open_images
from sources.shapes import SPLITS
from sources.text import fill_template, is_string
from tasks.attention_maps import draw_attention
from tasks.batches import IMAGES, PartialResults
from tasks.features import write_features
from tasks.presets import PRESETS, REPORTS, TASKS, partial_folder, provenance, write_result
from tasks.retrieval import RULES
from tasks.shapes_qa import shapes_vqa

# The image that ships with the code, and what is asked about it by default.
PICTURE = os.path.relpath(TINY / "picture.png")
FIRST_QUESTIONS = ("how many shapes are there?", "what color is the star?", "is the cross small or large?")
PENALTIES = ("length_penalty", "repetition_penalty", "min_new_tokens")  # flags of ask and captions


def ask(model: Blip2, args: argparse.Namespace) -> list[dict]:
    """Caption, or answer about, an image or all images of a folder."""
    path, built_in = Path(args.image), args.image == PICTURE and model.llm is not None
    paths = images_in(path) if path.is_dir() else [path]
    questions = args.question or (list(FIRST_QUESTIONS) if built_in and not args.prompt else [])
    given = {key: getattr(args, key) for key in ("max_new_tokens", *PENALTIES)}
    decoding = {"num_beams": args.beams} | {key: value for key, value in given.items() if value is not None}
    rows, started = [], time.time()
    batches = list(map(list, chunked(range(len(paths)), IMAGES)))
    loader = image_loader(ImageFiles(paths), model.image_size, batches, workers_of(args))
    # On a terminal the answers themselves show how far it is.
    for readable, broken, pixels in loader if sys.stdout.isatty() else progress(loader, "images"):
        for reason in broken.values():
            expect(len(paths) > 1, reason)
            print0(f"skipped: {reason}")
        if not readable:
            continue
        images = model.encode_image(pixels)
        if args.attention:
            save_attention(model, path, args)
        maps_only = args.attention and "itg" in model.untrained_heads and model.llm is None
        texts = {} if args.question or args.prompt or maps_only else {"caption": model.caption(images, **decoding)}
        if args.prompt:
            texts[args.prompt] = model.ask(images, args.prompt, template="{}", **decoding)
        texts |= {question: model.ask(images, question, **decoding) for question in questions}
        for i, row in enumerate(readable):
            print0(f"{paths[row]}", *(f"  {asked}: {answers[i]}" for asked, answers in texts.items()))
            rows.append({"image": str(paths[row]), **{asked: answers[i] for asked, answers in texts.items()}})
    if path.is_dir():
        seconds = time.time() - started
        print0(f"{len(rows):,} images, {clock(seconds)}, {len(rows) / seconds:.1f} img/s")
    return rows


def workers_of(args: argparse.Namespace) -> int:
    """Loader processes: none for a single image, nor for the shapes world, which is drawn as fast."""
    if args.workers is not None:
        return max(0, args.workers)
    if args.command == "ask":
        return decoding_workers() if Path(args.image).is_dir() else 0
    return 0 if args.command in TASKS and args.data == ["shapes"] else decoding_workers()


def save_attention(model: Blip2, path: Path, args: argparse.Namespace) -> None:
    """Draw where the queries look."""
    image, no_captions = open_image(path), "itg" in model.untrained_heads and model.llm is None
    caption = "" if args.prompt or args.question or no_captions else model.caption(image)
    question = args.question[0] if args.question else ""
    prompt = fill_template(model.template, question) if question and model.llm is not None else args.prompt or ""
    drawn = draw_attention(model, image, caption, args.queries or [], args.word or "", prompt, question)
    if rank() > 0:
        return
    with whole(args.attention) as partial:
        drawn.save(partial, format=Image.registered_extensions()[Path(args.attention).suffix.lower()])
    print0(f"attention maps: {args.attention}")


def chat(model: Blip2, path: Path) -> None:
    """A conversation about one image; an empty line ends it."""
    images, turns = model.encode_image([open_image(path)]), []
    print0(f"{path}: {model.caption(images)[0]}", "ask about it; an empty line ends the conversation")
    while True:
        try:
            question = input("you: ").strip() if rank() == 0 else ""
        except (EOFError, Stopped):
            question = ""
        question = gather_objects(question)[0]  # the terminal is rank 0's
        if not question:
            return
        (answer,) = model.ask(images, [*turns, question])
        print0(answer)
        turns.append((question, answer))


def evaluate(model: Blip2, args: argparse.Namespace, preset: dict, changed: dict) -> dict:
    """Retrieval, captions or VQA as the preset says, which goes into the result with what makes it comparable."""
    questions, retrieval = args.command == "vqa", args.command == "retrieval"
    if questions:
        model.need_llm()
    has_llm = f"{args.checkpoint} has a language model, for which its queries were trained since"
    expect(not retrieval or model.llm is None, f"{has_llm}: pass a run of stage 1 or of --stage retrieval")
    how_opened = dict(questions=questions, need_texts=retrieval, field=args.caption_field)
    images = open_images(args.data, preset["split"], model.image_size, args.images, **how_opened)
    how = {key: value for key, value in preset.items() if key not in ("task", "split", "image_size")}
    own = {"image_size": model.image_size, "template": model.template, "prompt": model.prompt}
    resolved = {key: own.get(key) if value is None else value for key, value in preset.items()}
    if args.candidates:
        how["candidates"] = read_candidates(args.candidates)
        resolved["candidates"] = hashlib.sha256(json.dumps(how["candidates"]).encode()).hexdigest()
    if retrieval:
        how["match"] = "itm" not in model.untrained_heads
    identity = {"preset": {"name": args.preset, "changed": sorted(changed), **resolved}}
    identity |= provenance(model, Path(args.checkpoint), images, args.data)
    choices = ", ".join(f"{key} {value!r}" for key, value in resolved.items() if key != "task")
    print0(f"preset {args.preset}: {choices}")
    folder = partial_folder(args.out, identity | {"images": images.fingerprint()}) if args.out else None
    partial = PartialResults(folder)
    try:
        return identity | TASKS[args.command](model, images, workers=workers_of(args), partial=partial, **how)
    except Stopped:
        if folder and partial.done:
            state.advice = lambda: "type the same command again to go on"
        raise


def read_candidates(path: str) -> list[str]:
    """A JSON list of answers."""
    candidates = read_json(path)
    is_list = isinstance(candidates, list) and candidates and all(map(is_string, candidates))
    expect(is_list, f'--candidates {path} is no list of answers: expected ["yes", "no", ...]')
    return candidates


# --- the command line ------------------------------------------------------------------------------------------------


COMMANDS = {
    "ask": "caption an image, or answer questions about it",
    "retrieval": "recall at 1, 5, 10 in both directions",
    "captions": "BLEU, ROUGE-L and CIDEr-D of captions",
    "vqa": "accuracy of answers to the questions of an annotation file",
    "answers": "correct answers in the shapes world",
    "features": "write the features of all images of a folder",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of all commands."""
    parser = Parser(prog="python eval.py", description=__doc__)
    parser.set_defaults(data=["shapes"], preset="", split=None, candidates=None, predictions=None, attention=None)
    parser.set_defaults(repetition_penalty=None, caption_field="")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {command: commands.add_parser(command, help=text) for command, text in COMMANDS.items()}

    def flag(names: str, where: tuple[str, ...], **settings) -> None:
        for name, command in product(names.split(), where):
            parsers[command].add_argument(name, **settings)

    few = partial(at_least_1, most=4096)
    every, preset, generated = tuple(COMMANDS), tuple(TASKS), ("captions", "vqa")
    opened = "a run, one of its checkpoints (runs/stage1/best, runs/stage1/step-000500), or a public checkpoint"
    flag("--checkpoint", ("ask",), default=os.path.relpath(TINY / "blip2"), help=opened)
    flag("--checkpoint", every[1:], required=True, help=opened)
    for command in preset:
        names = [name for name, choices in PRESETS.items() if choices["task"] == command]
        newest = max(name for name in names if name.startswith(f"{command}-v"))
        flag("--preset", (command,), default=newest, choices=names, help=f"default {newest}")
    flag("--vit", every, help="the frozen encoder, if it is not where the run says")
    flag("--bert", every, help="for a .pth: the BERT folder")
    flag("--llm", every, help="the frozen language model, if it is not where the run says")
    flag("--shard-vit --shard-llm", every, action="store_true", help="spread this frozen part over all processes")
    flag("--precision", every, default="auto", choices=("auto", *PRECISIONS))
    flag("--device", every, default="auto", choices=DEVICES)
    flag("--image-size", every, type=few, help="pixels a side, if not the checkpoint's")
    flag("--out", every[:-1], help="write the result here")
    flag("--out", every[-1:], help="write the features here", required=True)
    flag("--workers", ("ask", *preset, "features"), type=int, help="loader processes; default up to 8")
    flag("--image", ("ask",), default=PICTURE, help="an image, or a folder of them")
    flag("--question", ("ask",), action="append", help="put into the run's template; may be repeated")
    flag("--prompt", ("ask",), help="any text that the language model continues, unchanged")
    flag("--chat", ("ask",), action="store_true", help="a conversation about one image")
    flag("--attention", ("ask",), help="draw where the queries look into this .png")
    flag("--queries", ("ask",), type=int, nargs="+", help="which; default those with the most concentrated maps")
    flag("--word", ("ask",), help="with --attention: Grad-CAM for this word")
    flag("--beams", ("ask",), type=few, default=5)
    flag("--max-new-tokens", ("ask",), type=few, help="default 30 for captions, 10 for answers")
    for name, kind in zip(PENALTIES, (float, float, at_least_1)):
        flag(f"--{name.replace('_', '-')}", ("ask", "captions"), type=kind, help="of the search; see generate.py")
    flag("--images", ("features",), required=True, help="the folder of the images")
    flag("--texts", ("features",), help="a text file: the features of its lines as well")
    either = dict(action="append", default=argparse.SUPPRESS, help="an annotation file, or shapes; default shapes")
    flag("--data", preset, **either)
    flag("--images", preset, action="append", help="folder of the images, if not beside the file; may be repeated")
    flag(
        "--caption-field",
        preset[:2],
        default="",
        help="of tar shards: the JSON field with the captions",
    )
    flag("--split", (*preset, "answers"), help="of shapes and of Karpathy's files; default the preset's")
    flag("--k", ("retrieval",), type=at_least_1, help="how many candidates ITM re-ranks; default 128")
    flag("--rerank", ("retrieval",), choices=RULES, help="default posterior; the paper's is itm, LAVIS's itm+itc")
    flag("--beams", generated, dest="num_beams", type=few, help="default 5")
    flag("--max-new-tokens", generated, type=few, help="default the preset's")
    flag("--predictions", generated, help="write the predictions here, as the task's evaluation server reads them")
    flag("--prompt", ("captions",), help="what the captions continue")
    flag("--template", ("vqa",), help="for the questions, with {} for the question")
    flag("--lemmatized", ("vqa",), action="store_true", default=None, help="also score the answers' lemmas")
    flag("--candidates", ("vqa",), help="a JSON list of answers, of which the most probable is taken")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, in a sentence, before anything is loaded."""
    if args.command == "ask":
        expect(args.image, "got an empty --image, expected an image or a folder of them")
        flag = "--chat" if args.chat else "--attention"
        single = f"{flag} is for one image, {args.image} is a folder: pass --image with one of its files"
        expect(not (args.chat or args.attention) or not Path(args.image).is_dir(), single)
        unused = "got --word or --queries, which say what --attention draws: add --attention out.png"
        expect(args.attention or not (args.word or args.queries), unused)
        other = f"--attention {args.attention} is no image file: let it end in .png"
        expect(not args.attention or Path(args.attention).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"), other)
    path = Path(args.checkpoint)
    there = ", ".join(sorted(file.parent.name for file in path.parent.glob("[!.]*/config.json")))
    expect(path.exists() or not there, f"--checkpoint {path} does not exist: in {path.parent} there are {there}")
    for spec in args.data:
        check_spec(spec)
    answers = "eval.py vqa needs --data with questions; for the shapes world use: python eval.py answers"
    expect(args.command != "vqa" or "shapes" not in args.data, answers)
    wrong = f"got --split {args.split} of the shapes world, expected {', '.join(SPLITS)}"
    expect(args.data != ["shapes"] or args.split in (None, *SPLITS), wrong)
    wrong = f"got --repetition-penalty {args.repetition_penalty}, expected above 0"
    expect(args.repetition_penalty is None or args.repetition_penalty > 0, wrong)
    fits = getattr(args, "workers", None) is None or -1 <= args.workers <= 256
    expect(fits, f"got --workers {shorten(getattr(args, 'workers', 0), 60)}, expected -1 to 256")
    for flag in ("out", "predictions", "attention"):
        check_output(flag, getattr(args, flag))


def main(argv: list[str] | None = None) -> dict | list | None:
    """The command line."""
    args = parse(argv)
    check(args)
    start_processes()
    device = local_device(args.device)
    precision, why = choose_precision(device, args.precision)
    preset, given = PRESETS.get(args.preset, {"image_size": None, "split": "test"}), vars(args)
    changed = {key: given[key] for key in preset if given.get(key) not in (None, preset[key])}
    preset = preset | changed
    where = dict(device=device, precision=precision, image_size=preset["image_size"], sharded=sharded_parts(args))
    model = Blip2.from_pretrained(args.checkpoint, args.vit, args.bert, args.llm, **where)
    if args.command == "ask" and args.chat:
        return chat(model, Path(args.image))
    print0(f"{args.checkpoint} on {device}, {precision} ({why})")
    if args.command == "features":
        texts = [line.rstrip("\n") for line in io.StringIO(read_text(args.texts))] if args.texts else []
        return write_features(model, images_in(Path(args.images)), texts, args.out, workers_of(args))
    if args.command == "ask":
        rows = ask(model, args)
        if args.out and rank() == 0:
            write_json(Path(args.out), rows, indent=2)
        return rows
    if args.command == "answers":
        model.need_llm()
        result = shapes_vqa(model, open_images(["shapes"], preset["split"], model.image_size))
        return report(result, args)
    with locked(partial_folder(args.out)) if args.out else nullcontext():
        return report(evaluate(model, args, preset, changed), args)


def report(result: dict, args: argparse.Namespace) -> dict:
    """Print a result and write it into the files that were asked for."""
    print0(REPORTS[result["task"]][1](result))
    if args.predictions and rank() == 0:
        write_json(Path(args.predictions), result["predictions"])
    if args.out and rank() == 0:
        write_result(Path(args.out), result)
        shutil.rmtree(partial_folder(args.out), ignore_errors=True)
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
