"""The course grades: an exercise fails until it is solved, its model answer solves it, a hole turns tests red."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from course.dig import HOLES

PATCHES = sorted((ROOT / "course/solutions").glob("*.patch"))
EXERCISES = range(1, 17)
ADAPTERS = (ROOT / "course/adapters.py").read_text()
STUBS = set(map(int, re.findall(r'raise NotImplementedError\("exercise (\d+): ', ADAPTERS)))
unsolved = pytest.mark.skipif(STUBS != set(EXERCISES), reason="some exercises are solved in course/adapters.py")


def in_copy(copy: Path, *command: str, fine: tuple[int, ...] = (0,)) -> str:
    """What a command prints in the copy; `python` is this one."""
    command = [sys.executable if word == "python" else word for word in command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    result = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode in fine, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project without its history and runs; tests undo what they change."""
    if shutil.which("git") is None:
        pytest.skip("no git, which applies the patches")
    junk = shutil.ignore_patterns(".git", "runs", "docs", "logs", "__pycache__", ".*_cache", ".venv")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("course") / "tree", ignore=junk))


def apply(tree: Path, *patches: Path, back: bool = False) -> None:
    """Apply patches in order, or take them back."""
    for patch in patches:
        in_copy(tree, "git", "apply", *["--reverse"] * back, str(patch))


def test_every_exercise_has_a_test_a_marker_and_a_model_answer(pytestconfig):
    markers = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert {"exercise", *(f"exercise_{number}" for number in EXERCISES)} <= markers
    names = [path.stem.replace("_", "-") for path in sorted((ROOT / "course/exercises").glob("test_*.py"))]
    assert names == [f"test-{patch.stem}" for patch in PATCHES]
    assert [int(patch.stem[:2]) for patch in PATCHES] == list(EXERCISES)
    for number, path in zip(EXERCISES, sorted((ROOT / "course/exercises").glob("test_*.py"))):
        assert f"\npytestmark = [pytest.mark.exercise, pytest.mark.exercise_{number}]\n" in path.read_text()


@unsolved
def test_unsolved_every_test_of_every_exercise_fails_in_one_sentence(tree):
    """None passes by accident, none is an error at collection; the last line of each failure says what to write."""
    printed = in_copy(tree, "python", "-m", "pytest", "-m", "exercise", "-q", "-rA", "--tb=line", "course", fine=(1,))
    failed = re.findall(r"^FAILED course/exercises/test_(\d\d)_", printed, re.MULTILINE)
    assert set(map(int, failed)) == set(EXERCISES)
    assert re.search(rf"^{len(failed)} failed in ", printed, re.MULTILINE), printed[-300:]
    sentences = re.findall(r"NotImplementedError: exercise (\d+): \w.*\n", printed)
    assert len(sentences) >= len(failed)


@unsolved
def test_with_all_model_answers_every_exercise_passes(tree):
    apply(tree, *PATCHES)
    printed = in_copy(tree, "python", "-m", "pytest", "-m", "exercise", "-q", "course", fine=(0, 1))
    apply(tree, *PATCHES, back=True)
    assert re.search(r"^\d+ passed in ", printed, re.MULTILINE), printed[-1000:]
    assert (tree / "course/adapters.py").read_text() == ADAPTERS


@unsolved
def test_model_answers_apply_alone_and_in_any_order_and_are_short(tree):
    for patch in PATCHES:
        apply(tree, patch)
        apply(tree, patch, back=True)
        lines = [line for line in patch.read_text().splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
        assert len(lines) <= 20, f"{patch.name} changes {len(lines)} lines"
    apply(tree, *reversed(PATCHES))
    apply(tree, *PATCHES, back=True)


def test_a_plain_test_run_leaves_the_exercises_out(pytestconfig):
    """And `-m exercise_3` finds them without a path."""
    assert pytestconfig.getini("testpaths") == ["tests", "course/exercises"]
    assert pytestconfig.getini("addopts") == ["-m", "not exercise"]


# --- holes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tree) -> Path:
    """The copy as a repository in which all is committed."""
    if not (tree / ".git").exists():
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        in_copy(tree, "git", "init", "-q")
        in_copy(tree, "git", "add", ".")
        in_copy(tree, "git", *identity, "commit", "-q", "-m", "all")
    yield tree
    in_copy(tree, "git", "checkout", "-q", ".")
    shutil.rmtree(tree / "runs", ignore_errors=True)


def dig(tree: Path, *words: str, fine: int = 0) -> str:
    return in_copy(tree, "python", "course/dig.py", *words, fine=(fine,))


@pytest.mark.parametrize("name", ["qformer_mask", "sample_hard_negatives", "itg"])
def test_a_hole_turns_its_tests_red_and_filling_it_restores_the_file(repository, name):
    """All eleven take two minutes; these have one file each of qformer.py, losses.py and model.py."""
    file, _, tests = HOLES[name]
    before = (repository / file).read_bytes()
    printed = dig(repository, name)
    assert f"python -m pytest -x {tests}\n" in printed
    graded = in_copy(repository, "python", "-m", "pytest", "-x", "-q", *tests.split(), fine=(1,))
    assert f"NotImplementedError: write {name}, or: python course/dig.py --fill {name}" in graded
    dig(repository, "--fill", name)
    assert (repository / file).read_bytes() == before
    assert not list((repository / "runs/dug").iterdir())


def test_every_hole_can_be_dug_and_filled(repository):
    listed = dig(repository, "--list")
    for name, (file, _, tests) in HOLES.items():
        before = (repository / file).read_text()
        assert re.search(rf"^{name} +{file}:\d+ +\d+ lines   {tests}$", listed, re.MULTILINE)
        dig(repository, name)
        dug = (repository / file).read_text()
        gone = len(before.splitlines()) - len(dug.splitlines())
        assert dug.count("raise NotImplementedError") == 1 and f" {gone + 1} lines " in listed
        compile(dug, file, "exec")
        dig(repository, "--fill", name)
        assert (repository / file).read_text() == before


def test_nothing_that_somebody_wrote_is_lost(repository):
    """Neither changes before digging, nor a solution in the hole."""
    losses = repository / "losses.py"
    own = losses.read_text() + "# mine\n"
    losses.write_text(own)
    assert "losses.py has changes that are not committed" in dig(repository, "itc_loss", fine=1)
    assert losses.read_text() == own
    in_copy(repository, "git", "checkout", "-q", ".")

    assert "itc_loss has not been dug out" in dig(repository, "--fill", "itc_loss", fine=1)
    dig(repository, "itc_loss")
    assert "has changes that are not committed" in dig(repository, "itg_loss", fine=1)  # it has a hole
    solved = re.sub(
        r"    raise NotImplementedError.*\n", "    # my way\n    return sim_i2t.sum()\n", losses.read_text()
    )
    losses.write_text(solved)
    asked = dig(repository, "--fill", "itc_loss", fine=1)  # nobody answers
    assert "    # my way\n    return sim_i2t.sum()\n" in asked and "nothing was changed" in asked
    assert losses.read_text() == solved
    losses.write_text(solved.replace("return sim_i2t.sum()", "return ("))
    assert "losses.py is not Python, or has no itc_loss" in dig(repository, "--fill", "itc_loss", fine=1)
