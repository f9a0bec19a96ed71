"""What a stage is evaluated on: in validations on the way, and at the end of a training."""

from pathlib import Path

from blip2 import Blip2
from data import sample_rng
from engine.distributed import barrier, print0, rank
from sources.annotations import Mixture, ShapesSource, open_images
from tasks.batches import encoded_batches
from tasks.captions import captioning
from tasks.presets import REPORTS, provenance, write_result
from tasks.retrieval import retrieval
from tasks.shapes_qa import shapes_captioning, shapes_vqa
from tasks.vqa import vqa


def evaluate(
    model: Blip2, images: Mixture, stage: str, objectives: tuple[str, ...], workers: int, quick: bool = False
) -> dict:
    """Retrieval for stage 1; for stage 2 answers in the shapes world, captions elsewhere; its task, if fine-tuned.
    quick: fewer candidates and no controls, on the way."""
    if "lm" not in objectives:
        return retrieval(model, images, k=16 if quick else 128, match="itm" in objectives, workers=workers)
    if all(isinstance(part, ShapesSource) for part in images.parts):
        return shapes_captioning(model, images) if stage == "caption" else shapes_vqa(model, images, controls=not quick)
    return vqa(model, images, workers) if stage == "vqa" else captioning(model, images, workers)


def headline(result: dict) -> tuple[str, float]:
    """The one number by which a model is "best", and its name."""
    if result["task"] == "answers":
        return "accuracy", result["accuracy"]["the image"]["all"]
    if result["task"] != "retrieval":
        name = {"vqa": "accuracy", "captions": "CIDEr", "shapes captions": "correct captions"}[result["task"]]
        return name, result[name]
    numbers = result.get("reranked", result["itc"])  # R@1, 5, 10 both ways, re-ranked if the model can
    values = [value for way in numbers.values() for value in way.values()]
    return "mean recall", sum(values) / len(values)


def validate(model: Blip2, val: Mixture, cfg, objectives, workers: int, step: int, best: float, save, log) -> float:
    """A validation -> the best score so far; the model that has it is saved in best/."""
    result = evaluate(model, val, cfg.stage, objectives, workers, quick=True)
    name, score = headline(result)
    print0(validation_lines(model, val, result, name, score, score > best))
    if score > best:
        save(step, score, is_best=True)
    log.write({"step": step, "validation": result, name.replace(" ", "_"): score})
    return max(score, best)


def validation_lines(model: Blip2, val: Mixture, result: dict, name: str, score: float, is_best: bool) -> str:
    """A validation in a few lines: its numbers, and two examples if the model can write."""
    lines = []
    for ranking in ("itc", "reranked"):
        if ranking in result:
            i2t, t2i = (way["R@1"] for way in result[ranking].values())
            lines.append(f"  validation, {ranking}: image-to-text R@1 {i2t:.1f} %, text-to-image R@1 {t2i:.1f} %")
    if result["task"] == "answers":
        lines.append(f"  validation: correct captions {result['correct captions']:.1f} %")
    unit = "" if name == "CIDEr" else " %"
    lines.append(f"  {name} {score:.1f}{unit}{', the best so far' if is_best else ''} ({result['seconds']:.0f} s)")
    model.eval()
    for row in (0, len(val) // 2) if model.llm is not None or "itg" not in model.untrained_heads else ():
        sample, (images,) = val[row], encoded_batches(model, val, [[row]], workers=0)
        question, reference = sample.sample_text(sample_rng(0, row))
        text = model.ask(images, [question])[0] if question else model.caption(images)[0]
        asked = f"{question} " if question else ""
        lines.append(f'  {sample.name}: {asked}"{text}"; reference: "{reference}"')
    model.train()
    return "\n".join(lines)


def final_evaluation(model: Blip2, val: Mixture | None, cfg, objectives, workers: int, run: Path) -> dict | None:
    """Evaluate the best model of a run on the test split of the shapes world, or on the validation images."""
    if cfg.data == ["shapes"]:
        val = open_images(["shapes"], "test", cfg.image_size, questions=cfg.stage == "vqa")
    if val is None:
        return None
    barrier()  # rank 0 may still be writing
    weights = run / "best" if (run / "best").exists() else run
    if weights != run:
        model.load_trained(weights)
    print0(f"evaluating on {len(val):,} images")
    result = evaluate(model, val, cfg.stage, objectives, workers)
    name, table = REPORTS[result["task"]]
    if rank() == 0:
        files = cfg.data if cfg.data == ["shapes"] or cfg.val_photos else [cfg.val_data]
        write_result(run / name, provenance(model, weights, val, files) | result)
    print0(table(result))
    return result
