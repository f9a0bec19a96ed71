"""Image-text retrieval (paper 4.4): recall at 1, 5, 10, ranked by ITC, then re-ranked with ITM.

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
from tasks.metrics import chance, ranks, recalls, reranked

RULES = {"posterior": "ITM+ITC", "itm": "ITM", "itm+itc": "LAVIS"}  # of re-ranking, and their names in a table


@evaluation
def retrieval(
    model: Blip2,
    images: Mixture,
    k: int = 128,  # paper 4.4
    rerank: str = "posterior",
    match: bool = True,
    workers: int = 0,
    partial: PartialResults | None = None,
) -> dict:
    """Recall at 1, 5, 10 in both directions, by ITC alone and re-ranked with ITM.

    rerank: "posterior", ITM's log-odds + cosine / temperature. ITM's negatives are drawn by ITC's softmax, so its
    log-odds tell how much likelier a pair is than ITC says: by Bayes, ITC is the prior and ITM the likelihood ratio.
    "itm", by the matching score alone (the paper), or "itm+itc", which adds the raw cosine to the raw match logit
    (LAVIS). match=False leaves ITM out, for a model that was trained without it.
    """
    if rerank == "posterior" and "itc" in model.untrained_heads:
        rerank = "itm"  # its negatives were uniform: there is no prior
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

    itm, prior = None, None
    if match:
        # The pairs among the k best of any image or any text, each once; a rank scores those of its images.
        wanted = torch.zeros(N, M, dtype=torch.bool)
        wanted.scatter_(1, itc.topk(min(k, M), dim=1).indices, True)
        wanted |= torch.zeros(M, N, dtype=torch.bool).scatter_(1, itc.T.topk(min(k, N), dim=1).indices, True).T
        swapped = gallery.subsets().get("swapped", torch.arange(0)).view(-1, 2)
        wanted[swapped[:, :, None], swapped[:, None]] = True  # for `twins`, however far apart ITC has put them
        itm = match_scores(model, encoded, texts, wanted, rerank, partial)
        if rerank == "itm+itc":
            itm += itc
        elif rerank == "posterior":
            prior = itc / model.temperature.item()
    return {"task": "retrieval", **report(gallery, itc, itm, k, prior), "rerank": rerank}


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
            yield (logits[:, 1] - (0 if rerank == "itm+itc" else logits[:, 0])).tolist()

    scores = torch.full(wanted.shape, float("-inf"))
    pairs = hashlib.sha256(np.packbits(wanted.numpy()).tobytes()).hexdigest()[:12]
    scores[wanted] = torch.tensor(sum(map_batches(partial, f"pairs {pairs}", len(wanted), work), []))
    return scores


def report(gallery: Gallery, itc: Tensor, itm: Tensor | None, k: int, prior: Tensor | None = None) -> dict:
    """Recalls of the whole gallery and of its subsets, both directions, beside chance and shuffled images.

    itc, itm, prior: (N, M) scores. itm + prior re-ranks; itm alone, too, where there is a prior.
    """
    positives = gallery.positives
    N, M = positives.shape
    scores = itm if prior is None else itm + prior

    def both(chosen: Tensor, positives: Tensor, second: Tensor | None) -> dict:
        """Queries are the chosen images and their texts; candidates are always all."""
        texts, found = torch.isin(gallery.owner, chosen).nonzero().squeeze(1), {}
        for way, rows, order in (("image_to_text", chosen, (0, 1)), ("text_to_image", texts, (1, 0))):
            first, truth = itc.permute(order)[rows], positives.permute(order)[rows]
            order = first if second is None else reranked(first, second.permute(order)[rows], k)
            found[way] = recalls(ranks(order, truth))
        return found

    everything, subsets = torch.arange(N), gallery.subsets()
    shuffled = positives.roll(N // 2, dims=0)  # each image has the captions of another, far from any twin
    out = {"images": N, "texts": M, "k": k}
    out["chance"] = {"image_to_text": chance(positives), "text_to_image": chance(positives.T)}
    out["itc"] = both(everything, positives, None)
    if prior is not None:
        out["itm"] = both(everything, positives, itm)
    if itm is not None:
        out["reranked"] = both(everything, positives, scores)
    out["shuffled images"] = both(everything, shuffled, scores)
    out["subsets"] = {name: both(chosen, positives, scores) for name, chosen in subsets.items()}
    if "swapped" in subsets:
        out["twins"] = twins(subsets["swapped"], itc, itm)
    return out | extremes(gallery, itc if itm is None else reranked(itc, scores, k))


def twins(swapped: Tensor, itc: Tensor, itm: Tensor | None) -> dict[str, float]:
    """Images that differ by a swap only: how often an image prefers its own caption to its twin's, in per cent."""
    twin, found = swapped.view(-1, 2).flip(1).flatten(), {}
    for name, scores in (("itc", itc), ("itm", itm)):
        if scores is not None:
            right = scores[swapped, swapped] > scores[swapped, twin]
            found[name] = 100 * right.double().mean().item()
    return found


def extremes(gallery: Gallery, scores: Tensor, count: int = 5) -> dict[str, list[dict]]:
    """By scores (N, M), "best": the images that find their own caption with the largest margin, and "mistakes": those
    whose own captions rank lowest. "its own" is the first of these."""
    positives, low = gallery.positives, float("-inf")
    own, other = scores.masked_fill(~positives, low).max(dim=1), scores.masked_fill(positives, low).amax(dim=1)
    rank, found = ranks(scores, positives), scores.argmax(dim=1)
    best, worst = (own.values - other).argsort(descending=True), rank.argsort(descending=True, stable=True)

    def shown(i: int) -> dict:
        texts = {"found": gallery.texts[found[i]], "its own": gallery.texts[own.indices[i]]}
        return {"image": gallery[i].name, **texts, "rank": int(rank[i]) + 1}

    chosen = {"best": best[rank[best] == 0], "mistakes": worst[rank[worst] > 0]}
    return {name: [shown(i) for i in images[:count].tolist()] for name, images in chosen.items()}


def rankings(result: dict) -> dict[str, dict]:
    """The recalls of a result of `retrieval` by the name of their ranking; also of one from before there were rules."""
    names = {"itc": "ITC", "itm": "ITM", "reranked": RULES[result.get("rerank", "itm")]}
    return {name: result[key] for key, name in names.items() if key in result}


def retrieval_table(result: dict) -> str:
    """The result of `retrieval` as a table."""
    rows = [(name, result[name]) for name in ("chance", "shuffled images")]
    for name, numbers in rankings(result).items():
        rows.append((name if name == "ITC" else f"{name} re-ranks {result['k']}", numbers))
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
    lines += [f'best: {row["image"]} found its own, "{row["found"]}"' for row in result["best"]]
    for row in result["mistakes"]:
        lines.append(f'worst: {row["image"]} found "{row["found"]}"; rank {row["rank"]}: its own "{row["its own"]}"')
    return "\n".join(lines)
