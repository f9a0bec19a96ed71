"""Public formats as data: which of their keys becomes which of ours.

`{}` stands for the number of a block. A row may go through a transform, which `INVERSES` undoes for the way out; what a
format has too much is ignored for a stated reason, what it lacks is fresh for a stated reason. weights.py reads these
tables; to support another format, write one more.

    encoders    EVA-CLIP ViT-g (bare file), CLIP (LAVIS's bare file or transformers' folder), DINOv2, BLIP-2's own
    text        BERT and its like (MiniLM, ...); OPT; T5 v1.1 and Flan-T5
    BLIP-2      LAVIS's checkpoints of both stages; transformers' folders, with a language model or for retrieval
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# --- rows, and what may happen to a tensor on its way ----------------------------------------------------------------


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
    row = torch.empty_like(embedding[:1])
    row.normal_(0, 0.02)
    return torch.cat((embedding, row))


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


# Which part of a fused qkv bias a transform takes.
THIRDS = {query_third: 0, key_third: 1, value_third: 2}

# What undoes another transform: one of our tensors -> theirs, in the order of the row's keys. LayerScale stays folded.
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

# The encoder inside transformers' BLIP-2 (EVA-CLIP without its last block). The key's third of the bias is zero, and
# would change nothing: it adds the same to every key's score. q, k and v are one Linear, or three in some releases.
HF_BLIP2_VIT = Table(
    [
        Row(("embeddings.class_embedding",), "cls_token"),
        Row(("embeddings.position_embedding",), "pos_embed"),
        *both("embeddings.patch_embedding", "patch_embed"),
        *both("encoder.layers.{}.layer_norm1", "blocks.{}.ln_1"),
        Row(("encoder.layers.{}.self_attn.qkv.weight",), "blocks.{}.attn.qkv.weight"),
        Row(("encoder.layers.{}.self_attn.qkv.bias",), "blocks.{}.attn.q_bias", query_third),
        Row(("encoder.layers.{}.self_attn.qkv.bias",), "blocks.{}.attn.k_bias", key_third),
        Row(("encoder.layers.{}.self_attn.qkv.bias",), "blocks.{}.attn.v_bias", value_third),
        Row(
            tuple("encoder.layers.{}.self_attn." + part + "_proj.weight" for part in QKV),
            "blocks.{}.attn.qkv.weight",
            join,
        ),
        *(Row(("encoder.layers.{}.self_attn." + p + "_proj.bias",), "blocks.{}.attn." + p + "_bias") for p in QKV),
        *both("encoder.layers.{}.self_attn.projection", "blocks.{}.attn.proj"),
        *both("encoder.layers.{}.layer_norm2", "blocks.{}.ln_2"),
        *both("encoder.layers.{}.mlp.fc1", "blocks.{}.fc1"),
        *both("encoder.layers.{}.mlp.fc2", "blocks.{}.fc2"),
    ],
    ignored={
        r"post_layernorm\..*": "that model's ln_vision",
        r"encoder\.layers\.\d+\.self_attn\.k_proj\.bias": "the key's bias, which changes nothing",
        r"(query_tokens|qformer|language_(model|projection)|embeddings\.((word|position)_embeddings|position_ids)"
        r"|(vision|text)_projection|itm_head)(\..*)?": "the other parts of that model",
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

STAGE2_FRESH = {
    r"vit\..*|llm\..*": "the frozen parts, loaded apart",
    r"qformer\.((word|position)_embedding\.weight|blocks\.\d+\.ffn_text\..*|lm_head\..*)": "the text branch, which "
    "checkpoints of stage 2 lack",
    r"(vision_proj|text_proj|itm_head)\..*|temperature": "heads of stage 1",
}

# The original's checkpoints. Only the fine-tuned ones hold their ViT; the others rely on its own file.
LAVIS_VITS = {
    name: Table(under("visual_encoder.", "", rows), ignored={r"(?!visual_encoder\.).*": "the other parts of that file"})
    for name, rows in (("eva-g", EVA_ROWS), ("clip-l", CLIP_BARE_ROWS))
}
LAVIS_IGNORED = {
    r"visual_encoder\..*": "its ViT",
    r"Qformer\.cls\.predictions\.decoder\..*": "tied to the word embeddings and to the bias",
    r"Qformer\.bert\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
}
LAVIS_STAGE1 = Table(
    [
        *LAVIS_QFORMER_ROWS,
        *both("ln_vision", "ln_vision"),
        *both("vision_proj", "vision_proj"),
        *both("text_proj", "text_proj"),
        *both("itm_head", "itm_head"),
        Row(("temp",), "temperature"),
    ],
    LAVIS_IGNORED,
    fresh={r"vit\..*": "the frozen ViT"},
)
LAVIS_STAGE2 = Table(
    [
        *LAVIS_QFORMER_ROWS,
        *both("ln_vision", "ln_vision"),
        *both("opt_proj", "llm_proj"),
        *both("t5_proj", "llm_proj"),
    ],
    LAVIS_IGNORED,
    STAGE2_FRESH,
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
    fresh=STAGE2_FRESH,
)

# And its Blip2ForImageTextRetrieval: a stage 1 without ITG.
HF_RETRIEVAL = Table(
    [
        Row(("query_tokens",), "qformer.queries"),
        Row(("embeddings.word_embeddings.weight",), "qformer.word_embedding.weight"),
        Row(("embeddings.position_embeddings.weight",), "qformer.position_embedding.weight"),
        *under("qformer.", "qformer.", HF_QFORMER.rows),
        *both("vision_model.post_layernorm", "ln_vision"),
        *both("vision_projection", "vision_proj"),
        *both("text_projection", "text_proj"),
        *both("itm_head", "itm_head"),
    ],
    ignored={
        r"vision_model\..*": "the frozen ViT",
        r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
    },
    fresh={
        r"vit\..*": "the frozen ViT",
        r"qformer\.lm_head\..*": "ITG's head, which this format lacks",
        "temperature": "ITC's temperature, which this format lacks",
    },
)
