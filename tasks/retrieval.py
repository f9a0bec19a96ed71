"""Image-text retrieval (paper 4.4): recall at 1, 5, 10, ranked by ITC, then re-ranked by ITM.

Each image goes through the ViT once, each needed pair through the ITM pass once. Letters: N images, M texts.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from blip2 import Blip2, EncodedImages, EncodedTexts, chunked
from engine.progress import progress
from sources.mixture import Mixture
from sources.text import pad
from tasks.batches import TEXTS, Gallery, PartialResults, encode_images, evaluation, gather_shards, map_batches, shard
from tasks.metrics import chance, ranks, recalls, reranked_ranks


@evaluation
def retrieval(
    model: Blip2,
    images: Mixture,
    k: int = 128,  # paper 4.4
    rerank: str = "itm",
    match: bool = True,
    workers: int = 0,
    partial: PartialResults | None = None,
) -> dict:
    """Recall at 1, 5, 10 in both directions, by ITC alone and re-ranked by ITM.

    rerank: "itm", by the matching score alone (the paper), or "itm+itc", which adds the raw cosine to the raw match
    logit (LAVIS). match=False leaves ITM out, for a model that was trained without it.
    """
    gallery = Gallery(images)
    N, M = gallery.positives.shape
    encoded = encode_images(model, images, gallery.rows[shard(N)], workers)
    feats = gather_shards(encoded.feats, N)
    ids = model.tokenizer.encode(gallery.texts)
    order = sorted(range(M), key=lambda i: len(ids[i]))  # little padding in a batch of any rank
    batches = list(chunked([gallery.texts[i] for i in order[shard(M, TEXTS)]], TEXTS))
    mine = [feats[:0, 0], *(model.encode_text(batch).feats for batch in progress(batches, "texts"))]
    text_feats = torch.empty(M, model.embed_dim, device=model.device)
    text_feats[order] = gather_shards(torch.cat(mine), M, TEXTS)
    texts = EncodedTexts(*pad(ids, model.tokenizer.pad_id), text_feats[:0], text_feats)  # [CLS] is not used here
    parts = progress(list(chunked(feats, 64)), "ITC")
    itc = torch.cat([model.itc_scores(EncodedImages(part, part, part), texts) for part in parts]).cpu()

    itm = None
    if match:
        # The pairs among the k best of any image or any text, each once; a rank scores those of its images.
        wanted = torch.zeros(N, M, dtype=torch.bool)
        wanted.scatter_(1, itc.topk(min(k, M), dim=1).indices, True)
        wanted |= torch.zeros(M, N, dtype=torch.bool).scatter_(1, itc.T.topk(min(k, N), dim=1).indices, True).T
        swapped = gallery.subsets().get("swapped", torch.arange(0)).view(-1, 2)
        wanted[swapped[:, :, None], swapped[:, None]] = True  # for `twins`, however far apart ITC has put them
        itm = match_scores(model, encoded, texts, wanted, rerank, partial) + (0 if rerank == "itm" else itc)
    return {"task": "retrieval", **report(gallery, itc, itm, k), "rerank": rerank}


def match_scores(
    model: Blip2, mine: EncodedImages, texts: EncodedTexts, wanted: Tensor, rerank: str, partial: PartialResults | None
) -> Tensor:
    """ITM's score of the wanted pairs: (N, M) bool over all images -> (N, M), -inf for the others; `mine`: the images
    of this rank's share.

    The log-odds order pairs as the probability does, without its ties at 1.
    """
    first = shard(len(wanted)).start

    def work(batches: list[range]):
        for chosen in batches:
            rows, columns = wanted[chosen.start : chosen.stop].nonzero(as_tuple=True)
            logits = model.match_logits(mine, texts, rows + chosen.start - first, columns)
            yield (logits[:, 1] - (logits[:, 0] if rerank == "itm" else 0)).tolist()

    scores = torch.full(wanted.shape, float("-inf"))
    pairs = hashlib.sha256(np.packbits(wanted.numpy()).tobytes()).hexdigest()[:12]
    scores[wanted] = torch.tensor(sum(map_batches(partial, f"pairs {pairs}", len(wanted), work), []))
    return scores


def report(gallery: Gallery, itc: Tensor, itm: Tensor | None, k: int) -> dict:
    """Recalls of the whole gallery and of its subsets, both directions, beside chance and shuffled images."""
    positives = gallery.positives
    N, M = positives.shape

    def both(chosen: Tensor, positives: Tensor, itm: Tensor | None) -> dict:
        """Queries are the chosen images and their texts; candidates are always all."""
        texts, found = torch.isin(gallery.owner, chosen).nonzero().squeeze(1), {}
        for way, rows, order in (("image_to_text", chosen, (0, 1)), ("text_to_image", texts, (1, 0))):
            first, truth = itc.permute(order)[rows], positives.permute(order)[rows]
            rank = ranks(first, truth) if itm is None else reranked_ranks(first, itm.permute(order)[rows], truth, k)
            found[way] = recalls(rank)
        return found

    everything, subsets = torch.arange(N), gallery.subsets()
    shuffled = positives.roll(N // 2, dims=0)  # each image has the captions of another, far from any twin
    out = {"images": N, "texts": M, "k": k}
    out["chance"] = {"image_to_text": chance(positives), "text_to_image": chance(positives.T)}
    out["itc"] = both(everything, positives, None)
    if itm is not None:
        out["reranked"] = both(everything, positives, itm)
    out["shuffled images"] = both(everything, shuffled, itm)
    out["subsets"] = {name: both(chosen, positives, itm) for name, chosen in subsets.items()}
    if "swapped" in subsets:
        out["twins"] = twins(subsets["swapped"], itc, itm)
    out["mistakes"] = mistakes(gallery, itc, itm, k)
    return out


def twins(swapped: Tensor, itc: Tensor, itm: Tensor | None) -> dict[str, float]:
    """Images that differ by a swap only: how often an image prefers its own caption to its twin's, in per cent."""
    twin, found = swapped.view(-1, 2).flip(1).flatten(), {}
    for name, scores in (("itc", itc), ("itm", itm)):
        if scores is not None:
            right = scores[swapped, swapped] > scores[swapped, twin]
            found[name] = 100 * right.double().mean().item()
    return found


def mistakes(gallery: Gallery, itc: Tensor, itm: Tensor | None, k: int, count: int = 5) -> list[dict]:
    """The first images whose best caption is not theirs."""
    found = itc.topk(1 if itm is None else min(k, itc.shape[1]), dim=1).indices
    order = (itc if itm is None else itm).gather(1, found)
    best = found.gather(1, order.argmax(dim=1, keepdim=True)).squeeze(1)
    wrong = (gallery.owner[best] != torch.arange(len(best))).nonzero().squeeze(1)[:count]
    return [
        {"image": gallery[i].name, "found": gallery.texts[best[i]], "its own": gallery.references[i][0]}
        for i in wrong.tolist()
    ]


def retrieval_table(result: dict) -> str:
    """The result of `retrieval` as a table."""
    rows = [("chance", result["chance"]), ("shuffled images", result["shuffled images"]), ("ITC", result["itc"])]
    if "reranked" in result:
        rows.append((f"ITM re-ranks {result['k']}", result["reranked"]))
    rows += [(f"- {name}", numbers) for name, numbers in result["subsets"].items()]
    lines = [
        f"{result['images']:,} images, {result['texts']:,} captions, {result['seconds']:.0f} s",
        f"{'':20}  image to text            text to image",
        f"{'':20}  R@1    R@5    R@10       R@1    R@5    R@10",
    ]
    for name, numbers in rows:
        cells = "     ".join("".join(f"{v:5.1f}  " for v in way.values()) for way in numbers.values())
        lines.append(f"{name:20}  {cells}".rstrip())
    if "twins" in result:
        pairs = ", ".join(f"{name.upper()} {share:.1f} %" for name, share in result["twins"].items())
        lines.append(f"twin accuracy (chance 50 %): {pairs}")
    for mistake in result["mistakes"]:
        lines.append(f'mistake: {mistake["image"]} found "{mistake["found"]}", its own is "{mistake["its own"]}"')
    return "\n".join(lines)
