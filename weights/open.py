"""From a spec to a part (`load_vit`, `load_bert`, `load_llm`), from a path to a `Description` of a whole model."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import expect
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from vit import PRESETS, ViT, ViTConfig
from weights.configs import bert_config, hf_qformer_config, image_norm, llm_config, read_config, vit_config
from weights.load import first_match, load, no_init, open_tensors, weight_files
from weights.runs import Source, relocated, split_spec
from weights.tables import BERT, CLIP_BARE, EVA, HF_BLIP2, HF_RETRIEVAL, LAVIS_STAGE1, LAVIS_STAGE2, LAVIS_VITS, Table

BARE_FILES = {"eva-g": EVA, "clip-l": CLIP_BARE}  # encoders whose published file has no config.json


def fill(
    kind: type[nn.Module], cfg, paths: list[Path], table: Table | None, what: str,
    dtype: torch.dtype, device: str | torch.device,
) -> tuple[nn.Module, str]:  # fmt: skip
    """A frozen part, `kind(cfg)`, with the weights of its files, or random ones without files; and its load report."""
    with torch.device("meta" if paths else device), no_init():
        part = kind(cfg)
    if paths:
        return part, load(part, open_tensors(paths), table, what, dtype, device)
    part.init_weights()
    return part.to(dtype), f"{what}: RANDOM WEIGHTS, for dry runs and benchmarks only"


# --- image encoders --------------------------------------------------------------------------------------------------


def find_vit(spec: str) -> tuple[ViTConfig, Table | None, list[Path]]:
    """Configuration of the encoder that `--vit` names, its key table and its files (none for random weights).

    spec: a folder as a hub serves it; "eva-g", "clip-l" or "dinov2-s" for random weights of that architecture; or
    "eva-g:eva_vit_g.pth" for a bare file, also a LAVIS checkpoint that holds a fine-tuned ViT. The last published block
    is dropped (paper 3.4).
    """
    name, file = split_spec(spec)
    if Path(spec).is_dir():
        cfg, table = vit_config(Path(spec))
        paths = weight_files(Path(spec))
    else:
        names, bare = f"a name ({', '.join(PRESETS)})", " or ".join(BARE_FILES)
        expect(name in PRESETS, f"--vit {spec} does not exist: expected a folder, or {names} for random weights")
        if not file:
            return PRESETS[name], None, []
        expect(name in BARE_FILES, f"--vit {spec}: a bare file is of {bare}, expected a folder for {name}")
        expect(Path(file).exists(), f"{file} does not exist: expected the weights of {name}")
        cfg, table, paths = replace(PRESETS[name], depth=PRESETS[name].depth + 1), BARE_FILES[name], [Path(file)]
        tensors = open_tensors(paths)
        if holds_vit(tensors):
            return lavis_vit_config(name, tensors), LAVIS_VITS[name], paths
    last = rf".*(blocks|resblocks|layers?)\.{cfg.depth - 1}\..*"
    table = replace(table, ignored={last: "the last block, dropped (paper 3.4)", **table.ignored})
    return replace(cfg, depth=cfg.depth - 1), table, paths


def load_vit(
    spec: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[ViT, str, Source]:
    """The encoder that `--vit` names (see `find_vit`), its load report, and its source."""
    cfg, table, paths = find_vit(spec)
    vit, report = fill(ViT, cfg, paths, table, f"vit {spec}", dtype, device)
    if Path(spec).is_dir() and (missing := {"mean", "std"} - image_norm(Path(spec)).keys()):
        report += f"; CLIP's {' and '.join(sorted(missing))} of pixels, as {spec} names none"
    return vit, report, Source(spec, paths)


def empty_vit(cfg: ViTConfig, dtype: torch.dtype, device: str | torch.device) -> ViT:
    """An encoder for the file of a whole model to fill."""
    with torch.device("meta"), no_init():
        vit = ViT(cfg)
    return vit.to(dtype).to_empty(device=device)


def check_size(image_size: int, patch: int, what: str) -> None:
    """Refuse an image size that is no multiple of the patch size."""
    expect(
        image_size % patch == 0 and image_size >= patch,
        f"--image-size {image_size} is no multiple of the patch size {patch} of {what}: "
        f"pass --image-size {max(1, round(image_size / patch)) * patch}",
    )


# --- the Q-Former ----------------------------------------------------------------------------------------------------


def load_bert(folder: str, **overrides) -> tuple[QFormer, str, Source]:
    """A Q-Former initialized from the BERT in `folder` (paper 3.1), its load report, and its source."""
    path = Path(folder)
    expect(path.is_dir(), f"--bert {folder} does not exist: expected a BERT folder (config.json, model.safetensors)")
    qformer = QFormer(QFormerConfig(**bert_config(path) | overrides))
    paths = weight_files(path)
    report = load(qformer, open_tensors(paths), BERT, f"bert {folder}")
    copy_text_ffn_to_queries(qformer)
    return qformer, report, Source(folder, paths)


def build_qformer(cfg: QFormerConfig, fresh: dict[str, str], device: str | torch.device) -> QFormer:
    """A Q-Former for the file of a whole model to fill; only what its format lacks (`Table.fresh`) is initialized."""
    with torch.device(device), no_init():
        qformer = QFormer(cfg)
    qformer.init_weights([name for name, _ in qformer.named_parameters() if first_match(fresh, f"qformer.{name}")])
    return qformer


# --- language models -------------------------------------------------------------------------------------------------


def check_llm_dtype(llm, dtype: torch.dtype | None, spec: str) -> None:
    """Refuse T5 in fp16; llm: a language model or its class."""
    fits, name = dtype != torch.float16 or llm.fits_fp16, getattr(llm, "__name__", type(llm).__name__)
    expect(fits, f"got precision fp16 for {spec}, in which {name} overflows: pass bf16, or fp32")


def load_llm(
    spec: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", act: str | None = None
) -> tuple[nn.Module, str, Source]:
    """The language model that `--llm` names (a folder, a BLIP-2 folder, or a preset for random weights), its load
    report, and its source. act: T5's activation, if not that of its config.json."""
    cfg, family = llm_config(spec)
    cfg = cfg if act is None else replace(cfg, act=act)
    check_llm_dtype(family.kind, dtype, spec)
    paths = weight_files(Path(spec)) if Path(spec).is_dir() else []
    return *fill(family.kind, cfg, paths, family.table, f"llm {spec}", dtype, device), Source(spec, paths)


# --- whole models ----------------------------------------------------------------------------------------------------


@dataclass
class Description:
    """What a checkpoint says of itself, in any of the three formats."""

    vit: str  # spec of the encoder
    qformer: QFormerConfig
    tensors: dict[str, Tensor]
    table: Table | None  # None for a run, whose table is that of its model
    tokenizer: Path | None  # folder of BERT's tokenizer; None without a text branch
    image_size: int | None = None  # None: the encoder's
    embed_dim: int = 256
    ln_vision_eps: float = 1e-5
    max_text_tokens: int = 32
    bert: str = ""
    llm: str | None = None
    llm_act: str | None = None
    template: str | None = None
    prompt: str = ""
    conditioned: bool = False
    vit_config: ViTConfig | None = None  # if the checkpoint is a run that holds its ViT
    untrained_heads: tuple[str, ...] = ()
    frozen_sha256: dict[str, str | None] = field(default_factory=dict)  # of a run


def describe(path: Path, vit: str | None, bert: str | None, llm: str | None) -> Description:
    """A run folder, a transformers BLIP-2 folder, or a LAVIS .pth with the folders it was trained over."""
    if path.suffix in (".pth", ".pt"):
        return describe_lavis(path, vit, bert, llm)
    config = read_config(path) if any((path / f"{name}config.json").exists() for name in ("", "adapter_")) else {}
    if config.get("model_type") == "blip-2":
        expect(not (vit or bert or llm), f"{path} has all its parts: leave --vit, --bert and --llm out")
        return describe_hf(path, config)
    return describe_run(path, config, vit, llm)


def describe_run(folder: Path, config: dict, vit: str | None, llm: str | None) -> Description:
    """A folder that `Blip2.save_pretrained` has written."""
    whole, kind = config and (folder / "model.safetensors").exists(), config.get("model_type")
    expect(whole, f"{folder} is not a run: expected config.json and model.safetensors in it, as train.py writes")
    expect(config.get("model") == "blip2", f"{folder} is a {kind}, expected a run, or a whole BLIP-2")
    expect(
        not config.get("last_block"),
        f"{folder} was trained with the last block of its ViT, which is always dropped now (paper 3.4): train it again",
    )
    spec, width, own = vit or relocated(config["vit"], folder), config["qformer"]["image_width"], None
    if config.get("vit_trained"):
        own = ViTConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config["vit_config"].items()})
    else:
        got = find_vit(spec)[0].width
        expect(
            got == width,
            f"{folder} was trained over a ViT of width {width}, {spec} has width {got}: pass --vit with the encoder it "
            f"was trained over ({config['vit']})",
        )
    has_llm = bool(config.get("llm"))
    return Description(
        vit=spec,
        qformer=QFormerConfig(**config["qformer"]),
        tensors=open_tensors([folder / "model.safetensors"]),
        table=None,
        tokenizer=folder if config.get("text_branch", True) else None,
        **{key: config[key] for key in ("image_size", "embed_dim", "ln_vision_eps", "max_text_tokens", "bert")},
        llm=(llm or relocated(config["llm"], folder)) if has_llm else None,
        **{key: config[key] for key in ("llm_act", "template", "prompt", "conditioned") if key in config},
        vit_config=own,
        untrained_heads=tuple(config.get("lacks", ())),
        frozen_sha256={part: config.get(f"{part}_sha256") for part in ("vit",) * (own is None) + ("llm",) * has_llm},
    )


def describe_hf(folder: Path, config: dict) -> Description:
    """transformers' BLIP-2 classes. With a language model it has no text branch; for retrieval it has one, but neither
    ITG's head nor ITC's temperature."""
    encoder, tensors = find_vit(str(folder))[0], open_tensors(weight_files(folder))
    retrieval = "itm_head.weight" in tensors
    return Description(
        vit=str(folder),
        qformer=hf_qformer_config(config, retrieval),
        tensors=tensors,
        table=HF_RETRIEVAL if retrieval else HF_BLIP2,
        tokenizer=folder if retrieval else None,
        embed_dim=config.get("image_text_hidden_size", 256),
        ln_vision_eps=encoder.eps,
        llm=None if retrieval else str(folder),
        untrained_heads=("itg",) if retrieval else (),
    )


def describe_lavis(path: Path, vit: str | None, bert: str | None, llm: str | None) -> Description:
    """LAVIS checkpoints of either stage, with or without a fine-tuned ViT. They have no config: the folders give the
    architecture."""
    expect(path.exists(), f"{path} does not exist: expected a LAVIS checkpoint or a run folder")
    tensors = open_tensors([path])
    stage2, own = is_lavis_stage2(tensors), holds_vit(tensors)
    clip = len(tensors.get("ln_vision.weight", ())) == PRESETS["clip-l"].width
    name, file = ("clip-l", ":clip_vit_L.pth") if clip else ("eva-g", ":eva_vit_g.pth")
    part, folder = ("llm", llm) if stage2 else ("bert", bert)
    expect(
        vit is not None and folder is not None,
        f"{path} does not say its architecture: pass --vit {name + file * (not own)} and --{part} FOLDER",
    )
    spec = f"{name}:{path}" if own else vit
    sizes = {"image_width": find_vit(spec)[0].width} | lavis_sizes(tensors) | (bert_config(Path(bert)) if bert else {})
    return Description(
        vit=spec,
        qformer=QFormerConfig(**sizes),
        tensors=tensors,
        table=LAVIS_STAGE2 if stage2 else LAVIS_STAGE1,
        tokenizer=None if stage2 else Path(bert),
        embed_dim=len(tensors["vision_proj.bias"]) if "vision_proj.bias" in tensors else 256,
        bert=bert or "",
        llm=llm if stage2 else None,
        llm_act="gelu" if "t5_proj.weight" in tensors else None,
    )


# --- what the keys of a LAVIS checkpoint say -------------------------------------------------------------------------


def is_lavis_stage2(tensors: dict[str, Tensor]) -> bool:
    """Does it have a projection to a language model?"""
    return "opt_proj.weight" in tensors or "t5_proj.weight" in tensors


def holds_vit(tensors: dict[str, Tensor]) -> bool:
    """Does it hold a fine-tuned ViT?"""
    return any(key.startswith("visual_encoder.") for key in tensors)


def lavis_sizes(tensors: dict[str, Tensor]) -> dict:
    """The fields of QFormerConfig that its shapes decide; its heads are BERT's, 64 wide."""
    layer = "Qformer.bert.encoder.layer."
    blocks = {int(key[len(layer) :].split(".")[0]) for key in tensors if key.startswith(layer)}
    cross = [block for block in sorted(blocks) if f"{layer}{block}.crossattention.self.query.weight" in tensors]
    if not blocks or not cross or "query_tokens" not in tensors:
        return {}  # the loader will list what is missing
    _, queries, width = tensors["query_tokens"].shape
    return dict(
        width=width,
        depth=len(blocks),
        heads=max(1, width // 64),
        mlp=len(tensors[f"{layer}0.intermediate_query.dense.weight"]),
        num_queries=queries,
        cross_every=cross[1] - cross[0] if len(cross) > 1 else len(blocks),
    )


def lavis_vit_config(name: str, tensors: dict[str, Tensor]) -> ViTConfig:
    """The fine-tuned ViT of architecture `name` in it, with its own depth and image size."""
    positions = ("visual_encoder.pos_embed", "visual_encoder.positional_embedding")
    grid = max([1, *(math.isqrt(tensors[key].shape[-2] - 1) for key in positions if key in tensors)])
    blocks = {found[1] for key in tensors if (found := re.search(r"^visual_encoder\..*blocks\.(\d+)\.", key))}
    return replace(PRESETS[name], depth=len(blocks), image_size=grid * PRESETS[name].patch_size)
