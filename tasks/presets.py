"""Presets: every choice that decides about the number of an evaluation, and the files that record it.

A preset never changes: if a choice turns out to be wrong, a -v2 is added. None is the checkpoint's own. Sources: paper
4.1 to 4.4 and Tables 7 to 9; what the paper leaves open (shortest captions, the split) is LAVIS's. Questions are
lower-cased for zero-shot, as there.
"""

import hashlib
from pathlib import Path

from blip2 import ANSWERS, Blip2
from engine.device import PRECISIONS
from engine.files import sha256, write_json
from sources.mixture import Mixture
from tasks.captions import CAPTION_DECODING, caption_table, captioning
from tasks.retrieval import retrieval, retrieval_table
from tasks.shapes_qa import shapes_captioning_table, shapes_vqa_table
from tasks.vqa import vqa, vqa_table
from weights.load import weight_files

COCO = CAPTION_DECODING | dict(min_new_tokens=8)
CAPTIONS = dict(task="captions", split="test", image_size=None, prompt=None)
QUESTIONS = dict(task="vqa", split="val", image_size=None, template=None, clean=False, metric=None, lemmatized=False)
ZERO_SHOT = QUESTIONS | dict(image_size=224, clean=True, metric="vqa")
RETRIEVAL = dict(task="retrieval", split="test", image_size=None, k=128, rerank="itm")
PRESETS = {
    "captions-v1": CAPTIONS | CAPTION_DECODING,
    "coco-captions-v1": CAPTIONS | COCO | dict(image_size=364, prompt="a photo of"),  # Table 3
    "nocaps-v1": CAPTIONS | COCO | dict(split="val", image_size=364, prompt="a photo of"),  # Tables 1 and 3
    "vqa-v1": QUESTIONS | ANSWERS,
    "vqav2-zeroshot-v1": ZERO_SHOT | ANSWERS,  # Table 2
    "okvqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(lemmatized=True),  # beside the accuracy, not in its place
    "gqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(metric="gqa"),
    "gqa-zeroshot-v2": ZERO_SHOT | ANSWERS | dict(metric="gqa balanced"),  # v1 also counts unbalanced questions
    "aokvqa-zeroshot-v1": ZERO_SHOT | ANSWERS | dict(metric="direct"),
    "aokvqa-zeroshot-v2": ZERO_SHOT | ANSWERS | dict(metric="aokvqa"),  # v1 counts as LAVIS does
    "vqav2-v1": QUESTIONS | ANSWERS | dict(image_size=490, metric="vqa"),  # Table 4
    "retrieval-v1": RETRIEVAL,
    "retrieval-v2": RETRIEVAL | dict(rerank="posterior"),  # v1 forgets what ITC has already said
    "coco-retrieval-v1": RETRIEVAL | dict(image_size=364),  # Table 5, fine-tuned
    "flickr30k-retrieval-v1": RETRIEVAL | dict(image_size=364),  # Table 5, zero-shot by a model fine-tuned on COCO
}
TASKS = {"retrieval": retrieval, "captions": captioning, "vqa": vqa}

# Of each result: the file in the run, and its table.
REPORTS = {
    "retrieval": ("retrieval.json", retrieval_table),
    "captions": ("captions.json", caption_table),
    "vqa": ("answers.json", vqa_table),
    "answers": ("answers.json", shapes_vqa_table),
    "shapes captions": ("captions.json", shapes_captioning_table),
}


def provenance(model: Blip2, checkpoint: Path, images: Mixture, files: list[str]) -> dict:
    """Which weights and data a result is of, by their hashes, and how it was computed."""
    parts = [checkpoint] if checkpoint.is_file() else weight_files(checkpoint)
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == model.amp_dtype)
    frozen = {part: source.sha256 for part, source in model.sources.items() if part != "bert"}
    prompts = {} if model.llm is None else {"prompt": model.prompt, "template": model.template}
    return {
        "checkpoint": str(checkpoint),
        "weights": {"sha256": sha256(parts)} | frozen,
        "data": {"files": files, "sha256": images.content_sha256()},
        "computed": {"precision": precision, "device": model.device.type, "image_size": model.image_size} | prompts,
    }


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON; without the time it took, so that equal results are equal files, and without the
    predictions, which have a file of their own."""
    write_json(path, {key: value for key, value in result.items() if key not in ("seconds", "predictions")}, indent=2)


def partial_folder(out: str, identity: dict | None = None) -> Path:
    """Where an evaluation that writes to `out` keeps its finished batches: a folder for all weights, presets and
    data."""
    folder = Path(out).with_name(f".{Path(out).name}.batches")
    return folder if identity is None else folder / hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
