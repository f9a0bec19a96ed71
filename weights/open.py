"""From a spec to a part (`load_vit`, `load_bert`, `load_llm`), from a path to a `Description` of a whole model."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.distributed import world_size
from engine.errors import expect
from engine.sharding import draw, shard
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from vit import PRESETS, ViT, ViTConfig
from weights.configs import bert_config, check_run, hf_qformer_config, image_norm, llm_config, read_config, vit_config
from weights.load import first_match, load, no_init, open_tensors, weight_files
from weights.runs import Source, check_frozen, relocated, split_spec
from weights.tables import BERT, CLIP_BARE, EVA, HF_BLIP2, HF_RETRIEVAL, LAVIS_STAGE1, LAVIS_STAGE2, LAVIS_VITS, Table

MAX_SIDE = 4096  # pixels; attention takes the square of the number of patches
OF_LLM = ("llm_act", "prompt_format", "template", "prompt", "conditioned")  # entries of a run's config.json
BARE_FILES = {"eva-g": EVA, "clip-l": CLIP_BARE}  # encoders whose published file has no config.json


def fill(
    kind: type[nn.Module], cfg, paths: list[Path], table: Table | None, what: str,
    dtype: torch.dtype, device: str | torch.device, sharded: bool = False,
) -> tuple[nn.Module, str]:  # fmt: skip
    """A frozen part, `kind(cfg)`, with the weights of its files, or random ones without files; and its load report.
    sharded: spread over all ranks, if there are several."""
    sharded = sharded and world_size() > 1
    with torch.device("meta" if paths or sharded else device), no_init():
        part = kind(cfg)
    if sharded:
        shard(part.to(dtype), device)
    if paths:
        return part, load(part, open_tensors(paths), table, what, dtype, device)
    draw(part, device) if sharded else part.init_weights()
    return part.to(dtype), f"{what}: RANDOM WEIGHTS, for dry runs and benchmarks only"


def expect_held(what: str, kind: type[nn.Module], cfg, tensors: dict, fresh: dict, prefix: str = "") -> None:
    """Refuse a kind(cfg) of more parameters than tensors hold, before memory is taken. fresh: see `Table`."""
    with torch.device("meta"), no_init():
        part = kind(cfg)
    wanted = sum(p.numel() for name, p in part.named_parameters() if not first_match(fresh, prefix + name))
    held = sum(tensor.numel() for tensor in tensors.values())
    sizes = f"a {kind.__name__} of {wanted:,} parameters by its configuration, its files have {held:,}"
    expect(wanted <= held, f"{what} has {sizes}: fetch them again, they are not of one model")


# --- image encoders --------------------------------------------------------------------------------------------------


def find_vit(spec: str) -> tuple[ViTConfig, Table | None, list[Path]]:
    """Configuration of the encoder that `--vit` names, its key table and its files (none for random weights).

    spec: a folder as a hub serves it; a name of `vit.PRESETS` for random weights of that architecture; or
    "eva-g:eva_vit_g.pth" for a bare file, also a LAVIS checkpoint that holds a fine-tuned ViT. The last published block
    is dropped (paper 3.4).
    """
    name, file = split_spec(spec)
    if os.path.isdir(spec):
        cfg, table = vit_config(Path(spec))
        paths = weight_files(Path(spec))
    else:
        names, bare = f"a name ({', '.join(PRESETS)})", " or ".join(BARE_FILES)
        expect(name in PRESETS, f"--vit {spec} does not exist: expected a folder, or {names} for random weights")
        if not file:
            return PRESETS[name], None, []
        expect(name in BARE_FILES, f"--vit {spec}: a bare file is of {bare}, expected a folder for {name}")
        expect(os.path.exists(file), f"{file} does not exist: expected the weights of {name}")
        cfg, table, paths = replace(PRESETS[name], depth=PRESETS[name].depth + 1), BARE_FILES[name], [Path(file)]
        tensors = open_tensors(paths)
        if holds_vit(tensors):
            return lavis_vit_config(name, tensors), LAVIS_VITS[name], paths
    last = rf".*(blocks|resblocks|layers?)\.{cfg.depth - 1}\..*"
    table = replace(table, ignored={last: "the last block, dropped (paper 3.4)", **table.ignored})
    return replace(cfg, depth=cfg.depth - 1), table, paths


def load_vit(
    spec: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", sharded: bool = False
) -> tuple[ViT, str, Source]:
    """The encoder that `--vit` names (see `find_vit`), its load report, and its source."""
    cfg, table, paths = find_vit(spec)
    vit, report = fill(ViT, cfg, paths, table, f"vit {spec}", dtype, device, sharded)
    if os.path.isdir(spec) and (missing := {"mean", "std"} - image_norm(Path(spec)).keys()):
        whose = "CLIP" if vit.cfg.cls_token else "SigLIP"
        report += f"; {whose}'s {' and '.join(sorted(missing))} of pixels, as {spec} names none"
    return vit, report, Source(spec, paths)


def empty_vit(what: str, cfg: ViTConfig, tensors: dict, dtype: torch.dtype, device: str | torch.device) -> ViT:
    """An encoder for the file of a whole model, `what`, to fill with its tensors."""
    expect_held(what, ViT, cfg, tensors, {})
    with torch.device("meta"), no_init():
        vit = ViT(cfg)
    return vit.to(dtype).to_empty(device=device)


def check_size(image_size: int, cfg: ViTConfig, what: str) -> None:
    """Refuse an image size that does not fit an encoder (see `ViTConfig.fitting`)."""
    expect(
        image_size == cfg.fitting(image_size) <= MAX_SIDE,
        f"--image-size {image_size} is no multiple of the patch size {cfg.patch_size} of {what} up to {MAX_SIDE}: "
        f"pass --image-size {cfg.fitting(min(image_size, MAX_SIDE - cfg.patch_size))}",
    )


# --- the Q-Former ----------------------------------------------------------------------------------------------------


def load_bert(folder: str, **overrides) -> tuple[QFormer, str, Source]:
    """A Q-Former initialized from the BERT in `folder` (paper 3.1), its load report, and its source."""
    path = Path(folder)
    there = os.path.isdir(folder)
    expect(there, f"--bert {folder} does not exist: expected a BERT folder (config.json, model.safetensors)")
    cfg, paths = QFormerConfig(**bert_config(path) | overrides), weight_files(path)
    tensors = open_tensors(paths)
    expect_held(f"bert {folder}", QFormer, cfg, tensors, BERT.fresh)
    qformer = QFormer(cfg)
    report = load(qformer, tensors, BERT, f"bert {folder}")
    copy_text_ffn_to_queries(qformer)
    return qformer, report, Source(folder, paths)


def build_qformer(what: str, cfg: QFormerConfig, tensors: dict, fresh: dict, device: str | torch.device) -> QFormer:
    """A Q-Former for the file of a whole model, `what`, to fill with its tensors; only what its format lacks
    (`Table.fresh`) is initialized."""
    expect_held(what, QFormer, cfg, tensors, fresh, "qformer.")
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
    spec: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", act: str | None = None,
    sharded: bool = False,
) -> tuple[nn.Module, str, Source]:  # fmt: skip
    """The language model that `--llm` names (a folder, a BLIP-2 folder, or a preset for random weights), its load
    report, and its source. act: T5's activation, if not that of its config.json."""
    cfg, family = llm_config(spec)
    expect(
        act is None or hasattr(cfg, "act"), f"{spec} is no T5, over which the checkpoint was trained: pass it as --llm"
    )
    cfg = cfg if act is None else replace(cfg, act=act)
    check_llm_dtype(family.kind, dtype, spec)
    paths = weight_files(Path(spec)) if os.path.isdir(spec) else []
    return *fill(family.kind, cfg, paths, family.table, f"llm {spec}", dtype, device, sharded), Source(spec, paths)


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
    prompt_format: str | None = None
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
    config = read_config(path) if any(os.path.exists(path / f"{name}config.json") for name in ("", "adapter_")) else {}
    if config.get("model_type") == "blip-2":
        expect(not (vit or bert or llm), f"{path} has all its parts: leave --vit, --bert and --llm out")
        return describe_hf(path, config)
    return describe_run(path, config, vit, llm)


def describe_run(folder: Path, config: dict, vit: str | None, llm: str | None) -> Description:
    """A folder that `Blip2.save_pretrained` has written."""
    whole, kind = config and os.path.exists(folder / "model.safetensors"), config.get("model_type")
    expect(whole, f"{folder} is not a run: expected config.json and model.safetensors in it, as train.py writes")
    expect(config.get("model") == "blip2", f"{folder} is a {kind}, expected a run, or a whole BLIP-2")
    expect(
        not config.get("last_block"),
        f"{folder} was trained with the last block of its ViT, which is always dropped now (paper 3.4): train it again",
    )
    qformer, own = check_run(config, folder / "config.json")
    spec, width = vit or relocated(config["vit"], folder), qformer.image_width
    encoder, _, files = (own, None, []) if own else find_vit(spec)
    expect(
        encoder.width == width,
        f"{folder} was trained over a ViT of width {width}, {spec} has width {encoder.width}: pass --vit with the "
        f"encoder it was trained over ({config['vit']})",
    )
    pixels, patch = config["image_size"], encoder.patch_size
    fits = pixels == encoder.fitting(pixels) <= MAX_SIDE
    expect(fits, f"{folder} has image_size {pixels}, no multiple of its ViT's patch size {patch}, up to {MAX_SIDE}")
    has_llm = bool(config.get("llm"))
    llm = (llm or relocated(config["llm"], folder)) if has_llm else None
    random = {"vit": spec} if not (own or files) else {}
    random |= {"llm": llm} if has_llm and not os.path.isdir(llm) and llm_config(llm) else {}
    for part, name in random.items():  # before they are drawn in vain
        check_frozen(part, Source(name), config.get(f"{part}_sha256"), folder)
    return Description(
        vit=spec,
        qformer=qformer,
        tensors=open_tensors([folder / "model.safetensors"]),
        table=None,
        tokenizer=folder if config.get("text_branch", True) else None,
        **{key: config[key] for key in ("image_size", "embed_dim", "ln_vision_eps", "max_text_tokens", "bert")},
        llm=llm,
        **{key: config[key] for key in OF_LLM if key in config},
        vit_config=own,
        untrained_heads=tuple(config.get("lacks", ())),
        frozen_sha256={part: config.get(f"{part}_sha256") for part in ("vit",) * (own is None) + ("llm",) * has_llm},
    )


def describe_hf(folder: Path, config: dict) -> Description:
    """transformers' BLIP-2 classes. With a language model it has no text branch; for retrieval it has one, but neither
    ITG's head nor ITC's temperature."""
    encoder, tensors = find_vit(str(folder))[0], open_tensors(weight_files(folder))
    retrieval = "itm_head.weight" in tensors
    qformer, embed_dim = hf_qformer_config(config, retrieval)
    return Description(
        vit=str(folder),
        qformer=qformer,
        tensors=tensors,
        table=HF_RETRIEVAL if retrieval else HF_BLIP2,
        tokenizer=folder if retrieval else None,
        embed_dim=embed_dim,
        ln_vision_eps=encoder.eps,
        llm=None if retrieval else str(folder),
        untrained_heads=("itg",) if retrieval else (),
    )


def describe_lavis(path: Path, vit: str | None, bert: str | None, llm: str | None) -> Description:
    """LAVIS checkpoints of either stage, with or without a fine-tuned ViT. They have no config: the folders give the
    architecture."""
    expect(os.path.exists(path), f"{path} does not exist: expected a LAVIS checkpoint or a run folder")
    tensors = open_tensors([path])
    stage2, own = is_lavis_stage2(tensors), holds_vit(tensors)
    clip = size(tensors, "ln_vision.weight") == PRESETS["clip-l"].width
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
        embed_dim=size(tensors, "vision_proj.bias") or 256,
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


def size(tensors: dict[str, Tensor], key: str, dim: int = 0) -> int:
    """A side of a tensor, 0 if there is none: the loader will say so."""
    return dict(enumerate(tensors[key].shape)).get(dim, 0) if key in tensors else 0


def lavis_sizes(tensors: dict[str, Tensor]) -> dict:
    """The fields of QFormerConfig that its shapes decide; its heads are BERT's, 64 wide."""
    layer = "Qformer.bert.encoder.layer."
    blocks = {int(found[1]) for key in tensors if (found := re.match(rf"{layer}(\d{{1,3}})\.", key))}
    cross = [block for block in sorted(blocks) if f"{layer}{block}.crossattention.self.query.weight" in tensors]
    if not blocks or not cross or "query_tokens" not in tensors:
        return {}  # the loader will list what is missing
    width = size(tensors, "query_tokens", 2)
    return dict(
        width=width,
        depth=len(blocks),
        heads=width // 64 if width and width % 64 == 0 else 1,
        mlp=size(tensors, f"{layer}0.intermediate_query.dense.weight"),
        num_queries=size(tensors, "query_tokens", 1),
        cross_every=cross[1] - cross[0] if len(cross) > 1 else len(blocks),
    )


def lavis_vit_config(name: str, tensors: dict[str, Tensor]) -> ViTConfig:
    """The fine-tuned ViT of architecture `name` in it, with its own depth and image size."""
    tokens = size(tensors, "visual_encoder.pos_embed", 1) or size(tensors, "visual_encoder.positional_embedding")
    grid = max(1, math.isqrt(max(0, tokens - 1)))
    blocks = {found[1] for key in tensors if (found := re.search(r"^visual_encoder\..*blocks\.(\d+)\.", key))}
    return replace(PRESETS[name], depth=len(blocks), image_size=grid * PRESETS[name].patch_size)
