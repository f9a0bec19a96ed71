"""Captions and answers in the shapes world, where the truth is known: zero-shot VQA (paper 4.1) in miniature."""

from collections import Counter
from itertools import permutations

from PIL import Image

from blip2 import ANSWERS, Blip2, EncodedImages, chunked
from engine.distributed import gather_objects
from engine.progress import clock, progress
from generate import generate
from sources import shapes
from sources.annotations import ShapesSource
from sources.mixture import Mixture
from sources.text import clean_caption
from tasks.batches import IMAGES, encode_images, evaluation, shard

BLANK = Image.new("RGB", (64, 64), (178, 178, 178))  # an empty scene
SEEN = "seen"  # questions whose wordings and colour-shape pairs occur in training


@evaluation
def shapes_vqa(model: Blip2, images: Mixture, per_image: int = 4, controls: bool = True) -> dict:
    """Question answering in the shapes world: correct answers, in per cent, by subset, beside those of the majority
    answer to that kind of question.

    After stage 2 it is zero-shot: the model was trained on captions only, the language model on text only. controls:
    also a blank image, another image, and as the ceiling the language model given the true caption as text. "held-out
    pairs" counts only questions about such a pair. A caption is correct if it describes the scene in one of the
    wordings.
    """
    world, N = images.parts[0], len(images)
    mine = list(range(N))[shard(N)]
    asked = [chosen_questions(world, images.locate(row)[1], per_image) for row in mine]
    texts = [[question for _, _, question, _ in group] for group in asked]
    encoded = encode_images(model, images, mine, 0)
    inputs = {"the image": encoded}
    if controls:
        blank = model.encode_image([BLANK])
        inputs["a blank image"] = EncodedImages(*(t.expand(len(mine), *t.shape[1:]) for t in blank))
        others = [images[(row + N // 2) % N].open() for row in mine]
        inputs["another image"] = model.encode_image(others) if others else encoded
    answers = {
        name: [group for part, chunk in in_batches(seen, name) for group in model.ask(chunk, texts[part])]
        for name, seen in inputs.items()
    }
    if controls:
        captions = [clean_caption(images[row].captions[0]) for row in mine]
        flat = [(caption, question) for caption, group in zip(captions, texts) for question in group]
        left = iter(answers_to_text(model, flat))
        answers["the true caption as text"] = [[next(left) for _ in group] for group in texts]
    majority = majority_answers()
    answers["the majority answer"] = [[majority[kind] for _, kind, _, _ in group] for group in asked]
    rows = [
        {"image": row, "subset": subset, "kind": kind, "question": question, "answer": answer}
        | {name: given[i][j] for name, given in answers.items()}
        for i, (row, group) in enumerate(zip(mine, asked))
        for j, (subset, kind, question, answer) in enumerate(group)
    ]
    rows = sum(gather_objects(rows), [])

    def share(name: str, **of) -> float:  # of: the subset or kind of the questions
        chosen = [row for row in rows if of.items() <= row.items()]
        return 100 * sum(row[name] == row["answer"] for row in chosen) / max(1, len(chosen))

    subsets = dict.fromkeys(row["subset"] for row in rows)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    wrong = [row for row in rows if row["the image"] != row["answer"]]
    return {
        "task": "answers",
        "images": N,
        "questions": len(rows),
        "accuracy": {
            name: {"all": share(name)} | {subset: share(name, subset=subset) for subset in subsets} for name in answers
        },
        "kinds": {kind: share("the image", kind=kind) for kind in kinds},
        **caption_shares(model, images, mine, encoded),
        "mistakes": [
            {"image": images[row["image"]].name, "caption": images[row["image"]].captions[0]}
            | {key: row[key] for key in ("question", "answer", "the image")}
            for row in wrong[:: max(1, len(wrong) // 5)][:5]
        ],
    }


@evaluation
def shapes_captioning(model: Blip2, images: Mixture) -> dict:
    """Correct captions in the shapes world, in per cent: those that describe the scene in one of the wordings."""
    mine = list(range(len(images)))[shard(len(images))]
    shares = caption_shares(model, images, mine, encode_images(model, images, mine, 0))
    return {"task": "shapes captions", "images": len(images), **shares}


def caption_shares(model: Blip2, images: Mixture, mine: list[int], encoded: EncodedImages) -> dict:
    """Captions of images of the shapes world, on all ranks: per cent that are correct, and that would be for another
    image, and some mistakes; `mine`: the rows of this rank."""
    N, scene = len(images), lambda row: images.parts[0].scene(images.locate(row % N)[1])
    captions = [clean_caption(text) for _, chunk in in_batches(encoded, "captions") for text in model.caption(chunk)]
    right = [
        [caption in true_captions(scene(row + shift)) for row, caption in zip(mine, captions, strict=True)]
        for shift in (0, N // 2)
    ]
    own, others = (100 * sum(gather_objects(sum(part))) / N for part in right)
    wrong = [
        {"image": images[row].name, "caption": caption, "reference": images[row].captions[0]}
        for row, caption, is_right in zip(mine, captions, right[0])
        if not is_right
    ]
    wrong = sum(gather_objects(wrong), [])
    mistakes = wrong[:: max(1, len(wrong) // 5)][:5]
    return {"correct captions": own, "correct captions of shuffled images": others, "mistakes": mistakes}


def in_batches(encoded: EncodedImages, what: str):
    """Yield (slice, the features there) of a batch of images at a time."""
    for rows in progress(list(chunked(range(len(encoded.tokens)), IMAGES)), what):
        part = slice(rows.start, rows.stop)
        yield part, EncodedImages(*(x[part] for x in encoded))


def shapes_captioning_table(result: dict) -> str:
    """The result of `shapes_captioning` in a few lines."""
    share, control = (result[f"correct captions{of}"] for of in ("", " of shuffled images"))
    count, seconds = f"{result['images']:,} images", clock(result["seconds"])
    lines = [f"correct captions: {share:.1f} % (of shuffled images {control:.1f} %) of {count}, {seconds}"]
    lines += [f'mistake: {m["image"]}: "{m["caption"]}"; reference: "{m["reference"]}"' for m in result["mistakes"]]
    return "\n".join(lines)


def chosen_questions(world: ShapesSource, index: int, count: int) -> list[tuple[str, str, str, str]]:
    """Some questions about an image, always the same: (subset, kind, question, answer)."""
    subset, asked = world.subset(index), world.questions(index)
    if subset == "held-out pairs":  # in question and answer, not elsewhere in the image
        words = [{*f"{question} {answer}".replace("?", "").split()} for _, question, answer in asked]
        asked = [q for q, said in zip(asked, words) if any({*pair} <= said for pair in shapes.HELD_OUT_PAIRS)]
    name = subset if subset.startswith("held-out") else SEEN
    chosen = world.rng(index, "asked").sample(asked, min(count, len(asked)))
    return [(name, *question) for question in chosen]


def majority_answers() -> dict[str, str]:
    """The most frequent answer to each kind of question, in training."""
    world = shapes.ShapesWorld("train")
    counts = Counter((kind, answer) for index in range(2000) for kind, _, answer in world.questions(index))
    return dict(pair for pair, _ in reversed(counts.most_common()))  # the most frequent of a kind comes last and stays


def true_captions(scene: shapes.Scene) -> set[str]:
    """All correct captions of the scene, in any wording."""
    return {
        clean_caption(caption)
        for order in permutations(scene)
        for held_out in (False, True)
        for caption in shapes.captions(order, held_out)
    }


def answers_to_text(model: Blip2, asked: list[tuple[str, str]], batch_size: int = 64) -> list[str]:
    """Answers of the language model alone to (description, question) pairs: a description replaces the visual
    embeddings."""
    tokenizer, answers = model.llm_tokenizer, []
    for part in progress(list(chunked(asked, batch_size)), "answers from the text"):
        descriptions, questions = map(list, zip(*part))
        filled = [tokenizer.fill(model.template, question) for question in questions]
        prompts = tokenizer.encode_prompts(filled)
        ids = [described + prompt for described, prompt in zip(tokenizer.encode(descriptions), prompts)]
        prompt_ids, mask = tokenizer.pad_prompts(ids)
        embedded = model.llm.embed(prompt_ids.to(model.device))
        decoder = model.llm.decoder_for(embedded, mask.to(model.device), ANSWERS["max_new_tokens"])
        groups = generate(decoder, end_id=tokenizer.end_id, **ANSWERS)  # as `Blip2.ask` does
        answers += [tokenizer.decode(group[0]) for group in groups]
    return answers


def shapes_vqa_table(result: dict) -> str:
    """The result of `shapes_vqa` as a table."""
    subsets = list(result["accuracy"]["the image"])
    lines = [
        f"{result['questions']:,} questions about {result['images']:,} images, {result['seconds']:.0f} s",
        f"{'correct answers, %':26}" + "".join(f"{subset:>19}" for subset in subsets),
    ]
    for name in ("the majority answer", "a blank image", "another image", "the image", "the true caption as text"):
        if name in result["accuracy"]:
            shares = result["accuracy"][name].values()
            lines.append(f"{name:26}" + "".join(f"{share:19.1f}" for share in shares))
    lines.append("by kind: " + ", ".join(f"{kind} {share:.1f}" for kind, share in result["kinds"].items()))
    control = result["correct captions of shuffled images"]
    lines.append(f"correct captions: {result['correct captions']:.1f} % (of shuffled images {control:.1f} %)")
    for m in result["mistakes"]:
        lines.append(f'mistake: {m["image"]}, "{m["caption"]}": {m["question"]} {m["the image"]} ({m["answer"]})')
    return "\n".join(lines)
