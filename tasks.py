"""What the paper measures: retrieval (4.4), captions (4.2), answers (4.1, 4.3), as functions of a model and photos.

Each gives a dictionary of numbers and examples, and has a `*_table` that shows it. The same on any number of processes:
batches are formed before they are spread, so that a batch, and with it every number, does not depend on how many there
are.

Retrieval: candidates are ranked by ITC, then the first k are put in the order of ITM. Each photo goes through the ViT
once, each needed pair through the ITM pass once.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import shapes
from blip2 import (
    ANSWERS,
    PRECISIONS,
    Blip2,
    EncodedImages,
    EncodedTexts,
    batches_of,
)
from data import (
    Mixture,
    PictureFiles,
    Shapes,
    UserError,
    ask_in,
    clean_caption,
    clean_question,
    pad,
    picture_loader,
)
from generate import generate
from losses import all_gather, barrier, gather_objects, say, world
from metrics import (
    any_match,
    bleu,
    caption_words,
    chance,
    cider,
    direct_answer_accuracy,
    gqa_match,
    lemmatize,
    ranks,
    recalls,
    reranked_ranks,
    rouge_l,
    vqa_accuracy,
)
from weights import sha256, weight_files

K_RERANK = 128  # the original's and, by its code, the paper's
PHOTOS, TEXTS = 64, 256  # in a batch
METRICS = {  # of one answer, given what people have answered
    "vqa": vqa_accuracy,  # VQAv2, OK-VQA: a tenth of the people may be wrong
    "gqa": gqa_match,
    "direct": direct_answer_accuracy,  # A-OKVQA
    "any": any_match,  # where there are fewer answers than ten
}
WRITTEN = dict(num_beams=5, max_new_tokens=30, min_new_tokens=1, length_penalty=1.0, repetition_penalty=1.0)


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

    @cached_property
    def positives(self) -> torch.Tensor:
        """(N, M) bool: of which photo each text is. Only retrieval needs so much memory."""
        return torch.arange(len(self.rows))[:, None] == self.owner

    def captions(self) -> list[list[str]]:
        """Those of each photo."""
        people = [[] for _ in self.rows]
        for text, owner in zip(self.texts, self.owner.tolist(), strict=True):
            people[owner].append(text)
        return people

    def field(self, photo: int, name: str):
        """What the annotation file says of the photo under that name, if it does."""
        part, row = self.photos.find(self.rows[photo])
        return None if isinstance(self.photos.parts[part], Shapes) else self.photos.parts[part].record(row).get(name)

    def public_id(self, photo: int) -> int | str:
        """The image_id of the annotation file, as a number if it is one; else the name of the photo."""
        image_id, name = self.field(photo, "image_id"), Path(self.photos.name(self.rows[photo])).name
        of_coco = re.fullmatch(r"COCO_\w+_0*(\d+)\.\w+", name)  # LAVIS's files have no id, or one of their own
        if of_coco and not str(image_id).isdigit():
            return int(of_coco[1])
        if image_id is None:
            return name
        return int(image_id) if str(image_id).isdigit() else image_id

    def subsets(self) -> dict[str, Tensor]:
        """The named parts of the shapes world's test split -> photo numbers."""
        parts = self.photos.parts
        if len(parts) > 1 or not isinstance(parts[0], Shapes) or not parts[0].subsets:
            return {}
        names = [parts[0].subsets[self.photos.find(row)[1]] for row in self.rows]
        return {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}


def shares(count: int, together: int = PHOTOS) -> list[slice]:
    """Which of `count` things each process works on. Batches of `together` stay whole, so that a batch, and with it
    every number, is the same for any number of processes."""
    batches, size = -(-count // together), world()[1]
    ends = [min(count, batches * rank // size * together) for rank in range(size + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:])]


def shard(count: int, together: int = PHOTOS) -> slice:
    """This process's share."""
    return shares(count, together)[world()[0]]


def gather_shards(x: Tensor, count: int, together: int = PHOTOS) -> Tensor:
    """The rows of all processes' shares -> (count, ...), in order."""
    sizes = [share.stop - share.start for share in shares(count, together)]
    if len(sizes) == 1:
        return x
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = all_gather(padded).unflatten(0, (len(sizes), max(sizes)))
    return torch.cat([part[:rows] for part, rows in zip(parts, sizes)])


class Kept:
    """What an interrupted evaluation has done, in `folder`, so that it is not done again; without a folder, nothing is
    kept. Each process writes the results of its batches as they come, and reads those of all."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.done: dict[str, object] = {}
        lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.open()] if folder else []
        for line in lines:
            if line.endswith("\n"):  # else it was cut off
                self.done |= json.loads(line)
        if self.done:
            say(f"going on with {folder}: {len(self.done):,} batches are there")
        barrier()  # nobody writes before all have read
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = folder / f"{world()[0]}-{time.time_ns()}.jsonl"  # a new one: the last line of an old may be cut

    def add(self, name: str, result) -> None:
        """Keep the result of a batch, which JSON must be able to hold."""
        self.done[name] = result
        if self.folder:
            with open(self.file, "a") as file:
                file.write(json.dumps({name: result}) + "\n")


def by_batches(kept: Kept, name: str, count: int, work, together: int = PHOTOS) -> list:
    """The results of work(rows) for all batches of `together` rows, in order; those of all processes.

    `work` takes this process's batches that are not done yet, and yields their results one by one. What takes long
    says how long.
    """
    batches = [range(start, min(count, start + together)) for start in range(0, count, together)]
    mine = [i for i in range(len(batches))[shard(len(batches), 1)] if f"{name} {i}" not in kept.done]
    started = said = time.time()
    for number, (i, result) in enumerate(zip(mine, work([batches[i] for i in mine]), strict=True), start=1):
        kept.add(f"{name} {i}", result)
        if (now := time.time()) - said > 30:
            eta = clock((now - started) / number * (len(mine) - number))
            say(f"  {name.split()[0]}: {number:,} of {len(mine):,} batches, eta {eta}")
            said = now
    for part in gather_objects({f"{name} {i}": kept.done[f"{name} {i}"] for i in mine}):
        kept.done |= part
    return [kept.done[f"{name} {i}"] for i in range(len(batches))]


@torch.no_grad()
def retrieval(
    model: Blip2,
    photos: Mixture,
    k: int = K_RERANK,
    rerank: str = "itm",
    match: bool = True,
    workers: int = 0,
    kept: Kept | None = None,
) -> dict:
    """Recall at 1, 5, 10 in both directions, by ITC alone and re-ranked by ITM.

    rerank: "itm", by the matching score alone (the paper), or "itm+itc", which adds the raw cosine to the raw match
    logit (the original). match=False leaves ITM out, for a model that was trained without it. Returns the numbers.
    """
    started, was_training = time.time(), model.training
    model.eval()
    gallery = Gallery(photos)
    N, M = gallery.positives.shape
    images = encode_photos(model, photos, gallery.rows[shard(N)], workers)
    feats = gather_shards(images.feats, N)
    ids = model.texts.encode(gallery.texts)
    order = sorted(range(M), key=lambda i: len(ids[i]))  # so that a batch of any process needs little padding
    mine = model.encode_text([gallery.texts[i] for i in order[shard(M, TEXTS)]], batch_size=TEXTS)
    text_feats = torch.empty(M, model.embed_dim, device=model.device)
    text_feats[order] = gather_shards(mine.feats, M, TEXTS)
    padded = pad(ids, model.texts.pad_id)
    texts = EncodedTexts(*padded, mine.cls[:0], text_feats)  # nothing here reads the unprojected [CLS]
    itc = torch.cat([model.itc_scores(EncodedImages(part, part, part), texts) for part in batches_of(feats, 64)]).cpu()

    itm = None
    if match:
        # The pairs that any photo or any text wants judged, each once; a process judges those of its photos.
        wanted = torch.zeros(N, M, dtype=torch.bool)
        wanted.scatter_(1, itc.topk(min(k, M), dim=1).indices, True)
        wanted |= torch.zeros(M, N, dtype=torch.bool).scatter_(1, itc.T.topk(min(k, N), dim=1).indices, True).T
        swapped = gallery.subsets().get("swapped", torch.arange(0)).view(-1, 2)
        wanted[swapped[:, :, None], swapped[:, None]] = True  # for `twins`, however far apart ITC has put them
        itm = judge(model, images, texts, wanted, rerank, kept or Kept(None)) + (0 if rerank == "itm" else itc)
    model.train(was_training)
    return {
        "task": "retrieval",
        **report(gallery, itc, itm, k),
        "rerank": rerank,
        "seconds": round(time.time() - started, 1),
    }


def judge(model: Blip2, images: EncodedImages, texts: EncodedTexts, wanted: Tensor, rerank: str, kept: Kept) -> Tensor:
    """ITM's score of the wanted pairs: (N, M) bool over all photos -> (N, M), -inf for the others; `images` are those
    of this process's share.

    The log-odds order pairs as the probability does, without its ties at 1.
    """
    first = shard(len(wanted)).start

    def work(batches: list[range]):
        for photos in batches:
            rows, columns = wanted[photos.start : photos.stop].nonzero(as_tuple=True)
            logits = model.match_logits(images, texts, rows + photos.start - first, columns)
            yield (logits[:, 1] - (logits[:, 0] if rerank == "itm" else 0)).tolist()

    scores = torch.full(wanted.shape, float("-inf"))
    pairs = hashlib.sha256(np.packbits(wanted.numpy()).tobytes()).hexdigest()[:12]
    scores[wanted] = torch.tensor(sum(by_batches(kept, f"pairs {pairs}", len(wanted), work), []))
    return scores


def encoded_batches(model: Blip2, photos: Mixture | PictureFiles, batches: list[list[int]], workers: int):
    """Features of some photos, batch by batch."""
    if photos.cached:
        for rows in batches:
            yield model.encode_tokens(photos.tokens(rows))
    else:
        for _, broken, pictures in picture_loader(photos, model.image_size, batches, workers):
            for reason in broken.values():  # to leave a photo out would make the numbers incomparable
                raise UserError(f"every photo is needed here, and {reason}")
            yield model.encode_image(pictures)


def encode_photos(model: Blip2, photos: Mixture, rows: list[int], workers: int) -> EncodedImages:
    """Features of some photos; their ViT tokens stay in the host's memory, in the ViT's precision."""
    if not rows:  # fewer photos than processes
        Q, D, E = model.qformer.cfg.num_queries, model.qformer.cfg.width, model.embed_dim
        sizes = (0, 1, model.vit.cfg.width), (0, Q, D), (0, Q, E)
        return EncodedImages(*(torch.empty(size, device=model.device) for size in sizes))
    batches = encoded_batches(model, photos, list(batches_of(rows, PHOTOS)), workers)
    parts = [images._replace(tokens=images.tokens.cpu()) for images in batches]  # of 5,000 photos these are gigabytes
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
def captioning(
    model: Blip2, photos: Mixture, workers: int = 0, prompt: str | None = None, kept: Kept | None = None, **decoding
) -> dict:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of the captions of all photos, beside those of shuffled photos; some examples.

    decoding: see `generate.generate`; by default that of the preset captions-v1. The photos of NoCaps are also counted
    by domain.
    """
    started, was_training = time.time(), model.training
    model.eval()
    gallery = Gallery(photos)
    N, decoding = len(gallery.rows), decoding or WRITTEN

    def work(batches: list[range]):
        rows = [gallery.rows[batch.start : batch.stop] for batch in batches]
        for images in encoded_batches(model, photos, rows, workers):
            yield model.caption(images, prompt, **decoding)

    captions = sum(by_batches(kept or Kept(None), "captions", N, work), [])
    model.train(was_training)
    people = gallery.captions()
    names = [photos.name(row) for row in gallery.rows]
    shuffled = captions[N // 2 :] + captions[: N // 2]  # to each photo what was said of another
    domains = [gallery.field(photo, "domain") for photo in range(N)]
    every = max(1, N // 10)
    return {
        "task": "captions",
        "photos": N,
        "distinct captions": len(set(captions)),
        **caption_scores(captions, people),
        "shuffled pictures": caption_scores(shuffled, people),
        "domains": {
            domain: caption_scores(*zip(*[(c, p) for c, p, d in zip(captions, people, domains) if d == domain]))
            for domain in dict.fromkeys(domains)
            if domain
        },
        "examples": [{"picture": names[i], "caption": captions[i], "people": people[i]} for i in range(0, N, every)],
        "captions": dict(zip(names, captions, strict=True)),
        # What the COCO server, and pycocoevalcap, read.
        "predictions": [{"image_id": gallery.public_id(i), "caption": captions[i]} for i in range(N)],
        "seconds": round(time.time() - started, 1),
    }


def caption_scores(captions: list[str], people: list[list[str]]) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D, in per cent as papers give them; nothing where people have said nothing."""
    if not all(people):
        return {}
    said = [caption_words(caption) for caption in captions]
    references = [[caption_words(text) for text in texts] for texts in people]
    scores = {f"BLEU-{n + 1}": score for n, score in enumerate(bleu(said, references))}
    scores |= {"ROUGE-L": rouge_l(said, references), "CIDEr": cider(said, references)}
    return {name: 100 * score for name, score in scores.items()}


def caption_table(result: dict) -> str:
    """The result of `captioning` as a small table, and the examples."""
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
    lines = [
        f"{result['photos']:,} photos, {result['distinct captions']:,} distinct captions, {clock(result['seconds'])}"
    ]
    whole = "overall" if result["domains"] else "captions"
    rows = [("shuffled photos", result["shuffled pictures"]), *result["domains"].items(), (whole, result)]
    if "CIDEr" not in result:
        lines.append(
            "not every photo has captions of people, so there is nothing to compare with: --predictions writes"
        )
        lines.append("what was said")
    if "CIDEr" in result:
        lines.append(f"{'':18}" + "".join(f"{name:>8}" for name in names))
        lines += [f"{row:18}" + "".join(f"{scores[name]:8.1f}" for name in names) for row, scores in rows]
    for example in result["examples"]:
        person = f'; a person: "{example["people"][0]}"' if example["people"] else ""
        lines.append(f'{example["picture"]}: "{example["caption"]}"{person}')
    return "\n".join(lines)


# --- questions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vqa(
    model: Blip2,
    photos: Mixture,
    workers: int = 0,
    template: str | None = None,
    candidates: list[str] | None = None,
    clean: bool = False,
    metric: str | None = None,
    lemmatized: bool = False,
    kept: Kept | None = None,
    **decoding,
) -> dict:
    """Accuracy of the answers to all questions, in per cent, also by type of answer and of question; some examples.

    The model writes its answers, or with `candidates` takes the likeliest of these. clean: questions as the original
    has them, see `data.clean_question`. metric: one of `METRICS`; if not given, the official one where each question
    has ten answers, else whether the answer is one of those given. Each photo is encoded once for all its questions.
    """
    started, was_training = time.time(), model.training
    model.eval()
    records = [photos.record(row) for row in range(len(photos))]
    asked: dict[int, list[int]] = {}  # image_id -> rows
    for row in range(len(photos)):
        asked.setdefault(photos.image_id(row), []).append(row)
    groups = list(asked.values())

    def work(batches: list[range]):
        firsts = [[groups[i][0] for i in batch] for batch in batches]
        for batch, images in zip(batches, encoded_batches(model, photos, firsts, workers), strict=True):
            questions = [[records[row]["question"] for row in groups[i]] for i in batch]
            if clean:
                questions = [list(map(clean_question, group)) for group in questions]
            if candidates:
                ranked = model.rank(images, questions, candidates, template)
                yield [[order[0].answer for order in group] for group in ranked]
            else:
                yield model.ask(images, questions, template, **(decoding or ANSWERS))

    answers: list[str] = [""] * len(photos)
    said = sum(by_batches(kept or Kept(None), "questions", len(groups), work), [])
    for rows, texts in zip(groups, said, strict=True):
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    model.train(was_training)
    every = max(1, len(records) // 10)
    return {
        "task": "vqa",
        "photos": len(groups),
        "questions": len(records),
        **answer_scores(answers, records, metric, lemmatized),
        "examples": [
            {"picture": photos.name(row), "question": records[row]["question"], "answer": answers[row]}
            | {"people": list(dict.fromkeys(records[row]["answer"]))}
            for row in range(0, len(records), every)
        ],
        # What the VQA server reads.
        "predictions": [
            {"question_id": record.get("question_id", row), "answer": answer}
            for row, (record, answer) in enumerate(zip(records, answers, strict=True))
        ],
        "seconds": round(time.time() - started, 1),
    }


def answer_scores(answers: list[str], records: list[dict], metric: str | None, lemmatized: bool) -> dict:
    """Accuracies in per cent, of the model and of who always says the most frequent answer, and if asked for of the
    lemmas of the model's answers; nothing for a test set without answers."""
    people = [record["answer"] for record in records]
    if not all(people):
        return {"metric": None}
    fewer = sum(len(texts) != 10 for texts in people)
    metric = metric or ("any" if fewer else "vqa")
    usual = Counter(text for texts in people for text in texts).most_common(1)[0][0]
    found = {"metric": metric, "questions with another number of answers than ten": fewer, "majority answer": usual}
    said = {"accuracy of the majority answer": [usual] * len(people)}
    said |= {"accuracy of the lemmas": list(map(lemmatize, answers))} if lemmatized else {}
    for name, texts in (said | {"accuracy": answers}).items():
        right = [METRICS[metric](answer, others) for answer, others in zip(texts, people, strict=True)]
        found[name] = mean_percent(right)
    for kind in ("answer_type", "question_type"):
        by_kind: dict[str, list[float]] = {}
        for record, value in zip(records, right, strict=True):
            if kind in record:
                by_kind.setdefault(str(record[kind]), []).append(value)
        if by_kind:
            found[f"by {kind}"] = {name: mean_percent(values) for name, values in sorted(by_kind.items())}
    return found


def mean_percent(values: list[float]) -> float:
    """As the official tool rounds it."""
    return round(100 * sum(values) / len(values), 2)


def vqa_table(result: dict) -> str:
    """The result of `vqa` in a few lines."""
    lines = [f"{result['questions']:,} questions about {result['photos']:,} photos, {clock(result['seconds'])}"]
    if "accuracy" in result:
        fewer, metric = result["questions with another number of answers than ten"], result["metric"]
        why = (
            f": is it one of the answers given? for {fewer:,} questions have not ten of them" if metric == "any" else ""
        )
        lines.append(
            f'accuracy {result["accuracy"]:.2f} % ({metric}{why}); always "{result["majority answer"]}": '
            f"{result['accuracy of the majority answer']:.2f} %"
        )
    if "accuracy of the lemmas" in result:
        lines.append(f"accuracy of the answers' lemmas {result['accuracy of the lemmas']:.2f} %")
    for kind in ("answer_type", "question_type"):
        if f"by {kind}" in result:
            numbers = list(result[f"by {kind}"].items())
            more = f", and {len(numbers) - 12} more" if len(numbers) > 12 else ""
            lines.append(f"by {kind}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers[:12]) + more)
    for e in result["examples"]:
        people = f" ({', '.join(e['people'])})" if e["people"] else ""
        lines.append(f"{e['picture']}: {e['question']} {e['answer']}{people}")
    return "\n".join(lines)


# --- answers in the shapes world --------------------------------------------------------------------------------------

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
    told = [right for *_, right in told_of(model, photos, list(mine), images)]
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
        "task": "answers",
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


@torch.no_grad()
def telling(model: Blip2, photos: Mixture) -> dict:
    """The share of pictures of the shapes world that are told right, in per cent: in one of the wordings."""
    started, was_training = time.time(), model.training
    model.eval()
    mine = list(range(len(photos)))[shard(len(photos))]
    told = sum(gather_objects(told_of(model, photos, mine, encode_photos(model, photos, mine, 0))), [])
    model.train(was_training)
    wrong = [{"picture": name, "said": said, "one of its own": own} for name, said, own, right in told if not right]
    return {
        "task": "telling",
        "pictures": len(photos),
        "captions right": 100 * (1 - len(wrong) / len(told)),
        "mistakes": wrong[:: max(1, len(wrong) // 5)][:5],
        "seconds": round(time.time() - started, 1),
    }


def told_of(model: Blip2, photos: Mixture, rows: list[int], images: EncodedImages) -> list[tuple[str, str, str, bool]]:
    """Of some pictures of the shapes world: name, what the model says, what a person might, is the former true?"""
    said = model.caption(images) if rows else []
    scenes = [photos.parts[0].scene(photos.find(row)[1]) for row in rows]
    return [
        (photos.name(row), clean_caption(caption), photos.captions(row)[0], clean_caption(caption) in told_right(scene))
        for row, caption, scene in zip(rows, said, scenes, strict=True)
    ]


def telling_table(result: dict) -> str:
    """The result of `telling` in a few lines."""
    lines = [
        f"captions that are right: {result['captions right']:.1f} % of {result['pictures']:,} pictures, "
        f"{clock(result['seconds'])}"
    ]
    lines += [f'mistake: {m["picture"]}: "{m["said"]}"; its own is "{m["one of its own"]}"' for m in result["mistakes"]]
    return "\n".join(lines)


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


# --- results ---------------------------------------------------------------------------------------------------------

REPORTS = {
    "retrieval": ("retrieval.json", table),
    "captions": ("captions.json", caption_table),
    "vqa": ("answers.json", vqa_table),
    "answers": ("answers.json", answer_table),
    "telling": ("captions.json", telling_table),
}


def origin(model: Blip2, checkpoint: Path, photos: Mixture, files: list[str]) -> dict:
    """Of which weights and data a result is, by their hashes, and how it was computed."""
    parts = [checkpoint] if checkpoint.is_file() else weight_files(checkpoint)
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == model.amp_dtype)
    return {
        "checkpoint": str(checkpoint),
        "weights": {"sha256": sha256(parts), "vit": model.frozen_sha256("vit")}
        | ({} if model.llm is None else {"llm": model.frozen_sha256("llm")}),
        "data": {"files": files, "sha256": photos.content_sha256()},
        "computed": {"precision": precision, "device": model.device.type, "image_size": model.image_size}
        | ({} if model.llm is None else {"prompt": model.prompt, "template": model.template}),
    }


def write_result(path: Path, result: dict) -> None:
    """As JSON, whole or not at all; without the time it took, so that equal results are equal files, and without the
    predictions, which have a file of their own."""
    kept = {key: value for key, value in result.items() if key not in ("seconds", "predictions")}
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(kept, indent=2) + "\n")
    os.replace(partial, path)
