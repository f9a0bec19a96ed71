"""Visual question answering (paper 4.1, 4.3): accuracy of the answers to the questions of an annotation file."""

from collections import Counter
from itertools import chain

from blip2 import ANSWERS, Blip2
from engine.progress import clock
from sources.mixture import Mixture
from sources.text import clean_question
from tasks.batches import Gallery, PartialResults, encoded_batches, evaluation, map_batches
from tasks.metrics import any_match, direct_answer_accuracy, gqa_match, lemmatize, vqa_accuracy

METRICS = {  # of one answer, given the reference answers
    "vqa": vqa_accuracy,  # VQAv2, OK-VQA: three of ten references suffice
    "gqa": gqa_match,
    "gqa balanced": gqa_match,
    "direct": direct_answer_accuracy,  # A-OKVQA as LAVIS counts it; its own tool compares in lower case
    "aokvqa": lambda answer, others: direct_answer_accuracy(answer.lower(), [text.lower() for text in others]),
    "any": any_match,  # where there are fewer references than ten
}
COUNTS = {  # the questions that the data set's own tool counts, if not all
    "gqa balanced": lambda record: record.get("isBalanced", True),
    "aokvqa": lambda record: not record.get("difficult_direct_answer"),
}


@evaluation
def vqa(
    model: Blip2,
    images: Mixture,
    workers: int = 0,
    template: str | None = None,
    candidates: list[str] | None = None,
    clean: bool = False,
    metric: str | None = None,
    lemmatized: bool = False,
    partial: PartialResults | None = None,
    **decoding,
) -> dict:
    """Accuracy of the answers to all questions, in per cent, also by type of answer and of question; some examples.

    The model generates its answers, or with `candidates` takes the most probable of these. clean: questions as in
    LAVIS, see `clean_question`. metric: one of `METRICS`; by default the official one where each question has ten
    answers, else whether the answer is one of those given. Each image is encoded once for all its questions.
    """
    records = [images[row].record for row in range(len(images))]
    groups = Gallery(images).groups

    def work(batches: list[range]):
        firsts = [[groups[i][0] for i in batch] for batch in batches]
        for batch, encoded in zip(batches, encoded_batches(model, images, firsts, workers), strict=True):
            questions = [[records[row]["question"] for row in groups[i]] for i in batch]
            if clean:
                questions = [list(map(clean_question, group)) for group in questions]
            if candidates:
                ranked = model.rank(encoded, questions, candidates, template)
                yield [[order[0].answer for order in group] for group in ranked]
            else:
                yield model.ask(encoded, questions, template, **(decoding or ANSWERS))

    found = chain(*map_batches(partial, "questions", len(groups), work))  # for each image a list of answers
    answer_of = dict(zip(chain(*groups), chain(*found), strict=True))
    answers = [answer_of[row] for row in range(len(images))]
    return {
        "task": "vqa",
        "images": len(groups),
        "questions": len(records),
        **answer_scores(answers, records, metric, lemmatized),
        "examples": [
            {"image": images[row].name, "question": records[row]["question"], "answer": answers[row]}
            | {"references": list(dict.fromkeys(records[row]["answer"]))}
            for row in range(0, len(records), max(1, len(records) // 10))
        ],
        "predictions": for_the_server(answers, records, metric or ""),
    }


def for_the_server(answers: list[str], records: list[dict], metric: str) -> list | dict:
    """Predictions as the evaluation server of A-OKVQA, of GQA or of VQA reads them."""
    by_id = zip((record.get("question_id", row) for row, record in enumerate(records)), answers, strict=True)
    if "difficult_direct_answer" in records[0] or metric in ("direct", "aokvqa"):
        return {question_id: {"direct_answer": answer} for question_id, answer in by_id}
    of_gqa = "isBalanced" in records[0] or metric.startswith("gqa")
    names = ("questionId", "prediction") if of_gqa else ("question_id", "answer")
    return [dict(zip(names, pair)) for pair in by_id]


def answer_scores(answers: list[str], records: list[dict], metric: str | None, lemmatized: bool) -> dict:
    """Accuracies in per cent, of the model, of the most frequent answer, and optionally of the lemmas of the model's
    answers; over the questions that have an answer, nothing if none has."""
    unanswered = sum(not record["answer"] for record in records)
    counted = [row for row, record in enumerate(records) if record["answer"] and COUNTS.get(metric, bool)(record)]
    if not counted:
        return {"metric": None}
    answers, records = [answers[row] for row in counted], [records[row] for row in counted]
    references = [record["answer"] for record in records]
    fewer = sum(len(texts) != 10 for texts in references)
    metric = metric or ("any" if fewer else "vqa")
    majority = Counter(text for texts in references for text in texts).most_common(1)[0][0]
    found = {"metric": metric, "questions with another number of answers than ten": fewer, "majority answer": majority}
    found |= {"questions without an answer": unanswered, "questions counted": len(records)}
    scored = {"accuracy of the majority answer": [majority] * len(references)}
    scored |= {"accuracy of the lemmas": list(map(lemmatize, answers))} if lemmatized else {}
    for name, texts in (scored | {"accuracy": answers}).items():
        right = [METRICS[metric](answer, others) for answer, others in zip(texts, references, strict=True)]
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
    """Mean in per cent, rounded as by the official tool."""
    return round(100 * sum(values) / len(values), 2)


def vqa_table(result: dict) -> str:
    """The result of `vqa` in a few lines."""
    lines = [f"{result['questions']:,} questions about {result['images']:,} images, {clock(result['seconds'])}"]
    if "accuracy" in result:
        fewer, metric = result["questions with another number of answers than ten"], result["metric"]
        why = f": one of the reference answers, as {fewer:,} questions have not ten of them" * (metric == "any")
        lines.append(
            f'accuracy {result["accuracy"]:.2f} % ({metric}{why}); always "{result["majority answer"]}": '
            f"{result['accuracy of the majority answer']:.2f} %"
        )
        if (left_out := result["questions"] - result["questions counted"]) > 0:
            unanswered = result["questions without an answer"]
            why = f"{unanswered:,} without an answer, {left_out - unanswered:,} by the rule of {metric}"
            lines.append(f"over {result['questions counted']:,} questions; left out: {why}")
    if "accuracy of the lemmas" in result:
        lines.append(f"accuracy of the answers' lemmas {result['accuracy of the lemmas']:.2f} %")
    for kind in ("answer_type", "question_type"):
        if f"by {kind}" in result:
            numbers = list(result[f"by {kind}"].items())
            more = f", and {len(numbers) - 12} more" if len(numbers) > 12 else ""
            lines.append(f"by {kind}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers[:12]) + more)
    for e in result["examples"]:
        references = f" ({', '.join(e['references'])})" if e["references"] else ""
        lines.append(f"{e['image']}: {e['question']} {e['answer']}{references}")
    return "\n".join(lines)
