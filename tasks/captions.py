"""Image captioning (paper 4.2): BLEU, ROUGE-L and CIDEr-D beside those of shuffled images."""

from blip2 import Blip2
from engine.progress import clock
from sources.mixture import Mixture
from tasks.batches import Gallery, PartialResults, encoded_batches, evaluation, map_batches
from tasks.metrics import bleu, caption_words, cider, rouge_l

CAPTION_DECODING = dict(num_beams=5, max_new_tokens=30, min_new_tokens=1, length_penalty=1.0, repetition_penalty=1.0)


@evaluation
def captioning(
    model: Blip2,
    images: Mixture,
    workers: int = 0,
    prompt: str | None = None,
    partial: PartialResults | None = None,
    **decoding,
) -> dict:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D of the captions of all images, beside those of shuffled images; some examples.

    decoding: see `generate.generate`; by default that of the preset captions-v1. NoCaps is also scored by domain.
    """
    gallery = Gallery(images)
    N, decoding = len(gallery.rows), decoding or CAPTION_DECODING

    def work(batches: list[range]):
        rows = [gallery.rows[batch.start : batch.stop] for batch in batches]
        for encoded in encoded_batches(model, images, rows, workers):
            yield model.caption(encoded, prompt, **decoding)

    captions = sum(map_batches(partial, "captions", N, work), [])
    references, names = gallery.references, [gallery[image].name for image in range(N)]
    shuffled = captions[N // 2 :] + captions[: N // 2]  # each image has the caption of another
    domains = [gallery[image].record.get("domain") for image in range(N)]
    shown = range(0, N, max(1, N // 10))
    return {
        "task": "captions",
        "images": N,
        "distinct captions": len(set(captions)),
        **caption_scores(captions, references),
        "shuffled images": caption_scores(shuffled, references),
        "domains": {
            domain: caption_scores(*zip(*[(c, r) for c, r, d in zip(captions, references, domains) if d == domain]))
            for domain in dict.fromkeys(domains)
            if domain
        },
        "examples": [{"image": names[i], "caption": captions[i], "references": references[i]} for i in shown],
        "captions": dict(zip(names, captions, strict=True)),
        # The format of the COCO server and of pycocoevalcap.
        "predictions": [{"image_id": gallery.public_id(i), "caption": captions[i]} for i in range(N)],
    }


def caption_scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D, in per cent as papers give them; nothing if an image has no reference."""
    if not all(references):
        return {}
    words = [caption_words(caption) for caption in captions]
    reference_words = [[caption_words(text) for text in texts] for texts in references]
    scores = {f"BLEU-{n + 1}": score for n, score in enumerate(bleu(words, reference_words))}
    scores |= {"ROUGE-L": rouge_l(words, reference_words), "CIDEr": cider(words, reference_words)}
    return {name: 100 * score for name, score in scores.items()}


def caption_table(result: dict) -> str:
    """The result of `captioning` as a table, and the examples."""
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
    count = f"{result['images']:,} images, {result['distinct captions']:,} distinct captions"
    lines = [f"{count}, {clock(result['seconds'])}"]
    if "CIDEr" in result:
        whole = "overall" if result["domains"] else "captions"
        rows = [("shuffled images", result["shuffled images"]), *result["domains"].items(), (whole, result)]
        lines.append(f"{'':18}" + "".join(f"{name:>8}" for name in names))
        lines += [f"{row:18}" + "".join(f"{scores[name]:8.1f}" for name in names) for row, scores in rows]
    else:
        lines += ["some images have no reference captions, so there are no scores: --predictions writes the captions"]
    for example in result["examples"]:
        reference = f'; reference: "{example["references"][0]}"' if example["references"] else ""
        lines.append(f'{example["image"]}: "{example["caption"]}"{reference}')
    return "\n".join(lines)
