"""Evaluation, and a photo to ask about.

    python eval.py ask                                          answers about a built-in picture; --image for your own
    python eval.py retrieval --checkpoint runs/stage1           captions for pictures and pictures for captions
    python eval.py answers --checkpoint runs/stage2             questions about pictures of the shapes world
    python eval.py captions --checkpoint runs/stage2 --data a.json      BLEU, ROUGE-L and CIDEr
    python eval.py vqa --checkpoint runs/vqa --data a.json      VQA accuracy
    python eval.py features --checkpoint runs/stage1 --images DIR --out features.safetensors

Every choice of an evaluation (prompt, beams, lengths, resolution, ...) is frozen in one of `PRESETS`, and written into
the result together with a hash of the split. With --out, an interrupted evaluation goes on where it stopped. What is
measured, and how, is in tasks.py.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from blip2 import (
    ANSWERS,
    PRECISIONS,
    TINY,
    Blip2,
    batches_of,
    choose_precision,
    local_device,
)
from data import (
    PictureFiles,
    UserError,
    ask_in,
    check_annotations,
    decoding_workers,
    open_photos,
    open_picture,
    picture_loader,
    read_json,
    say_sentence,
)
from explain import draw_attention
from layouts import read_text
from losses import say, start_processes, world
from shapes import SPLITS
from tasks import (
    PHOTOS,
    REPORTS,
    WRITTEN,
    Kept,
    answering,
    captioning,
    clock,
    encoded_batches,
    gather_shards,
    origin,
    retrieval,
    shard,
    vqa,
    write_result,
)

# How text is generated, and what else decides about the numbers of an evaluation. A preset never changes: if a choice
# turns out to be wrong, a -v2 is added. None is the checkpoint's own. Sources: paper 4.1 to 4.4 and Tables 7 to 9; what
# it leaves open (shortest captions, k, the split) is the original's. Prompts are lower-cased as there for zero-shot.
COCO = WRITTEN | dict(min_new_tokens=8)
CAPTIONS = dict(task="captions", split="test", image_size=None, prompt=None)
QUESTIONS = dict(task="vqa", split="val", image_size=None, template=None, clean=False, metric=None, lemmatized=False)
ZERO_SHOT = QUESTIONS | dict(image_size=224, clean=True, metric="vqa")
RETRIEVAL = dict(task="retrieval", split="test", image_size=None, k=128, rerank="itm")
PRESETS = {
    "captions-v1": CAPTIONS | WRITTEN,
    "coco-captions-v1": CAPTIONS | COCO | dict(image_size=364, prompt="a photo of"),  # Table 3
    "nocaps-v1": CAPTIONS | COCO | dict(split="val", image_size=364, prompt="a photo of"),  # Tables 1 and 3
    "vqa-v1": QUESTIONS | ANSWERS,
    "vqav2-zeroshot-v1": ZERO_SHOT | ANSWERS,  # Table 2
    "okvqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(lemmatized=True),  # counted beside the accuracy, not in its place
    "gqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(metric="gqa"),
    "aokvqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(metric="direct"),
    "vqav2-v1": QUESTIONS | ANSWERS | dict(image_size=490, metric="vqa"),  # Table 4
    "retrieval-v1": RETRIEVAL,
    "coco-retrieval-v1": RETRIEVAL | dict(image_size=364),  # Table 5, fine-tuned
    "flickr30k-retrieval-v1": RETRIEVAL | dict(image_size=364),  # Table 5, zero-shot by a model fine-tuned on COCO
}


# What is asked when nothing else is, about the picture that ships with the code.
PICTURE = os.path.relpath(TINY / "picture.png")
FIRST_QUESTIONS = ("how many shapes are there?", "what color is the star?", "is the cross small or large?")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, in the order of their names; at least one."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} has no pictures in it, expected a folder of files that end in {', '.join(PICTURES)}")
    return paths


def ask(model: Blip2, args: argparse.Namespace) -> list[dict]:
    """Caption, or answer about, a photo or all photos of a folder, as the command line says."""
    path, built_in = Path(args.image), args.image == PICTURE and model.llm is not None
    paths = pictures_in(path) if path.is_dir() else [path]
    questions = args.question or (list(FIRST_QUESTIONS) if built_in and not args.prompt else [])
    decoding = {"num_beams": args.beams}
    if args.max_new_tokens is not None:
        decoding["max_new_tokens"] = args.max_new_tokens
    rows, started = [], time.time()
    batches = list(map(list, batches_of(range(len(paths)), PHOTOS)))
    for readable, broken, pictures in picture_loader(PictureFiles(paths), model.image_size, batches, loaders(args)):
        for reason in broken.values():
            if len(paths) == 1:
                raise UserError(reason)
            say(f"skipped: {reason}")
        if not readable:
            continue
        images = model.encode_image(pictures)
        if args.attention:
            attend_to(model, open_picture(path), args)
        drawn_only = args.attention and "itg" in model.sources.get("lacks", ())
        said = {} if args.question or args.prompt or drawn_only else {"caption": model.caption(images, **decoding)}
        if args.prompt:
            said[args.prompt] = model.ask(images, args.prompt, template="{}", **decoding)
        said |= {question: model.ask(images, question, **decoding) for question in questions}
        for i, row in enumerate(readable):
            say(f"{paths[row]}", *(f"  {asked}: {answers[i]}" for asked, answers in said.items()))
            rows.append({"image": str(paths[row]), **{asked: answers[i] for asked, answers in said.items()}})
    if path.is_dir():
        say(f"{len(rows):,} photos, {clock(time.time() - started)}, {len(rows) / (time.time() - started):.1f} a second")
    return rows


def loaders(args: argparse.Namespace) -> int:
    """How many processes open pictures: none for a single one, and for the shapes world, which draws as fast."""
    if args.workers is not None:
        return args.workers
    single = args.command == "ask" and not Path(args.image).is_dir()
    return 0 if single or (getattr(args, "data", "photos") or ["shapes"]) == ["shapes"] else decoding_workers()


def attend_to(model: Blip2, picture: Image.Image, args: argparse.Namespace) -> None:
    """Draw where the queries look, as the command line says."""
    caption = "" if args.prompt or args.question or "itg" in model.sources.get("lacks", ()) else model.caption(picture)
    question = args.question[0] if args.question else ""
    prompt = ask_in(model.template, question) if question and model.llm is not None else args.prompt or ""
    drawn = draw_attention(model, picture, caption, args.queries or [], args.word or "", prompt, question)
    drawn.save(args.attention)
    say(f"where the queries look: {args.attention}")


def chat(model: Blip2, path: Path) -> None:
    """A conversation about one photo; an empty line ends it."""
    images, turns = model.encode_image([open_picture(path)]), []
    say(f"{path}: {model.caption(images)[0]}", "ask about it; an empty line ends the conversation")
    while True:
        try:
            question = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        (answer,) = model.ask(images, [*turns, question])
        say(answer)
        turns.append((question, answer))


def features(model: Blip2, args: argparse.Namespace) -> None:
    """Write what the model makes of all pictures of a folder, and of the lines of a text file if there is one.

    image_query_outputs (N, Q, D) are the queries behind the Q-Former; image_features (N, Q, E) are these, projected and
    of unit length; text_features (M, E) likewise. itc_scores is the highest product of a text with the queries.
    """
    paths = pictures_in(Path(args.images))
    texts = read_text(Path(args.texts)).splitlines() if args.texts else []
    if texts and (model.texts is None or model.llm is not None):
        raise UserError(
            "--texts: texts have features in a run of stage 1 or of --stage retrieval, pass such a --checkpoint"
        )
    batches = [list(rows) for rows in batches_of(range(len(paths))[shard(len(paths))], PHOTOS)]
    encoded = encoded_batches(model, PictureFiles(paths), batches, loaders(args))
    parts = [(images.query_out.cpu(), images.feats.cpu()) for images in encoded]
    Q, D, E = model.qformer.cfg.num_queries, model.qformer.cfg.width, model.embed_dim
    nothing = (torch.empty(0, Q, D), torch.empty(0, Q, E))  # a process without a share
    found = {
        name: gather_shards(torch.cat(mine).to(model.device), len(paths)).cpu()
        for name, mine in zip(("image_query_outputs", "image_features"), zip(nothing, *parts))
    }
    if model.texts is None or model.llm is not None:
        del found["image_features"]  # nothing has trained its projection since stage 1, or ever
    if texts:
        found["text_features"] = model.encode_text(texts).feats.cpu()
    names = {"images": json.dumps([path.name for path in paths]), "texts": json.dumps(texts)}
    if world()[0] == 0:
        save_file(found, args.out, metadata=names)
        os.chmod(args.out, 0o644)  # safetensors lets only the owner read its files
    say(*(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items()), f"written to {args.out}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "ask": "caption a photo, or answer questions about it",
        "retrieval": "recall at 1, 5, 10 in both directions",
        "captions": "BLEU, ROUGE-L and CIDEr-D of captions",
        "vqa": "accuracy of answers to the questions of an annotation file",
        "answers": "share of right answers in the shapes world",
        "features": "write the features of all pictures of a folder",
    }
    for command, help_ in about.items():
        p = commands.add_parser(command, help=help_)
        default = os.path.relpath(TINY / "blip2") if command == "ask" else None
        p.add_argument("--checkpoint", required=default is None, default=default, help="a run, or a public checkpoint")
        p.add_argument("--vit", help="the frozen encoder, if it is not where the run says")
        p.add_argument("--bert", help="for a .pth: the BERT folder")
        p.add_argument("--llm", help="the frozen language model, if it is not where the run says")
        p.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
        p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
        p.add_argument("--image-size", type=int, help="of the pictures, if not that of the checkpoint")
        p.add_argument("--out", help="write the result here", required=command == "features")
        if command != "answers":
            p.add_argument("--workers", type=int, help="processes that decode photos; default up to 8")
        if command == "ask":
            p.add_argument("--image", default=PICTURE, help="a photo, or a folder of them")
            p.add_argument("--question", action="append", help="put into the run's template; may be repeated")
            p.add_argument("--prompt", help="any text that the language model goes on from, as it is")
            p.add_argument("--chat", action="store_true", help="a conversation about one photo")
            p.add_argument("--attention", help="draw where the queries look into this .png")
            p.add_argument("--queries", type=int, nargs="+", help="which; default those that look at the fewest places")
            p.add_argument("--word", help="with --attention: what speaks for this word")
            p.add_argument("--beams", type=int, default=5)
            p.add_argument("--max-new-tokens", type=int, help="default 30 for captions, 10 for answers")
        if command == "features":
            p.add_argument("--images", required=True, help="the folder of the pictures")
            p.add_argument("--texts", help="a text file: the features of its lines as well")
        if command in ("retrieval", "captions", "vqa"):
            names = [name for name, preset in PRESETS.items() if preset["task"] == command]
            p.add_argument("--preset", default=f"{command}-v1", choices=names, help=f"default {command}-v1")
            p.add_argument("--data", action="append", help="an annotation file, or shapes; default shapes")
            p.add_argument(
                "--images", action="append", help="folder of the photos, if not beside the file; may be repeated"
            )
        if command in ("retrieval", "captions", "vqa", "answers"):
            p.add_argument("--split", help="of shapes and of Karpathy's files; default that of the preset")
        if command == "retrieval":
            p.add_argument("--k", type=int, help="how many candidates ITM puts in order; default 128")
            p.add_argument("--rerank", choices=("itm", "itm+itc"), help="default itm, as in the paper")
        if command in ("captions", "vqa"):
            p.add_argument("--beams", dest="num_beams", type=int, help="default 5")
            p.add_argument("--max-new-tokens", type=int, help="default that of the preset")
            p.add_argument("--predictions", help="write what was said here, as the task's evaluation server reads it")
        if command == "captions":
            p.add_argument("--prompt", help="what the captions go on from")
        if command == "vqa":
            p.add_argument("--template", help="of the questions, with {} for the question")
            p.add_argument(
                "--lemmatized", action="store_true", default=None, help="count the lemmas of the answers, too"
            )
            p.add_argument("--candidates", help="a JSON list of answers, of which the likeliest is taken")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, in a sentence, before anything is loaded."""
    for name in ("k", "beams", "num_beams", "max_new_tokens"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise UserError(f"got --{name.replace('num_', '').replace('_', '-')} {value}, expected at least 1")
    if args.command == "ask" and args.chat and Path(args.image).is_dir():
        raise UserError(f"--chat is about one photo, {args.image} is a folder: pass --image with one of its files")
    if args.command == "ask":
        if (args.word or args.queries) and not args.attention:
            raise UserError("got --word or --queries, which say what --attention draws: add --attention out.png")
        if args.attention and Path(args.attention).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"--attention {args.attention} is no name of a picture: let it end in .png")
        if args.attention and Path(args.image).is_dir():
            raise UserError(
                f"--attention is about one photo, {args.image} is a folder: pass --image with one of its files"
            )
    for spec in getattr(args, "data", None) or []:
        check_annotations(spec)
    if getattr(args, "data", None) in (None, ["shapes"]) and getattr(args, "split", None) not in (None, *SPLITS):
        raise UserError(f"got --split {args.split} of the shapes world, expected {', '.join(SPLITS)}")
    for flag in ("out", "predictions", "attention"):
        path = getattr(args, flag, None)
        if path and Path(path).is_dir():
            raise UserError(f"--{flag} {path} is a folder: pass the name of a file in it")
        if path and not Path(path).parent.is_dir():
            raise UserError(f"--{flag} {path}: the folder {Path(path).parent} does not exist, make it first")


def main(argv: list[str] | None = None) -> dict | list | None:
    """The command line."""
    args = parse(argv)
    check(args)
    start_processes()
    device = local_device(args.device)
    precision, why = choose_precision(device, args.precision)
    preset = dict(PRESETS.get(getattr(args, "preset", ""), {"image_size": None, "split": "test"}))
    changed = {key: getattr(args, key) for key in preset if getattr(args, key, None) not in (None, preset[key])}
    preset |= changed
    model = Blip2.from_pretrained(
        args.checkpoint, args.vit, args.bert, args.llm, device, precision, image_size=preset["image_size"]
    )
    if args.command == "ask" and args.chat:
        return chat(model, Path(args.image))
    say(f"{args.checkpoint} on {device}, {precision} ({why})")
    if args.command == "features":
        return features(model, args)
    if args.command == "ask":
        result = ask(model, args)
    elif args.command == "answers":
        model.need_llm()
        result = answering(model, open_photos(["shapes"], preset["split"], model.image_size))
    else:
        result = run_preset(model, args, preset, changed)
    if args.command != "ask":
        say(REPORTS[result["task"]][1](result))
    if args.out and world()[0] == 0:
        if args.command == "ask":
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
        else:
            write_result(Path(args.out), result)
            shutil.rmtree(partial_folder(args.out), ignore_errors=True)
    return result


def run_preset(model: Blip2, args: argparse.Namespace, preset: dict, changed: dict) -> dict:
    """Retrieval, captions or VQA as the preset says, which goes into the result with what makes it comparable."""
    if args.command == "vqa" and "shapes" in (args.data or ["shapes"]):
        raise UserError("eval.py vqa needs --data with questions; for the shapes world use: python eval.py answers")
    if args.command == "vqa":
        model.need_llm()
    if args.command == "retrieval" and model.llm is not None:
        raise UserError(
            f"{args.checkpoint} has a language model, for which its queries were trained since: retrieval needs a run "
            "of stage 1 or of --stage retrieval"
        )
    photos = open_photos(
        args.data or ["shapes"],
        preset["split"],
        model.image_size,
        args.images,
        questions=args.command == "vqa",
        need_texts=args.command == "retrieval",
    )
    how = {key: value for key, value in preset.items() if key not in ("task", "split", "image_size")}
    resolved = preset | {"image_size": model.image_size}
    if "template" in preset:
        resolved["template"] = preset["template"] or model.template
    if "prompt" in preset:
        resolved["prompt"] = model.prompt if preset["prompt"] is None else preset["prompt"]
    if getattr(args, "candidates", None):
        how["candidates"] = read_candidates(args.candidates)
        resolved["candidates"] = hashlib.sha256(json.dumps(how["candidates"]).encode()).hexdigest()
    if args.command == "retrieval":
        how["match"] = "itm" not in model.sources.get("lacks", ())
    said = {"preset": {"name": args.preset, "changed": sorted(changed), **resolved}}
    said |= origin(model, Path(args.checkpoint), photos, args.data or ["shapes"])
    say(f"preset {args.preset}: " + ", ".join(f"{key} {value!r}" for key, value in resolved.items() if key != "task"))
    kept = Kept(partial_folder(args.out, said | {"photos": photos.fingerprint()}) if args.out else None)
    evaluate = {"retrieval": retrieval, "captions": captioning, "vqa": vqa}[args.command]
    result = said | evaluate(model, photos, workers=loaders(args), kept=kept, **how)
    if getattr(args, "predictions", None) and world()[0] == 0:
        Path(args.predictions).write_text(json.dumps(result["predictions"]) + "\n")
    return result


def partial_folder(out: str, said: dict | None = None) -> Path:
    """Where an evaluation that writes to `out` keeps what it has done: a folder for all weights, presets and data."""
    folder = Path(out).with_name(f".{Path(out).name}.partial")
    return folder if said is None else folder / hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def read_candidates(path: str) -> list[str]:
    """A JSON list of answers."""
    candidates = read_json(path)
    if not isinstance(candidates, list) or not candidates or not all(isinstance(text, str) for text in candidates):
        raise UserError(f'--candidates {path} is no list of answers: expected ["yes", "no", ...]')
    return candidates


if __name__ == "__main__":
    sys.exit(say_sentence(main))
