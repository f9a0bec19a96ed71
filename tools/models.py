"""Which encoder and which language model: `python -m tools.models` writes the tables of docs/models.md.

Calculated from the configurations that a name stands for: parameters and FLOPs over tensors without data, as in
tools/scale.py; memory is what a training prints at its start.
"""

from torch import nn

from engine.log import memory_estimate
from llm import OPT, T5, Llama
from tools.results import ROOT, table, with_tables
from tools.scale import META, run_of
from vit import PRESETS, ViT
from weights.load import no_init

PAGE, BATCH = ROOT / "docs/models.md", 32
PAIRS = (
    ("dinov2-s", "smollm2-135m"),
    ("clip-l", "smollm2-135m"),
    ("clip-l", "qwen3-0.6b"),
    ("siglip-so400m", "qwen3-0.6b"),
    ("siglip-so400m", "qwen2.5-3b"),
    ("siglip-so400m", "llama-3.2-3b"),
    ("siglip-so400m", "llama-3.1-8b"),
    ("eva-g", "opt-2.7b"),
)


def size(kind: type[nn.Module], cfg) -> tuple[str, str]:
    """Parameters, and GB in bf16, of a part."""
    with META, no_init():
        count = sum(p.numel() for p in kind(cfg).parameters())
    return f"{count / 1e6:,.0f} M", f"{2 * count / 1e9:.2f}"


def encoders() -> str:
    """The encoders that have a name, without their last block."""
    rows = [("`--vit`", "width", "blocks", "pixels", "P", "parameters", "GB in bf16")]
    for name, cfg in PRESETS.items():
        sizes = cfg.width, cfg.depth, cfg.image_size, cfg.tokens(cfg.image_size)
        rows.append((f"`{name}`", *map(str, sizes), *size(ViT, cfg)))
    return table(*rows)


def language_models() -> str:
    """The language models that have a name."""
    rows = [("`--llm`", "width", "blocks", "heads", "of keys", "words", "head", "parameters", "GB in bf16")]
    for kind in (OPT, Llama, T5):
        for name, cfg in kind.presets.items():
            tied = getattr(cfg, "tied", kind is OPT)
            sizes = cfg.width, cfg.depth, cfg.heads, getattr(cfg, "kv_heads", cfg.heads), f"{cfg.vocab_size:,}"
            rows.append((f"`{name}`", *map(str, sizes), "tied" if tied else "its own", *size(kind, cfg)))
    return table(*rows)


def pairs() -> str:
    """A step of stage 2 with an encoder and a language model, at the encoder's image size."""
    rows = [("`--vit`, `--llm`", "P", "frozen", "GB in bf16", "trained", f"GB, a step of {BATCH}", "GFLOPs an image")]
    for vit, llm in PAIRS:
        side = PRESETS[vit].image_size
        run = run_of(vit, llm, "stage 2, paper, OPT", image_size=side)
        frozen = sum(p.numel() for part in (run.model.vit, run.model.llm) for p in part.parameters())
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        memory = sum(memory_estimate(run.model, BATCH, run.objectives).values())
        cells = f"{frozen / 1e6:,.0f} M", f"{2 * frozen / 1e9:.1f}", f"{trained / 1e6:,.0f} M", f"{memory / 1e9:.1f}"
        rows.append((f"`{vit}`, `{llm}`", f"{PRESETS[vit].tokens(side)}", *cells, f"{run.flops[0] / 1e9:,.0f}"))
    return table(*rows)


TABLES = [encoders, language_models, pairs]


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text(), TABLES))


if __name__ == "__main__":
    main()
