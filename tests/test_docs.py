"""What the README says is so: its commands run, its links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT, TINY
from PIL import Image

import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SMALL = ["--steps", "2", "--batch", "4", "--queries", "2", "--eval-every", "0"]


def commands(language: str) -> list[list[str]]:
    """The command lines of the README's blocks of a language, without comments."""
    text = "\n".join(block for kind, block in BLOCKS if kind == language).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


# --- commands


def test_the_first_block_sets_up_and_the_next_train_and_test():
    """Two commands set up, one trains, one tests; CI runs the same test command and installs the same files."""
    *setup, main, tests = commands("bash")
    assert len(setup) == 2
    assert main == ["torchrun", "train.py", "--stage", "1"]
    ci = (ROOT / ".ci/run").read_text()
    assert ci.strip().splitlines()[-1] == " ".join(tests)
    assert setup[1][-1] in ci


def test_the_main_command_runs_and_prints_what_the_readme_shows(tmp_path):
    """With few steps. What the README tells the reader to look at is in its example and in the real output."""
    command = [*commands("bash")[2], *SMALL, "--out", str(tmp_path / "run"), "--losses", "itc,itm,itg"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:]], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown = next(block for kind, block in BLOCKS if kind == "" and "re-ranks" in block)
    for line in ("ViT (frozen)", "Q-Former", "temperature", "picture finds caption", "shuffled pictures",
                 "ITM re-ranks 128", "- held-out pairs", "- swapped", "trained in"):  # fmt: skip
        assert line in done.stdout and line in shown, line
    recipe = shown.splitlines()[0].removesuffix(", ...")
    assert train.complete(train.TrainConfig(), set())[1].startswith(recipe)


def test_every_other_command_has_only_flags_that_exist():
    lines = [words for kind in ("", "bash") for words in commands(kind) if "train.py" in words]
    assert len(lines) >= 4
    for words in lines:
        train.parse_flags(words[words.index("train.py") + 1 :])


def test_own_photos_and_the_python_lines(tmp_path, monkeypatch):
    """The example file, a run over it, its evaluation, and the calls from Python, as the README has them."""
    import eval

    records = next(block for kind, block in BLOCKS if kind == "json")
    (tmp_path / "photos.json").write_text(records)
    for i, record in enumerate(json.loads(records)):
        Image.new("RGB", (80, 60), (90 * i, 30, 30)).save(tmp_path / record["image"])
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, *SMALL, "--batch", "2", "--data", "photos.json", "--image-size", "64", "--out", "runs/stage1"])
    words = next(words for words in commands("") if "eval.py" in words)
    result = eval.main([word.replace("val.json", "photos.json") for word in words[words.index("eval.py") + 1 :]])
    assert (result["photos"], result["texts"]) == (2, 3)
    Image.new("RGB", (50, 40)).save("photo.jpg")
    exec(next(block for kind, block in BLOCKS if kind == "python"), {})


# --- links


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
