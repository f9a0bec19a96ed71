"""Dig a hole into the project, write what was there yourself, and let the project's own tests grade it.

python course/dig.py --list                 what can be dug out, and which tests turn red
python course/dig.py qformer_mask           its body becomes `raise NotImplementedError`, its docstring stays
python course/dig.py --fill qformer_mask    the body comes back; asks before it replaces what you wrote
"""

import argparse
import ast
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "runs/dug"  # the bodies that were dug out

# name: file, function, and the tests that turn red without it, the fastest that do
HOLES = {
    "qformer_mask": ("qformer.py", "qformer_mask", "tests/test_masks.py"),
    "itc_similarity": ("losses.py", "itc_similarity", "tests/test_losses.py"),
    "itc_loss": ("losses.py", "itc_loss", "tests/test_losses.py"),
    "sample_hard_negatives": ("losses.py", "sample_hard_negatives", "tests/test_losses.py"),
    "itg_loss": ("losses.py", "itg_loss", "tests/test_losses.py"),
    "itm": ("model.py", "Blip2Model.itm", "tests/test_course.py"),  # which rows match, and which do not
    "itg": ("model.py", "Blip2Model.itg", "tests/test_course.py"),  # [DEC], and what each position predicts
    "nucleus": ("generate.py", "nucleus", "tests/test_generate.py"),
    "word_map": ("tasks/attention_maps.py", "word_map", "tests/test_attention.py"),
    "causal_mask": ("llm.py", "causal_mask", "tests/test_llm.py"),
    "split_prefix": ("sources/text.py", "split_prefix", "tests/test_sources.py tests/test_data.py -k prefix"),  # in two
}


def body_of(name: str) -> tuple[Path, list[str], slice]:
    """The file of a function, its lines, and which of them are the function's body without its docstring."""
    path, lines, node = ROOT / HOLES[name][0], [], None
    with suppress(SyntaxError, StopIteration):
        lines = path.read_text().splitlines(keepends=True)
        node = ast.parse("".join(lines))
        for part in HOLES[name][1].split("."):
            node = next(inner for inner in node.body if getattr(inner, "name", None) == part)
        begin = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        return path, lines, slice(begin, node.end_lineno)
    sys.exit(f"{path.name} is not Python, or has no {name}: see git diff {path.name}, or git checkout -p {path.name}")


def hole(name: str) -> str:
    """What stands in the place of a body."""
    indent = 4 * (1 + HOLES[name][1].count("."))
    return " " * indent + f'raise NotImplementedError("write {name}, or: python course/dig.py --fill {name}")\n'


def dig(name: str) -> str:
    """Keep the body, put a hole in its place -> what to do next. Refuses where something could be lost."""
    (path, lines, body), kept = body_of(name), KEPT / name
    git = ["git", "status", "--porcelain", str(path)]
    if shutil.which("git") and subprocess.run(git, cwd=ROOT, capture_output=True).stdout:
        sys.exit(f"{path.name} has changes that are not committed: commit them, or fill the hole that is in it, first")
    was = "".join(lines[body])
    if kept.exists() and kept.read_text() != was:
        sys.exit(f"{name} was dug out before: python course/dig.py --fill {name} puts it back")
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(was)
    lines[body] = [hole(name)]
    path.write_text("".join(lines))
    return f"""{path.relative_to(ROOT)}, line {body.start + 1}, is where {name} has to be written
what grades it:     python -m pytest -x {HOLES[name][2]}
what puts it back:  python course/dig.py --fill {name}, or git checkout -p {path.relative_to(ROOT)}"""


def fill(name: str) -> str:
    """Put the body back -> what was done. Asks first if something else than the hole is there."""
    (path, lines, body), kept = body_of(name), KEPT / name
    if not kept.exists():
        sys.exit(f"{name} has not been dug out, or not by this script: git checkout -p {path.relative_to(ROOT)}")
    if (now := "".join(lines[body])) not in (hole(name), kept.read_text()):
        print(
            now, f"This is {name} in {path.name}. Replace it by the project's own? [y/N] ", sep="\n", end="", flush=True
        )
        if sys.stdin.readline().strip() != "y":
            sys.exit("nothing was changed")
    lines[body] = [kept.read_text()]
    path.write_text("".join(lines))
    kept.unlink()
    return f"{path.relative_to(ROOT)} has its {name} again"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=HOLES, metavar="NAME", help="see --list")
    parser.add_argument("--fill", action="store_true", help="put the body back")
    parser.add_argument("--list", action="store_true", help="show what can be dug out")
    args = parser.parse_args()
    if args.name:
        return print((fill if args.fill else dig)(args.name))
    for name, (file, _, tests) in HOLES.items():
        body = body_of(name)[2]
        print(f"{name:22} {file + ':' + str(body.start + 1):28} {body.stop - body.start:2} lines   {tests}")


if __name__ == "__main__":
    main()
