"""Public checkpoint formats as key tables: which of their keys becomes which of ours.

`{}` stands for a block's number. A row may apply a transform, which is undone on export. Unused keys are ignored and
missing ones newly initialized, each with a stated reason. load.py reads these; another format is one more.

    encoders    EVA-CLIP ViT-g (bare file), CLIP (LAVIS's bare file or transformers' folder), SigLIP, DINOv2, BLIP-2's
    text        BERT and models of its layout (MiniLM, ...); OPT; the Llama family; T5 v1.1 and Flan-T5
    BLIP-2      LAVIS checkpoints of both stages; transformers' folders, with a language model or for retrieval
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# --- rows and transforms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """Their tensors -> ours, and back: our tensor and the number of their keys -> their tensors.

    third: of a fused bias, which third `read` takes; on export the rows of one fused bias fill their thirds.
    """

    read: Callable[..., Tensor]
    write: Callable[[Tensor, int], Sequence[Tensor]] | None = None
    third: int | None = None


def append_random_row(embedding: Tensor) -> Tensor:
    """A drawn row for [DEC] after BERT's words."""
    row = torch.empty_like(embedding[:1])
    row.normal_(0, 0.02)
    return torch.cat((embedding, row))


def fold_scale(tensor: Tensor, scale: Tensor) -> Tensor:
    """DINOv2's LayerScale, a factor per output of the Linear before it, folded into its weight or bias."""
    return tensor * scale.view(-1, *[1] * (tensor.dim() - 1))


IDENTITY = Transform(lambda tensor: tensor, lambda tensor, _: [tensor])
JOIN = Transform(lambda *tensors: torch.cat(tensors), lambda tensor, keys: tensor.chunk(keys))  # q, k, v -> one Linear
LEAD_1 = Transform(lambda tensor: tensor[None], lambda tensor, _: [tensor[0]])  # (P, V) -> (1, P, V)
LEAD_1_1 = Transform(lambda tensor: tensor.view(1, 1, -1), lambda tensor, _: [tensor.view(-1)])  # (V,) -> (1, 1, V)
# BERT adds its token-type row 0 to every text: add it to the position table (LAVIS drops it).
ADD_TYPE_0 = Transform(lambda table, types: table + types[0], lambda table, _: [table, torch.zeros(2, table.shape[1])])
APPEND_RANDOM_ROW = Transform(append_random_row, lambda embedding, _: [embedding[:-1]])
APPEND_ZERO = Transform(lambda bias: nn.functional.pad(bias, (0, 1)), lambda bias, _: [bias[:-1]])  # of [DEC]
FOLD_SCALE = Transform(fold_scale, lambda tensor, _: [tensor, tensor.new_ones(len(tensor))])  # stays folded on export


@dataclass(frozen=True)
class Row:
    """Their keys (one, or several that are combined) -> our key."""

    theirs: tuple[str, ...]
    ours: str
    transform: Transform = IDENTITY


@dataclass(frozen=True)
class Table:
    """One public format. Of several rows for one of our keys, the first whose sources all exist counts."""

    rows: list[Row]
    ignored: dict[str, str] = field(default_factory=dict)  # regular expression of their keys -> why
    fresh: dict[str, str] = field(default_factory=dict)  # regular expression of our keys -> why
    renames: dict[str, str] = field(default_factory=dict)  # regular expression -> replacement, on their keys, first


def both(theirs: str, ours: str) -> list[Row]:
    """Rows for the weight and the bias of a Linear or a norm."""
    return [Row((f"{theirs}.{kind}",), f"{ours}.{kind}") for kind in ("weight", "bias")]


def joined(theirs: str, parts: tuple[str, ...], ours: str, kinds: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    """Rows for several Linears that are one here; `{part}` in `theirs` stands for the parts."""
    names = [theirs.replace("{part}", part) for part in parts]
    return [Row(tuple(f"{name}.{kind}" for name in names), f"{ours}.{kind}", JOIN) for kind in kinds]


def under(prefix_theirs: str, prefix_ours: str, rows: list[Row]) -> list[Row]:
    """The same rows with a prefix on both sides."""
    return [Row(tuple(prefix_theirs + k for k in row.theirs), prefix_ours + row.ours, row.transform) for row in rows]


# --- the tables: image encoders --------------------------------------------------------------------------------------

QKV, BERT_PARTS = ("q", "k", "v"), ("query", "key", "value")


def thirds(theirs: str) -> list[Row]:
    """Rows for an encoder's biases of q, k and v, which are one there."""
    return [
        Row((theirs,), f"blocks.{{}}.attn.{part}_bias", Transform(lambda bias, i=i: bias.chunk(3)[i], third=i))
        for i, part in enumerate(QKV)
    ]


def split_qkv(theirs: str, parts: tuple[str, ...] = QKV) -> list[Row]:
    """Rows for an encoder's q, k and v, which are a Linear each there; `{part}` in `theirs` stands for the parts."""
    names = [theirs.replace("{part}", part) for part in parts]
    biases = [Row((f"{name}.bias",), f"blocks.{{}}.attn.{part}_bias") for name, part in zip(names, QKV)]
    return [*joined(theirs, parts, "blocks.{}.attn.qkv", ("weight",)), *biases]


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
    Row(("class_embedding",), "cls_token", LEAD_1_1),
    Row(("positional_embedding",), "pos_embed", LEAD_1),
    Row(("conv1.weight",), "patch_embed.weight"),
    *both("ln_pre", "ln_pre"),
    *both("transformer.resblocks.{}.ln_1", "blocks.{}.ln_1"),
    Row(("transformer.resblocks.{}.attn.in_proj_weight",), "blocks.{}.attn.qkv.weight"),
    *thirds("transformer.resblocks.{}.attn.in_proj_bias"),
    *both("transformer.resblocks.{}.attn.out_proj", "blocks.{}.attn.proj"),
    *both("transformer.resblocks.{}.ln_2", "blocks.{}.ln_2"),
    *both("transformer.resblocks.{}.mlp.c_fc", "blocks.{}.fc1"),
    *both("transformer.resblocks.{}.mlp.c_proj", "blocks.{}.fc2"),
]
CLIP_BARE = Table(CLIP_BARE_ROWS, ignored={r"ln_post\..*|proj": "the final norm and projection, unused"})


def hf_encoder_rows(projection: str) -> list[Row]:
    """Rows of a transformers CLIP-like encoder block, whose attention ends in a Linear of this name."""
    return [
        *both("encoder.layers.{}.layer_norm1", "blocks.{}.ln_1"),
        *split_qkv("encoder.layers.{}.self_attn.{part}_proj"),
        *both(f"encoder.layers.{{}}.self_attn.{projection}", "blocks.{}.attn.proj"),
        *both("encoder.layers.{}.layer_norm2", "blocks.{}.ln_2"),
        *both("encoder.layers.{}.mlp.fc1", "blocks.{}.fc1"),
        *both("encoder.layers.{}.mlp.fc2", "blocks.{}.fc2"),
    ]


CLIP = Table(  # and SigLIP, which has no [CLS] and no norm before the blocks, but a bias of the patches
    [
        Row(("embeddings.class_embedding",), "cls_token", LEAD_1_1),
        Row(("embeddings.position_embedding.weight",), "pos_embed", LEAD_1),
        *both("embeddings.patch_embedding", "patch_embed"),
        *both("pre_layrnorm", "ln_pre"),  # transformers' own spelling
        *hf_encoder_rows("out_proj"),
    ],
    ignored={
        r"(post_layernorm|head)\..*": "the final norm and pooling, unused",
        r"text_model\..*|text_projection\..*|visual_projection\..*|logit_(scale|bias)": "the text side and projections",
        r".*position_ids": "a buffer that counts 0, 1, 2, ...",
    },
    renames={r"^vision_model\.": ""},
)

# Both towers, all blocks and the projections: tasks/clip.py.
CLIP_TOWERS = Table(
    [
        *under("vision_model.", "vit.", CLIP.rows),
        *both("vision_model.post_layernorm", "vision_norm"),
        Row(("visual_projection.weight",), "vision_proj.weight"),
        *(
            Row((f"text_model.embeddings.{part}_embedding.weight",), f"text.{part}_embedding.weight")
            for part in ("token", "position")
        ),
        *under("text_model.", "text.", hf_encoder_rows("out_proj")),
        *both("text_model.final_layer_norm", "text.norm"),
        Row(("text_projection.weight",), "text.proj.weight"),
    ],
    ignored={"logit_scale": "the temperature, which changes no order", r".*position_ids": "a buffer that counts"},
)

DINOV2 = Table(
    [
        Row(("embeddings.cls_token",), "cls_token"),
        Row(("embeddings.position_embeddings",), "pos_embed"),
        *both("embeddings.patch_embeddings.projection", "patch_embed"),
        *both("encoder.layer.{}.norm1", "blocks.{}.ln_1"),
        *split_qkv("encoder.layer.{}.attention.attention.{part}", BERT_PARTS),
        *(
            Row((*row.theirs, f"encoder.layer.{{}}.layer_scale{i}.lambda1"), row.ours, FOLD_SCALE)
            for i, theirs, ours in ((1, "attention.output.dense", "attn.proj"), (2, "mlp.fc2", "fc2"))
            for row in both("encoder.layer.{}." + theirs, "blocks.{}." + ours)
        ),
        *both("encoder.layer.{}.norm2", "blocks.{}.ln_2"),
        *both("encoder.layer.{}.mlp.fc1", "blocks.{}.fc1"),
    ],
    ignored={r"layernorm\..*": "the final norm, unused", "embeddings.mask_token": "used in DINOv2's own training only"},
    renames={r"^dinov2\.": "", r"\.weights_in\.": ".fc1.", r"\.weights_out\.": ".fc2."},  # the giant's SwiGLU
)

# The encoder of transformers' BLIP-2 (EVA-CLIP without its last block). The key's third of the bias is zero, and would
# change nothing: it adds the same to every key's score. q, k and v are one Linear, in some releases three.
HF_BLIP2_VIT = Table(
    [
        Row(("embeddings.class_embedding",), "cls_token"),
        Row(("embeddings.position_embedding",), "pos_embed"),
        *both("embeddings.patch_embedding", "patch_embed"),
        Row(("encoder.layers.{}.self_attn.qkv.weight",), "blocks.{}.attn.qkv.weight"),
        *thirds("encoder.layers.{}.self_attn.qkv.bias"),
        *hf_encoder_rows("projection"),
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


def bert_block(layer: str, attention: str, cross: bool) -> list[Row]:
    """Rows of one Q-Former block in BERT's names; `attention` is "self" (BERT, LAVIS) or "attention" (transformers)."""
    rows = [
        *joined(f"attention.{attention}.{{part}}", BERT_PARTS, "attn.qkv"),
        *both("attention.output.dense", "attn.proj"),
        *both("attention.output.LayerNorm", "attn.ln"),
        *both("intermediate.dense", "ffn_text.up"),
        *both("output.dense", "ffn_text.down"),
        *both("output.LayerNorm", "ffn_text.ln"),
    ]
    if cross:
        rows += [
            *both(f"crossattention.{attention}.query", "cross.q"),
            *joined(f"crossattention.{attention}.{{part}}", BERT_PARTS[1:], "cross.kv"),
            *both("crossattention.output.dense", "cross.proj"),
            *both("crossattention.output.LayerNorm", "cross.ln"),
            *both("intermediate_query.dense", "ffn_query.up"),
            *both("output_query.dense", "ffn_query.down"),
            *both("output_query.LayerNorm", "ffn_query.ln"),
        ]
    return under(f"{layer}.{{}}.", "blocks.{}.", rows)


BERT = Table(
    [
        Row(("embeddings.word_embeddings.weight",), "word_embedding.weight", APPEND_RANDOM_ROW),
        Row(
            ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"),
            "position_embedding.weight",
            ADD_TYPE_0,
        ),
        *both("embeddings.LayerNorm", "embedding_ln"),
        *bert_block("encoder.layer", "self", cross=False),
        *both("cls.predictions.transform.dense", "lm_head.dense"),
        *both("cls.predictions.transform.LayerNorm", "lm_head.ln"),
        Row(("cls.predictions.bias",), "lm_head.bias", APPEND_ZERO),
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
    Row(("Qformer.bert.embeddings.word_embeddings.weight",), "qformer.word_embedding.weight"),
    Row(("Qformer.bert.embeddings.position_embeddings.weight",), "qformer.position_embedding.weight"),
    *both("Qformer.bert.embeddings.LayerNorm", "qformer.embedding_ln"),
    *under("Qformer.bert.", "qformer.", bert_block("encoder.layer", "self", cross=True)),
    *both("Qformer.cls.predictions.transform.dense", "qformer.lm_head.dense"),
    *both("Qformer.cls.predictions.transform.LayerNorm", "qformer.lm_head.ln"),
    Row(("Qformer.cls.predictions.bias",), "qformer.lm_head.bias"),
]

STAGE2_FRESH = {
    r"vit\..*|llm\..*": "the frozen parts, loaded apart",
    r"qformer\.((word|position)_embedding\.weight|blocks\.\d+\.ffn_text\..*|lm_head\..*)": "the text branch, which "
    "checkpoints of stage 2 lack",
    r"(vision_proj|text_proj|itm_head)\..*|temperature": "heads of stage 1",
}

# LAVIS checkpoints. Only fine-tuned ones hold their ViT; the others rely on its own file.
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
        *(row for name in ("ln_vision", "vision_proj", "text_proj", "itm_head") for row in both(name, name)),
        Row(("temp",), "temperature"),
    ],
    LAVIS_IGNORED,
    fresh={r"vit\..*": "the frozen ViT"},
)
LAVIS_STAGE2 = Table(
    [*LAVIS_QFORMER_ROWS, *both("ln_vision", "ln_vision"), *both("opt_proj", "llm_proj"), *both("t5_proj", "llm_proj")],
    LAVIS_IGNORED,
    STAGE2_FRESH,
)

# transformers' Blip2QFormerModel, with the embeddings that its retrieval class keeps beside it.
HF_QFORMER = Table(
    [*both("layernorm", "embedding_ln"), *bert_block("encoder.layer", "attention", cross=True)],
    fresh={
        r"queries|(word|position)_embedding\.weight": "kept outside of this class there",
        r"lm_head\..*": "dropped when the public files were converted",
    },
)

# --- the tables: language models -------------------------------------------------------------------------------------

# A language model is in a folder of its own, or under `language_model.` in transformers' BLIP-2.
NOT_THE_LLM = {r"(vision_model|query_tokens|qformer|language_projection)(\..*)?": "the other parts of that model"}

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
    ignored={r"lm_head\.weight": "tied to the word embeddings"} | NOT_THE_LLM,
    renames={r"^language_model\.": "", r"^(model\.)?decoder\.": ""},
)


LLAMA_TABLE = Table(
    [
        Row(("embed_tokens.weight",), "word_embedding.weight"),
        Row(("norm.weight",), "ln_final.weight"),
        Row(("lm_head.weight",), "lm_head.weight"),
        Row(("embed_tokens.weight",), "lm_head.weight"),  # a file without a head has it tied
        *under("layers.{}.", "blocks.{}.", [
            Row(("input_layernorm.weight",), "ln_1.weight"),
            Row(("post_attention_layernorm.weight",), "ln_2.weight"),
            *both("self_attn.q_proj", "q"),
            *joined("self_attn.{part}_proj", QKV[1:], "kv"),
            *(Row((f"self_attn.{part}_norm.weight",), f"{part}_norm.weight") for part in QKV[:2]),
            Row(("self_attn.o_proj.weight",), "proj.weight"),
            *(Row((f"mlp.{part}_proj.weight",), f"{part}.weight") for part in ("gate", "up", "down")),
        ]),
    ],
    ignored={
        r"lm_head\.weight": "tied to the word embeddings",
        r".*rotary_emb\.inv_freq": "the frequencies of RoPE, which are computed",
        **NOT_THE_LLM,
    },
    renames={r"^language_model\.": "", r"^model\.": ""},
)  # fmt: skip


def t5_stack(stack: str, feed_forward: int) -> list[Row]:
    """Rows of T5's encoder or decoder, whose feed-forward is the layer of that number in each of their blocks."""
    layer, ffn = f"{stack}.block.{{}}.layer.", f"{feed_forward}.DenseReluDense."
    names = {"ln_1": "0.layer_norm", "ln_cross": "1.layer_norm", "ln_2": f"{feed_forward}.layer_norm"}
    names |= {"gate": ffn + "wi_0", "up": ffn + "wi_1", "down": ffn + "wo"}
    names |= {"attn.q": "0.SelfAttention.q", "attn.proj": "0.SelfAttention.o"}
    names |= {"cross.q": "1.EncDecAttention.q", "cross.proj": "1.EncDecAttention.o"}
    return [
        Row((f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",), "position_bias.weight"),
        Row((f"{stack}.final_layer_norm.weight",), "ln_final.weight"),
        *(Row((f"{layer}{theirs}.weight",), f"blocks.{{}}.{ours}.weight") for ours, theirs in names.items()),
        *joined(layer + "0.SelfAttention.{part}", QKV[1:], "blocks.{}.attn.kv", ("weight",)),
        *joined(layer + "1.EncDecAttention.{part}", QKV[1:], "blocks.{}.cross.kv", ("weight",)),
    ]


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
        **NOT_THE_LLM,
    },
    renames={r"^language_model\.": ""},
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
    ignored={r"vision_model\..*": "the frozen ViT", r"embeddings\.position_ids": "a buffer that counts 0, 1, 2, ..."},
    fresh={
        r"vit\..*": "the frozen ViT",
        r"qformer\.lm_head\..*": "ITG's head, which this format lacks",
        "temperature": "ITC's temperature, which this format lacks",
    },
)
