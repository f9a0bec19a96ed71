"""What a model does on a few images, as plain data for the page of a run (report.py), on one rank.

{"shown": [{"image", "caption", "references", "questions": [[question, answer, reference], ...]}, ...],
 "retrieval": [{"text", "image", "ITC": [images in order], "ITM": ...}, ...],
 "attention": [{"image", "maps": {name: picture}}, ...], "pictures": {image: base64 JPEG}}; an image is a number.
"""

import base64
import io

import torch
from PIL import Image

from blip2 import Blip2, EncodedImages
from sources.annotations import ShapesSource
from sources.mixture import Mixture
from tasks.attention_maps import TILE, attention_maps, overlay
from tasks.batches import Gallery, encoded_batches, evaluation
from tasks.shapes_qa import chosen_questions

GALLERY, SHOWN, QUERIES, LOOKED_AT = 64, 8, 6, 3  # images; of them shown, whose text is a query, with attention
HITS, RERANKED = 5, 16
SIDE = 160  # pixels


@evaluation
def samples(model: Blip2, images: Mixture, stage: str, objectives: tuple[str, ...]) -> dict:
    """Captions, answers, retrieval and attention on the first images of a set, as far as the model has learned them."""
    few = images.subset(range(min(len(images), 5 * GALLERY)))  # an image may have several rows
    few.cached, gallery = images.cached, Gallery(few)
    count = min(GALLERY, len(gallery.rows))
    (encoded,) = encoded_batches(model, few, [gallery.rows[:count]], workers=0)
    chosen = spread(count, SHOWN)
    shown = [{"image": image, "references": gallery.references[image][:2]} for image in chosen]
    part = EncodedImages(*(x[chosen] for x in encoded))
    if stage != "vqa" and (model.llm is not None or "itg" not in model.untrained_heads):
        for one, caption in zip(shown, model.caption(part), strict=True):
            one["caption"] = caption
    asked = [questions(few, gallery.groups[image]) if stage in ("2", "vqa") else [] for image in chosen]
    if all(asked):
        answers = model.ask(part, [[question for question, _ in pairs] for pairs in asked])
        for one, pairs, given in zip(shown, asked, answers, strict=True):
            one["questions"] = [(question, said, right) for (question, right), said in zip(pairs, given)]
    found = {"shown": shown, "attention": []}
    found["retrieval"] = retrieval_grid(model, gallery, encoded, "itm" in objectives) if "itc" in objectives else []
    for image, pairs in list(zip(chosen, asked))[:LOOKED_AT]:
        one = EncodedImages(*(x[[image]] for x in encoded))
        maps = attention_maps(model, one, pairs[0][0] if pairs else "").mean(dim=0)  # (Q, h, w)
        share = maps.flatten(1).amax(dim=1) / maps.flatten(1).sum(dim=1)
        peaked = sorted(share.topk(min(3, len(maps))).indices.tolist())
        drawn = {"mean of all": maps.mean(dim=0)} | {f"query {query}": maps[query] for query in peaked}
        tile = gallery[image].open().resize((TILE, TILE), Image.Resampling.BICUBIC)
        found["attention"].append({"image": image, "maps": {k: jpeg(overlay(tile, m)) for k, m in drawn.items()}})
    used = {*chosen, *(hit for row in found["retrieval"] for way in ("ITC", "ITM") for hit in row.get(way, [])[:HITS])}
    return found | {"pictures": {str(image): jpeg(gallery[image].open()) for image in sorted(used)}}


def retrieval_grid(model: Blip2, gallery: Gallery, encoded: EncodedImages, match: bool) -> list[dict]:
    """For the texts of some images all images, best first: by ITC, and with the best re-ranked by ITM and ITC."""
    own = spread(len(encoded.feats), QUERIES)
    texts = [gallery.references[image][0] for image in own]
    features = model.encode_text(texts)
    itc = model.itc_scores(encoded, features).T.cpu()  # (queries, images)
    order = itc.argsort(dim=1, descending=True)
    found = [{"text": text, "image": image, "ITC": row} for text, image, row in zip(texts, own, order.tolist())]
    if match:
        first = order[:, :RERANKED]
        columns = torch.arange(len(own))[:, None].expand_as(first)
        logits = model.match_logits(encoded, features, first.flatten(), columns.flatten()).float().cpu()
        posterior = (logits[:, 1] - logits[:, 0]).view(first.shape) + itc.gather(1, first) / model.temperature.item()
        again = posterior.argsort(dim=1, descending=True)
        for row, best, rest in zip(found, first.gather(1, again).tolist(), order[:, RERANKED:].tolist()):
            row["ITM"] = best + rest
    return found


def questions(images: Mixture, rows: list[int]) -> list[tuple[str, str]]:
    """Two questions about an image, with an answer, if there are any."""
    part, index = images.locate(rows[0])
    if isinstance(source := images.parts[part], ShapesSource):
        return [(question, answer) for _, _, question, answer in chosen_questions(source, index, 2)]
    return [(images[row].record["question"], images[row].record["answer"][0]) for row in rows[:2] if images.asks]


def spread(count: int, most: int) -> list[int]:
    """Some of `count` numbers, far from one another."""
    return list(range(0, count, -(-count // most)))


def jpeg(image: Image.Image) -> str:
    """A small picture, as a page embeds it."""
    image, file = image.convert("RGB"), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
