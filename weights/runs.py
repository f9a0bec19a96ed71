"""Run folders: config.json, paths relative to the run, hashes of the frozen parts."""

import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError, expect
from engine.files import sha256, write_json
from vit import PRESETS
from weights.load import tensors_of
from weights.tables import Row, Table


@dataclass
class Source:
    """Where a part of a model came from."""

    spec: str  # as --vit, --bert or --llm name it
    files: list[Path] = field(default_factory=list)  # none for random weights, or for a ViT that has been trained since

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the files, if any."""
        return sha256(self.files) if self.files else None


def split_spec(spec: str) -> tuple[str, str]:
    """Name and path of what `--vit` names: of "eva-g:file" both; a folder has no name, whatever colons are in it."""
    name, _, path = spec.partition(":")
    return (name, path) if name in PRESETS and not os.path.isdir(spec) else ("", spec)


def relative(spec: str, folder: Path) -> str:
    """A folder or name:file as a path relative to `folder`; a bare name is unchanged."""
    name, path = split_spec(spec)
    moves = path and (name or os.path.isdir(path))
    return f"{name}:" * bool(name) + os.path.relpath(path, folder) if moves else spec


def relocated(spec: str, folder: Path) -> str:
    """The inverse of `relative`."""
    name, path = split_spec(spec)
    moved = os.path.normpath(folder / path)
    moves = path and (name or os.path.isdir(moved) or os.sep in path)
    return f"{name}:" * bool(name) + moved if moves else spec


def write_config(model, folder: Path, relative_to: Path, **extra) -> None:
    """config.json of a run; paths in it are relative to `relative_to`."""
    config = {
        "model": "blip2",
        "vit": relative(model.sources["vit"].spec, relative_to),
        "vit_sha256": model.sources["vit"].sha256,
        "vit_trained": model.holds_vit,  # then the run holds it
        **({"vit_config": asdict(model.vit.cfg)} if model.holds_vit else {}),
        "bert": relative(model.sources["bert"].spec, relative_to),  # origin of the Q-Former; not needed any more
        "image_size": model.image_size,
        "embed_dim": model.embed_dim,
        "text_branch": model.tokenizer is not None,  # public stage-2 checkpoints have none
        "lacks": list(model.untrained_heads),
        "max_text_tokens": (model.tokenizer or model.llm_tokenizer).max_tokens,
        "ln_vision_eps": model.ln_vision.eps,
        "qformer": asdict(model.qformer.cfg),
        **extra,
    }
    if model.llm is not None:
        llm = model.sources["llm"]
        config |= {"llm": relative(llm.spec, relative_to), "llm_sha256": llm.sha256, "llm_act": model.llm_act}
        config |= {"prompt_format": model.llm_tokenizer.format_name}
        config |= {"template": model.template, "prompt": model.prompt, "conditioned": model.conditioned}
    write_json(folder / "config.json", config, indent=2)


def check_frozen(part: str, source: Source, known: str | None, run: str | Path) -> None:
    """Refuse a frozen part, "vit" or "llm", other than the one the run was trained over, by its sha256."""
    if known not in (None, source.sha256):
        raise UserError(
            f"{source.spec} has other weights than {run} was trained over: pass --{part} with the right ones, or "
            f'remove "{part}_sha256" from {run}/config.json if you know that they are equivalent'
        )
    name = {"vit": "ViT", "llm": "language model"}[part]
    expect(
        source.files,
        f"{run} was trained over a {name} of random weights ({source.spec}), which no file holds: pass --{part} with "
        "real ones, or train again",
    )


# --- what a run holds ------------------------------------------------------------------------------------------------


def frozen_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Parts that are not in the checkpoint."""
    return ("llm.",) if model.holds_vit else ("vit.", "llm.")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name: everything that is not frozen for good. A trained ViT that is in half
    precision now is stored as it was."""
    state = {name: t.detach() for name, t in tensors_of(model).items() if not name.startswith(frozen_prefixes(model))}
    return state | {name: t for name, t in model.vit_in_file.items() if state[name].dtype != torch.float32}


def run_table(model: nn.Module) -> Table:
    """The key table of a run's model.safetensors."""
    frozen = "|".join(prefix.replace(".", r"\..*") for prefix in frozen_prefixes(model))
    return Table([Row((name,), name) for name in trained_state(model)], fresh={frozen: "the frozen parts"})
