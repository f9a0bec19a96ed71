"""Tables of results from assets/logs: `python -m tools.results` writes them into README.md and docs/.

A table stands after a line `<!-- table: NAME -->`, where NAME is a function of this file. A test checks that the tables
are current.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "assets/logs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WAYS = ("image to text", "text to image")
SUBSETS = ("all", "seen", "held-out pairs", "held-out wordings")
LLM_NAMES = {"opt": "OPT", "t5": "T5"}


def log(name: str) -> dict:
    """A result file."""
    return json.loads((LOGS / f"{name}.json").read_text())


def seeds(name: str) -> list[dict]:
    """The result files of three seeds."""
    return [log(f"{name}-seed{seed}") for seed in range(3)]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(*rows: tuple[str, ...]) -> str:
    """Rows of cells as Markdown; the first is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def r1_row(title: str, runs: list[dict]) -> tuple[str, ...]:
    """Mean and standard deviation of R@1 over the seeds, both ways."""
    both = zip(*[[run[way]["R@1"] for way in ("image_to_text", "text_to_image")] for run in runs])
    return title, *(spread(list(values)) for values in both)


def recalls_row(title: str, ways: dict) -> tuple[str, ...]:
    """All recalls of one run, both ways."""
    return title, *(" / ".join(f"{value:.1f}" for value in way.values()) for way in ways.values())


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def shapes() -> str:
    """Stage 1 in the shapes world, three seeds."""
    runs = seeds("shapes")
    names = {"chance": "chance", "shuffled images": "shuffled images", "itc": "**ITC**"}
    rows = [r1_row(title, [run[name] for run in runs]) for name, title in names.items()]
    rows.append(r1_row("**ITM re-ranks 128**", [run["reranked"] for run in runs]))
    rows += [r1_row(f"of these, {name}", [run["subsets"][name] for run in runs]) for name in runs[0]["subsets"]]
    twins = [f"{name.upper()} {spread([run['twins'][name] for run in runs])}" for name in ("itc", "itm")]
    return table(("R@1, %", *WAYS), *rows, ("twin accuracy, chance 50", *twins))


def losses() -> str:
    """Paper Table 6 in miniature: with and without ITG; the shapes world with three seeds, Flickr8k once."""
    rows, variants = [("R@1 after re-ranking, %", *WAYS)], {"ITC + ITM": "-itc-itm", "ITC + ITM + ITG": ""}
    for title, name in variants.items():
        rows.append(r1_row(f"shapes world, {title}", [run["reranked"] for run in seeds(f"shapes{name}")]))
    for title, name in variants.items():
        ways = log(f"flickr8k{name or '-20min'}")["reranked"].values()
        rows.append((f"Flickr8k, 850 steps, {title}", *(f"{way['R@1']:.1f}" for way in ways)))
    return table(*rows)


def flickr8k() -> str:
    """Stage 1 on Flickr8k: 1,000 images of val, five captions each."""
    rows = [("Flickr8k val, R@1 / 5 / 10, %", *WAYS), recalls_row("chance", log("flickr8k-20min")["chance"])]
    for minutes in (20, 60):
        run = log(f"flickr8k-{minutes}min")
        rows.append(recalls_row(f"{minutes} minutes, ITC", run["itc"]))
        rows.append(recalls_row(f"{minutes} minutes, ITM re-ranks {run['k']}", run["reranked"]))
    return table(*rows)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def answers() -> str:
    """Zero-shot question answering in the shapes world, three seeds of stages 1 and 2."""
    rows = [("correct answers, %", *SUBSETS)]
    marked = {"the image": "**the image**", "the true caption as text": "ceiling: the true caption as text"}
    for llm, title in LLM_NAMES.items():
        runs = [run["accuracy"] for run in seeds(f"stage2-{llm}-init")]
        for name in ("the majority answer", "a blank image", "another image", *marked):
            shares = (spread([run[name][subset] for run in runs]) for subset in SUBSETS)
            rows.append((f"{title}, {marked.get(name, name)}", *shares))
    return table(*rows)


def validations(name: str) -> dict[int, float]:
    """Step -> accuracy in validation, as a run printed it."""
    text = (LOGS / f"{name}.txt").read_text()
    after = r"\n(?:  [^\n]*\n){0,3}?(?!step)[^\n]*accuracy ([\d.]+) %"  # of the validation under the line of a step
    found = re.findall(r"step +(\d+)/\d+ [^\n]*" + after, text)
    return {int(step): float(share) for step, share in found}


def figure5() -> str:
    """Paper Figure 5 in miniature: stage 2 after stage 1, and without it."""
    steps = (250, 500, 1000, 1750, 2500)
    rows = [("correct answers, %, after", *(f"{step:,} steps" for step in steps), "test")]
    for llm, title in LLM_NAMES.items():
        for init, how in (("none", "without stage 1"), ("init", "after stage 1")):
            runs = [validations(f"stage2-{llm}-{init}-seed{seed}") for seed in range(3)]
            test = [run["accuracy"]["the image"]["all"] for run in seeds(f"stage2-{llm}-{init}")]
            rows.append((f"{title}, {how}", *(spread([run[step] for run in runs]) for step in steps), spread(test)))
    return table(*rows)


def captions() -> str:
    """Stage 2 on Flickr8k: captions of 1,000 images of val."""
    names, run = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"), log("flickr8k-stage2")
    rows = (("shuffled images", run["shuffled images"]), ("**captions**", run))
    return table(("Flickr8k val", *names), *((title, *(f"{n[name]:.1f}" for name in names)) for title, n in rows))


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def tuned_answers() -> str:
    """Fine-tuning for VQA in the shapes world, three seeds."""
    rows = [("correct answers, %", *SUBSETS)]
    for title, name in (
        ("before", "stage2-opt-init"),
        ("fine-tuned, `--no-condition`", "finetune-vqa-no-condition"),
        ("fine-tuned, the Q-Former reads the question", "finetune-vqa"),
    ):
        runs = [run["accuracy"]["the image"] for run in seeds(name)]
        rows.append((title, *(spread([run[subset] for run in runs]) for subset in SUBSETS)))
    return table(*rows)


def tuned_captions() -> str:
    """Fine-tuning for captions in the shapes world, three seeds: 1,000 test images, a fifth with held-out pairs."""
    rows = [("correct captions, %", "seed 0", "seed 1", "seed 2", "all")]
    for title, name in (("before", "stage2-opt-init"), ("fine-tuned", "finetune-caption")):
        shares = [run["correct captions"] for run in seeds(name)]
        rows.append((title, *(f"{share:.1f}" for share in shares), spread(shares)))
    return table(*rows)


def tuned_retrieval() -> str:
    """Fine-tuning for retrieval in the shapes world, three seeds."""
    rows = [("R@1, %", *WAYS)]
    for title, name in (("before", "finetune-retrieval-before"), ("fine-tuned", "finetune-retrieval")):
        rows.append(r1_row(f"{title}, ITC", [run["itc"] for run in seeds(name)]))
        rows.append(r1_row(f"{title}, ITM re-ranks 128", [run["reranked"] for run in seeds(name)]))
    return table(*rows)


def tuned_flickr8k_captions() -> str:
    """Fine-tuning for captions on Flickr8k, 1,000 images of val."""
    names, before = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"), log("finetune-flickr8k-caption-before")
    rows = {"shuffled images": before["shuffled images"], "before": before}
    rows["fine-tuned"] = log("finetune-flickr8k-caption")
    return table(("Flickr8k val", *names), *((t, *(f"{run[name]:.1f}" for name in names)) for t, run in rows.items()))


def tuned_flickr8k_retrieval() -> str:
    """Fine-tuning for retrieval on Flickr8k, 1,000 images of val."""
    rows = [("Flickr8k val, R@1 / 5 / 10, %", *WAYS)]
    for title, name in (("before", "-before"), ("fine-tuned", "")):
        run = log(f"finetune-flickr8k-retrieval{name}")
        rows.append(recalls_row(f"{title}, ITC", run["itc"]))
        rows.append(recalls_row(f"{title}, ITM re-ranks {run['k']}", run["reranked"]))
    return table(*rows)


def daquar() -> str:
    """Fine-tuning for VQA on DAQUAR, beside the same on blank images and the most frequent answer."""
    real = log("finetune-daquar-photos")
    rows = {
        f'always "{real["majority answer"]}", the most frequent answer': real["accuracy of the majority answer"],
        "trained and asked on blank images": log("finetune-daquar-blank")["accuracy"],
        "trained on the images, asked on blank ones": log("finetune-daquar-photos-asked-blank")["accuracy"],
        "**trained and asked on the images**": real["accuracy"],
    }
    return table(("DAQUAR val, correct answers", "%"), *((title, f"{share:.1f}") for title, share in rows.items()))


# --- speed -----------------------------------------------------------------------------------------------------------

STEP1, STEP2 = "a step of stage 1, batch 16", "a step of stage 2, OPT-125m, batch 8"
CAPTIONS = "captions, 5 beams, 20 tokens, batch 8"
SPEED = {
    "fp32, AMD EPYC": {
        "stage1": STEP1, "stage2": STEP2, "generate": CAPTIONS, "retrieval": "ITM of 2 images with 64 texts",
    },
    "bf16, Intel Xeon": {"stage1-amx": STEP1, "stage2-amx": STEP2, "generate-amx": CAPTIONS},
    "fp32, Intel Xeon": {"stage1-amx-fp32": STEP1, "stage2-amx-fp32": STEP2, "generate-amx-fp32": CAPTIONS},
    "bf16, NVIDIA H100": {
        "stage1-h100": "a step of stage 1, ViT-g, batch 384",
        "stage1-h100-batch64-graph": "a step of stage 1, ViT-g, batch 64",
        "stage2-h100": "a step of stage 2, ViT-g, OPT-2.7b, batch 128",
        "generate-h100": "captions, ViT-g, OPT-2.7b, 5 beams, 20 tokens, batch 8",
    },
}  # fmt: skip


def speed_row(title: str, numbers: dict) -> tuple[str, ...]:
    """A benchmark, beside the best matrix product and beside transformers."""
    unit = next(name for name in numbers if name.endswith(" a second")).split()[0]
    cells = [f"{numbers['seconds']:.2f}", f"{numbers[f'{unit} a second']:,.1f} {unit}", f"{numbers['GFLOP/s']:,.0f}"]
    cells.append(f"{numbers['MFU, %']:.0f} %")
    if "seconds, alternating" not in numbers:
        return title, *cells, "–", "–", "–"
    ours, theirs = numbers["seconds, alternating"], numbers["seconds of transformers, alternating"]
    pairs = ("median of the pairs", "worst pair", "best pair")
    median, worst, best = (numbers[f"times as fast, {which}"] for which in pairs)
    fewer = numbers.get("times as many FLOPs in transformers")
    cells += [f"{ours:.2f}, {theirs:.2f}", f"{median:.2f} ({worst:.2f} to {best:.2f})"]
    return title, *cells, f"{fewer:.2f}" if fewer else "–"


def speed() -> str:
    """All benchmarks."""
    head = ("", "seconds", "a second", "GFLOP/s", "of the best product", "alternating: here, transformers")
    rows = [(*head, "times as fast", "times as few FLOPs")]
    for machine, works in SPEED.items():
        rows.append((f"**{machine}**", *[""] * 7))
        rows += [speed_row(title, log(f"bench-{what}")["numbers"]) for what, title in works.items()]
    return table(*rows)


TABLES = [shapes, losses, flickr8k, answers, figure5, captions, tuned_answers, tuned_captions, tuned_retrieval]
TABLES += [tuned_flickr8k_captions, tuned_flickr8k_retrieval, daquar, speed]


def with_tables(page: str, tables: list = TABLES) -> str:
    """A page with its tables made anew."""
    for make in tables:
        pattern = rf"(<!-- table: {make.__name__} -->\n\n)(?:\|.*\n)*"
        page = re.sub(pattern, lambda found, made=make: f"{found[1]}{made()}\n", page)
    return page


def main() -> None:
    """Rewrite the pages whose tables are stale."""
    for path in PAGES:
        page = path.read_text()
        if (current := with_tables(page)) != page:
            path.write_text(current)
            print(f"{path.relative_to(ROOT)} updated")


if __name__ == "__main__":
    main()
