"""What a stage is evaluated on: in validations on the way, and at the end of a training."""

from pathlib import Path

from blip2 import Blip2
from engine.checkpoint import finish_writing
from engine.distributed import barrier, gather_objects, print0, rank, take_from_0, world_size
from engine.draws import sample_rng
from engine.files import read_json, write_json
from engine.log import loss_bounds, model_summary, rows_of
from engine.stop import at_once
from sources.annotations import ShapesSource
from sources.mixture import Mixture, open_images
from tasks.batches import encoded_batches
from tasks.captions import captioning
from tasks.presets import REPORTS, provenance, write_result
from tasks.report import read_run, write_report
from tasks.retrieval import rankings, retrieval
from tasks.samples import samples
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
    return "mean recall", mean_recall(result.get("reranked", result["itc"]))  # re-ranked if the model can


def mean_recall(numbers: dict) -> float:
    """Of R@1, 5, 10 both ways."""
    values = [value for way in numbers.values() for value in way.values()]
    return sum(values) / len(values)


def control(result: dict) -> tuple[str, float]:
    """What the headline would be without looking at the images: its name, and the number."""
    if result["task"] == "retrieval":
        return "chance", mean_recall(result["chance"])
    if result["task"] == "vqa":
        return f'always "{result["majority answer"]:.20}":', result["accuracy of the majority answer"]
    if result["task"] == "answers":
        return "majority answers:", result["accuracy"]["the majority answer"]["all"]
    if result["task"] == "captions":
        return "shuffled images:", result["shuffled images"]["CIDEr"]
    return "shuffled images:", result["correct captions of shuffled images"]


def validate(model: Blip2, val: Mixture, cfg, objectives, workers: int, step: int, best: float, save, log) -> float:
    """A validation -> the best score so far; the model that has it is saved in best/."""
    with at_once():  # a stop; the validation is made up for by --resume
        result = evaluate(model, val, cfg.stage, objectives, workers, quick=True)
    finish_writing()  # the checkpoint of this step, which evaluates beside
    name, score = headline(result)
    print0(validation_lines(model, val, result, step, score > best))
    if score > best:
        save(step, score, is_best=True)
    key = name.replace(" ", "_")
    log.write({"step": step, "validation": result, key: score, "control": control(result)})
    if rank() == 0:
        rows = rows_of(log.path)
        warn_of_overfitting(rows, key, cfg)
        report(log.path.parent, model, val, cfg, objectives, log.path.parent, rows)
    return max(score, best)


def report(run: Path, model: Blip2, val: Mixture | None, cfg, objectives, weights: Path, rows=None, final=None) -> None:
    """Draw run/report.html, on rank 0. If that fails, a sentence says why, and the training goes on.

    weights: the folder whose weights the model has; rows: of log.jsonl, if they have been read; final: at the end of
    the training, the table of the final evaluation."""
    if rank() > 0:
        return
    was_training = model.training
    try:
        words = (model.qformer if model.llm is None else model.llm).cfg.vocab_size
        candidates = cfg.batch if cfg.gradcache else (cfg.micro_batch or cfg.batch // world_size()) * world_size()
        found = {"parts": model_summary(model), "bounds": loss_bounds(objectives, candidates, words)}
        found |= {"step": read_json(weights / "config.json")["step"], "evaluation": final}
        found |= samples(model, val, cfg.stage, objectives) if val is not None else {}
        write_json(run / "samples.json", found)
        write_report([read_run(run, rows)], run / "report.html")
        if final is not None:
            print0(f"report: {run / 'report.html'}")
    except Exception as error:  # whatever it is, the training is worth more
        print0(f"{run / 'report.html'} was not drawn ({type(error).__name__}: {error})")
    finally:
        model.train(was_training)


def warn_of_overfitting(rows: list[dict], key: str, cfg) -> None:
    """Say at the third validation in a row that is not the best, the sixth, ... what helps. rows: of log.jsonl, which
    a resumed run continues."""
    scores = {row["step"]: row[key] for row in rows if key in row}
    best = max(scores, key=scores.get)
    worse = sum(step > best for step in scores)
    if worse and worse % 3 == 0:
        helps = ["more images", "fewer --steps"] + ["--no-cache-features, which shows crops"] * cfg.cache_features
        print0(
            f"validation has not improved for {worse} times since step {best}: the model overfits",
            f"  best/ keeps the best one. What helps: {', '.join(helps)}",
        )


def validation_lines(model: Blip2, val: Mixture, result: dict, step: int, is_best: bool) -> str:
    """A validation in a few lines: its numbers beside those of chance, and two examples if the model can write."""
    name, score = headline(result)
    unit, (blind, value) = "" if name == "CIDEr" else " %", control(result)
    numbers = f"{name} {score:.1f}{unit} ({blind} {value:.1f}{unit}){', the best so far' * is_best}"
    lines = [f"validation at step {step}: {numbers} ({result['seconds']:.0f} s)"]
    for by, recalls in rankings(result).items():
        ways = *recalls.values(), result["chance"]["image_to_text"]  # chance is that of both ways
        i2t, t2i, chance = (way["R@1"] for way in ways)
        lines.append(f"  R@1 by {by}: image-to-text {i2t:.1f} %, text-to-image {t2i:.1f} % (chance {chance:.1f} %)")
    if result["task"] == "answers":
        others = result["correct captions of shuffled images"]
        lines.append(f"  correct captions {result['correct captions']:.1f} % (shuffled images: {others:.1f} %)")
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
    """Evaluate the best model of a run on the test split of the shapes world, or on the validation images; on held-out
    images with the few candidates of a validation, because 128 of them take long. Then draw the report."""
    finish_writing()
    if cfg.data == ["shapes"]:
        val = open_images(["shapes"], "test", cfg.image_size, questions=cfg.stage == "vqa")
    if val is None or not {"itc", "lm"} & set(objectives):  # without ITC there is nothing to rank by
        report(run, model, val, cfg, objectives, run, final="")
        barrier()  # rank 0 may need the others for it, if parts are sharded
        return None
    if count := cfg.test_images:  # the first, with all their captions or questions; of twins both
        ids = [val.image_id(row) for row in range(len(val))]
        kept = {*list(dict.fromkeys(ids))[: count + count % val.parts[0].group_size]}
        val = val.subset([row for row, image_id in enumerate(ids) if image_id in kept])
    weights = run / "best" if gather_objects((run / "best").exists())[0] else run
    if weights != run:
        if rank() == 0:
            model.load_trained(weights)
        take_from_0(model.trained_state().values())
    print0(f"evaluating on {len(val):,} images")
    with at_once():
        result = evaluate(model, val, cfg.stage, objectives, workers, quick=bool(cfg.val_photos))
    name, table = REPORTS[result["task"]]
    if rank() == 0:
        files = cfg.data if cfg.data == ["shapes"] or cfg.val_photos else [cfg.val_data]
        write_result(run / name, provenance(model, weights, val, files) | result)
    print0(table(result))
    report(run, model, val, cfg, objectives, weights, final=table(result))
    barrier()  # as above
    return result
