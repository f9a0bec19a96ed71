"""CapFilt in the shapes world (paper 3.4): python tests/capfilt_experiment.py OUT --seed 0

Drawn images as files, in three parts: clean ones, on which a captioner and a ranker are trained (stages 1 and 2);
"web" ones with one caption each, of which half are of another image; and others to evaluate on. CapFilt captions the
web part and keeps the best two. Then stage 1 is trained anew on the web's captions, on CapFilt's, and on the clean
captions of the same images, equal steps. Prints the share of wrong and of right captions that was dropped, and R@1.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sources.shapes import ShapesWorld  # noqa: E402

SIZES = "--queries 8 --image-size 64 --embed-dim 64"
FLAGS = "--batch 32 --dropout 0 --lr 1e-3 --warmup 30 --cache-features --val-photos 0 --eval-every 0 --workers 0"


def draw(out: Path, count: int, seed: int) -> dict[str, Path]:
    """The images and four annotation files."""
    world, rng = ShapesWorld("train", 64), np.random.default_rng(seed)
    chosen = rng.choice(len(world), 2 * count + 400, replace=False)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for index in chosen.tolist():
        world.image(index).save(out / f"images/{index}.png")
    record = lambda index, captions: {"image": f"images/{index}.png", "caption": captions}  # noqa: E731
    first, web, val = np.split(chosen, [count, 2 * count])
    own = {i: world.captions(i)[rng.integers(len(world.captions(i)))] for i in web.tolist()}
    wrong = rng.permutation(web)[: count // 2]
    moved = dict(zip(wrong.tolist(), np.roll(wrong, 1).tolist()))
    parts = {
        "clean part": [record(i, world.captions(i)) for i in first.tolist()],
        "web": [record(i, [own[moved.get(i, i)]]) for i in web.tolist()],
        "clean": [record(i, [own[i]]) for i in web.tolist()],
        "val": [record(i, world.captions(i)[:1]) for i in val.tolist()],
    }
    files = {name: out / f"{name.replace(' ', '-')}.json" for name in parts}
    for name, records in parts.items():
        files[name].write_text(json.dumps(records))
    (out / "wrong.json").write_text(json.dumps([f"images/{i}.png" for i in moved]))
    return files


def run(out: Path, name: str, *flags: str) -> None:
    """A command; its output goes into a file."""
    print(f"{name} ...", flush=True)
    with open(out / f"{name.replace(' ', '-')}.log", "w") as log:
        subprocess.run([sys.executable, *" ".join(flags).split()], cwd=ROOT, stdout=log, stderr=log, check=True)


def dropped(kept: Path, wrong: Path) -> str:
    """Shares of the web's captions that were dropped."""
    bad, count = set(json.loads(wrong.read_text())), {True: [0, 0], False: [0, 0]}
    for line in kept.read_text().splitlines():
        record = json.loads(line)
        own = count[record["image"] in bad]
        own[0] += not set(record["web"]) & set(record["caption"])
        own[1] += 1
    return ", ".join(f"{'wrong' if is_wrong else 'right'} captions dropped {100 * a / max(1, b):.1f} % of {b}"
                     for is_wrong, (a, b) in count.items())  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    out, flags = args.out.resolve(), f"{FLAGS} --seed {args.seed}"
    files = draw(out, args.count, args.seed)
    data = f"--data {files['clean part']}"
    run(out, "stage 1", f"train.py --stage 1 {data} {SIZES} {flags} --steps {2 * args.steps} --out {out}/ranker")
    run(
        out,
        "stage 2",
        f"train.py --stage 2 --init {out}/ranker {data} {flags} --steps {args.steps} --out {out}/captioner",
    )
    models = f"--captioner {out}/captioner --ranker {out}/ranker --seed {args.seed}"
    run(out, "capfilt", f"-m tools.capfilt {models} --data {files['web']} --out {out}/capfilt.jsonl")
    print(dropped(out / "capfilt.jsonl", out / "wrong.json"))
    files["capfilt"] = out / "capfilt.jsonl"
    for name in ("web", "capfilt", "clean"):
        data, to = f"--data {files[name]}", out / f"from-{name}"
        run(out, f"from {name}", f"train.py --stage 1 {data} {SIZES} {flags} --steps {args.steps} --out {to}")
        run(out, f"eval {name}", f"eval.py retrieval --checkpoint {to} --data {files['val']} --k 1 --out {to}.json")
        itc = json.loads(to.with_suffix(".json").read_text())["itc"]
        print(f"{name}: R@1 by ITC {itc['image_to_text']['R@1']:.1f} / {itc['text_to_image']['R@1']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
