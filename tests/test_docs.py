"""What the README says is so: its commands run, its numbers stand in assets/logs, its links lead somewhere.

`python tests/test_docs.py` prints the README's tables of results, made from the logs.
"""

import json
import re
import shlex
import statistics

import pytest
from conftest import ROOT, TINY
from PIL import Image

import train

README = (ROOT / "README.md").read_text()
LOGS = ROOT / "assets/logs"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SMALL = ["--steps", "2", "--batch", "4", "--queries", "2", "--eval-every", "0"]


def commands(language: str) -> list[list[str]]:
    """The command lines of the README's blocks of a language, without comments."""
    text = "\n".join(block for kind, block in BLOCKS if kind == language).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


# --- commands


def test_the_first_block_sets_up_and_the_next_ask_train_and_test():
    """Two commands set up, one asks, one trains, one tests; CI runs the same test command, installs the same files."""
    *setup, ask, main, tests = commands("bash")
    assert len(setup) == 2
    assert ask == ["python", "eval.py", "ask"]
    assert main == ["torchrun", "train.py", "--stage", "1"]
    ci = (ROOT / ".ci/run").read_text()
    assert ci.strip().splitlines()[-1] == " ".join(tests)
    assert setup[1][-1] in ci


def test_the_main_command_runs_and_prints_what_the_readme_shows(tmp_path, few_test_pictures, capsys):
    """With few steps and test pictures. What the README tells the reader to look at is in its example and in the real
    output. (torchrun is test_train's.)"""
    torchrun, script, *flags = commands("bash")[3]
    assert (torchrun, script) == ("torchrun", "train.py")
    train.main([*flags, *SMALL, "--out", str(tmp_path / "run"), "--losses", "itc,itm,itg"])
    said = capsys.readouterr().out
    shown = next(block for kind, block in BLOCKS if kind == "" and "re-ranks" in block)
    for line in ("ViT (frozen)", "Q-Former", "temperature", "picture finds caption", "shuffled pictures",
                 "ITM re-ranks 128", "- held-out pairs", "- swapped", "trained in"):  # fmt: skip
        assert line in said and line in shown, line
    recipe = shown.splitlines()[0].removesuffix(", ...")
    assert train.complete(train.TrainConfig(), set())[1].startswith(recipe)


def test_every_other_command_has_only_flags_that_exist():
    lines = [words for kind in ("", "bash") for words in commands(kind) if "train.py" in words]
    assert len(lines) >= 4
    for words in lines:
        train.parse_flags(words[words.index("train.py") + 1 :])


def test_every_evaluation_has_only_flags_that_exist():
    import eval

    lines = [words for words in commands("") if "eval.py" in words]
    assert {words[2] for words in lines} == {"ask", "answers", "captions", "retrieval", "vqa", "features"}
    for words in lines:
        eval.parse(words[2:])


def test_every_data_command_has_only_flags_that_exist(capsys):
    """Its files are not there; but the command line is understood."""
    import data

    lines = [words for words in commands("") if "data.py" in words]
    assert {words[2] for words in lines} == {"check", "convert"}
    for words in lines:
        with pytest.raises(data.UserError, match=r"does not exist: check the path|has no tokenizer"):
            data.main(words[2:])


def test_own_photos_and_the_python_lines(tmp_path, monkeypatch):
    """The example file, a run over it, its evaluation, and the calls from Python, as the README has them."""
    import eval

    records = next(block for kind, block in BLOCKS if kind == "json" and "caption" in block)
    (tmp_path / "photos.json").write_text(records)
    for i, record in enumerate(json.loads(records)):
        Image.new("RGB", (80, 60), (90 * i, 30, 30)).save(tmp_path / record["image"])
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, *SMALL, "--batch", "2", "--data", "photos.json", "--image-size", "64", "--out", "runs/stage1"])
    words = next(words for words in commands("") if "retrieval" in words and "val.json" in words)
    result = eval.main([word.replace("val.json", "photos.json") for word in words[words.index("eval.py") + 1 :]])
    assert (result["photos"], result["texts"]) == (2, 3)
    questions = next(block for kind, block in BLOCKS if kind == "json" and "question" in block)
    assert [record.keys() for record in json.loads(questions)] == [{"image", "question", "answer"}]
    Image.new("RGB", (50, 40)).save("photo.jpg")
    exec(next(block for kind, block in BLOCKS if kind == "python" and "runs/stage1" in block), {})


def test_asking_says_what_the_readme_shows(capsys):
    import eval

    eval.main(["ask"])
    shown = next(block for kind, block in BLOCKS if kind == "" and block.startswith("assets/tiny/blip2 on"))
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]  # the first line names the machine


def test_the_python_lines_of_stage_2_give_what_the_readme_says():
    names, block = {}, next(block for kind, block in BLOCKS if kind == "python" and "tiny/blip2" in block)
    exec(block, names)
    model, photo = names["model"], names["photo"]
    assert model.caption(photo) == "a small white cross left of a large green star"
    assert model.ask(photo, "what color is the star?") == "green"
    assert model.rank(photo, "what color is the star?", ["red", "green"])[0].answer == "green"
    likely = model.score(photo, ["a green star", "a red star"]).log_prob
    assert likely.shape == (1, 2)


# --- numbers and links


def log(name: str) -> dict:
    return json.loads((LOGS / f"{name}.json").read_text())


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def r1(numbers: dict) -> list[float]:
    """R@1 both ways."""
    return [numbers[way]["R@1"] for way in ("image_to_text", "text_to_image")]


def row(title: str, *cells: str) -> str:
    return f"| {' | '.join((title, *cells))} |"


def mean_row(title: str, several: list[dict]) -> str:
    """Mean and standard deviation of R@1 over the seeds, both ways."""
    return row(title, *(spread(list(values)) for values in zip(*map(r1, several), strict=True)))


def ways_row(title: str, ways: dict) -> str:
    """All recalls of one run, both ways."""
    return row(title, *(" / ".join(f"{value:.1f}" for value in way.values()) for way in ways.values()))


def shapes_table() -> str:
    """Three seeds of the main command."""
    runs = [log(f"shapes-seed{seed}") for seed in range(3)]
    lines = [row("R@1, %", "picture finds caption", "caption finds picture"), "|---|---|---|"]
    for title, name in (
        ("chance", "chance"),
        ("shuffled pictures", "shuffled pictures"),
        ("**ITC**", "itc"),
        ("**ITM re-ranks 128**", "reranked"),
    ):
        lines.append(mean_row(title, [run[name] for run in runs]))
    for name in runs[0]["subsets"]:
        lines.append(mean_row(f"of these, {name}", [run["subsets"][name] for run in runs]))
    twins = [spread([run["twins"][name] for run in runs]) for name in ("itc", "itm")]
    lines.append(row("own caption before its twin's, chance 50", f"ITC {twins[0]}", f"ITM {twins[1]}"))
    return "\n".join(lines)


def losses_table() -> str:
    """Paper Table 6 in miniature: with and without ITG; the shapes world with three seeds, the photos once."""
    lines = [row("R@1 after re-ranking, %", "picture finds caption", "caption finds picture"), "|---|---|---|"]
    for losses, name in (("ITC + ITM", "-itc-itm"), ("ITC + ITM + ITG", "")):
        lines.append(mean_row(f"shapes world, {losses}", [log(f"shapes{name}-seed{i}")["reranked"] for i in range(3)]))
    for losses, name in (("ITC + ITM", "-itc-itm"), ("ITC + ITM + ITG", "-20min")):
        numbers = r1(log(f"flickr8k{name}")["reranked"])
        lines.append(row(f"Flickr8k, 850 steps, {losses}", *(f"{value:.1f}" for value in numbers)))
    return "\n".join(lines)


def photos_table() -> str:
    """Flickr8k val: 1,000 photos, five captions each."""
    title = row("Flickr8k val, R@1 / 5 / 10, %", "photo finds caption", "caption finds photo")
    lines = [title, "|---|---|---|", ways_row("chance", log("flickr8k-20min")["chance"])]
    for minutes in (20, 60):
        run = log(f"flickr8k-{minutes}min")
        lines.append(ways_row(f"{minutes} minutes, ITC", run["itc"]))
        lines.append(ways_row(f"{minutes} minutes, ITM re-ranks {run['k']}", run["reranked"]))
    return "\n".join(lines)


SUBSETS = ("all", "seen", "held-out pairs", "held-out wordings")
LLM_NAMES = {"opt": "OPT", "t5": "T5"}


def stage2_logs(llm: str, init: str) -> list[str]:
    return [f"stage2-{llm}-{init}-seed{seed}" for seed in range(3)]


def answers_table() -> str:
    """Zero-shot question answering in the shapes world, three seeds of stages 1 and 2."""
    lines = [row("right answers, %", *SUBSETS), "|---|---|---|---|---|"]
    for llm, title in LLM_NAMES.items():
        runs = [log(name)["accuracy"] for name in stage2_logs(llm, "init")]
        for shown, name in (
            ("the majority answer", "the majority answer"),
            ("a blank picture", "a blank picture"),
            ("another picture", "another picture"),
            ("**the picture**", "the picture"),
            ("ceiling: the true caption as text", "the true caption as text"),
        ):
            cells = [spread([run[name][subset] for run in runs]) for subset in SUBSETS]
            lines.append(row(f"{title}, {shown}", *cells))
    return "\n".join(lines)


def accuracies(name: str) -> dict[int, float]:
    """Step -> share of right answers in validation, as the run printed it."""
    text = (LOGS / f"{name}.txt").read_text()
    found = re.findall(r"step +(\d+)/\d+ [^\n]*\n  validation: [^\n]*\n  accuracy ([\d.]+) %", text)
    return {int(step): float(share) for step, share in found}


def figure5_table() -> str:
    """Paper Figure 5 in miniature: stage 2 behind stage 1, and without it."""
    steps = (250, 500, 1000, 1750, 2500)
    lines = [row("right answers, %, after", *(f"{step:,} steps" for step in steps), "test"), "|---|" + "---|" * 6]
    for llm, title in LLM_NAMES.items():
        for init, how in (("none", "without stage 1"), ("init", "after stage 1")):
            names = stage2_logs(llm, init)
            runs = [accuracies(name) for name in names]
            test = [log(name)["accuracy"]["the picture"]["all"] for name in names]
            lines.append(row(f"{title}, {how}", *(spread([run[step] for run in runs]) for step in steps), spread(test)))
    return "\n".join(lines)


def captions_table() -> str:
    """Captions of Flickr8k val, 1,000 photos."""
    names, run = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"), log("flickr8k-stage2")
    lines = [row("Flickr8k val", *names), "|---|" + "---|" * len(names)]
    for title, numbers in (("shuffled photos", run["shuffled pictures"]), ("**captions**", run)):
        lines.append(row(title, *(f"{numbers[name]:.1f}" for name in names)))
    return "\n".join(lines)


def tuned_answers_table() -> str:
    """Fine-tuning for VQA in the shapes world, three seeds: before, and with the question in the Q-Former or not."""
    lines = [row("right answers, %", *SUBSETS), "|---|---|---|---|---|"]
    for title, names in (
        ("before", stage2_logs("opt", "init")),
        ("fine-tuned, `--no-condition`", [f"finetune-vqa-no-condition-seed{seed}" for seed in range(3)]),
        ("fine-tuned, the Q-Former reads the question", [f"finetune-vqa-seed{seed}" for seed in range(3)]),
    ):
        runs = [log(name)["accuracy"]["the picture"] for name in names]
        lines.append(row(title, *(spread([run[subset] for run in runs]) for subset in SUBSETS)))
    return "\n".join(lines)


def tuned_captions_table() -> str:
    """Fine-tuning for captions in the shapes world, three seeds: 1,000 test pictures, a fifth with held-out pairs."""
    lines = [row("captions that are right, %", *(f"seed {seed}" for seed in range(3)), "all"), "|---|---|---|---|---|"]
    for title, names in (
        ("before", stage2_logs("opt", "init")),
        ("fine-tuned", [f"finetune-caption-seed{seed}" for seed in range(3)]),
    ):
        shares = [log(name)["captions right"] for name in names]
        lines.append(row(title, *(f"{share:.1f}" for share in shares), spread(shares)))
    return "\n".join(lines)


def tuned_retrieval_table() -> str:
    """Fine-tuning for retrieval in the shapes world, three seeds."""
    lines = [row("R@1, %", "picture finds caption", "caption finds picture"), "|---|---|---|"]
    for title, name in (("before", "finetune-retrieval-before"), ("fine-tuned", "finetune-retrieval")):
        runs = [log(f"{name}-seed{seed}") for seed in range(3)]
        lines.append(mean_row(f"{title}, ITC", [run["itc"] for run in runs]))
        lines.append(mean_row(f"{title}, ITM re-ranks 128", [run["reranked"] for run in runs]))
    return "\n".join(lines)


def tuned_photos_table() -> str:
    """Fine-tuning for captions on Flickr8k, 1,000 photos of val."""
    names = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr")
    before, tuned = log("finetune-flickr8k-caption-before"), log("finetune-flickr8k-caption")
    lines = [row("Flickr8k val", *names), "|---|" + "---|" * len(names)]
    for title, run in (("shuffled photos", before["shuffled pictures"]), ("before", before), ("fine-tuned", tuned)):
        lines.append(row(title, *(f"{run[name]:.1f}" for name in names)))
    return "\n".join(lines)


def tuned_photo_retrieval_table() -> str:
    """Fine-tuning for retrieval on Flickr8k, 1,000 photos of val."""
    lines = [row("Flickr8k val, R@1 / 5 / 10, %", "photo finds caption", "caption finds photo"), "|---|---|---|"]
    for title, name in (("before", "-before"), ("fine-tuned", "")):
        run = log(f"finetune-flickr8k-retrieval{name}")
        lines.append(ways_row(f"{title}, ITC", run["itc"]))
        lines.append(ways_row(f"{title}, ITM re-ranks {run['k']}", run["reranked"]))
    return "\n".join(lines)


def daquar_table() -> str:
    """Fine-tuning for VQA on DAQUAR, beside the same on blank photos and the most frequent answer."""
    photos = log("finetune-daquar-photos")
    usual = photos["majority answer"], photos["accuracy of the majority answer"]
    lines = [row("DAQUAR val, right answers", "%"), "|---|---|"]
    lines.append(row(f'always "{usual[0]}", the most frequent answer', f"{usual[1]:.1f}"))
    lines.append(row("trained and asked on blank photos", f"{log('finetune-daquar-blank')['accuracy']:.1f}"))
    asked_blank = log("finetune-daquar-photos-asked-blank")["accuracy"]
    lines.append(row("trained on the photos, asked on blank ones", f"{asked_blank:.1f}"))
    lines.append(row("**trained and asked on the photos**", f"{photos['accuracy']:.1f}"))
    return "\n".join(lines)


SPEED = {
    "fp32, AMD EPYC": {
        "stage1": "a step of stage 1, batch 16",
        "stage2": "a step of stage 2, OPT-125m, batch 8",
        "generate": "captions, 5 beams, 20 tokens, batch 8",
        "retrieval": "ITM of 2 photos with 64 texts",
    },
    "bf16, Intel Xeon": {
        "stage1-amx": "a step of stage 1, batch 16",
        "stage2-amx": "a step of stage 2, OPT-125m, batch 8",
        "generate-amx": "captions, 5 beams, 20 tokens, batch 8",
    },
    "fp32, Intel Xeon": {
        "stage1-amx-fp32": "a step of stage 1, batch 16",
        "stage2-amx-fp32": "a step of stage 2, OPT-125m, batch 8",
        "generate-amx-fp32": "captions, 5 beams, 20 tokens, batch 8",
    },
    "bf16, NVIDIA H100": {
        "stage1-h100": "a step of stage 1, ViT-g, batch 384",
        "stage2-h100": "a step of stage 2, ViT-g, OPT-2.7b, batch 128",
        "generate-h100": "captions, ViT-g, OPT-2.7b, 5 beams, 20 tokens, batch 8",
    },
}


def speed_table() -> str:
    """bench.py, beside the best matrix product and beside transformers."""
    lines, fewer = [], "times as many FLOPs in transformers"
    for machine, works in SPEED.items():
        lines.append(row(f"**{machine}**", *[""] * 7))
        for what, title in works.items():
            numbers = log(f"bench-{what}")["numbers"]
            unit = next(name for name in numbers if name.endswith(" a second")).split()[0]
            cells = [
                f"{numbers['seconds']:.2f}",
                f"{numbers[f'{unit} a second']:,.1f} {unit}",
                f"{numbers['GFLOP/s']:,.0f}",
                f"{numbers['MFU, %']:.0f} %",
                *["–"] * 3,
            ]
            if "seconds, in turns" in numbers:
                times = (
                    numbers[f"times as fast, {which}"] for which in ("median of the pairs", "worst pair", "best pair")
                )
                cells[4:] = [
                    f"{numbers['seconds, in turns']:.2f}, {numbers['seconds of transformers, in turns']:.2f}",
                    "{:.2f} ({:.2f} to {:.2f})".format(*times),
                    f"{numbers[fewer]:.2f}" if fewer in numbers else "–",
                ]
            lines.append(row(title, *cells))
    rate, turns = "of the best product", "in turns: we, transformers"
    head = row("", "seconds", "a second", "GFLOP/s", rate, turns, "times as fast", "times as few FLOPs")
    return "\n".join([head, "|---|" + "---|" * 7, *lines])


TABLES = [shapes_table, losses_table, photos_table, answers_table, figure5_table, captions_table]
TABLES += [tuned_answers_table, tuned_captions_table, tuned_retrieval_table, tuned_photos_table]
TABLES += [tuned_photo_retrieval_table, daquar_table, speed_table]


@pytest.mark.parametrize("table", TABLES)
def test_tables_match_the_logs(table):
    assert table() in README


def test_links_to_files_and_headings_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}  # fmt: skip
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:assets|tests)/[\w./-]+|\w+\.py)`", README):
        assert (ROOT / name).exists(), name


if __name__ == "__main__":
    print("\n\n".join(table() for table in TABLES))
