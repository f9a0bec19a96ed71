"""Public checkpoints in and out: one strict loader, what the files say, and the way back.

    python weights.py inspect CHECKPOINT                      what it is, its parts, their sizes and dtypes
    python weights.py export RUN --format hf OUT_FOLDER       for transformers' BLIP-2 classes
    python weights.py export RUN --format lavis OUT.pth       for the original code
    python weights.py export PUBLIC --format run runs/NAME    to train from a public checkpoint

The tables of formats.py say which of their keys becomes which of ours. Loading accounts for everything: each of their
keys is used or ignored for a stated reason, each of ours is filled or fresh for a stated reason, all shapes agree and
all values are finite. Otherwise one error lists every problem and nothing has been changed.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data import UserError, read_json, say_sentence
from formats import (
    BERT,
    CLIP,
    CLIP_BARE,
    DINOV2,
    EVA,
    HF_BLIP2,
    HF_BLIP2_VIT,
    HF_RETRIEVAL,
    INVERSES,
    LAVIS_STAGE1,
    LAVIS_STAGE2,
    LAVIS_VITS,
    OPT_TABLE,
    T5_TABLE,
    THIRDS,
    Row,
    Table,
    both,
)
from llm import PRESETS as LLM_PRESETS
from llm import OPTConfig, T5Config, build_llm
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from vit import CLIP_MEAN, CLIP_STD, PRESETS, ViT, ViTConfig

# --- the loader ------------------------------------------------------------------------------------------------------


def load(
    target: nn.Module, source: Mapping[str, Tensor], table: Table, what: str,
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
) -> str:  # fmt: skip
    """Put `source` into the parameters of `target` as `table` says. Returns the account in a sentence.

    Parameters that exist keep their dtype and place. Those on the meta device come to be on `device`, in `dtype` or
    else as the file has them, one at a time, so that never more than one tensor is there twice.
    Raises UserError with the full list of problems, before anything is changed.
    """
    plan, account = match(target, source, table, what)
    loaded = []
    for ours, (row, keys) in plan.items():
        parameter = target.get_parameter(ours)
        tensor = row.transform(*(source[key] for key in keys))
        if parameter.is_meta:  # a copy: what is mapped from a file would change with it
            tensor = tensor.to(device, dtype, copy=True)
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"{what} does not fit, nothing was loaded: {', '.join(keys)} holds values that are not finite in "
                f"{str(tensor.dtype)[6:]}: fetch it again, or take a wider dtype"
            )
        loaded.append((ours, parameter, tensor))
    with torch.no_grad():
        for ours, parameter, tensor in loaded:
            if parameter.is_meta:
                owner, _, name = ours.rpartition(".")
                setattr(target.get_submodule(owner), name, nn.Parameter(tensor, parameter.requires_grad))
            else:
                parameter.copy_(tensor)
    return account


def match(
    target: nn.Module, source: Mapping[str, Tensor], table: Table, what: str
) -> tuple[dict[str, tuple[Row, list[str]]], str]:
    """Which row and which of their keys fill each of our parameters, and the account; by names and shapes alone."""
    theirs = {}  # their key, renamed -> their key
    for key in source:
        renamed = key
        for pattern, replacement in table.renames.items():
            renamed = re.sub(pattern, replacement, renamed)
        theirs[renamed] = key

    plan, problems, fresh, used = {}, [], Counter(), set()
    for ours, parameter in target.named_parameters():
        row, keys = find_row(table, ours, theirs)
        if row is None:
            why = first_match(table.fresh, ours)
            fresh[why] += 1
            if why is None:
                problems.append(f"missing: nothing for {ours} {tuple(parameter.shape)}{wanted_keys(table, ours)}")
            continue
        used.update(keys)
        try:
            with NothingDrawn():
                shape = row.transform(*(outline(shape_of(source, theirs[key])) for key in keys)).shape
        except RuntimeError:  # they do not even fit to each other
            shape = [tuple(shape_of(source, theirs[key])) for key in keys]
        if shape != parameter.shape:
            problems.append(f"shape: {', '.join(keys)} gives {tuple(shape)}, {ours} is {tuple(parameter.shape)}")
        plan[ours] = row, [theirs[key] for key in keys]

    ignored = Counter()
    for key in sorted(theirs.keys() - used):
        why = first_match(table.ignored, key)
        ignored[why] += 1
        if why is None:
            problems.append(f"unknown: {key} {tuple(shape_of(source, theirs[key]))} has no place here")
    if problems:
        raise UserError(
            f"{what} does not fit, nothing was loaded; {len(problems)} problem(s):\n  " + "\n  ".join(problems)
        )
    account = [f"{len(used)} used"]
    account += [f"{n} ignored ({why})" for why, n in ignored.items()]
    account += [f"{n} fresh ({why})" for why, n in fresh.items()]
    return plan, f"{what}: {', '.join(account)}"


def outline(shape: Iterable[int]) -> Tensor:
    """A tensor of that shape with one byte behind it, to see what a transform makes of the shape. Not on the meta
    device: to add or join there, PyTorch imports its compiler, which takes longer than to load a model."""
    return torch.empty((), dtype=torch.uint8).expand(shape)


def find_row(table: Table, ours: str, theirs: Mapping[str, str]) -> tuple[Row | None, list[str]]:
    """The first row that leads to our key from keys that are there, and those keys."""
    for row, keys in rows_for(table, ours):
        if all(key in theirs for key in keys):
            return row, keys
    return None, []


def rows_for(table: Table, ours: str):
    """Every row that leads to our key, with the block's number put into its keys."""
    for row in table.rows:
        if match := re.fullmatch(re.escape(row.ours).replace(r"\{\}", r"(\d+)"), ours):
            yield row, [key.format(*match.groups()) for key in row.theirs]


def wanted_keys(table: Table, ours: str) -> str:
    """For the message: what the table would have taken."""
    wanted = [" + ".join(keys) for _, keys in rows_for(table, ours)]
    return f", wanted {' or '.join(wanted)}" if wanted else ""


def first_match(patterns: dict[str, str], key: str) -> str | None:
    """The reason of the first pattern that matches the whole key."""
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)


def unload(source: nn.Module, table: Table, without: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The other way: the parameters that `table` has a place for, under their keys. The first row of a key counts.

    without: regular expression of our keys that are left out -> why.
    """
    theirs: dict[str, Tensor] = {}
    for ours, parameter in source.named_parameters():
        for row, keys in () if first_match(without or {}, ours) else rows_for(table, ours):
            tensor = parameter.detach()
            if row.transform in THIRDS:  # the key's third is zero where there is none
                fused = theirs.setdefault(keys[0], tensor.new_zeros(3 * len(tensor)))
                fused.chunk(3)[THIRDS[row.transform]].copy_(tensor)
            else:
                tensors = INVERSES[row.transform](tensor, len(keys))
                theirs |= {key: tensor.contiguous() for key, tensor in zip(keys, tensors, strict=True)}
            break
    return theirs


# --- files -----------------------------------------------------------------------------------------------------------


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class SafeTensors(Mapping):
    """The tensors of one or more .safetensors files, read when asked for."""

    def __init__(self, paths: list[Path]):
        self.files = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # of a class of its own, or an OSError
                raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
            self.files.update((key, file) for key in file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self.files[key].get_tensor(key)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)

    def shape(self, key: str) -> list[int]:
        """The shape alone, from the file's header."""
        return self.files[key].get_slice(key).get_shape()

    def dtype(self, key: str) -> torch.dtype:
        """The dtype alone."""
        return SAFETENSORS_DTYPES[self.files[key].get_slice(key).get_dtype()]


def shape_of(source: Mapping[str, Tensor], key: str) -> list[int]:
    """A tensor's shape, without reading it where that is possible."""
    return source.shape(key) if isinstance(source, SafeTensors) else source[key].shape


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that hold its tensors: one, or the shards that the index names; no pickles where
    there is something safer."""
    single = ("model.safetensors", "pytorch_model.bin")
    indices = [folder / f"{name}.index.json" for name in single]
    index = next((path for path in indices if path.exists() and not (folder / single[0]).exists()), None)
    if index:
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index} names a file outside of {folder}, {outside[0]}: fetch it again")
    else:
        names = [name for name in single if (folder / name).exists()][:1]
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        got = f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} has no weights"
        raise UserError(f"{got}: expected model.safetensors, its shards and index, or pytorch_model.bin")
    return [folder / name for name in names]


def open_tensors(paths: list[Path]) -> Mapping[str, Tensor]:
    """Tensors by key from safetensors files, or from pickles of PyTorch (read with weights_only=True)."""
    if paths[0].suffix == ".safetensors":
        return SafeTensors(paths)
    tensors = {}
    for path in paths:
        try:
            mapped = zipfile.is_zipfile(path)  # older pickles are read whole
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} cannot be read as PyTorch weights ({why})") from None
        content = content.get("model", content) if isinstance(content, dict) else None  # LAVIS wraps its state dict
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no state dict: expected tensors by name")
        tensors |= {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}
    return tensors


def sha256(paths: list[Path]) -> str:
    """One hash over the contents of the files, to know a frozen part again."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- building the parts ----------------------------------------------------------------------------------------------


class NothingDrawn(TorchFunctionMode):
    """Inside, no random values are drawn: those that a file replaces take four times as long to draw as the file to
    read; and to draw on the meta device, PyTorch imports its compiler."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function in self.DRAWS else function(*args, **(kwargs or {}))


def vit_config(folder: Path) -> tuple[ViTConfig, Table]:
    """Architecture and key table of an encoder folder, with all its published blocks, from its config.json."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in ("clip", "blip-2"):  # a whole model: its image encoder
        config = config["vision_config"]
        kind = {"clip": "clip_vision_model", "blip-2": "blip_2_vision_model"}[kind]
    if kind == "dinov2":
        if config.get("use_swiglu_ffn") or config.get("hidden_act", "gelu") != "gelu":
            raise UserError(
                f"{folder} is a DINOv2 with SwiGLU, expected the plain GELU one: use dinov2-small, -base, -large"
            )
        width = config.get("hidden_size", 768)
        cfg = ViTConfig(
            width=width,
            depth=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 12),
            mlp=int(width * config.get("mlp_ratio", 4)),
            patch_size=config.get("patch_size", 14),
            image_size=config.get("image_size", 224),
            eps=config.get("layer_norm_eps", 1e-6),
        )
        table = DINOV2
    elif kind == "clip_vision_model":
        cfg = ViTConfig(
            width=config.get("hidden_size", 768),
            depth=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 12),
            mlp=config.get("intermediate_size", 3072),
            patch_size=config.get("patch_size", 32),
            image_size=config.get("image_size", 224),
            act=config.get("hidden_act", "quick_gelu"),
            eps=config.get("layer_norm_eps", 1e-5),
            ln_pre=True,
            conv_bias=False,
            align_corners=True,
        )
        table = CLIP
    elif kind == "blip_2_vision_model":
        cfg = ViTConfig(
            width=config.get("hidden_size", 1408),
            depth=config.get("num_hidden_layers", 39) + 1,  # it was published without its last block
            heads=config.get("num_attention_heads", 16),
            mlp=config.get("intermediate_size", 6144),
            patch_size=config.get("patch_size", 14),
            image_size=config.get("image_size", 224),
            eps=config.get("layer_norm_eps", 1e-6),
            key_bias=False,
        )
        table = HF_BLIP2_VIT
    else:
        raise UserError(
            f"{folder}/config.json has model_type {kind!r}, expected an image encoder: "
            "dinov2, clip, clip_vision_model, blip-2"
        )
    preprocessor = folder / "preprocessor_config.json"
    norm = {**config, **(read_json(preprocessor) if preprocessor.exists() else {})}
    mean, std = norm.get("image_mean", CLIP_MEAN), norm.get("image_std", CLIP_STD)
    return replace(cfg, mean=tuple(mean), std=tuple(std)), table


BARE_FILES = {"eva-g": EVA, "clip-l": CLIP_BARE}  # encoders whose published file has no config


def load_vit(
    spec: str, last_block: bool = False, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[ViT, str, list[Path]]:
    """The encoder that `--vit` names -> the ViT, the account of its loading, and the files it came from.

    spec: a folder as a hub serves it; "eva-g", "clip-l" or "dinov2-s" for random weights of that architecture; or
    "eva-g:eva_vit_g.pth" for a bare file, or one of LAVIS that holds a fine-tuned ViT. The last published block is left
    out (paper 3.4) unless `last_block`.
    """
    name, _, file = spec.partition(":")
    if name in PRESETS and not Path(name).is_dir():
        cfg, depth = PRESETS[name], PRESETS[name].depth + 1
        if file and name not in BARE_FILES:
            raise UserError(
                f"--vit {spec}: a bare file can be of {' or '.join(BARE_FILES)}, expected a folder for {name}"
            )
        table, paths = BARE_FILES.get(name), [Path(file)] if file else []
    elif Path(spec).is_dir():
        cfg, table = vit_config(Path(spec))
        depth, paths = cfg.depth, weight_files(Path(spec))
    else:
        raise UserError(
            f"--vit {spec} does not exist: expected a folder, or a name ({', '.join(PRESETS)}) for random weights"
        )
    cfg = replace(cfg, depth=depth if last_block else depth - 1)
    if not paths:
        with torch.device(device), NothingDrawn():
            vit = ViT(cfg)
        vit.init_weights()
        return vit.to(dtype), f"vit {name}: RANDOM WEIGHTS, for dry runs and benchmarks only", paths
    if not paths[0].exists():
        raise UserError(f"{paths[0]} does not exist: expected the weights of {name}")
    if not last_block:
        last = rf".*(blocks|resblocks|layers?)\.{depth - 1}\..*"
        table = replace(table, ignored={last: "the last block, dropped (paper 3.4)", **table.ignored})
    tensors = open_tensors(paths)
    if any(key.startswith("visual_encoder.") for key in tensors):
        cfg, table = lavis_vit_config(name, tensors), LAVIS_VITS[name]
    with torch.device("meta"), NothingDrawn():
        vit = ViT(cfg)
    return vit, load(vit, tensors, table, f"vit {spec}", dtype, device), paths


def bert_config(folder: Path) -> dict:
    """The fields of QFormerConfig that a BERT folder's config.json decides."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{folder}/config.json has model_type {config.get('model_type')!r} and hidden_act "
            f"{config.get('hidden_act')!r}, expected bert and gelu: use bert-base-uncased or one like it"
        )
    return dict(
        vocab_size=config.get("vocab_size", 30522) + 1,  # [DEC]
        width=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mlp=config.get("intermediate_size", 3072),
        max_positions=config.get("max_position_embeddings", 512),
        dropout=config.get("hidden_dropout_prob", 0.1),
        eps=config.get("layer_norm_eps", 1e-12),
        init_std=config.get("initializer_range", 0.02),
    )


def build_qformer(cfg: QFormerConfig, fresh: dict[str, str], device: str | torch.device) -> QFormer:
    """A Q-Former for the file of a whole model to fill; only what the file's format lacks is drawn here.

    fresh: see `formats.Table`.
    """
    with torch.device(device), NothingDrawn():
        qformer = QFormer(cfg)
    qformer.init_weights([name for name, _ in qformer.named_parameters() if first_match(fresh, f"qformer.{name}")])
    return qformer


def load_bert(folder: str, **overrides) -> tuple[QFormer, str, list[Path]]:
    """A Q-Former that starts as the BERT in `folder` (paper 3.1) -> it, the account, and the files it came from."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"--bert {folder} does not exist: expected a BERT folder with config.json and model.safetensors"
        )
    qformer = QFormer(QFormerConfig(**{**bert_config(path), **overrides}))
    paths = weight_files(path)
    account = load(qformer, open_tensors(paths), BERT, f"bert {folder}")
    copy_text_ffn_to_queries(qformer)
    return qformer, account, paths


def hf_qformer_config(config: dict, retrieval: bool) -> QFormerConfig:
    """The Q-Former of a transformers BLIP-2, from its config.json."""
    q = config["qformer_config"]
    return QFormerConfig(
        vocab_size=q.get("vocab_size", 30522) + (not retrieval),  # [DEC], which is counted where words are read
        width=q.get("hidden_size", 768),
        depth=q.get("num_hidden_layers", 12),
        heads=q.get("num_attention_heads", 12),
        mlp=q.get("intermediate_size", 3072),
        max_positions=q.get("max_position_embeddings", 512),
        num_queries=config.get("num_query_tokens", 32),
        image_width=q.get("encoder_hidden_size", 1408),
        cross_every=q.get("cross_attention_frequency", 2),
        dropout=q.get("hidden_dropout_prob", 0.1),
        eps=q.get("layer_norm_eps", 1e-12),
    )


def lavis_kind(tensors: Mapping[str, Tensor]) -> tuple[bool, bool, str]:
    """Whether a checkpoint of the original is of stage 2, whether it holds a fine-tuned ViT, and of which name its ViT
    is, which the width of `ln_vision` tells."""
    stage2 = "opt_proj.weight" in tensors or "t5_proj.weight" in tensors
    clip = "ln_vision.weight" in tensors and len(tensors["ln_vision.weight"]) == PRESETS["clip-l"].width
    return stage2, any(key.startswith("visual_encoder.") for key in tensors), "clip-l" if clip else "eva-g"


def lavis_sizes(tensors: Mapping[str, Tensor]) -> dict:
    """The fields of QFormerConfig that the shapes of such a checkpoint decide; its heads are BERT's, 64 wide."""
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


def lavis_vit_config(name: str, tensors: Mapping[str, Tensor]) -> ViTConfig:
    """The fine-tuned ViT inside such a checkpoint, of the architecture `name`, with its own depth and size."""
    positions = [key for key in tensors if re.fullmatch(r"visual_encoder\.(pos_embed|positional_embedding)", key)]
    grid = math.isqrt(shape_of(tensors, positions[0])[-2] - 1) if positions else 0
    blocks = {found[1] for key in tensors if (found := re.search(r"^visual_encoder\..*blocks\.(\d+)\.", key))}
    return replace(PRESETS[name], depth=len(blocks), image_size=max(1, grid) * PRESETS[name].patch_size)


def llm_config(spec: str) -> tuple[OPTConfig | T5Config, Table]:
    """Architecture and key table of what `--llm` names, a folder by its config.json; of a BLIP-2 folder, its own."""
    if not Path(spec).is_dir():
        if spec in LLM_PRESETS:
            cfg = LLM_PRESETS[spec]
            return cfg, OPT_TABLE if isinstance(cfg, OPTConfig) else T5_TABLE
        names = ", ".join(LLM_PRESETS)
        raise UserError(f"--llm {spec} does not exist: expected a folder, or a name ({names}) for random weights")
    config = read_json(Path(spec) / "config.json")
    where = f"{spec}/config.json"
    if config.get("model_type") == "blip-2":
        config, where = config["text_config"], f"text_config in {where}"
    kind = config.get("model_type")
    if kind == "opt":
        if config.get("activation_function", "relu") != "relu" or not config.get("enable_bias", True):
            raise UserError(f"{where} is of an OPT without ReLU or biases, expected one of facebook/opt-*")
        width = config.get("hidden_size", 768)
        cfg = OPTConfig(
            vocab_size=config.get("vocab_size", 50272),
            width=width,
            depth=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 12),
            mlp=config.get("ffn_dim", 3072),
            max_positions=config.get("max_position_embeddings", 2048),
            embed_width=config.get("word_embed_proj_dim") or width,
            pre_norm=config.get("do_layer_norm_before", True),
        )
        return cfg, OPT_TABLE
    if kind == "t5":
        # T5 v1.0 scales what goes into its head, and has no gates. "gated-gelu" has always meant the one by tanh.
        scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        act = config.get("dense_act_fn") or {"gated-gelu": "gelu_new"}.get(config.get("feed_forward_proj"))
        if scales or act not in ("gelu", "gelu_new") or not config.get("feed_forward_proj", "").startswith("gated"):
            raise UserError(f"{where} is of a T5 v1.0, expected google/t5-v1_1-* or google/flan-t5-*")
        depth = config.get("num_layers", 6)
        cfg = T5Config(
            vocab_size=config.get("vocab_size", 32128),
            width=config.get("d_model", 512),
            depth=depth,
            decoder_depth=config.get("num_decoder_layers") or depth,
            heads=config.get("num_heads", 8),
            head_width=config.get("d_kv", 64),
            mlp=config.get("d_ff", 2048),
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            eps=config.get("layer_norm_epsilon", 1e-6),
            act=act,
            pad_id=config.get("pad_token_id", 0),
        )
        return cfg, T5_TABLE
    raise UserError(f"{where} has model_type {kind!r}, expected a language model of a known type: opt, t5")


def inside_blip2(table: Table) -> Table:
    """The table of a language model that is a part of transformers' BLIP-2."""
    others = {r"(vision_model|query_tokens|qformer|language_projection)(\..*)?": "the other parts of that model"}
    return replace(table, ignored=others | table.ignored, renames={r"^language_model\.": ""} | table.renames)


def check_llm_dtype(llm: nn.Module, dtype: torch.dtype | None, spec: str) -> None:
    """Refuse T5 in fp16."""
    if dtype == torch.float16 and not llm.fits_fp16:
        raise UserError(f"got precision fp16 for {spec}, in which T5 overflows: pass bf16, or fp32")


def load_llm(
    spec: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", act: str | None = None
) -> tuple[nn.Module, str, list[Path]]:
    """The language model that `--llm` names -> it, the account of its loading, and the files it came from.

    spec: a folder as a hub serves it, also one of a whole BLIP-2; or a name of `llm.PRESETS` for random weights.
    """
    cfg, table = llm_config(spec)
    if act is not None:
        cfg = replace(cfg, act=act)
    with torch.device("meta"), NothingDrawn():
        llm = build_llm(cfg)
    check_llm_dtype(llm, dtype, spec)
    if not Path(spec).is_dir():
        with torch.device(device), NothingDrawn():
            llm = build_llm(cfg)
        llm.init_weights()
        return llm.to(dtype), f"llm {spec}: RANDOM WEIGHTS, for dry runs and benchmarks only", []
    paths = weight_files(Path(spec))
    source = open_tensors(paths)
    if any(key.startswith("language_model.") for key in source):
        table = inside_blip2(table)
    return llm, load(llm, source, table, f"llm {spec}", dtype, device), paths


# --- out -------------------------------------------------------------------------------------------------------------

SHARD_BYTES = 2_000_000_000
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(model, form: str, out: Path, dtype: str) -> list[str]:
    """Write a `Blip2` for transformers ("hf", a folder) or for the original code ("lavis", a .pth) -> what to know.

    Raises UserError, with nothing written, for what the format cannot hold. `out` appears whole or not at all.
    """
    if out.exists():
        raise UserError(f"{out} exists already: pass another name, or remove it first")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist, make it first")
    if model.conditioned and form != "run":
        raise UserError(
            f"the Q-Former of this run reads the question too (--stage vqa), which BLIP-2 in {form} cannot: use it "
            "here, or fine-tune with --no-condition"
        )
    for part in ("vit", "llm") if model.llm is not None else ("vit",):
        if not model.sources.get(f"{part}_files") and not (part == "vit" and model.vit_trained):
            raise UserError(f"--{part} {model.sources[part]} has random weights, which are not worth exporting")
    unfinished = out.with_name(out.name + ".part")
    if unfinished.exists():
        raise UserError(f"{unfinished} is left of an export that was ended: remove it first")
    try:
        notes = {"hf": export_hf, "lavis": export_lavis, "run": export_run}[form](model, unfinished, dtype)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
    return notes


def export_run(model, folder: Path, dtype: str) -> list[str]:
    """A run, from which training goes on; its frozen parts stay where they are."""
    model.save_pretrained(folder, home=folder.with_suffix(""))
    return [f"--vit {model.sources['vit']}"] + ([f"--llm {model.sources['llm']}"] if model.llm is not None else [])


def left_behind(model: nn.Module, table: Table) -> list[str]:
    """What a table has no place for, a sentence for each reason."""
    lost: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        why = first_match(table.fresh, name)
        if why and not name.startswith(("vit.", "llm.")):
            lost.setdefault(why, []).append(name)
    return [f"left behind, {len(names)} tensors: {why}" for why, names in lost.items()]


def export_hf(model, folder: Path, dtype: str) -> list[str]:
    """config.json, safetensors, tokenizer and processor files, as transformers' BLIP-2 classes read them."""
    vit, retrieval, notes = model.vit.cfg, model.llm is None, []
    if vit.ln_pre:
        raise UserError(
            f"{model.sources['vit']} has a norm in front of its blocks (CLIP), which transformers' BLIP-2 classes "
            "lack: export with --format lavis"
        )
    if vit.eps != model.ln_vision.eps:
        notes.append(
            f"ln_vision has eps {model.ln_vision.eps:g} here and {vit.eps:g} there, where the ViT has only one: "
            "outputs differ in their last digits, as those of the public conversions do"
        )
    table = HF_RETRIEVAL if retrieval else HF_BLIP2
    notes += left_behind(model, table)
    tensors, config, grid = unload(model, table, table.fresh), hf_config(model), model.image_size // vit.patch_size
    vision = unload(model.vit, HF_BLIP2_VIT) | {"embeddings.position_embedding": model.vit.positions(grid, grid)}
    tensors |= {f"vision_model.{key}": tensor.detach() for key, tensor in vision.items()}
    folder.mkdir()
    if retrieval:
        tokenizer, special = model.texts.hf_tokenizer()
    else:
        tokenizer, special = model.llm_texts.hf_tokenizer()
        image_token = tokenizer.token_to_id("<image>")
        words = max(model.llm.cfg.vocab_size, image_token + 1)
        text = read_json(Path(model.sources["llm"]) / "config.json")
        text = text.get("text_config", text)  # of a whole BLIP-2
        ends = {"eos_token_id": model.llm_texts.end_id, "pad_token_id": model.llm_texts.pad_id}
        starts = {key: text[key] for key in ("bos_token_id", "decoder_start_token_id") if text.get(key) is not None}
        act = {"dense_act_fn": model.llm.cfg.act} if isinstance(model.llm.cfg, T5Config) else {}
        text |= ends | act | {"vocab_size": words, "dtype": TORCH_NAMES[dtype]}
        config |= {"image_token_index": image_token, "text_config": text}
        tensors |= {f"language_model.{key}": tensor for key, tensor in unload_llm(model.llm, words).items()}
        write_json(folder / "generation_config.json", ends | starts)
    write_shards(folder, tensors, getattr(torch, TORCH_NAMES[dtype]))
    write_json(folder / "config.json", config | {"dtype": TORCH_NAMES[dtype]})
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", special | kind)
    picture = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vit.mean,
        "image_std": vit.std,
    }
    write_json(folder / "preprocessor_config.json", picture)
    queries = {} if retrieval else {"num_query_tokens": model.qformer.cfg.num_queries}
    write_json(folder / "processor_config.json", {"processor_class": "Blip2Processor"} | queries)
    return notes


def hf_config(model) -> dict:
    """What transformers' Blip2Config says of all but the language model. The ViT's table of positions is written for
    the size of picture that the model takes."""
    vit, q, retrieval = model.vit.cfg, model.qformer.cfg, model.llm is None
    return {
        "architectures": ["Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": q.num_queries,
        "image_text_hidden_size": model.embed_dim,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vit.width,
            "intermediate_size": vit.mlp,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads,
            "patch_size": vit.patch_size,
            "image_size": model.image_size,
            "hidden_act": vit.act,
            "layer_norm_eps": vit.eps,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": q.vocab_size - (not retrieval),
            "hidden_size": q.width,
            "num_hidden_layers": q.depth,
            "num_attention_heads": q.heads,
            "intermediate_size": q.mlp,
            "hidden_dropout_prob": q.dropout,
            "attention_probs_dropout_prob": q.dropout,
            "max_position_embeddings": q.max_positions,
            "layer_norm_eps": q.eps,
            "cross_attention_frequency": q.cross_every,
            "encoder_hidden_size": vit.width,
            "use_qformer_text_input": retrieval,
        },
    }


def write_json(path: Path, content: dict) -> None:
    """Readable, with a line end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def unload_llm(llm: nn.Module, words: int) -> dict[str, Tensor]:
    """A language model under its public keys, with as many words; those that are added (for an image) are zero."""
    opt = isinstance(llm.cfg, OPTConfig)
    tensors = unload(llm, OPT_TABLE if opt else T5_TABLE)
    for key in ("embed_tokens.weight", "shared.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key] = nn.functional.pad(tensors[key], (0, 0, 0, words - len(tensors[key])))
    return {f"model.decoder.{key}": tensor for key, tensor in tensors.items()} if opt else tensors


def write_shards(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """model.safetensors, or shards and their index."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for key, tensor in tensors.items():
        count = tensor.numel() * dtype.itemsize
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size, total = size + count, total + count
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    for name, keys in zip(names, shards):
        save_file({key: tensors[key].to(dtype).contiguous() for key in keys}, folder / name, {"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets only the owner read its files


def export_lavis(model, path: Path, dtype: str) -> list[str]:
    """{"model": state dict} under the original's names. A ViT from the original's own file stays out, as there."""
    vit, notes = model.vit.cfg, []
    kind = "clip-l" if vit.ln_pre else "eva-g"
    if vit.key_bias != vit.ln_pre:  # EVA has no key bias, CLIP has one
        raise UserError(
            f"{model.sources['vit']} is neither an EVA-CLIP nor a CLIP encoder, and LAVIS knows no other: "
            "export with --format hf"
        )
    if model.sources.get("last_block"):
        raise UserError("the run keeps the last block of its ViT, which LAVIS never builds: export with --format hf")
    q = model.qformer.cfg
    if (q.width, q.depth, q.cross_every) != (768, 12, 2):
        notes.append(
            f"a Q-Former of {q.depth} blocks of width {q.width}, cross-attention in every {q.cross_every}: LAVIS "
            "builds 12 of 768 with cross-attention in every 2, and has to be changed to read it"
        )
    if model.ln_vision.eps != 1e-5:
        notes.append(f"ln_vision has eps {model.ln_vision.eps:g} here and 1e-05 there: the last digits differ")
    if model.llm is not None and getattr(model.llm.cfg, "act", "gelu") != "gelu":
        notes.append("T5's GELU is by tanh here; LAVIS puts the one by erf in its place: answers may differ")
    table = LAVIS_STAGE1
    if model.llm is not None:
        proj = "opt_proj" if isinstance(model.llm.cfg, OPTConfig) else "t5_proj"
        rows = [row for row in LAVIS_STAGE2.rows if row.ours.split(".")[0] != "llm_proj"]
        table = replace(LAVIS_STAGE2, rows=rows + both(proj, "llm_proj"))
    notes += left_behind(model, table)
    tensors = unload(model, table, table.fresh)
    positions = torch.arange(model.qformer.cfg.max_positions)[None]
    if model.llm is None:
        head = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
        tensors |= {f"Qformer.cls.predictions.decoder.{k}": tensors[f"Qformer.{tied}"] for k, tied in head.items()}
    own = model.vit_trained or holds_vit(model.sources["vit_files"])
    bare = model.sources["vit"].partition(":")[0] in PRESETS and not own
    if not bare:  # it may be fine-tuned
        tensors |= unload(model.vit, LAVIS_VITS[kind])
    else:
        notes.append(f"without its ViT, which LAVIS reads from its own file ({model.sources['vit']})")
    tensors = {key: tensor.to(getattr(torch, TORCH_NAMES[dtype])).clone() for key, tensor in tensors.items()}
    torch.save({"model": tensors | {"Qformer.bert.embeddings.position_ids": positions}}, path)
    return notes


def holds_vit(files: list[Path]) -> bool:
    """Whether a ViT came from a checkpoint of LAVIS with which it was fine-tuned."""
    return any(key.startswith("visual_encoder.") for key in open_tensors(files))


# --- inspect ---------------------------------------------------------------------------------------------------------

# Beginnings of keys -> what they are, in the order in which they are tried.
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
    """What a checkpoint is, its parts with their parameters and dtypes, as a text; no tensor is read."""
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a checkpoint folder or file")
    config = read_json(path / "config.json") if path.is_dir() else {}
    files = weight_files(path) if path.is_dir() else [path]
    tensors, lines = open_tensors(files), []
    kind = config.get("model_type")
    if config.get("model") == "blip2":
        kind = "run"
        stage = config.get("train", {}).get("stage") or (2 if config.get("llm") else 1)
        lines.append(f"{path}: a run of this code, stage {stage}, {config['image_size']} px")
        own = ("llm",) if config.get("vit_trained") else ("vit", "llm")  # else it holds its ViT
        lines += [f"  --{part} {config[part]}" for part in own if config.get(part)]
    elif kind == "blip-2":
        stage2 = any(key.startswith("language_model.") for key in tensors)
        text = f"with {config.get('text_config', {}).get('model_type', 'opt')}" if stage2 else "for retrieval"
        lines.append(f"{path}: a BLIP-2 of transformers {text}")
        lines += [] if stage2 else ["  lacks ITC's temperature and ITG's head"]
        lines += ["  lacks the text branch of the Q-Former"] if stage2 else []
    elif kind is not None:
        lines.append(f"{path}: {kind}")
    elif any(key.startswith(("Qformer.", "query_tokens")) for key in tensors):
        kind, (stage2, vit, _) = "lavis", lavis_kind(tensors)
        lines.append(
            f"{path}: a checkpoint of LAVIS, stage {2 if stage2 else 1}, {'with its' if vit else 'without a'} ViT"
        )
        lines += ["  lacks the text branch of the Q-Former and the language model"] if stage2 else []
    else:
        lines.append(f"{path}: tensors without a config.json")
    found: dict[str, Counter] = {}
    for key in tensors:
        prefixes = PARTS.get(kind, {"": kind or "all"})
        name = next(name for prefix, name in prefixes.items() if key.startswith(prefix))
        dtype, count = dtype_of(tensors, key), math.prod(shape_of(tensors, key))
        part = found.setdefault(name, Counter())
        part.update({"tensors": 1, "parameters": count, "bytes": count * dtype.itemsize, str(dtype)[6:]: 0})
    lines.append(f"{'part':34}{'tensors':>9}{'parameters':>16}{'GB':>9}  dtype")
    for name, part in sorted(found.items(), key=lambda item: -item[1]["parameters"]):
        dtypes = ", ".join(sorted(part.keys() - {"tensors", "parameters", "bytes"}))
        lines.append(f"{name:34}{part['tensors']:9,}{part['parameters']:16,}{part['bytes'] / 1e9:9.3f}  {dtypes}")
    return "\n".join(lines)


def dtype_of(source: Mapping[str, Tensor], key: str) -> torch.dtype:
    """A tensor's dtype, without reading it where that is possible."""
    return source.dtype(key) if isinstance(source, SafeTensors) else source[key].dtype


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what a checkpoint is, without loading it")
    look.add_argument("checkpoint", type=Path)
    give = commands.add_parser("export", help="write a model for transformers or for the original code")
    give.add_argument("run", help="a run, or a public checkpoint")
    give.add_argument("out", type=Path, help="a folder (hf, run) or a .pth file (lavis), which does not exist yet")
    give.add_argument("--format", required=True, choices=("hf", "lavis", "run"))
    give.add_argument("--dtype", default="fp32", choices=TORCH_NAMES)
    for part in ("vit", "bert", "llm"):
        give.add_argument(f"--{part}", help="that part, if it is not where the run says")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        print(inspect(args.checkpoint))
        return
    from blip2 import Blip2  # which imports this module

    model = Blip2.from_pretrained(args.run, args.vit, args.bert, args.llm, precision=args.dtype)
    print(*export(model, args.format, args.out, args.dtype), f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    sys.exit(say_sentence(main))
