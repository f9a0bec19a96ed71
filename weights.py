"""Public checkpoints in: key tables as data, and one strict loader.

A table says which of their keys becomes which of ours, `{}` standing for the number of a block, and through which
function if not as it is. Loading accounts for everything: each of their keys is used or ignored for a stated reason,
each of ours is filled or fresh for a stated reason, and all shapes agree. Otherwise one error lists every problem and
nothing has been changed.

    encoders    EVA-CLIP ViT-g (bare file), CLIP (LAVIS's bare file or transformers' folder), DINOv2, BLIP-2's own
    text        BERT and its like (MiniLM, ...); OPT; T5 v1.1 and Flan-T5
    BLIP-2      LAVIS's stage-1 checkpoints; transformers' folders with a language model
"""

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data import UserError, read_json
from llm import PRESETS as LLM_PRESETS
from llm import OPTConfig, T5Config, build_llm
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from vit import CLIP_MEAN, CLIP_STD, PRESETS, ViT, ViTConfig

# --- the loader ------------------------------------------------------------------------------------------------------


def as_it_is(tensor: Tensor) -> Tensor:
    """No transform."""
    return tensor


@dataclass(frozen=True)
class Row:
    """Their keys (one, or several that are combined) -> our key."""

    theirs: tuple[str, ...]
    ours: str
    transform: Callable[..., Tensor] = as_it_is


@dataclass(frozen=True)
class Table:
    """One public format. If several rows lead to one of our keys, the first whose sources are all there counts."""

    rows: list[Row]
    ignored: dict[str, str] = field(default_factory=dict)  # regular expression of their keys -> why
    fresh: dict[str, str] = field(default_factory=dict)  # regular expression of our keys -> why
    renames: dict[str, str] = field(default_factory=dict)  # regular expression -> replacement, on their keys, first


def load(target: nn.Module, source: Mapping[str, Tensor], table: Table, what: str) -> str:
    """Copy `source` into the parameters of `target` as `table` says. Returns the account in a sentence.

    Raises UserError with the full list of problems, before anything is changed.
    """
    theirs = {}  # their key, renamed -> their key
    for key in source:
        renamed = key
        for pattern, replacement in table.renames.items():
            renamed = re.sub(pattern, replacement, renamed)
        theirs[renamed] = key

    plan, problems, fresh, used = [], [], Counter(), set()
    for ours, parameter in target.named_parameters():
        row, keys = find_row(table, ours, theirs)
        if row is None:
            why = first_match(table.fresh, ours)
            fresh[why] += 1
            if why is None:
                problems.append(f"missing: nothing for {ours} {tuple(parameter.shape)}{wanted_keys(table, ours)}")
            continue
        used.update(keys)
        # On the meta device first: shapes only, so that nothing is read or changed before all is known to fit.
        shape = row.transform(*(torch.empty(shape_of(source, theirs[key]), device="meta") for key in keys)).shape
        if shape != parameter.shape:
            problems.append(f"shape: {', '.join(keys)} gives {tuple(shape)}, {ours} is {tuple(parameter.shape)}")
        plan.append((parameter, row, keys))

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

    with torch.no_grad():
        for parameter, row, keys in plan:
            parameter.copy_(row.transform(*(source[theirs[key]] for key in keys)))
    account = [f"{len(used)} used"]
    account += [f"{n} ignored ({why})" for why, n in ignored.items()]
    account += [f"{n} fresh ({why})" for why, n in fresh.items()]
    return f"{what}: {', '.join(account)}"


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


# --- files -----------------------------------------------------------------------------------------------------------


class SafeTensors(Mapping):
    """The tensors of one or more .safetensors files, read when asked for."""

    def __init__(self, paths: list[Path]):
        self.files = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:
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


def shape_of(source: Mapping[str, Tensor], key: str) -> list[int]:
    """A tensor's shape, without reading it where that is possible."""
    return source.shape(key) if isinstance(source, SafeTensors) else source[key].shape


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that hold its tensors: one, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()][:1]
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        got = f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} has no weights"
        raise UserError(f"{got}: expected model.safetensors, its shards and index, or pytorch_model.bin")
    return [folder / name for name in names]


def open_tensors(paths: list[Path]) -> Mapping[str, Tensor]:
    """Tensors by key from safetensors files, or from one pickle of PyTorch (read with weights_only=True)."""
    if paths[0].suffix == ".safetensors":
        return SafeTensors(paths)
    try:
        mapped = zipfile.is_zipfile(paths[0])  # older pickles are read whole
        content = torch.load(paths[0], map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise UserError(f"{paths[0]} cannot be read as PyTorch weights ({str(error).splitlines()[0]})") from None
    content = content.get("model", content)  # LAVIS wraps its state dict
    return {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}


def sha256(paths: list[Path]) -> str:
    """One hash over the contents of the files, to know a frozen part again."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- transforms ------------------------------------------------------------------------------------------------------


def join(*tensors: Tensor) -> Tensor:
    """q, k, v -> one Linear."""
    return torch.cat(tensors)


def query_third(bias: Tensor) -> Tensor:
    """The query's part of a fused qkv bias."""
    return bias.chunk(3)[0]


def value_third(bias: Tensor) -> Tensor:
    """The value's part of a fused qkv bias."""
    return bias.chunk(3)[2]


def key_third(bias: Tensor) -> Tensor:
    """The key's part of a fused qkv bias."""
    return bias.chunk(3)[1]


def fold_scale(tensor: Tensor, scale: Tensor) -> Tensor:
    """DINOv2's LayerScale is a factor per output of the Linear before it: multiply it into weight or bias."""
    return tensor * scale.view(-1, *[1] * (tensor.dim() - 1))


def lead_1_1(tensor: Tensor) -> Tensor:
    """(V,) -> (1, 1, V)."""
    return tensor.view(1, 1, -1)


def lead_1(tensor: Tensor) -> Tensor:
    """(P, V) -> (1, P, V)."""
    return tensor[None]


def add_type_0(positions: Tensor, types: Tensor) -> Tensor:
    """BERT adds its token-type row 0 to every single text: put it into the positions (the original drops it)."""
    return positions + types[0]


def append_random_row(embedding: Tensor) -> Tensor:
    """A row for [DEC] behind BERT's words."""
    return torch.cat((embedding, torch.empty_like(embedding[:1]).normal_(0, 0.02)))


def append_zero(bias: Tensor) -> Tensor:
    """The output bias of [DEC]."""
    return torch.cat((bias, torch.zeros_like(bias[:1])))


def both(theirs: str, ours: str) -> list[Row]:
    """Rows for the weight and the bias of a Linear or a norm."""
    return [Row((f"{theirs}.{kind}",), f"{ours}.{kind}") for kind in ("weight", "bias")]


def joined(theirs: str, parts: tuple[str, ...], ours: str) -> list[Row]:
    """Rows for Linears that are apart there and one here: `{part}` in `theirs` stands for the parts."""
    return [
        Row(tuple(f"{theirs.replace('{part}', part)}.{kind}" for part in parts), f"{ours}.{kind}", join)
        for kind in ("weight", "bias")
    ]


def under(prefix_theirs: str, prefix_ours: str, rows: list[Row]) -> list[Row]:
    """The same rows, with both sides inside something."""
    return [
        Row(tuple(prefix_theirs + key for key in row.theirs), prefix_ours + row.ours, row.transform) for row in rows
    ]


# What undoes a transform: one of our tensors -> theirs, in the order of the row's keys. LayerScale stays folded in.
INVERSES = {
    join: lambda tensor, keys: tensor.chunk(keys),
    fold_scale: lambda tensor, keys: (tensor, torch.ones_like(tensor[(slice(None), *[0] * (tensor.dim() - 1))])),
    lead_1_1: lambda tensor, keys: (tensor.view(-1),),
    lead_1: lambda tensor, keys: (tensor[0],),
    add_type_0: lambda tensor, keys: (tensor, torch.zeros(2, tensor.shape[1])),
    append_random_row: lambda tensor, keys: (tensor[:-1],),
    append_zero: lambda tensor, keys: (tensor[:-1],),
    as_it_is: lambda tensor, keys: (tensor,),
}


def unload(source: nn.Module, table: Table) -> dict[str, Tensor]:
    """The other way: the parameters that `table` has a place for, under their keys. The first row of a key counts."""
    theirs: dict[str, Tensor] = {}
    for ours, parameter in source.named_parameters():
        for row, keys in rows_for(table, ours):
            tensors = INVERSES[row.transform](parameter.detach(), len(keys))
            theirs |= {key: tensor.contiguous() for key, tensor in zip(keys, tensors, strict=True)}
            break
    return theirs


# --- the tables: image encoders --------------------------------------------------------------------------------------

QKV = ("q", "k", "v")

EVA_ROWS = [
    Row(("cls_token",), "cls_token"),
    Row(("pos_embed",), "pos_embed"),
    *both("patch_embed.proj", "patch_embed"),
    *both("blocks.{}.norm1", "blocks.{}.ln_1"),
    Row(("blocks.{}.attn.qkv.weight",), "blocks.{}.attn.qkv.weight"),
    Row(("blocks.{}.attn.q_bias",), "blocks.{}.attn.q_bias"),
    Row(("blocks.{}.attn.v_bias",), "blocks.{}.attn.v_bias"),
    *both("blocks.{}.attn.proj", "blocks.{}.attn.proj"),
    *both("blocks.{}.norm2", "blocks.{}.ln_2"),
    *both("blocks.{}.mlp.fc1", "blocks.{}.fc1"),
    *both("blocks.{}.mlp.fc2", "blocks.{}.fc2"),
]
EVA = Table(EVA_ROWS, ignored={r"(norm|fc_norm|head)\..*": "the final norm and head, unused", "mask_token": "unused"})

# CLIP's visual tower as LAVIS's clip_vit_L.pth has it.
CLIP_BARE_ROWS = [
    Row(("class_embedding",), "cls_token", lead_1_1),
    Row(("positional_embedding",), "pos_embed", lead_1),
    Row(("conv1.weight",), "patch_embed.weight"),
    *both("ln_pre", "ln_pre"),
    *both("transformer.resblocks.{}.ln_1", "blocks.{}.ln_1"),
    Row(("transformer.resblocks.{}.attn.in_proj_weight",), "blocks.{}.attn.qkv.weight"),
    Row(("transformer.resblocks.{}.attn.in_proj_bias",), "blocks.{}.attn.q_bias", query_third),
    Row(("transformer.resblocks.{}.attn.in_proj_bias",), "blocks.{}.attn.k_bias", key_third),
    Row(("transformer.resblocks.{}.attn.in_proj_bias",), "blocks.{}.attn.v_bias", value_third),
    *both("transformer.resblocks.{}.attn.out_proj", "blocks.{}.attn.proj"),
    *both("transformer.resblocks.{}.ln_2", "blocks.{}.ln_2"),
    *both("transformer.resblocks.{}.mlp.c_fc", "blocks.{}.fc1"),
    *both("transformer.resblocks.{}.mlp.c_proj", "blocks.{}.fc2"),
]
CLIP_BARE = Table(CLIP_BARE_ROWS, ignored={r"ln_post\..*|proj": "the final norm and projection, unused"})

CLIP = Table(
    [
        Row(("embeddings.class_embedding",), "cls_token", lead_1_1),
        Row(("embeddings.position_embedding.weight",), "pos_embed", lead_1),
        Row(("embeddings.patch_embedding.weight",), "patch_embed.weight"),
        *both("pre_layrnorm", "ln_pre"),  # the typing error is transformers' own
        *both("encoder.layers.{}.layer_norm1", "blocks.{}.ln_1"),
        Row(
            tuple("encoder.layers.{}.self_attn." + part + "_proj.weight" for part in QKV),
            "blocks.{}.attn.qkv.weight",
            join,
        ),
        *(Row(("encoder.layers.{}.self_attn." + p + "_proj.bias",), "blocks.{}.attn." + p + "_bias") for p in QKV),
        *both("encoder.layers.{}.self_attn.out_proj", "blocks.{}.attn.proj"),
        *both("encoder.layers.{}.layer_norm2", "blocks.{}.ln_2"),
        *both("encoder.layers.{}.mlp.fc1", "blocks.{}.fc1"),
        *both("encoder.layers.{}.mlp.fc2", "blocks.{}.fc2"),
    ],
    ignored={
        r"post_layernorm\..*": "the final norm, unused",
        r"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale": "CLIP's text side and projections",
        r".*position_ids": "a buffer that counts 0, 1, 2, ...",
    },
    renames={r"^vision_model\.": ""},
)

DINOV2 = Table(
    [
        Row(("embeddings.cls_token",), "cls_token"),
        Row(("embeddings.position_embeddings",), "pos_embed"),
        *both("embeddings.patch_embeddings.projection", "patch_embed"),
        *both("encoder.layer.{}.norm1", "blocks.{}.ln_1"),
        Row(
            tuple("encoder.layer.{}.attention.attention." + part + ".weight" for part in ("query", "key", "value")),
            "blocks.{}.attn.qkv.weight",
            join,
        ),
        *(
            Row(("encoder.layer.{}.attention.attention." + theirs + ".bias",), "blocks.{}.attn." + ours + "_bias")
            for theirs, ours in zip(("query", "key", "value"), QKV)
        ),
        *(
            Row(("encoder.layer.{}." + theirs, "encoder.layer.{}." + scale), "blocks.{}." + ours, fold_scale)
            for theirs, scale, ours in (
                ("attention.output.dense.weight", "layer_scale1.lambda1", "attn.proj.weight"),
                ("attention.output.dense.bias", "layer_scale1.lambda1", "attn.proj.bias"),
                ("mlp.fc2.weight", "layer_scale2.lambda1", "fc2.weight"),
                ("mlp.fc2.bias", "layer_scale2.lambda1", "fc2.bias"),
            )
        ),
        *both("encoder.layer.{}.norm2", "blocks.{}.ln_2"),
        *both("encoder.layer.{}.mlp.fc1", "blocks.{}.fc1"),
    ],
    ignored={
        r"layernorm\..*": "the final norm, unused",
        "embeddings.mask_token": "used in DINOv2's own training only",
    },
    renames={r"^dinov2\.": ""},
)

# The encoder inside transformers' BLIP-2 (EVA-CLIP without its last block; the key's third of the bias is zero).
HF_BLIP2_VIT = Table(
    [
        Row(("embeddings.class_embedding",), "cls_token"),
        Row(("embeddings.position_embedding",), "pos_embed"),
        *both("embeddings.patch_embedding", "patch_embed"),
        *both("encoder.layers.{}.layer_norm1", "blocks.{}.ln_1"),
        Row(("encoder.layers.{}.self_attn.qkv.weight",), "blocks.{}.attn.qkv.weight"),
        Row(("encoder.layers.{}.self_attn.qkv.bias",), "blocks.{}.attn.q_bias", query_third),
        Row(("encoder.layers.{}.self_attn.qkv.bias",), "blocks.{}.attn.v_bias", value_third),
        *both("encoder.layers.{}.self_attn.projection", "blocks.{}.attn.proj"),
        *both("encoder.layers.{}.layer_norm2", "blocks.{}.ln_2"),
        *both("encoder.layers.{}.mlp.fc1", "blocks.{}.fc1"),
        *both("encoder.layers.{}.mlp.fc2", "blocks.{}.fc2"),
    ],
    ignored={
        r"post_layernorm\..*": "that model's ln_vision",
        r"(query_tokens|qformer|language_(model|projection)|embeddings\.(word|position)_embeddings|(vision|text)_projection"
        r"|itm_head)(\..*)?": "the other parts of that model",
    },
    renames={r"^vision_model\.": ""},
)


# --- the tables: text and the Q-Former -------------------------------------------------------------------------------

BERT_PARTS = ("query", "key", "value")


def bert_block(theirs: str, attention: str, cross: bool) -> list[Row]:
    """Rows of one Q-Former block in BERT's names; `attention` is "self" (BERT, LAVIS) or "attention" (transformers)."""
    rows = [
        *joined(theirs + ".attention." + attention + ".{part}", BERT_PARTS, "blocks.{}.attn.qkv"),
        *both(theirs + ".attention.output.dense", "blocks.{}.attn.proj"),
        *both(theirs + ".attention.output.LayerNorm", "blocks.{}.attn.ln"),
        *both(theirs + ".intermediate.dense", "blocks.{}.ffn_text.up"),
        *both(theirs + ".output.dense", "blocks.{}.ffn_text.down"),
        *both(theirs + ".output.LayerNorm", "blocks.{}.ffn_text.ln"),
    ]
    if cross:
        rows += [
            *both(theirs + ".crossattention." + attention + ".query", "blocks.{}.cross.q"),
            *joined(theirs + ".crossattention." + attention + ".{part}", BERT_PARTS[1:], "blocks.{}.cross.kv"),
            *both(theirs + ".crossattention.output.dense", "blocks.{}.cross.proj"),
            *both(theirs + ".crossattention.output.LayerNorm", "blocks.{}.cross.ln"),
            *both(theirs + ".intermediate_query.dense", "blocks.{}.ffn_query.up"),
            *both(theirs + ".output_query.dense", "blocks.{}.ffn_query.down"),
            *both(theirs + ".output_query.LayerNorm", "blocks.{}.ffn_query.ln"),
        ]
    return rows


BERT = Table(
    [
        Row(("embeddings.word_embeddings.weight",), "word_embedding.weight", append_random_row),
        Row(
            ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"),
            "position_embedding.weight",
            add_type_0,
        ),
        *both("embeddings.LayerNorm", "embedding_ln"),
        *bert_block("encoder.layer.{}", "self", cross=False),
        *both("cls.predictions.transform.dense", "lm_head.dense"),
        *both("cls.predictions.transform.LayerNorm", "lm_head.ln"),
        Row(("cls.predictions.bias",), "lm_head.bias", append_zero),
    ],
    ignored={
        r"pooler\..*|cls\.seq_relationship\..*": "BERT's next-sentence head",
        r"cls\.predictions\.decoder\..*": "tied to the word embeddings",
        r".*position_ids": "a buffer that counts 0, 1, 2, ...",
    },
    fresh={
        "queries": "the queries, drawn at random",
        r"blocks\.\d+\.cross\..*": "cross-attention, drawn at random",
        r"blocks\.\d+\.ffn_query\..*": "the queries' feed-forward, copied from the text's",
        r"lm_head\..*": "LM head, which this checkpoint lacks",
    },
    # bert-base-uncased still has the names of 2018.
    renames={r"^bert\.": "", r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
)

LAVIS_QFORMER_ROWS = [
    Row(("query_tokens",), "qformer.queries"),
    *under(
        "Qformer.",
        "qformer.",
        [
            Row(("bert.embeddings.word_embeddings.weight",), "word_embedding.weight"),
            Row(("bert.embeddings.position_embeddings.weight",), "position_embedding.weight"),
            *both("bert.embeddings.LayerNorm", "embedding_ln"),
            *bert_block("bert.encoder.layer.{}", "self", cross=True),
            *both("cls.predictions.transform.dense", "lm_head.dense"),
            *both("cls.predictions.transform.LayerNorm", "lm_head.ln"),
            Row(("cls.predictions.bias",), "lm_head.bias"),
        ],
    ),
]

# A stage-1 checkpoint of the original. Only the fine-tuned ones hold their ViT; the others rely on its own file.
LAVIS_STAGE1 = Table(
    [
        *LAVIS_QFORMER_ROWS,
        *both("ln_vision", "ln_vision"),
        *both("vision_proj", "vision_proj"),
        *both("text_proj", "text_proj"),
        *both("itm_head", "itm_head"),
        Row(("temp",), "temperature"),
        *under("visual_encoder.", "vit.", EVA_ROWS),
        *under("visual_encoder.", "vit.", CLIP_BARE_ROWS),
    ],
    ignored={
        r"Qformer\.cls\.predictions\.decoder\..*": "tied to the word embeddings and to the bias",
        r"Qformer\.bert\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
    },
    fresh={r"vit\..*": "the frozen ViT, from its own file"},
)

# transformers' Blip2QFormerModel, with the embeddings that its retrieval class keeps beside it.
HF_QFORMER = Table(
    [
        *both("layernorm", "embedding_ln"),
        *bert_block("encoder.layer.{}", "attention", cross=True),
    ],
    fresh={
        r"queries|(word|position)_embedding\.weight": "kept outside of this class there",
        r"lm_head\..*": "dropped when the public files were converted",
    },
)

# --- the tables: language models -------------------------------------------------------------------------------------

OPT_TABLE = Table(
    [
        Row(("embed_tokens.weight",), "word_embedding.weight"),
        Row(("embed_positions.weight",), "position_embedding.weight"),
        Row(("project_in.weight",), "project_in.weight"),
        Row(("project_out.weight",), "project_out.weight"),
        *joined("layers.{}.self_attn.{part}_proj", QKV, "blocks.{}.qkv"),
        *both("layers.{}.self_attn.out_proj", "blocks.{}.proj"),
        *both("layers.{}.self_attn_layer_norm", "blocks.{}.ln_1"),
        *both("layers.{}.final_layer_norm", "blocks.{}.ln_2"),
        *both("layers.{}.fc1", "blocks.{}.fc1"),
        *both("layers.{}.fc2", "blocks.{}.fc2"),
        *both("final_layer_norm", "ln_final"),
    ],
    ignored={r"lm_head\.weight": "tied to the word embeddings"},
    renames={r"^(model\.)?decoder\.": ""},
)


def t5_stack(theirs: str, feed_forward: int) -> list[Row]:
    """Rows of T5's encoder or decoder, whose feed-forward is the layer of that number in each of their blocks."""
    block, ffn = theirs + ".block.{}.layer.", f"{theirs}.block.{{}}.layer.{feed_forward}"
    rows = [
        Row((f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",), "position_bias.weight"),
        Row((f"{theirs}.final_layer_norm.weight",), "ln_final.weight"),
        Row((block + "0.layer_norm.weight",), "blocks.{}.ln_1.weight"),
        Row((ffn + ".layer_norm.weight",), "blocks.{}.ln_2.weight"),
        Row((ffn + ".DenseReluDense.wi_0.weight",), "blocks.{}.gate.weight"),
        Row((ffn + ".DenseReluDense.wi_1.weight",), "blocks.{}.up.weight"),
        Row((ffn + ".DenseReluDense.wo.weight",), "blocks.{}.down.weight"),
        Row((block + "1.layer_norm.weight",), "blocks.{}.ln_cross.weight"),
    ]
    for attention, ours in (("0.SelfAttention", "attn"), ("1.EncDecAttention", "cross")):
        rows += [
            Row((block + attention + ".q.weight",), f"blocks.{{}}.{ours}.q.weight"),
            Row(
                (block + attention + ".k.weight", block + attention + ".v.weight"),
                f"blocks.{{}}.{ours}.kv.weight",
                join,
            ),
            Row((block + attention + ".o.weight",), f"blocks.{{}}.{ours}.proj.weight"),
        ]
    return rows


T5_TABLE = Table(
    [
        Row(("shared.weight",), "word_embedding.weight"),
        Row(("lm_head.weight",), "lm_head.weight"),
        Row(("shared.weight",), "lm_head.weight"),  # a file without a head has it tied
        *under("", "encoder.", t5_stack("encoder", 1)),
        *under("", "decoder.", t5_stack("decoder", 2)),
    ],
    ignored={
        r"(encoder|decoder)\.embed_tokens\.weight": "tied to the word embeddings",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": "unused there too",
    },
)

# What transformers' Blip2ForConditionalGeneration holds beside its encoder and its language model.
HF_BLIP2 = Table(
    [
        Row(("query_tokens",), "qformer.queries"),
        *under("qformer.", "qformer.", HF_QFORMER.rows),
        *both("vision_model.post_layernorm", "ln_vision"),
        *both("language_projection", "llm_proj"),
    ],
    ignored={r"vision_model\..*|language_model\..*": "the frozen parts"},
    fresh={
        r"vit\..*|llm\..*": "the frozen parts",
        r"qformer\.((word|position)_embedding\.weight|blocks\.\d+\.ffn_text\..*|lm_head\..*)": "the text branch, which "
        "stage-2 checkpoints lack",
        r"(vision_proj|text_proj|itm_head)\..*|temperature": "heads of stage 1",
    },
)

# --- building the parts ----------------------------------------------------------------------------------------------


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


def load_vit(spec: str, last_block: bool = False) -> tuple[ViT, str, list[Path]]:
    """The encoder that `--vit` names -> the ViT, the account of its loading, and the files it came from.

    spec: a folder as a hub serves it; "eva-g" or "clip-l" for that architecture with random weights; or
    "eva-g:eva_vit_g.pth" for a bare file. The last published block is left out (paper 3.4) unless `last_block`.
    """
    name, _, file = spec.partition(":")
    if name in PRESETS and not Path(name).is_dir():
        cfg, depth = PRESETS[name], PRESETS[name].depth + 1
        table = EVA if name == "eva-g" else CLIP_BARE
        paths = [Path(file)] if file else []
    elif Path(spec).is_dir():
        cfg, table = vit_config(Path(spec))
        depth, paths = cfg.depth, weight_files(Path(spec))
    else:
        raise UserError(
            f"--vit {spec} does not exist: expected a folder, or a name ({', '.join(PRESETS)}) for random weights"
        )
    vit = ViT(replace(cfg, depth=depth if last_block else depth - 1))
    if not paths:
        return vit, f"vit {name}: RANDOM WEIGHTS, for dry runs and benchmarks only", paths
    if not paths[0].exists():
        raise UserError(f"{paths[0]} does not exist: expected the weights of {name}")
    if not last_block:
        last = rf".*(blocks|resblocks|layers?)\.{depth - 1}\..*"
        table = replace(table, ignored={last: "the last block, dropped (paper 3.4)", **table.ignored})
    return vit, load(vit, open_tensors(paths), table, f"vit {spec}"), paths


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


def hf_qformer_config(config: dict) -> QFormerConfig:
    """The Q-Former of a transformers BLIP-2, from its config.json."""
    q = config["qformer_config"]
    return QFormerConfig(
        vocab_size=q.get("vocab_size", 30522) + 1,  # [DEC]
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


def load_llm(spec: str) -> tuple[nn.Module, str, list[Path]]:
    """The language model that `--llm` names -> it, the account of its loading, and the files it came from.

    spec: a folder as a hub serves it, also one of a whole BLIP-2; or a name of `llm.PRESETS` for random weights.
    """
    cfg, table = llm_config(spec)
    if not Path(spec).is_dir():
        llm = build_llm(cfg)
        llm.init_weights()
        return llm, f"llm {spec}: RANDOM WEIGHTS, for dry runs and benchmarks only", []
    with torch.device("meta"):
        llm = build_llm(cfg)
    llm, paths = llm.to_empty(device="cpu"), weight_files(Path(spec))
    source = open_tensors(paths)
    if any(key.startswith("language_model.") for key in source):  # inside a BLIP-2
        others = {r"(vision_model|query_tokens|qformer|language_projection)(\..*)?": "the other parts of that model"}
        table = replace(table, ignored=others | table.ignored, renames={r"^language_model\.": ""} | table.renames)
    return llm, load(llm, source, table, f"llm {spec}"), paths
