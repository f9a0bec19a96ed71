"""Draw the page of a run, or of several over each other, also while they train:

python -m tools.report runs/stage1                  writes runs/stage1/report.html, as a training does
python -m tools.report runs/seed0 runs/seed1        writes runs/report.html
"""

import sys
from pathlib import Path

from engine.errors import Parser, run_command
from engine.files import check_output
from tasks.report import read_run, write_report


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; those that differ by --seed become a mean")
    parser.add_argument("--out", type=Path, help="file of the page")
    args = parser.parse_args(argv)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else args.runs[0].parent) / "report.html"
    runs = [read_run(folder) for folder in args.runs]
    check_output("out", out)
    write_report(runs, out)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    sys.exit(run_command(main))
