"""Public checkpoints in and out.

python -m tools.weights inspect CHECKPOINT                      what it is, its parts, their sizes and dtypes
python -m tools.weights export RUN --format hf OUT_FOLDER       for transformers' BLIP-2 classes
python -m tools.weights export RUN --format lavis OUT.pth       for LAVIS
python -m tools.weights export PUBLIC --format run runs/NAME    to train from a public checkpoint
"""

import os
import sys
from collections import Counter
from pathlib import Path

from blip2 import Blip2
from engine.errors import Parser, expect, run_command
from weights.configs import as_object, check_run, read_config
from weights.export import DTYPES, export
from weights.load import open_tensors, weight_files
from weights.open import holds_vit, is_lavis_stage2

# Prefixes of keys -> parts, in the order in which they are tried.
PARTS = {
    "run": {
        "vit.": "ViT",
        "qformer.": "Q-Former",
        "llm_proj.": "projection to the language model",
        "": "heads of stage 1",
    },
    "blip-2": {
        "vision_model.": "ViT",
        "language_model.": "language model",
        "language_projection.": "projection to the language model",
        **dict.fromkeys(("qformer.", "query_tokens", "embeddings."), "Q-Former"),
        "": "heads of stage 1",
    },
    "lavis": {
        "visual_encoder.": "ViT",
        **dict.fromkeys(("Qformer.", "query_tokens"), "Q-Former"),
        **dict.fromkeys(("opt_proj.", "t5_proj."), "projection to the language model"),
        "": "heads of stage 1",
    },
}


def inspect(path: Path) -> str:
    """What a checkpoint is, and a table of its parts with their parameters and dtypes; no tensor is read."""
    expect(os.path.exists(path), f"{path} does not exist: expected a checkpoint folder or file")
    config = read_config(path) if path.is_dir() else {}
    tensors = open_tensors(weight_files(path) if path.is_dir() else [path])
    kind, lines = config.get("model_type"), []
    if config.get("model") == "blip2":
        check_run(config, path / "config.json")
        kind, stage = "run", (config.get("train") or {}).get("stage") or (2 if config.get("llm") else 1)
        lines.append(f"{path}: a run, stage {stage}, {config['image_size']} px")
        own = ("llm",) if config.get("vit_trained") else ("vit", "llm")  # a run may hold its ViT
        lines += [f"  --{part} {config[part]}" for part in own if config.get(part)]
    elif kind == "blip-2":
        stage2 = any(key.startswith("language_model.") for key in tensors)
        text = (
            f"with {as_object(config.get('text_config', {}), 'text_config').get('model_type', 'opt')}"
            if stage2
            else "for retrieval"
        )
        lacks = "the text branch of the Q-Former" if stage2 else "ITC's temperature and ITG's head"
        lines += [f"{path}: a BLIP-2 of transformers {text}", f"  lacks {lacks}"]
    elif kind is not None:
        lines.append(f"{path}: {kind}")
    elif any(key.startswith(("Qformer.", "query_tokens")) for key in tensors):
        kind, stage2, vit = "lavis", is_lavis_stage2(tensors), "with its" if holds_vit(tensors) else "without a"
        lines.append(f"{path}: a LAVIS checkpoint, stage {2 if stage2 else 1}, {vit} ViT")
        lines += ["  lacks the text branch of the Q-Former and the language model"] if stage2 else []
    else:
        lines.append(f"{path}: tensors without a config.json")
    found: dict[str, Counter] = {}
    for key, tensor in tensors.items():
        prefixes = PARTS.get(kind, {"": kind or "all"})
        name = next(name for prefix, name in prefixes.items() if key.startswith(prefix))
        part = found.setdefault(name, Counter())
        part.update({"tensors": 1, "parameters": tensor.numel(), "bytes": tensor.nbytes, str(tensor.dtype)[6:]: 0})
    lines.append(f"{'part':34}{'tensors':>9}{'parameters':>16}{'GB':>9}  dtype")
    for name, part in sorted(found.items(), key=lambda item: -item[1]["parameters"]):
        dtypes = ", ".join(sorted(part.keys() - {"tensors", "parameters", "bytes"}))
        lines.append(f"{name:34}{part['tensors']:9,}{part['parameters']:16,}{part['bytes'] / 1e9:9.3f}  {dtypes}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tools.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what a checkpoint is, without loading it")
    look.add_argument("checkpoint", type=Path)
    give = commands.add_parser("export", help="write a model for transformers or for LAVIS, or as a run")
    give.add_argument("run", help="a run, or a public checkpoint")
    give.add_argument("out", type=Path, help="a folder (hf, run) or a .pth file (lavis), which does not exist yet")
    give.add_argument("--format", required=True, choices=("hf", "lavis", "run"))
    give.add_argument("--dtype", default="fp32", choices=DTYPES)
    for part in ("vit", "bert", "llm"):
        give.add_argument(f"--{part}", help="that part, if it is not where the run says")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        print(inspect(args.checkpoint))
        return
    model = Blip2.from_pretrained(args.run, args.vit, args.bert, args.llm, precision=args.dtype)
    print(*export(model, args.format, args.out, args.dtype), f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
