"""Evaluation, and a photo to ask about.

    python eval.py ask                                          answers about a built-in picture; --image for your own
    python eval.py retrieval --checkpoint runs/stage1           captions for pictures and pictures for captions
    python eval.py answers --checkpoint runs/stage2             questions about pictures of the shapes world
    python eval.py captions --checkpoint runs/stage2 --data a.json      BLEU and CIDEr

Retrieval (paper 4.4): candidates are ranked by ITC, then the first k are put in the order of ITM. Each photo goes
through the ViT once, each needed pair through the ITM pass once. Works the same on any number of processes.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import shapes
from blip2 import (
    ANSWERS,
    PRECISIONS,
    TINY,
    Blip2,
    EncodedImages,
    EncodedTexts,
    batches_of,
    choose_precision,
    local_device,
)
from data import (
    Mixture,
    Shapes,
    UserError,
    ask_in,
    clean_caption,
    open_photos,
    open_picture,
    pad,
    picture_loader,
    read_json,
    say_sentence,
)
from generate import generate
from losses import all_gather, gather_objects, say, start_processes, world
from metrics import bleu, caption_words, chance, cider, ranks, recalls, reranked_ranks

K_RERANK = 128  # the original's and, by its code, the paper's


def clock(seconds: float) -> str:
    """ "2h05m", "3m10s", "12s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


# --- retrieval -------------------------------------------------------------------------------------------------------


class Gallery:
    """The distinct photos of a set, all their captions, and which belongs to which."""

    def __init__(self, photos: Mixture):
        self.photos, self.rows, self.texts, owner = photos, [], [], []
        number: dict[int, int] = {}  # image_id -> photo; files with a record per caption name a photo several times
        for row in range(len(photos)):
            image_id = photos.image_id(row)
            if image_id not in number:
                number[image_id] = len(self.rows)
                self.rows.append(row)
            captions = photos.captions(row)
            self.texts += captions
            owner += [number[image_id]] * len(captions)
        self.owner = torch.tensor(owner)
        self.positives = torch.arange(len(self.rows))[:, None] == self.owner  # (N, M)

    def subsets(self) -> dict[str, Tensor]:
        """The named parts of the shapes world's test split -> photo numbers."""
        parts = self.photos.parts
        if len(parts) > 1 or not isinstance(parts[0], Shapes) or not parts[0].subsets:
            return {}
        names = [parts[0].subsets[self.photos.find(row)[1]] for row in self.rows]
        return {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}


def shard(count: int) -> slice:
    """Which of `count` things this process works on; the slices of all processes cover each once."""
    rank, size = world()
    return slice(count * rank // size, count * (rank + 1) // size)


def gather_shards(x: Tensor, count: int) -> Tensor:
    """The rows of all processes' shards -> (count, ...), in order."""
    size = world()[1]
    if size == 1:
        return x
    longest = -(-count // size)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    parts = all_gather(padded).unflatten(0, (size, longest))
    return torch.cat([part[: count * (r + 1) // size - count * r // size] for r, part in enumerate(parts)])


@torch.no_grad()
def retrieval(
    model: Blip2, photos: Mixture, k: int = K_RERANK, rerank: str = "itm", match: bool = True, workers: int = 0
) -> dict:
    """Recall at 1, 5, 10 in both directions, by ITC alone and re-ranked by ITM.

    rerank: "itm", by the matching score alone (the paper), or "itm+itc", which adds the raw cosine to the raw match
    logit (the original). match=False leaves ITM out, for a model that was trained without it. Returns the numbers.
    """
    started, was_training = time.time(), model.training
    model.eval()
    gallery = Gallery(photos)
    N, M = gallery.positives.shape
    mine, my_texts = shard(N), shard(M)

    images = encode_photos(model, photos, gallery.rows[mine], workers)
    texts = model.encode_text(gallery.texts[my_texts])
    feats = gather_shards(images.feats, N)
    ids = model.texts.encode(gallery.texts)
    texts = EncodedTexts(ids, texts.cls[:0], gather_shards(texts.feats, M))  # nothing here reads the unprojected [CLS]
    itc = torch.cat([model.itc_scores(EncodedImages(part, part, part), texts) for part in batches_of(feats, 64)]).cpu()

    itm = None
    if match:
        # The pairs that any photo or any text wants judged, each once; a process judges those of its photos.
        wanted = torch.zeros(N, M, dtype=torch.bool)
        wanted.scatter_(1, itc.topk(min(k, M), dim=1).indices, True)
        wanted |= torch.zeros(M, N, dtype=torch.bool).scatter_(1, itc.T.topk(min(k, N), dim=1).indices, True).T
        swapped = gallery.subsets().get("swapped", torch.arange(0)).view(-1, 2)
        wanted[swapped[:, :, None], swapped[:, None]] = True  # for `twins`, however far apart ITC has put them
        judged = judge(model, images, texts, wanted[mine], rerank)
        itm = gather_shards(judged, N).cpu() + (0 if rerank == "itm" else itc)
    model.train(was_training)
    return {**report(gallery, itc, itm, k), "rerank": rerank, "seconds": round(time.time() - started, 1)}


def judge(model: Blip2, images: EncodedImages, texts: EncodedTexts, wanted: Tensor, rerank: str) -> Tensor:
    """ITM's score of the wanted pairs: (n, M) bool over this process's n photos -> (n, M), -inf for the others.

    The log-odds order pairs as the probability does, without its ties at 1. What takes long says how long.
    """
    scores = torch.full(wanted.shape, float("-inf"), device=model.device)
    started = said = time.time()
    done, pairs = 0, int(wanted.sum())
    for photos in batches_of(torch.arange(len(wanted)), 64):
        rows, columns = wanted[photos].nonzero(as_tuple=True)
        rows = photos[rows]
        logits = model.match_logits(images, texts, rows, columns)
        scores[rows, columns] = logits[:, 1] - (logits[:, 0] if rerank == "itm" else 0)
        done, now = done + len(rows), time.time()
        if now - said > 30:
            say(f"  judged {done:,} of {pairs:,} pairs, eta {clock((now - started) / done * (pairs - done))}")
            said = now
    return scores


def encoded_batches(model: Blip2, photos: Mixture, rows: list[int], workers: int):
    """Features of some photos, 64 at a time."""
    if photos.cached:
        for part in batches_of(rows, 64):
            yield model.encode_tokens(photos.tokens(part))
    else:
        for _, broken, pictures in picture_loader(photos, model.image_size, rows, workers):
            for reason in broken.values():  # to leave a photo out would make the numbers incomparable
                raise UserError(f"evaluation needs every photo: {reason}")
            yield model.encode_image(pictures)


def encode_photos(model: Blip2, photos: Mixture, rows: list[int], workers: int) -> EncodedImages:
    """Features of some photos; their ViT tokens stay in memory, in the ViT's precision."""
    if not rows:  # fewer photos than processes
        Q, D, E = model.qformer.cfg.num_queries, model.qformer.cfg.width, model.embed_dim
        sizes = (0, 1, model.vit.cfg.width), (0, Q, D), (0, Q, E)
        return EncodedImages(*(torch.empty(size, device=model.device) for size in sizes))
    parts = list(encoded_batches(model, photos, rows, workers))
    return EncodedImages(*map(torch.cat, zip(*parts, strict=True)))


def report(gallery: Gallery, itc: Tensor, itm: Tensor | None, k: int) -> dict:
    """Recalls of the whole gallery and of its subsets, both directions, beside chance and shuffled pictures."""
    positives = gallery.positives
    N, M = positives.shape

    def both(photos: Tensor, i2t_positives: Tensor, by_itm: bool) -> dict:
        """Queries are some photos and their texts; candidates are always all."""
        texts = torch.isin(gallery.owner, photos).nonzero().squeeze(1)
        found = {}
        for way, rows, first, second, truth in (
            ("image_to_text", photos, itc, itm, i2t_positives),
            ("text_to_image", texts, itc.T, None if itm is None else itm.T, i2t_positives.T),
        ):
            first, truth = first[rows], truth[rows]
            rank = reranked_ranks(first, second[rows], truth, k) if by_itm else ranks(first, truth)
            found[way] = recalls(rank)
        return found

    everything = torch.arange(N)
    shuffled = positives.roll(N // 2, dims=0)  # to each picture the captions of another, far away from any twin
    out = {
        "photos": N,
        "texts": M,
        "k": k,
        "chance": {"image_to_text": chance(positives), "text_to_image": chance(positives.T)},
        "itc": both(everything, positives, False),
    }
    if itm is not None:
        out["reranked"] = both(everything, positives, True)
    out["shuffled pictures"] = both(everything, shuffled, itm is not None)
    subsets = gallery.subsets()
    out["subsets"] = {name: both(photos, positives, itm is not None) for name, photos in subsets.items()}
    if "swapped" in subsets:
        out["twins"] = twins(subsets["swapped"], itc, itm)
    out["mistakes"] = mistakes(gallery, itc, itm, k)
    return out


def twins(swapped: Tensor, itc: Tensor, itm: Tensor | None) -> dict[str, float]:
    """Pictures that differ by a swap only: how often a picture prefers its own caption to its twin's, in per cent."""
    first, second = swapped.view(-1, 2).T
    found = {}
    for name, scores in (("itc", itc), ("itm", itm)):
        if scores is not None:
            own = torch.cat((scores[first, first], scores[second, second]))
            other = torch.cat((scores[first, second], scores[second, first]))
            found[name] = 100 * (own > other).double().mean().item()
    return found


def mistakes(gallery: Gallery, itc: Tensor, itm: Tensor | None, k: int, count: int = 5) -> list[dict]:
    """The first pictures whose best caption is not theirs, in words."""
    found = itc.topk(1 if itm is None else min(k, itc.shape[1]), dim=1).indices
    order = (itc if itm is None else itm).gather(1, found)
    best = found.gather(1, order.argmax(dim=1, keepdim=True)).squeeze(1)
    wrong = (gallery.owner[best] != torch.arange(len(best))).nonzero().squeeze(1)[:count]
    return [
        {
            "picture": gallery.photos.name(gallery.rows[photo]),
            "found": gallery.texts[best[photo]],
            "its own": gallery.texts[gallery.positives[photo].nonzero()[0].item()],
        }
        for photo in wrong.tolist()
    ]


def table(result: dict) -> str:
    """The result as a small table."""
    rows = [("chance", result["chance"]), ("shuffled pictures", result["shuffled pictures"]), ("ITC", result["itc"])]
    if "reranked" in result:
        rows.append((f"ITM re-ranks {result['k']}", result["reranked"]))
    rows += [(f"- {name}", numbers) for name, numbers in result["subsets"].items()]
    lines = [
        f"{result['photos']:,} pictures, {result['texts']:,} captions, {result['seconds']:.0f} s",
        f"{'':20}  picture finds caption     caption finds picture",
        f"{'':20}  R@1    R@5    R@10       R@1    R@5    R@10",
    ]
    for name, numbers in rows:
        cells = "     ".join("".join(f"{v:5.1f}  " for v in way.values()) for way in numbers.values())
        lines.append(f"{name:20}  {cells}".rstrip())
    if "twins" in result:
        pairs = ", ".join(f"{name.upper()} {share:.1f} %" for name, share in result["twins"].items())
        lines.append(f"own caption preferred to that of the picture with the swap (chance 50 %): {pairs}")
    for mistake in result["mistakes"]:
        lines.append(f'mistake: {mistake["picture"]} found "{mistake["found"]}", its own is "{mistake["its own"]}"')
    return "\n".join(lines)


# --- captions --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def captioning(model: Blip2, photos: Mixture, workers: int = 0, prompt: str = "") -> dict:
    """BLEU-1 to 4 and CIDEr-D of the captions of all photos, beside those of shuffled photos, and some examples.

    Beam search with 5 beams, at most 30 new tokens (paper, Table 7).
    """
    started, was_training = time.time(), model.training
    model.eval()
    gallery = Gallery(photos)
    N, captions = len(gallery.rows), []
    for images in encoded_batches(model, photos, gallery.rows[shard(N)], workers):
        captions += model.caption(images, prompt)
    captions = sum(gather_objects(captions), [])
    model.train(was_training)
    people = [[] for _ in range(N)]  # each photo's captions by people
    for text, owner in zip(gallery.texts, gallery.owner.tolist(), strict=True):
        people[owner].append(text)
    names = [photos.name(row) for row in gallery.rows]
    shuffled = captions[N // 2 :] + captions[: N // 2]  # to each photo what was said of another
    every = max(1, N // 10)
    return {
        "photos": N,
        "distinct captions": len(set(captions)),
        **caption_scores(captions, people),
        "shuffled pictures": caption_scores(shuffled, people),
        "examples": [{"picture": names[i], "caption": captions[i], "people": people[i]} for i in range(0, N, every)],
        "captions": dict(zip(names, captions, strict=True)),
        "seconds": round(time.time() - started, 1),
    }


def caption_scores(captions: list[str], people: list[list[str]]) -> dict[str, float]:
    """BLEU-1 to 4 and CIDEr-D, in per cent as papers give them."""
    said = [caption_words(caption) for caption in captions]
    references = [[caption_words(text) for text in texts] for texts in people]
    scores = {f"BLEU-{n + 1}": score for n, score in enumerate(bleu(said, references))}
    return {name: 100 * score for name, score in (scores | {"CIDEr": cider(said, references)}).items()}


def caption_table(result: dict) -> str:
    """The result of `captioning` as a small table, and the examples."""
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr")
    lines = [
        f"{result['photos']:,} photos, {result['distinct captions']:,} distinct captions, {result['seconds']:.0f} s",
        f"{'':18}" + "".join(f"{name:>8}" for name in names),
    ]
    for row, scores in (("shuffled photos", result["shuffled pictures"]), ("captions", result)):
        lines.append(f"{row:18}" + "".join(f"{scores[name]:8.1f}" for name in names))
    for example in result["examples"]:
        lines.append(f'{example["picture"]}: "{example["caption"]}"; a person: "{example["people"][0]}"')
    return "\n".join(lines)


# --- answers ---------------------------------------------------------------------------------------------------------

BLANK = Image.new("RGB", (64, 64), (178, 178, 178))  # the shapes world with nothing in it
SEEN = "seen"  # questions in wordings, about pairs of colour and shape, that some text or picture has shown


@torch.no_grad()
def answering(model: Blip2, photos: Mixture, per_picture: int = 4, controls: bool = True) -> dict:
    """Zero-shot question answering in the shapes world: the share of right answers, in per cent, by subset.

    The model has been trained on captions alone, the language model on text alone. Beside it, if asked for: the
    majority answer to that kind of question, a blank picture, another picture, and as the ceiling the language model
    given the true caption as text. "held-out pairs" counts only questions about such a pair. A caption is right if it
    tells the scene in one of the wordings.
    """
    started, was_training = time.time(), model.training
    model.eval()
    world_, N = photos.parts[0], len(photos)
    mine = range(N)[shard(N)]
    asked = [chosen_questions(world_, photos.find(row)[1], per_picture) for row in mine]
    texts = [[question for _, _, question, _ in group] for group in asked]
    images = encode_photos(model, photos, list(mine), 0)
    given = {"the picture": images}
    if controls:
        given["a blank picture"] = EncodedImages(
            *(t.expand(len(mine), *t.shape[1:]) for t in model.encode_image([BLANK]))
        )
        others = [photos.picture((row + N // 2) % N) for row in mine]
        given["another picture"] = model.encode_image(others) if others else images
    said = {name: model.ask(encoded, texts) if len(mine) else [] for name, encoded in given.items()}
    if controls:
        flat = [
            (clean_caption(photos.captions(row)[0]), question) for row, group in zip(mine, texts) for question in group
        ]
        left = iter(answers_to_text(model, flat))
        said["the true caption as text"] = [[next(left) for _ in group] for group in texts]
        usual = majority_answers()
        said["the majority answer"] = [[usual[kind] for _, kind, _, _ in group] for group in asked]
    captions = model.caption(images) if len(mine) else []
    told = [caption in told_right(world_.scene(photos.find(row)[1])) for row, caption in zip(mine, captions)]
    rows = [
        {"picture": row, "subset": subset, "kind": kind, "question": question, "answer": answer}
        | {name: answers[i][j] for name, answers in said.items()}
        for i, (row, group) in enumerate(zip(mine, asked))
        for j, (subset, kind, question, answer) in enumerate(group)
    ]
    rows, told = sum(gather_objects(rows), []), sum(gather_objects(told), [])
    model.train(was_training)

    def share(name: str, chosen: list[dict]) -> float:
        return 100 * sum(row[name] == row["answer"] for row in chosen) / max(1, len(chosen))

    subsets = dict.fromkeys(row["subset"] for row in rows)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    wrong = [row for row in rows if row["the picture"] != row["answer"]]
    return {
        "pictures": N,
        "questions": len(rows),
        "accuracy": {
            name: {"all": share(name, rows)}
            | {subset: share(name, [row for row in rows if row["subset"] == subset]) for subset in subsets}
            for name in said
        },
        "kinds": {kind: share("the picture", [row for row in rows if row["kind"] == kind]) for kind in kinds},
        "captions right": 100 * sum(told) / len(told),
        "mistakes": [
            {"picture": photos.name(row["picture"]), "caption": photos.captions(row["picture"])[0]}
            | {key: row[key] for key in ("question", "answer", "the picture")}
            for row in wrong[:: max(1, len(wrong) // 5)][:5]
        ],
        "seconds": round(time.time() - started, 1),
    }


def chosen_questions(world_: Shapes, index: int, count: int) -> list[tuple[str, str, str, str]]:
    """Some questions about a picture, always the same: (subset, kind, question, answer)."""
    subset, asked = world_.subset(index), world_.questions(index)
    if subset == "held-out pairs":  # what is asked and answered, not what else is in the picture
        words = [{*f"{question} {answer}".replace("?", "").split()} for _, question, answer in asked]
        asked = [q for q, said in zip(asked, words) if any({*pair} <= said for pair in shapes.HELD_OUT_PAIRS)]
    name = subset if subset.startswith("held-out") else SEEN
    chosen = world_.rng(index, "asked").sample(asked, min(count, len(asked)))
    return [(name, *question) for question in chosen]


def majority_answers() -> dict[str, str]:
    """The most frequent answer to each kind of question, in training."""
    world_, counts = shapes.ShapesWorld("train"), {}
    for index in range(2000):
        for kind, _, answer in world_.questions(index):
            counts.setdefault(kind, Counter())[answer] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}


def told_right(scene: shapes.Scene) -> set[str]:
    """All captions that are true of the scene."""
    return {
        clean_caption(caption)
        for order in permutations(scene)
        for held_out in (False, True)
        for caption in shapes.captions(order, held_out)
    }


def answers_to_text(model: Blip2, asked: list[tuple[str, str]], batch_size: int = 64) -> list[str]:
    """What the language model answers alone, given a (description, question) each, in the place of visual embeddings
    the description."""
    texts, answers = model.llm_texts, []
    for part in batches_of(asked, batch_size):
        descriptions, questions = map(list, zip(*part))
        prompts = texts.encode_prompts([ask_in(model.template, question) for question in questions])
        ids = [told + prompt for told, prompt in zip(texts.encode(descriptions), prompts)]
        prompt_ids, mask = pad(ids, texts.pad_id, model.llm.layout.pads, multiple=1)
        embedded = model.llm.embed(prompt_ids.to(model.device))
        decoder = model.llm.decoder_for(embedded, mask.to(model.device), ANSWERS["max_new_tokens"])
        groups = generate(decoder, end_id=texts.end_id, **ANSWERS)  # as `Blip2.ask` does
        answers += [texts.decode(group[0]) for group in groups]
    return answers


def answer_table(result: dict) -> str:
    """The result of `answering` as a small table."""
    subsets = list(result["accuracy"]["the picture"])
    lines = [
        f"{result['questions']:,} questions about {result['pictures']:,} pictures, {result['seconds']:.0f} s",
        f"{'right answers, %':26}" + "".join(f"{subset:>19}" for subset in subsets),
    ]
    order = ("the majority answer", "a blank picture", "another picture", "the picture", "the true caption as text")
    for name in order:
        if name in result["accuracy"]:
            shares = result["accuracy"][name].values()
            lines.append(f"{name:26}" + "".join(f"{share:19.1f}" for share in shares))
    lines.append("by kind: " + ", ".join(f"{kind} {share:.1f}" for kind, share in result["kinds"].items()))
    lines.append(f"captions that are right: {result['captions right']:.1f} %")
    for m in result["mistakes"]:
        lines.append(f'mistake: {m["picture"]}, "{m["caption"]}": {m["question"]} {m["the picture"]} ({m["answer"]})')
    return "\n".join(lines)


# --- the command line ------------------------------------------------------------------------------------------------


def trained_losses(checkpoint: Path) -> str:
    """With which losses a run was trained; all three, if it does not say so."""
    config = read_json(checkpoint / "config.json") if checkpoint.is_dir() else {}
    return config.get("train", {}).get("losses", "itc,itm,itg")


# What is asked when nothing else is, about the picture that ships with the code.
PICTURE = os.path.relpath(TINY / "picture.png")
FIRST_QUESTIONS = ("how many shapes are there?", "what color is the star?", "is the cross small or large?")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def ask(model: Blip2, args: argparse.Namespace) -> list[dict]:
    """Caption, or answer about, a photo or all photos of a folder, as the command line says."""
    path, built_in = Path(args.image), args.image == PICTURE and model.llm is not None
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"--image {path} has no pictures in it, expected files that end in {', '.join(PICTURES)}")
    questions = args.question or (list(FIRST_QUESTIONS) if built_in and not args.prompt else [])
    decoding = {"num_beams": args.beams}
    if args.max_new_tokens is not None:
        decoding["max_new_tokens"] = args.max_new_tokens
    rows = []
    for part in batches_of(paths, 16):
        readable = {}
        for name in part:
            try:
                readable[name] = open_picture(name)
            except UserError as error:
                if len(paths) == 1:
                    raise
                say(f"skipped: {error}")
        if not readable:
            continue
        images = model.encode_image(list(readable.values()))
        said = {} if args.question or args.prompt else {"caption": model.caption(images, **decoding)}
        if args.prompt:
            said[args.prompt] = model.ask(images, args.prompt, template="{}", **decoding)
        said |= {question: model.ask(images, question, **decoding) for question in questions}
        for i, name in enumerate(readable):
            say(f"{name}", *(f"  {asked}: {answers[i]}" for asked, answers in said.items()))
            rows.append({"image": str(name), **{asked: answers[i] for asked, answers in said.items()}})
    return rows


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


def main(argv: list[str] | None = None) -> dict | list | None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "ask": "caption a photo, or answer questions about it",
        "retrieval": "recall at 1, 5, 10 in both directions",
        "answers": "share of right answers in the shapes world",
        "captions": "BLEU and CIDEr-D of captions",
    }
    for command, help_ in about.items():
        p = commands.add_parser(command, help=help_)
        default = os.path.relpath(TINY / "blip2") if command == "ask" else None
        p.add_argument("--checkpoint", required=default is None, default=default, help="a run, or a public checkpoint")
        p.add_argument("--vit", help="the frozen encoder, if it is not where the run says")
        p.add_argument("--bert", help="for a .pth: the BERT folder")
        p.add_argument("--llm", help="the frozen language model, if it is not where the run says")
        p.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
        p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        p.add_argument("--image-size", type=int, help="of the pictures, if not that of the checkpoint")
        p.add_argument("--out", help="write the result here as JSON")
        if command == "ask":
            p.add_argument("--image", default=PICTURE, help="a photo, or a folder of them")
            p.add_argument("--question", action="append", help="put into the run's template; may be repeated")
            p.add_argument("--prompt", help="any text that the language model goes on from, as it is")
            p.add_argument("--chat", action="store_true", help="a conversation about one photo")
            p.add_argument("--beams", type=int, default=5)
            p.add_argument("--max-new-tokens", type=int, help="default 30 for captions, 10 for answers")
        if command in ("retrieval", "captions"):
            p.add_argument("--data", action="append", help="shapes, or an annotation file; default shapes")
            p.add_argument("--images", help="folder of the photos, if not beside the annotation file")
            p.add_argument("--workers", type=int, default=0, help="processes that decode photos")
        if command in ("retrieval", "captions", "answers"):
            p.add_argument("--split", default="test", help="of shapes and of Karpathy's files")
        if command == "retrieval":
            p.add_argument("--k", type=int, default=K_RERANK, help="how many candidates ITM puts in order")
            p.add_argument("--rerank", default="itm", choices=("itm", "itm+itc"))
        if command == "captions":
            p.add_argument("--prompt", default="", help="what the captions go on from")
    args = parser.parse_args(argv)

    if args.command == "retrieval" and args.k < 1:
        raise UserError(f"got --k {args.k}, expected at least 1")
    for flag in ("beams", "max_new_tokens") if args.command == "ask" else ():
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"got --{flag.replace('_', '-')} {getattr(args, flag)}, expected at least 1")
    if args.command == "ask" and args.chat and Path(args.image).is_dir():
        raise UserError(f"--chat is about one photo, {args.image} is a folder: pass --image with one of its files")
    if args.out and not Path(args.out).parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist, make it first")
    start_processes()
    device = local_device(args.device)
    precision, why = choose_precision(device, args.precision)
    model = Blip2.from_pretrained(
        args.checkpoint, args.vit, args.bert, args.llm, device, precision, image_size=args.image_size
    )
    if args.command == "ask" and args.chat:
        return chat(model, Path(args.image))
    say(f"{args.checkpoint} on {device}, {precision} ({why})")
    if args.command == "ask":
        result = ask(model, args)
    elif args.command == "answers":
        model.need_llm()
        result = answering(model, open_photos(["shapes"], args.split, model.image_size))
        say(answer_table(result))
    else:
        photos = open_photos(args.data or ["shapes"], args.split, model.image_size, args.images)
        if args.command == "captions":
            result = captioning(model, photos, args.workers, args.prompt)
            say(caption_table(result))
        else:
            match = "itm" in trained_losses(Path(args.checkpoint))
            result = retrieval(model, photos, args.k, args.rerank, match, args.workers)
            say(table(result))
    if args.out and world()[0] == 0:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(say_sentence(main))
