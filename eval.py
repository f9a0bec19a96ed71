"""Evaluation. `python eval.py retrieval --checkpoint runs/stage1`: captions for pictures and pictures for captions.

Retrieval (paper 4.4): candidates are ranked by ITC, then the first k are put in the order of ITM. Each photo goes
through the ViT once, each needed pair through the ITM pass once. Works the same on any number of processes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from blip2 import PRECISIONS, Blip2, EncodedImages, EncodedTexts, batches_of, choose_precision, local_device
from data import Mixture, Shapes, UserError, open_photos, picture_loader, read_json, say_sentence
from losses import all_gather, start_processes, world
from metrics import chance, ranks, recalls, reranked_ranks

K_RERANK = 128  # the original's and, by its code, the paper's


def say(*lines: str) -> None:
    """Print, on the first process."""
    if world()[0] == 0:
        print(*lines, sep="\n", flush=True)


def clock(seconds: float) -> str:
    """ "2h05m", "3m10s", "12s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


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


def encode_photos(model: Blip2, photos: Mixture, rows: list[int], workers: int) -> EncodedImages:
    """Features of some photos; their ViT tokens stay in memory, in the ViT's precision."""
    parts = []
    if not rows:  # fewer photos than processes
        Q, D, E = model.qformer.cfg.num_queries, model.qformer.cfg.width, model.embed_dim
        sizes = (0, 1, model.vit.cfg.width), (0, Q, D), (0, Q, E)
        return EncodedImages(*(torch.empty(size, device=model.device) for size in sizes))
    if photos.cached:
        for part in batches_of(rows, 64):
            parts.append(model.encode_tokens(photos.tokens(part)))
    else:
        for _, broken, pictures in picture_loader(photos, model.image_size, rows, workers):
            for reason in broken.values():  # to leave a photo out would make the numbers incomparable
                raise UserError(f"evaluation needs every photo: {reason}")
            parts.append(model.encode_image(pictures))
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


def trained_losses(checkpoint: Path) -> str:
    """With which losses a run was trained; all three, if it does not say so."""
    config = read_json(checkpoint / "config.json") if checkpoint.is_dir() else {}
    return config.get("train", {}).get("losses", "itc,itm,itg")


def main(argv: list[str] | None = None) -> dict | None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("retrieval", help="recall at 1, 5, 10 in both directions")
    p.add_argument("--checkpoint", required=True, help="a run folder, or a LAVIS stage-1 .pth")
    p.add_argument("--data", action="append", help="shapes, or an annotation file; default shapes")
    p.add_argument("--images", help="folder of the photos, if not beside the annotation file")
    p.add_argument("--split", default="test", help="of shapes and of Karpathy's files")
    p.add_argument("--k", type=int, default=K_RERANK, help="how many candidates ITM puts in order")
    p.add_argument("--rerank", default="itm", choices=("itm", "itm+itc"))
    p.add_argument("--vit", help="the frozen encoder, if it is not where the run says")
    p.add_argument("--bert", help="for a .pth: the BERT folder")
    p.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    p.add_argument("--workers", type=int, default=0, help="processes that decode photos")
    p.add_argument("--out", help="write the numbers here as JSON")
    args = parser.parse_args(argv)

    if args.k < 1:
        raise UserError(f"got --k {args.k}, expected at least 1")
    if args.out and not Path(args.out).parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist, make it first")
    start_processes()
    device = local_device("auto")
    precision, why = choose_precision(device, args.precision)
    model = Blip2.from_pretrained(args.checkpoint, args.vit, args.bert, device, precision)
    photos = open_photos(args.data or ["shapes"], args.split, model.image_size, args.images)
    say(f"{args.checkpoint} on {device}, {precision} ({why})")
    match = "itm" in trained_losses(Path(args.checkpoint))
    result = retrieval(model, photos, args.k, args.rerank, match, args.workers)
    say(table(result))
    if args.out and world()[0] == 0:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(say_sentence(main))
