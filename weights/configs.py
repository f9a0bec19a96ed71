"""config.json of public checkpoints <-> the configurations here, as field tables that work both ways."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.errors import UserError, expect, shorten
from engine.files import MAX_CONFIG, read_json
from llm import OPT, T5, Llama, LlamaConfig, OPTConfig, T5Config
from qformer import QFormerConfig
from sources.prompts import FORMATS
from sources.text import is_string
from vit import ACTIVATIONS, SIGLIP, ViTConfig
from weights.tables import CLIP, DINOV2, HF_BLIP2_VIT, LLAMA_TABLE, OPT_TABLE, T5_TABLE, Table

# Our field -> (their field, its default there).
Fields = dict[str, tuple[str, object]]

BASE_FIELDS: Fields = {  # the names that most of transformers' configurations share
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
}
DINOV2_FIELDS = BASE_FIELDS | {
    "patch_size": ("patch_size", 14),
    "image_size": ("image_size", 224),
    "act": ("hidden_act", "gelu"),
    "eps": ("layer_norm_eps", 1e-6),
}
CLIP_FIELDS = DINOV2_FIELDS | {
    "mlp": ("intermediate_size", 3072),
    "patch_size": ("patch_size", 32),
    "act": ("hidden_act", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5),
}
SIGLIP_FIELDS = DINOV2_FIELDS | {
    "mlp": ("intermediate_size", 3072),
    "patch_size": ("patch_size", 16),
    "act": ("hidden_act", "gelu_pytorch_tanh"),
}
BLIP2_VIT_FIELDS = CLIP_FIELDS | {
    "width": ("hidden_size", 1408),
    "depth": ("num_hidden_layers", 39),
    "heads": ("num_attention_heads", 16),
    "mlp": ("intermediate_size", 6144),
    "patch_size": ("patch_size", 14),
    "act": ("hidden_act", "gelu"),
    "eps": ("layer_norm_eps", 1e-6),
}
BERT_FIELDS = BASE_FIELDS | {
    "vocab_size": ("vocab_size", 30522),  # here with [DEC]
    "mlp": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "dropout": ("hidden_dropout_prob", 0.1),
    "eps": ("layer_norm_eps", 1e-12),
    "init_std": ("initializer_range", 0.02),
}
QFORMER_FIELDS = {name: row for name, row in BERT_FIELDS.items() if name != "init_std"} | {
    "image_width": ("encoder_hidden_size", 1408),
    "cross_every": ("cross_attention_frequency", 2),
}
BLIP2_FIELDS: Fields = {"num_queries": ("num_query_tokens", 32), "embed_dim": ("image_text_hidden_size", 256)}
OPT_FIELDS = BASE_FIELDS | {
    "vocab_size": ("vocab_size", 50272),
    "mlp": ("ffn_dim", 3072),
    "max_positions": ("max_position_embeddings", 2048),
    "embed_width": ("word_embed_proj_dim", None),
    "pre_norm": ("do_layer_norm_before", True),
}
T5_FIELDS: Fields = {
    "vocab_size": ("vocab_size", 32128),
    "width": ("d_model", 512),
    "depth": ("num_layers", 6),
    "decoder_depth": ("num_decoder_layers", None),
    "heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "mlp": ("d_ff", 2048),
    "buckets": ("relative_attention_num_buckets", 32),
    "max_distance": ("relative_attention_max_distance", 128),
    "eps": ("layer_norm_epsilon", 1e-6),
    "pad_id": ("pad_token_id", 0),
}
LLAMA_FIELDS = BASE_FIELDS | {
    "vocab_size": ("vocab_size", 32000),
    "width": ("hidden_size", 4096),
    "depth": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32),
    "kv_heads": ("num_key_value_heads", None),
    "head_width": ("head_dim", None),
    "mlp": ("intermediate_size", 11008),
    "max_positions": ("max_position_embeddings", 2048),
    "eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
ROPE_FIELDS: Fields = {  # of the type llama3
    "rope_factor": ("factor", "missing"),
    "rope_low": ("low_freq_factor", "missing"),
    "rope_high": ("high_freq_factor", "missing"),
    "rope_positions": ("original_max_position_embeddings", "missing"),
}


# What fields of ours may hold: a type, the least and the most; of a text its length. Any other is a size, and not what
# would be built for ever.
SIZE, NAMES = (int, 1, 10**7), {int: "a whole number", float: "a number", str: "a text of a length"}
SWITCHES = "cls_token ln_pre conv_bias key_bias align_corners pre_norm tied vit_trained text_branch conditioned".split()
STRINGS = "vit bert llm act llm_act prompt_format vit_sha256 llm_sha256 template prompt lacks".split()
LIMITS = {
    **dict.fromkeys(STRINGS, (str, 0, 4096)),
    **dict.fromkeys(SWITCHES, (bool, 0, 1)),
    **dict.fromkeys(("depth", "decoder_depth"), (int, 1, 1000)),
    **dict.fromkeys(("vocab_size", "pad_id"), (int, 0, 1 << 20)),
    **dict.fromkeys(("embed_dim", "num_queries"), (int, 1, 1 << 16)),
    **dict.fromkeys(("eps", "ln_vision_eps", "init_std"), (float, 0, 1)),
    **{"dropout": (float, 0, 0.999), "mlp_ratio": (float, 0.01, 100), "mean": (float, -1e3, 1e3)},
    **{"std": (float, 1e-6, 1e3), "rope_positions": (int, 1, 1 << 30), "rope_theta": (float, 1, 1e12)},
    **dict.fromkeys(("rope_factor", "rope_low", "rope_high"), (float, 1e-3, 1e6)),
}
CHOICES = {"act": tuple(ACTIVATIONS), "llm_act": ("gelu", "gelu_new"), **dict.fromkeys(SWITCHES, (True, False))}
CHOICES["prompt_format"] = tuple(FORMATS)
LISTS = {"mean": (3,), "std": (3,), "lacks": range(4)}  # how long they may be
IN_RUN = ("vit", "bert", "image_size", "embed_dim", "max_text_tokens", "ln_vision_eps")  # and "qformer"


def check_fields(values: dict, where: str | Path, names: Fields | None = None) -> None:
    """Refuse values that fields of ours cannot have. names: what the file calls them."""
    for ours, value in values.items():
        kind, low, high = LIMITS.get(ours, SIZE)
        is_list = isinstance(value, (list, tuple))
        each = value if is_list else [value]
        fits = is_list == (ours in LISTS) and len(each) in LISTS.get(ours, (1,))
        fits = fits and all(type(x) is kind or (type(x) is int and kind is float) for x in each)
        sizes = [len(x) if is_string(x) else -1 for x in each] if kind is str else each
        fits = fits and all(low <= x <= high for x in sizes)  # NaN is not
        fits = fits and value in CHOICES.get(ours, [value])
        name, got = (names or {}).get(ours, (ours,))[0], shorten(repr(value), 60)
        limits = f"{'a list, each ' * (ours in LISTS)}{NAMES.get(kind)} from {low:,} to {high:,}"
        expected = " or ".join(map(str, CHOICES.get(ours, [limits])))
        expect(fits, f"{where} has {name} {got}, expected {expected}: fetch it again")
    width, heads = values.get("width", 0), values.get("heads", 1)
    divides = "head_width" in values or width % heads == 0
    expect(divides, f"{where} has {heads} heads, into which its width of {width} does not divide: fetch it again")


def read_config(folder: Path, name: str = "config.json") -> dict:
    """config.json of a checkpoint folder, or another file like it."""
    path, merge = folder / name, "merge it into its own (merge_and_unload, save_pretrained), and pass that folder"
    adapter = not path.exists() and (folder / "adapter_config.json").exists()
    expect(not adapter, f"{folder} is an adapter of PEFT, which holds no model: {merge}")
    gguf = not path.exists() and any(folder.glob("*.gguf"))
    expect(not gguf, f"{folder} holds GGUF, expected config.json and weights in safetensors: fetch that release")
    return as_object(read_json(path, MAX_CONFIG), path)


def as_object(value, where: str | Path) -> dict:
    """A JSON object, or UserError."""
    expect(isinstance(value, dict), f"{where} holds a {type(value).__name__}, expected an object: fetch it again")
    return value


def read_fields(their: Fields, config: dict, where: str | Path) -> dict:
    """Their config.json, or a part of it, `where` -> keyword arguments of our configuration."""
    sizes = {ours: config.get(theirs, default) for ours, (theirs, default) in their.items()}
    check_fields({ours: x for ours, x in sizes.items() if (x, their[ours][1]) != (None, None)}, where, their)
    return sizes


def own_config(kind: type, values, where: str | Path):
    """A configuration of class `kind` as a run has it."""
    values = as_object(values, where).items()
    try:
        cfg = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})
    except TypeError as error:  # of names
        raise UserError(
            f"{where} does not fit ({shorten(str(error).partition('() ')[2])}): take it from the run again"
        ) from None
    check_fields(vars(cfg), where)
    return cfg


def check_run(config: dict, where: str | Path) -> tuple[QFormerConfig, ViTConfig | None]:
    """Refuse a run's config.json in which an entry lacks or cannot be -> its Q-Former, and its own ViT if any."""
    optional = {name: value for name, value in config.items() if name in LIMITS and value is not None}
    check_fields(optional | {name: config.get(name) for name in IN_RUN}, where)
    as_object(config.get("train") or {}, f"train in {where}")
    vit = config.get("vit_trained") and own_config(ViTConfig, config.get("vit_config"), f"vit_config in {where}")
    qformer, tokens = own_config(QFormerConfig, config.get("qformer"), f"qformer in {where}"), config["max_text_tokens"]
    longest = qformer.max_positions // 8 * 8  # `pad` rounds up to 8
    expect(3 <= tokens <= longest, f"{where} has max_text_tokens {tokens}, expected 3 to {longest}, its positions")
    return qformer, vit or None


def write_fields(fields: Fields, cfg) -> dict:
    """Our configuration -> entries of their config.json."""
    return {theirs: getattr(cfg, ours) for ours, (theirs, _) in fields.items()}


# --- readers ---------------------------------------------------------------------------------------------------------


def vit_config(folder: Path) -> tuple[ViTConfig, Table]:
    """Configuration, with its published depth, and key table of the encoder in a folder, alone or in a whole model."""
    config, where = read_config(folder), folder / "config.json"
    kind = config.get("model_type")
    if kind in ("clip", "siglip", "blip-2"):
        where = f"vision_config in {where}"
        config, kind = as_object(config.get("vision_config", {}), where), f"{kind.replace('-', '_')}_vision_model"
    if kind == "dinov2":
        sizes, table = read_fields(DINOV2_FIELDS, config, where), DINOV2
        check_fields({"mlp_ratio": config.get("mlp_ratio", 4)}, where)
        sizes["mlp"] = int(sizes["width"] * config.get("mlp_ratio", 4))
        if config.get("use_swiglu_ffn"):  # DINOv2-giant
            sizes |= dict(act="swiglu", mlp=(sizes["mlp"] * 2 // 3 + 7) // 8 * 8)
    elif kind == "clip_vision_model":
        sizes, table = read_fields(CLIP_FIELDS, config, where), CLIP
        sizes |= dict(ln_pre=True, conv_bias=False, align_corners=True)
    elif kind == "siglip_vision_model":
        sizes, table = read_fields(SIGLIP_FIELDS, config, where) | SIGLIP, CLIP
    elif kind == "blip_2_vision_model":
        sizes, table = read_fields(BLIP2_VIT_FIELDS, config, where), HF_BLIP2_VIT
        sizes |= dict(act="gelu", key_bias=False, depth=sizes["depth"] + 1)  # published without its last block
    else:
        naflex = kind in ("siglip2", "siglip2_vision_model")
        got = f"{where} is of a SigLIP 2 for images of any shape (NaFlex), expected one of a fixed size"
        expect(not naflex, f"{got}: use siglip2-base-patch16-224 or another whose name does not end in naflex")
        known = "dinov2, clip, clip_vision_model, siglip, siglip_vision_model, blip-2"
        raise UserError(f"{where} has model_type {shorten(repr(kind), 60)}, expected an image encoder: {known}")
    return ViTConfig(**sizes | image_norm(folder)), table


def image_norm(folder: Path) -> dict[str, tuple[float, ...]]:
    """The "mean" and "std" of the channels that an encoder's folder names, as far as it does; transformers 5 writes
    them into processor_config.json, older releases into preprocessor_config.json."""
    norm = {}
    for path in (folder / f"{name}config.json" for name in ("", "preprocessor_", "processor_")):
        config = read_config(folder, path.name) if path.exists() else {}
        config = as_object(config.get("image_processor") or config, f"image_processor in {path}")
        for ours in ("mean", "std"):
            if (value := config.get(f"image_{ours}")) is not None:
                value = [value] * 3 if isinstance(value, (int, float)) else value
                check_fields({ours: value}, path, {ours: (f"image_{ours}",)})
                norm[ours] = tuple(value)
    return norm


def bert_config(folder: Path) -> dict:
    """The fields of QFormerConfig that a BERT folder decides."""
    config = read_config(folder)
    kind, act = (shorten(repr(config.get(key, "gelu")), 60) for key in ("model_type", "hidden_act"))
    got = f"{folder}/config.json has model_type {kind} and hidden_act {act}, expected bert and gelu"
    expect((kind, act) == ("'bert'", "'gelu'"), f"{got}: use bert-base-uncased or one like it")
    sizes = read_fields(BERT_FIELDS, config, folder / "config.json")
    return sizes | {"vocab_size": sizes["vocab_size"] + 1}  # [DEC]


def hf_qformer_config(config: dict, retrieval: bool) -> tuple[QFormerConfig, int]:
    """The Q-Former of a transformers BLIP-2, and the width of the space in which ITC compares."""
    part, own = (
        as_object(config.get("qformer_config", {}), "qformer_config"),
        read_fields(BLIP2_FIELDS, config, "config.json"),
    )
    sizes = read_fields(QFORMER_FIELDS, part, "qformer_config")
    sizes["vocab_size"] += not retrieval  # [DEC], which is counted where words are read
    return QFormerConfig(**sizes, num_queries=own["num_queries"]), own["embed_dim"]


# --- language models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LLMFamily:
    """A language model and its public formats."""

    kind: type[nn.Module]  # its class in llm.py
    read: Callable[[dict, str], object]  # its config.json, and where it is -> its configuration
    table: Table
    hf_prefix: str | None = None  # before its keys in transformers' BLIP-2 classes; None: they have no place for it
    lavis_proj: str | None = None  # the projection to it in LAVIS; None likewise


def opt_config(config: dict, where: str) -> OPTConfig:
    """The configuration of an OPT."""
    plain = config.get("activation_function", "relu") == "relu" and config.get("enable_bias", True)
    expect(plain, f"{where} is of an OPT without ReLU or biases, expected one of facebook/opt-*")
    sizes = read_fields(OPT_FIELDS, config, where)
    return OPTConfig(**sizes | {"embed_width": sizes["embed_width"] or sizes["width"]})


def t5_config(config: dict, where: str) -> T5Config:
    """The configuration of a T5 v1.1. A v1.0 scales the input of its head, and has no gates. "gated-gelu" has always
    meant the one by tanh."""
    scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    gates = str(config.get("feed_forward_proj"))
    act = config.get("dense_act_fn") or {"gated-gelu": "gelu_new"}.get(gates)
    v1_1 = not scales and gates.startswith("gated") and act in ("gelu", "gelu_new")
    expect(v1_1, f"{where} is of a T5 v1.0, expected google/t5-v1_1-* or google/flan-t5-*")
    sizes = read_fields(T5_FIELDS, config, where)
    return T5Config(**sizes | {"decoder_depth": sizes["decoder_depth"] or sizes["depth"]}, act=act)


def llama_config(config: dict, where: str) -> LlamaConfig:
    """The configuration of a model of the Llama family. transformers 5 writes rope_parameters, older releases
    rope_theta and rope_scaling."""
    kind = config.get("model_type")
    odd = config.get("hidden_act", "silu") != "silu" or config.get("attention_bias") or config.get("mlp_bias")
    expect(not odd, f"{where} has an activation other than SiLU, or biases beside Qwen2's: expected a {kind} without")
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    scaling = as_object(config.get("rope_parameters") or config.get("rope_scaling") or {}, f"the RoPE of {where}")
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    known = f"{where} has RoPE of the type {shorten(repr(rope), 60)}, expected default or llama3"
    expect(rope in ("default", "llama3"), f"{known}: take a model of these, or its release without long context")
    sizes = read_fields(LLAMA_FIELDS, config, where)
    check_fields({"max_positions": window or 1}, where, {"max_positions": ("sliding_window",)})
    sizes["max_positions"] = min(sizes["max_positions"], window or sizes["max_positions"])  # within it all see all
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    got = f"{where} has {sizes['heads']} heads and {sizes['kv_heads']} of keys"
    expect(sizes["heads"] % sizes["kv_heads"] == 0, f"{got}, expected a divisor: fetch it again")
    sizes["head_width"] = sizes["head_width"] or sizes["width"] // sizes["heads"]
    even = f"{where} has heads of width {sizes['head_width']}, expected an even one, for RoPE: fetch it again"
    expect(sizes["head_width"] % 2 == 0, even)
    sizes["rope_theta"] = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    check_fields({"rope_theta": sizes["rope_theta"]}, where)
    sizes |= read_fields(ROPE_FIELDS, scaling, f"the RoPE of {where}") if rope == "llama3" else {}
    cfg = LlamaConfig(**sizes, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")
    got = f"the RoPE of {where} has low_freq_factor {cfg.rope_low} and high_freq_factor {cfg.rope_high}"
    expect(cfg.rope_low < cfg.rope_high, f"{got}, expected a lower low one: fetch it again")
    return cfg


# By the model_type in config.json; where a language model is entered, see docs/faq.md.
LLMS = {
    "opt": LLMFamily(OPT, opt_config, OPT_TABLE, "language_model.model.decoder.", "opt_proj"),
    "t5": LLMFamily(T5, t5_config, T5_TABLE, "language_model.", "t5_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLMFamily(Llama, llama_config, LLAMA_TABLE)),
}


def llm_config(spec: str) -> tuple[object, LLMFamily]:
    """Configuration and family of what `--llm` names: a preset, a folder, or the language model of a BLIP-2."""
    if os.path.isdir(spec):
        return read_llm_config(Path(spec))
    presets = {name: (cfg, family) for family in LLMS.values() for name, cfg in family.kind.presets.items()}
    names, is_file = f"a name ({', '.join(presets)})", os.path.exists(spec)
    got = f"--llm {spec} {'is a file' if is_file else 'does not exist'}"
    expect(spec in presets, f"{got}: expected a folder, or {names} for random weights")
    return presets[spec]


def read_llm_config(folder: Path) -> tuple[object, LLMFamily]:
    """A language model's config.json, or that of a BLIP-2, which has it inside."""
    config, where = read_config(folder), f"{folder}/config.json"
    if config.get("model_type") == "blip-2":
        where = f"text_config in {where}"
        config = as_object(config.get("text_config") or {}, where)
    kind = config.get("model_type")
    known = f"a language model of a known type: {', '.join(LLMS)}"
    expect(kind in list(LLMS), f"{where} has model_type {shorten(repr(kind), 60)}, expected {known}")
    quantized = f"{where} has a quantization_config: expected weights in fp32, bf16 or fp16, fetch those"
    expect(not config.get("quantization_config"), quantized)
    return LLMS[kind].read(config, where), LLMS[kind]


def family_of(llm: nn.Module) -> LLMFamily:
    """The family of a language model."""
    return next(family for family in LLMS.values() if family.kind is type(llm))


# --- writers ---------------------------------------------------------------------------------------------------------


def hf_config(model) -> dict:
    """transformers' Blip2Config of a `Blip2`, without the language model. The ViT's position table is exported for the
    image size that the model takes. UserError for an encoder that they cannot hold."""
    vit, qformer, retrieval = model.vit.cfg, model.qformer.cfg, model.llm is None
    has = {"a norm before its blocks (CLIP)": vit.ln_pre, "no [CLS] (SigLIP)": not vit.cls_token}
    has |= {"gates in its feed-forwards (DINOv2-giant)": vit.act == "swiglu"}
    if odd := [what for what, is_so in has.items() if is_so]:
        got = f"{model.sources['vit'].spec} has {' and '.join(odd)}, which transformers' BLIP-2 classes cannot hold"
        raise UserError(f"{got}: export with --format {'lavis' if vit.ln_pre else 'run'}")
    return {
        "architectures": ["Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": qformer.num_queries,
        "image_text_hidden_size": model.embed_dim,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            **write_fields(BLIP2_VIT_FIELDS, vit),
            "image_size": model.image_size,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **write_fields(QFORMER_FIELDS, qformer),
            "vocab_size": qformer.vocab_size - (not retrieval),
            "attention_probs_dropout_prob": qformer.dropout,
            "use_qformer_text_input": retrieval,
        },
    }
