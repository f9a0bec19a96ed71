"""Small checkpoints in the published formats, with random weights: transformers' BLIP-2 folders, LAVIS's files."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import LLMS, ROOT, roughen
from torch import Tensor

from llm import OPT, T5
from sources.text import LLMTokenizer
from vit import ViTConfig

transformers = pytest.importorskip("transformers")

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
QFORMER = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=16)
CLASSES = {"opt": "Blip2ForConditionalGeneration", "t5": "Blip2ForConditionalGeneration"} | {
    "retrieval": "Blip2ForImageTextRetrieval"
}
T5_V1_1 = {"dense_act_fn": "gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False}

# --- transformers ----------------------------------------------------------------------------------------------------


def random_blip2(kind: str, folder: Path, image_token: bool = True, image_size: int = 28) -> torch.nn.Module:
    """A small BLIP-2 of transformers, saved into the folder: with "opt", with "t5", or for "retrieval".

    image_token: is there a row of word embeddings for it? Newer releases have one.
    """
    torch.manual_seed(0)
    tokenizer, text, qformer = ROOT / LLMS.get(kind, "assets/tiny/bert") / "tokenizer.json", None, {"vocab_size": 40}
    if kind == "retrieval":
        words = len(json.loads(tokenizer.read_text())["model"]["vocab"]) + 1  # [DEC]
        qformer = {"vocab_size": words, "use_qformer_text_input": True}
    else:
        words = LLMTokenizer(ROOT / LLMS[kind], {"opt": OPT, "t5": T5}[kind].prompt_format).vocab_size + image_token
    if kind == "opt":
        text = transformers.OPTConfig(
            vocab_size=words, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=80,
        ).to_dict()  # fmt: skip
    elif kind == "t5":
        text = transformers.T5Config(
            vocab_size=words, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0,
        ).to_dict() | T5_V1_1  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=VISION | {"image_size": image_size},
        qformer_config=QFORMER | qformer,
        text_config=text,
        num_query_tokens=3,
        image_text_hidden_size=6,
        image_token_index=words - 1 if image_token and text else None,
    )
    model = roughen(getattr(transformers, CLASSES[kind])(config), 1).eval()
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[16:32] = 0  # EVA-CLIP has no bias of the keys
        if text:  # so that the text depends on the image
            model.language_projection.weight.mul_(20)
            for parameter in model.language_model.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    if kind == "t5":  # transformers 5 saves v1.1 and v1.0 alike
        edit_config(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | T5_V1_1)
    shutil.copy(tokenizer, folder)
    return model


@pytest.fixture(scope="session", name="public")
def public_blip2(tmp_path_factory):
    """public(kind) -> a random BLIP-2 of transformers, and its folder, read-only."""

    @cache
    def build(kind: str, **options):
        folder = tmp_path_factory.mktemp(kind)
        return random_blip2(kind, folder, **options), folder

    return build


def edit_config(folder: Path, **entries) -> None:
    """Replace entries of a folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- LAVIS: the names in its files, spelled out ----------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
TIED = {  # written twice
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
COUNTER = "Qformer.bert.embeddings.position_ids"  # 0, 1, 2, ...


def linear(name: str, rows: int, columns: int) -> Shapes:
    """A Linear's parameters."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Shapes:
    """A LayerNorm's parameters."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva_shapes(cfg: ViTConfig) -> Shapes:
    """eva_vit_g.pth, of `cfg.depth` blocks, without its final norm and head."""
    V, P = cfg.width, (cfg.image_size // cfg.patch_size) ** 2 + 1
    shapes = {"cls_token": (1, 1, V), "pos_embed": (1, P, V)}
    shapes |= {"patch_embed.proj.weight": (V, 3, cfg.patch_size, cfg.patch_size), "patch_embed.proj.bias": (V,)}
    for block in range(cfg.depth):
        at = f"blocks.{block}"
        shapes |= norm(f"{at}.norm1", V) | norm(f"{at}.norm2", V) | linear(f"{at}.attn.proj", V, V)
        shapes |= {f"{at}.attn.qkv.weight": (3 * V, V), f"{at}.attn.q_bias": (V,), f"{at}.attn.v_bias": (V,)}
        shapes |= linear(f"{at}.mlp.fc1", cfg.mlp, V) | linear(f"{at}.mlp.fc2", V, cfg.mlp)
    return shapes


def clip_shapes(cfg: ViTConfig) -> Shapes:
    """clip_vit_L.pth, of `cfg.depth` blocks, without its final norm and projection."""
    V, P = cfg.width, (cfg.image_size // cfg.patch_size) ** 2 + 1
    shapes = {"class_embedding": (V,), "positional_embedding": (P, V), **norm("ln_pre", V)}
    shapes |= {"conv1.weight": (V, 3, cfg.patch_size, cfg.patch_size)}
    for block in range(cfg.depth):
        at = f"transformer.resblocks.{block}"
        shapes |= norm(f"{at}.ln_1", V) | norm(f"{at}.ln_2", V) | linear(f"{at}.attn.out_proj", V, V)
        shapes |= {f"{at}.attn.in_proj_weight": (3 * V, V), f"{at}.attn.in_proj_bias": (3 * V,)}
        shapes |= linear(f"{at}.mlp.c_fc", cfg.mlp, V) | linear(f"{at}.mlp.c_proj", V, cfg.mlp)
    return shapes


def lavis_shapes(
    stage: int, image_width: int, width: int, depth: int, mlp: int, words: int, positions: int, queries: int, embed: int
) -> Shapes:
    """A LAVIS checkpoint without its ViT and its projection to a language model: blip2_pretrained.pth in stage 1; in
    stage 2 without the text branch and the heads. `words` counts [DEC]."""
    D, bert = width, "Qformer.bert"
    shapes = {"query_tokens": (1, queries, D), COUNTER: (1, positions)}
    shapes |= norm("ln_vision", image_width) | norm(f"{bert}.embeddings.LayerNorm", D)
    for block in range(depth):
        at = f"{bert}.encoder.layer.{block}"
        for attention in ["attention", "crossattention"] if block % 2 == 0 else ["attention"]:
            into = image_width if attention == "crossattention" else D
            shapes |= linear(f"{at}.{attention}.self.query", D, D)
            shapes |= linear(f"{at}.{attention}.self.key", D, into) | linear(f"{at}.{attention}.self.value", D, into)
            shapes |= linear(f"{at}.{attention}.output.dense", D, D) | norm(f"{at}.{attention}.output.LayerNorm", D)
        for branch in ["", "_query"] if stage == 1 else ["_query"]:
            shapes |= linear(f"{at}.intermediate{branch}.dense", mlp, D) | linear(f"{at}.output{branch}.dense", D, mlp)
            shapes |= norm(f"{at}.output{branch}.LayerNorm", D)
    if stage == 1:
        head = "Qformer.cls.predictions"
        shapes |= {f"{bert}.embeddings.word_embeddings.weight": (words, D), f"{head}.bias": (words,)}
        shapes |= {f"{bert}.embeddings.position_embeddings.weight": (positions, D), "temp": ()}
        shapes |= linear(f"{head}.transform.dense", D, D) | norm(f"{head}.transform.LayerNorm", D)
        shapes |= linear(f"{head}.decoder", words, D)
        shapes |= linear("vision_proj", embed, D) | linear("text_proj", embed, D) | linear("itm_head", 2, D)
    return shapes


def random_tensors(shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    """Random values; what LAVIS ties is tied."""
    tensors = {prefix + name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {name: tensors[source].clone() for name, source in TIED.items() if name in tensors}
    if COUNTER in tensors:
        tensors[COUNTER] = torch.arange(tensors[COUNTER].shape[1])[None]
    return tensors


TINY_BERT = dict(width=128, depth=4, mlp=512, words=127, positions=64)  # assets/tiny/bert, with [DEC]
ENCODERS = {  # small encoders of the two architectures that LAVIS has
    "eva-g": ViTConfig(16, depth=2, heads=2, mlp=24, patch_size=4, image_size=8, key_bias=False),
    "clip-l": ViTConfig(
        12, 2, 2, 24, 4, 8, act="quick_gelu", eps=1e-5, ln_pre=True, conv_bias=False, align_corners=True
    ),
}
ENCODER_SHAPES = {"eva-g": eva_shapes, "clip-l": clip_shapes}


def lavis_checkpoint(
    path: Path, stage: int, vit: str | None, llm: str = "", llm_width: int = 128, image_width: int = 16
) -> dict[str, Tensor]:
    """A small LAVIS checkpoint, saved -> its tensors. It holds a fine-tuned ViT of architecture `vit`, or none (then
    `image_width` is that of the one it was trained over); in stage 2 the projection to "opt" or "t5"."""
    width = ENCODERS[vit].width if vit else image_width
    tensors = random_tensors(lavis_shapes(stage, width, queries=3, embed=6, **TINY_BERT))
    if vit:
        tensors |= random_tensors(ENCODER_SHAPES[vit](ENCODERS[vit]), "visual_encoder.")
    if stage == 2:
        tensors |= random_tensors(linear(f"{llm}_proj", llm_width, TINY_BERT["width"]))
    torch.save({"model": tensors}, path)
    return tensors
