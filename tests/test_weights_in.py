"""Every public checkpoint opens: encoders, BERT, language models, LAVIS's and transformers' BLIP-2, and our own runs.

Opened, it computes what its own library computes. Loading is strict: each key is used or ignored for a reason, each
parameter filled or newly initialized for a reason; what does not fit is one error that lists every problem, and changes
nothing.
"""

import argparse
import copy
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LLMS, ROOT, copy_of, roughen, small_model, small_qformer
from public_checkpoints import (
    CLASSES,
    COUNTER,
    ENCODERS,
    T5_V1_1,
    TIED,
    clip_shapes,
    edit_config,
    eva_shapes,
    lavis_checkpoint,
    lavis_shapes,
    norm,
    public_blip2,  # noqa: F401  the fixture `public`
    random_tensors,
)
from safetensors.torch import load_file, save_file

from blip2 import Blip2
from engine.errors import UserError
from engine.files import sha256
from qformer import QFormer, QFormerConfig
from sources.shapes import ShapesWorld
from sources.text import BertTokenizer
from tools.weights import main as weights_command
from vit import PRESETS, ViT, ViTConfig
from weights.configs import bert_config, hf_qformer_config, llm_config, vit_config
from weights.export import write_shards
from weights.load import first_match, load, match, no_init, open_tensors, unload, weight_files
from weights.open import load_bert, load_llm, load_vit
from weights.runs import relative, relocated
from weights.tables import (
    BERT,
    DINOV2,
    EVA,
    HF_BLIP2,
    HF_RETRIEVAL,
    LAVIS_STAGE1,
    STAGE2_FRESH,
    Row,
    Table,
    both,
    joined,
)

transformers = pytest.importorskip("transformers")
TINY = ("assets/tiny/vit", "assets/tiny/bert")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"  # what Git leaves for a large file


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def small_encoders(monkeypatch):
    """The names "eva-g" and "clip-l" stand for small encoders."""
    for name, cfg in ENCODERS.items():
        monkeypatch.setitem(PRESETS, name, cfg)


# --- the strict loader -----------------------------------------------------------------------------------------------


def toy() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))


TOY = Table([*both("a", "0"), *both("b", "1")], ignored={r"junk\..*": "junk"})


def toy_tensors(**changes) -> dict:
    tensors = {
        "a.weight": torch.ones(3, 2),
        "a.bias": torch.ones(3),
        "b.weight": torch.ones(1, 3),
        "b.bias": torch.ones(1),
    }
    return {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}


def test_every_key_is_accounted_for():
    model = toy()
    assert load(model, toy_tensors(**{"junk.x": torch.ones(1)}), TOY, "toy") == "toy: 4 used, 1 ignored (junk)"
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_new_parameters_need_a_reason():
    table = Table(TOY.rows[:2], fresh={r"1\..*": "the head"})
    tensors = toy_tensors(**{"b.weight": None, "b.bias": None})
    assert load(toy(), tensors, table, "toy") == "toy: 2 used, 2 fresh (the head)"


def test_all_problems_are_listed_at_once_and_nothing_is_changed():
    model = toy()
    before = copy.deepcopy(model.state_dict())
    bad = toy_tensors(**{"a.weight": torch.ones(2, 2), "b.bias": None, "c.weight": torch.ones(5)})
    with pytest.raises(UserError) as error:
        load(model, bad, TOY, "toy.safetensors")
    message = str(error.value)
    assert "toy.safetensors does not fit, nothing was loaded; 3 problem(s)" in message
    assert "shape: a.weight gives (2, 2), 0.weight is (3, 2)" in message
    assert "missing: no source for 1.bias (1,), expected b.bias" in message
    assert "unknown: c.weight (5,) has no target" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_do_not_fit_each_other_are_listed_too():
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(2, 6)})
    table = Table(joined("{part}", ("q", "k", "v"), "qkv"))
    bad = {f"{part}.weight": torch.ones(2, 2 + (part == "k")) for part in "qkv"}
    bad |= {f"{part}.bias": torch.ones(2) for part in "qkv"}
    with pytest.raises(UserError, match=r"q.weight, k.weight, v.weight gives \(\(2, 2\), \(2, 3\), \(2, 2\)\)"):
        load(model, bad, table, "bad")


def test_a_value_that_is_not_finite_changes_nothing_either():
    """It comes last: the tensors before it are not in the model."""
    model = toy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="b.bias holds values that are not finite in float32"):
        load(model, toy_tensors(**{"b.bias": torch.tensor([torch.inf])}), TOY, "bad")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dtype_that_is_too_narrow_is_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(1, 1, bias=False)
    table, wide = Table([Row(("weight",), "weight")]), {"weight": torch.tensor([[1e6]])}
    with pytest.raises(UserError, match="not finite in float16: fetch it again, or take a wider dtype"):
        load(model, wide, table, "wide", torch.float16)
    load(model, wide, table, "wide", torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16


def test_of_many_problems_of_a_kind_ten_are_listed():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(9)))
    with pytest.raises(UserError) as error:
        load(model, {f"teacher.net.{i}.x": torch.ones(1) for i in range(12)}, Table([]), "file")
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 11 + 11 and lines[11] == "  missing: 8 more" and lines[-1] == "  unknown: 2 more"
    assert "30 problem(s); all its keys begin with teacher.net., which is none of module., " in lines[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_weights_are_refused(dtype):
    bad = toy_tensors(**{"b.weight": torch.ones(1, 3).to(dtype), "b.weight_scale": torch.ones(1)})
    with pytest.raises(UserError, match=r"toy is quantized, b.weight is \w+: expected weights in fp32, bf16 or fp16"):
        load(toy(), bad, TOY, "toy")


class Counting(torch.nn.Module):
    """A parameter, the same again, a persistent buffer, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.tied = self.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_a_buffer_that_is_saved_is_loaded_again(tmp_path):
    """Also into a module on the meta device; a tied parameter is saved once."""
    model, other = small_model(), small_model()
    model.extra, other.extra = Counting(), Counting()
    model.extra.count += 7
    model.extra.weight.data += 3
    model.tokenizer = BertTokenizer(TINY[1])
    model.save_pretrained(tmp_path / "run")
    names = {name for name in load_file(tmp_path / "run/model.safetensors") if name.startswith("extra.")}
    assert names == {"extra.weight", "extra.count"}
    other.load_trained(tmp_path / "run")
    assert other.extra.count == 7 and (other.extra.tied == 3).all()
    with torch.device("meta"):
        part = Counting()
    table = Table([Row(("weight",), "weight"), Row(("count",), "count")])
    load(part, unload(model.extra, table), table, "part", torch.bfloat16)
    assert part.count == 7 and part.count.dtype == torch.long and part.weight.dtype == torch.bfloat16


# --- image encoders --------------------------------------------------------------------------------------------------


def save_dinov2(folder: Path, **changes) -> dict[str, torch.Tensor]:
    """A small DINOv2 folder of three blocks -> its tensors."""
    tensors = unload(roughen(ViT(ViTConfig(8, depth=3, heads=2, mlp=16, patch_size=4, image_size=8))), DINOV2)
    save_file(tensors, folder / "model.safetensors")
    config = dict(model_type="dinov2", hidden_size=8, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2)
    (folder / "config.json").write_text(json.dumps(config | dict(patch_size=4, image_size=8) | changes))
    return tensors


def test_the_last_block_is_dropped(tmp_path):
    """Paper 3.4."""
    save_dinov2(tmp_path)
    vit, report, _ = load_vit(str(tmp_path))
    assert len(vit.blocks) == 2 and "18 ignored (the last block, dropped (paper 3.4))" in report


def test_mean_and_std_are_those_of_the_preprocessor_or_config_json_or_clip(tmp_path):
    save_dinov2(tmp_path)
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.48145466, 0.4578275, 0.40821073)
    save_dinov2(tmp_path, image_mean=[0.1, 0.2, 0.3])
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.4, 0.5, 0.6)
    processor = {"image_processor": {"image_mean": [0.7, 0.8, 0.9], "image_std": None}}  # as transformers 5 writes it
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    vit, report, _ = load_vit(str(tmp_path))
    assert vit.cfg.mean == (0.7, 0.8, 0.9) and report.endswith(f"; CLIP's std of pixels, as {tmp_path} names none")
    processor["image_processor"]["image_std"] = 0.5
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    vit, report, _ = load_vit(str(tmp_path))
    assert vit.cfg.std == (0.5, 0.5, 0.5) and "CLIP" not in report
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [1, 2]}}))
    with pytest.raises(
        UserError, match="has image_mean .1, 2., expected a list, each a number from -1,000.0 to 1,000.0"
    ):
        load_vit(str(tmp_path))


def test_a_bare_eva_file_opens_under_the_name_of_its_architecture(small_encoders, tmp_path):
    published = replace(ENCODERS["eva-g"], depth=3)
    tensors = random_tensors(eva_shapes(published) | norm("norm", 16) | {"head.weight": (1, 16)})
    torch.save(tensors, tmp_path / "eva.pth")
    vit, report, _ = load_vit(f"eva-g:{tmp_path / 'eva.pth'}")
    assert len(vit.blocks) == 2 and "3 ignored (the final norm and head, unused)" in report
    assert torch.equal(vit.blocks[1].fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    with pytest.raises(UserError, match="a bare file is of eva-g or clip-l, expected a folder for dinov2-s"):
        load_vit(f"dinov2-s:{tmp_path / 'eva.pth'}")


def test_a_bare_clip_file_is_the_encoder_of_transformers_clip(small_encoders, tmp_path):
    """clip_vit_L.pth has q, k and v in one matrix and its own names; transformers has three. One function."""
    cfg = replace(ENCODERS["clip-l"], depth=3)
    bare = random_tensors(clip_shapes(cfg) | norm("ln_post", cfg.width) | {"proj": (cfg.width, 4)})
    torch.save(bare, tmp_path / "clip.pth")
    vit, report, _ = load_vit(f"clip-l:{tmp_path / 'clip.pth'}")
    assert "12 ignored (the last block" in report and "3 ignored (the final norm and projection, unused)" in report

    config = transformers.CLIPVisionConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=8
    )
    theirs = transformers.CLIPVisionModel(config).eval()
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {}
    for key, tensor in bare.items():
        for bare_name, name in names.items():
            key = key.replace(bare_name, name)
        if "attn.in_proj" in key:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        elif key != "proj":
            state[key] = tensor
    theirs.load_state_dict(theirs.state_dict() | state)
    theirs.save_pretrained(tmp_path / "folder")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = theirs(images, output_hidden_states=True).hidden_states[-2]
        for ours in (vit, load_vit(str(tmp_path / "folder"))[0]):
            torch.testing.assert_close(ours(images), wanted, rtol=0, atol=1e-4)


def test_names_stand_for_random_weights_and_the_report_says_so(small_encoders):
    vit, report, source = load_vit("eva-g")
    assert "RANDOM WEIGHTS" in report and source.files == [] and source.sha256 is None and len(vit.blocks) == 2


# --- BERT ------------------------------------------------------------------------------------------------------------


def save_bert(folder: Path, bert: QFormer) -> None:
    """A BERT folder."""
    save_file(unload(bert, BERT), folder / "model.safetensors")
    config = dict(model_type="bert", vocab_size=29, hidden_size=16, num_hidden_layers=3, num_attention_heads=4)
    config |= dict(intermediate_size=24, max_position_embeddings=20)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_q_former_starts_as_bert_and_its_queries_feed_forward_as_the_texts(tmp_path):
    """Paper 3.1. [DEC] is new, and so are the queries and the cross-attention, whose weights are drawn."""
    bert = small_qformer()
    save_bert(tmp_path, bert)
    torch.manual_seed(1)
    ours, report, _ = load_bert(str(tmp_path), image_width=10)
    assert "1 fresh (the queries, drawn at random)" in report and "fresh (cross-attention, drawn at random)" in report
    assert torch.equal(ours.word_embedding.weight[:-1], bert.word_embedding.weight[:-1])
    assert 0.01 < ours.word_embedding.weight[-1].std() < 0.03
    assert torch.equal(ours.lm_head.bias[:-1], bert.lm_head.bias[:-1]) and ours.lm_head.bias[-1] == 0
    for a, b in zip(ours.blocks, bert.blocks, strict=True):
        assert same(a.attn, b.attn) and same(a.ffn_text, b.ffn_text) and same(a.ffn_query, b.ffn_text)
    assert 0.015 < ours.blocks[0].cross.kv.weight.std() < 0.025


def test_berts_names_of_2018_are_understood():
    """bert-base-uncased as its hub serves it: the prefix `bert.`, gamma and beta, a pooler."""
    bert, ours = small_qformer(0), small_qformer(1)
    old = {}
    for key, tensor in unload(bert, BERT).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[key if key.startswith("cls.") else f"bert.{key}"] = tensor
    old |= {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.bias": torch.ones(2)}
    assert "2 ignored (BERT's next-sentence head)" in load(ours, old, BERT, "bert")
    assert torch.equal(ours.embedding_ln.weight, bert.embedding_ln.weight)


# --- language models -------------------------------------------------------------------------------------------------


def test_a_language_model_needs_its_own_tokenizer(tmp_path):
    shutil.copytree(ROOT / LLMS["opt"], tmp_path / "llm")
    (tmp_path / "llm/tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer: expected tokenizer.json, vocab.txt, or vocab.json with me"):
        small_model().attach_llm(str(tmp_path / "llm"))
    shutil.copy(ROOT / "assets/tiny/bert/tokenizer.json", tmp_path / "llm")
    with pytest.raises(UserError, match="has no token '</s>': use the language model's own"):
        small_model().attach_llm(str(tmp_path / "llm"))


def test_a_language_model_is_created_where_the_model_is():
    """The new projection, and a language model of random weights."""
    with torch.device("meta"):
        model = small_model()
        model.attach_llm("opt-125m")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.amp_dtype = torch.float16
    with pytest.raises(UserError, match="in which T5 overflows"):
        model.attach_llm("flan-t5-xl")


@pytest.mark.parametrize("part", ["opt", "bert"])
@pytest.mark.parametrize("how", ["pointer", "cut", "newer", "vocabulary"])
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(part, how, tmp_path):
    folder = Path(shutil.copytree(f"assets/tiny/{part}", tmp_path / part))
    file, sentence = (
        folder / "tokenizer.json",
        r"tokenizer.json cannot be read \(.*\): fetch it again, or update",
    )
    if how == "pointer":
        file.write_bytes(POINTER)
        sentence = "tokenizer.json is a pointer of Git LFS, not the file itself: run git lfs pull"
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif how == "newer":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model": {"type": "Newer"}}))
    else:
        file.unlink()
        for name in ("vocab.json", "merges.txt") if part == "opt" else ("vocab.txt",):
            (folder / name).write_bytes(b"\xff\xfe")
        sentence = r"vocab\.\w+ .*cannot be read \(.*\): fetch it again, or update tokenizers"
    with pytest.raises(UserError, match=sentence):
        small_model().attach_llm(str(folder)) if part == "opt" else Blip2.build(TINY[0], str(folder))


@pytest.mark.parametrize("part", ["vit", "bert", "opt"])
@pytest.mark.parametrize(
    "content, sentence",
    [
        ([1], "config.json holds a list, expected an object"),
        ({"num_attention_heads": 5}, r"config.json has 5 heads, into which its width of \d+ does not divide"),
        (
            {"num_attention_heads": None},
            "config.json has num_attention_heads None, expected a whole number from 1 to 10,000,000",
        ),
        (None, "is an adapter of PEFT, which holds no model: merge it into its own"),
    ],
)
def test_a_config_that_cannot_be_is_a_sentence_at_load(part, content, sentence, tmp_path):
    folder = Path(shutil.copytree(f"assets/tiny/{part}", tmp_path / part))
    if isinstance(content, dict):
        edit_config(folder, **content)
        if None in content.values():
            (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | content))
    else:
        (folder / "config.json").write_text(json.dumps(content))
    if content is None:
        (folder / "config.json").rename(folder / "adapter_config.json")
        with pytest.raises(UserError, match=sentence):
            Blip2.from_pretrained(folder)
    with pytest.raises(UserError, match=sentence):
        {"vit": load_vit, "bert": load_bert, "opt": load_llm}[part](str(folder))


WIDE = {"hidden_size": 10**6, "num_attention_heads": 1, "intermediate_size": 10**6}
PARTS = {  # of a config.json -> what is said
    "vit": [
        ({"hidden_size": 0}, "has hidden_size 0, expected a whole number from 1 to"),
        ({"num_hidden_layers": 10**6}, "has num_hidden_layers 1000000, expected a whole number from 1 to 1,000"),
        ({"layer_norm_eps": float("nan")}, "has layer_norm_eps nan, expected a number from 0 to 1"),
        ({"image_std": [0, 0, 0]}, r"has image_std .0, 0, 0., expected a list, each a number from 1e-06 to"),
        ({"image_processor": [1]}, "image_processor in .* holds a list, expected an object"),
        ({"mlp_ratio": "4"}, "has mlp_ratio '4', expected a number"),
        (
            {"model_type": ["dinov2"] * 5000},
            r"has model_type \['dinov2', 'dinov2.* letters., expected an image encoder",
        ),
        ({"model_type": "siglip2"}, "a SigLIP 2 for images of any shape .NaFlex., expected one of a fixed size: use"),
        ({"model_type": "siglip2_vision_model"}, "use siglip2-base-patch16-224 or another whose name does not end in"),
        (WIDE, "does not fit, nothing was loaded"),
    ],
    "bert": [
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000, expected a whole number from 0 to 1,048,576"),
        ({"hidden_dropout_prob": -1}, "has hidden_dropout_prob -1, expected a number from 0 to 0.999"),
        ({"max_position_embeddings": True}, "has max_position_embeddings True, expected a whole number"),
        (WIDE, "has a QFormer of [0-9,]+ parameters by its configuration, its files have"),
    ],
    "opt": [
        ({"do_layer_norm_before": 1}, "has do_layer_norm_before 1, expected True or False"),
        ({"word_embed_proj_dim": "x" * 5000}, r"has word_embed_proj_dim 'x{29}\.\.\. .5,002 letters., expected"),
        ({"text_config": [], "model_type": "blip-2"}, "text_config in .*/config.json has model_type None"),
        (WIDE | {"ffn_dim": 10**6, "word_embed_proj_dim": 10**6}, "does not fit, nothing was loaded"),
    ],
    "t5": [
        ({"feed_forward_proj": ["gated"]}, "is of a T5 v1.0"),
        ({"num_decoder_layers": 1.5}, "has num_decoder_layers 1.5, expected a whole number"),
        ({"d_kv": None}, "has d_kv None, expected a whole number"),
    ],
}


@pytest.mark.parametrize("part, changes, said", [(part, *row) for part, rows in PARTS.items() for row in rows])
def test_a_field_that_cannot_be_is_named_before_memory_is_taken(part, changes, said, tmp_path):
    folder = Path(shutil.copytree(f"assets/tiny/{part}", tmp_path / part))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=said):
        {"vit": load_vit, "bert": load_bert}.get(part, load_llm)(str(folder))


LONG = "x" * 5000
IN_A_RUN = [
    ({"image_size": None}, "has image_size None, expected a whole number"),
    ({"image_size": 65}, "has image_size 65, no multiple of its ViT's patch size 8, up to 4096"),
    ({"image_size": 80_000}, "has image_size 80000, no multiple of its ViT's patch size 8, up to 4096"),
    ({"ln_vision_eps": float("nan")}, "has ln_vision_eps nan, expected a number from 0 to 1"),
    ({"embed_dim": 10**9}, "has embed_dim 1000000000, expected a whole number from 1 to 65,536"),
    ({"max_text_tokens": 65}, "has max_text_tokens 65, expected 3 to 64, its positions"),
    ({"vit": LONG}, "has vit 'x{29}... .5,002 letters., expected a text of a length from 0 to 4,096"),
    ({"llm": "x" * 3000}, "--llm x+ does not exist"),
    ({"llm": "opt-2.7b"}, "opt-2.7b has other weights than .* was trained over: pass --llm"),
    ({"template": 5}, "has template 5, expected a text"),
    ({"prompt": "\ud83d"}, "has prompt '.+', expected a text"),  # half of a character, which no tokenizer reads
    ({"conditioned": "no"}, "has conditioned 'no', expected True or False"),
    ({"lacks": "itg"}, "has lacks 'itg', expected a list"),
    ({"train": [1]}, "train in .* holds a list, expected an object"),
    ({"vit_trained": True}, "vit_config in .* holds a NoneType, expected an object"),
    (
        {"vit_trained": True, "vit_config": {"width": 96}},
        "does not fit .missing 3 required .* .depth., .heads., and .mlp..: take it",
    ),
    ({"qformer": []}, "qformer in .* holds a list, expected an object"),
    ({"qformer": {"widths": 5}}, "qformer in .* does not fit .got an unexpected keyword argument .widths..: take"),
    (
        {"qformer": {"depth": 900, "image_width": 96}},
        "has a QFormer of [0-9,]+ parameters by its configuration, its files have",
    ),
]


@pytest.mark.parametrize("changes, said", IN_A_RUN)
def test_a_run_of_which_an_entry_cannot_be_is_not_opened(changes, said, tmp_path):
    run = Path(shutil.copytree("assets/tiny/blip2", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    moved = {"vit": str(ROOT / "assets/tiny/vit"), "llm": str(ROOT / "assets/tiny/opt")}
    (run / "config.json").write_text(json.dumps(config | moved | changes))
    with pytest.raises(UserError, match=said):
        Blip2.from_pretrained(run)
    for name in ("vit", "bert", "image_size", "embed_dim", "ln_vision_eps", "max_text_tokens", "qformer"):
        (run / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        with pytest.raises(UserError, match=f"run/config.json (has {name} None|holds a NoneType), expected "):
            weights_command(["inspect", str(run)])


@pytest.mark.parametrize("index", [[], None, {}, {"weight_map": [1]}, {"weight_map": {"a": 1}}])
def test_an_index_that_names_no_files_says_so(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json has no weight_map from keys to files: fetch it again"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": LONG}}))
    with pytest.raises(UserError, match="lacks x"):
        weight_files(tmp_path)


def test_odd_tensors_in_a_pickle_are_refused(tmp_path):
    """Views that are larger than the file, and what has no values; a key that is a number is a key."""
    views = torch.zeros(1).expand(1, 32, 10**12), torch.eye(3).to_sparse(), torch.empty(10**9, device="meta")
    for tensor in views:
        torch.save({"query_tokens": tensor}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="has query_tokens without all of its values: expected dense tensors"):
            open_tensors([tmp_path / "x.pth"])
    odd = {"query_tokens": torch.zeros(3), "ln_vision.weight": torch.tensor(1.0), 7: torch.zeros(2)}
    odd["Qformer.bert.encoder.layer.0.crossattention.self.query.weight"] = torch.zeros(2, 2)
    torch.save(odd, tmp_path / "x.pth")
    with pytest.raises(UserError, match="has a QFormer of [0-9,]+ parameters by its configuration, its files have 10"):
        Blip2.from_pretrained(tmp_path / "x.pth", vit=TINY[0], bert=TINY[1])


def test_a_checkpoint_over_t5_takes_no_opt():
    with pytest.raises(
        UserError, match="assets/tiny/opt is no T5, over which the checkpoint was trained: pass it as --"
    ):
        load_llm("assets/tiny/opt", act="gelu")


def test_a_tokenizer_of_other_words_than_the_run_is_refused(tmp_path):
    """Its ids would be beyond the embeddings; one without a token for unknown words could not read them."""
    run = Path(shutil.copytree("assets/tiny/blip2", tmp_path / "blip2"))
    for part in ("vit", "opt"):
        shutil.copytree(f"assets/tiny/{part}", tmp_path / part)
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["[extra]"] = 10**6
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has a tokenizer of .* words and weights of 126, expected the same"):
        Blip2.from_pretrained(run)
    del words["[extra]"], words["[UNK]"]
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "[UNK]"]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer.json cannot be read .*Missing .UNK."):
        Blip2.from_pretrained(run)


# --- transformers' BLIP-2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LLMS)
def test_a_folder_of_transformers_gives_the_same_logits_and_writes_the_same_text(kind, public):
    theirs, folder = public(kind)
    ours, tokenizer = (model := Blip2.from_pretrained(folder)), model.llm_tokenizer
    assert ours.llm.cfg.act == "gelu" if kind == "t5" else ours.llm.cfg.pre_norm
    pixels = torch.randn(24, 3, 28, 28)
    prompt = "Question: what color is the star? Answer:"
    ids = torch.tensor(tokenizer.encode_prompts([prompt])).expand(24, -1)
    given = torch.cat((torch.full((24, 3), theirs.config.image_token_index), ids), dim=1)
    inputs = dict(pixel_values=pixels, input_ids=given, attention_mask=torch.ones_like(given))
    with torch.no_grad():
        images = ours.encode_tokens(ours.vit(pixels))
        prefix, mask = ours.llm_prefix(images.query_out, ids, torch.ones_like(ids, dtype=torch.bool))
        if kind == "opt":  # reads on where the queries end
            wanted = theirs(**inputs).logits[:, 2 : 2 + ids.shape[1]]
            found = ours.llm(prefix[:, :3], mask[:, :3], ids)
        else:
            target = torch.randint(2, 400, (24, 5))
            wanted, found = theirs(**inputs, labels=target).logits, ours.llm(prefix, mask, target)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        beams = dict(num_beams=5, max_new_tokens=8, length_penalty=-1.0, min_new_tokens=1)
        out = theirs.generate(**inputs, **beams, eos_token_id=tokenizer.end_id)
    rows = (out[:, 1:] if kind == "t5" else out[:, given.shape[1] :] if out.shape[1] > 8 else out).tolist()
    texts = [tokenizer.decode(row[: (row + [tokenizer.end_id]).index(tokenizer.end_id)]) for row in rows]
    assert ours.ask(images, prompt, template="{}", max_new_tokens=8) == texts
    assert len(set(texts)) > 1  # they depend on the image


def test_retrieval_scores_are_those_of_transformers(public):
    theirs, folder = public("retrieval")
    ours, pixels = Blip2.from_pretrained(folder), torch.randn(2, 3, 28, 28)
    images = ours.encode_tokens(ours.vit(pixels))
    for text in ["a small star", "two large crosses left of it"]:
        ids = torch.tensor(ours.tokenizer.encode([text]))
        pairs = dict(input_ids=ids.expand(2, -1), attention_mask=torch.ones_like(ids).expand(2, -1))
        with torch.no_grad():
            itm = theirs(pixel_values=pixels, **pairs, use_image_text_matching_head=True).logits_per_image
            itc = theirs(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits_per_image
        assert torch.allclose(ours.itm_scores(images, [text])[:, 0], itm.softmax(dim=-1)[:, 1], atol=1e-5)
        assert torch.allclose(ours.itc_scores(images, [text])[:, 0], itc.view(-1), atol=1e-5)


def test_a_checkpoint_for_retrieval_writes_no_captions(public, tmp_path):
    """It lacks ITG's head: a run that is made from it remembers."""
    model = Blip2.from_pretrained(public("retrieval")[1])
    model.save_pretrained(tmp_path / "run")
    for opened in (model, Blip2.from_pretrained(tmp_path / "run")):
        with pytest.raises(UserError, match="the head that writes captions .ITG. is not trained"):
            opened.caption(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_a_folder_of_transformers_takes_no_other_parts(public):
    with pytest.raises(UserError, match="has all its parts: leave --vit, --bert and --llm out"):
        Blip2.from_pretrained(public("opt")[1], vit=TINY[0])


@pytest.mark.parametrize("kind", LLMS)
def test_a_stage_2_checkpoint_without_text_branch_says_so_and_can_be_saved(kind, public, tmp_path):
    ours = Blip2.from_pretrained(public(kind)[1])
    with pytest.raises(UserError, match="has no text branch to read a text with"):
        ours.itc_scores(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), ["a star"])
    ours.save_pretrained(tmp_path / "run")
    again = Blip2.from_pretrained(tmp_path / "run")
    assert same(ours, again) and again.llm.cfg == ours.llm.cfg


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_file_lacks_is_reported_and_initialized(kind, public, monkeypatch, capsys):
    """Memory that nobody has written to is full of NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model = Blip2.from_pretrained(public(kind)[1])
    finally:
        torch.use_deterministic_algorithms(False)
    report = capsys.readouterr().out
    lacking = ["ITG's head", "ITC's temperature"] if kind == "retrieval" else ["the text branch", "heads of stage 1"]
    assert all(part in report for part in lacking)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    head = model.qformer.lm_head  # no public file has it
    assert 0.015 < head.dense.weight.std() < 0.025
    assert (head.ln.weight == 1).all() and not head.dense.bias.any() and not head.bias.any()


@pytest.mark.parametrize("split", [True, False])
def test_releases_that_differ_open_alike(split, public, tmp_path):
    """q, k and v in one matrix or in three; in one file or in shards; with and without a row for the image token."""
    _, folder = public("opt", image_token=not split)
    tensors = load_file(folder / "model.safetensors")
    if split:
        for key in [key for key in tensors if ".qkv." in key]:
            for part, tensor in zip("qkv", tensors.pop(key).chunk(3)):
                tensors[key.replace("qkv", f"{part}_proj")] = tensor.clone()
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weights.export.SHARD_BYTES", 20_000)
        write_shards(tmp_path / "other", tensors, torch.float32)
    assert len(weight_files(tmp_path / "other")) > 1
    one, other = Blip2.from_pretrained(folder), Blip2.from_pretrained(tmp_path / "other")
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) or (first_match(STAGE2_FRESH, name) and "vit" not in name), name


@pytest.mark.parametrize("size, other", [(28, 56), (56, 28)])
def test_a_checkpoint_opens_at_another_resolution_as_transformers_resizes_it(size, other, public):
    """The position table is resized bicubically, with [CLS] kept."""
    theirs, folder = public("opt", image_size=size)
    ours, pixels = Blip2.from_pretrained(folder, image_size=other), torch.randn(1, 3, other, other)
    with torch.no_grad():
        image = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        wanted = theirs.qformer(query_embeds=theirs.query_tokens, encoder_hidden_states=image).last_hidden_state
    assert torch.allclose(ours.encode_tokens(ours.vit(pixels)).query_out, wanted, atol=1e-5)
    assert ours.image_size == other
    with pytest.raises(UserError, match="--image-size 30 is no multiple of the patch size 14"):
        Blip2.from_pretrained(folder, image_size=30)


def test_pytorchs_compiler_is_not_imported_to_open_a_model_and_caption_an_image():
    """It takes longer than opening the model; arithmetic and random numbers on the meta device import it."""
    code = (
        "import sys; from blip2 import TINY, Blip2; model = Blip2.from_pretrained(TINY / 'blip2'); "
        "model.caption(TINY / 'picture.png'); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- LAVIS's BLIP-2 --------------------------------------------------------------------------------------------------


def test_a_lavis_checkpoint_of_stage_1_opens_over_the_folders_of_its_parts(tmp_path, capsys):
    """Nothing is left over or missing but the ViT, which is in a file of its own."""
    tensors = lavis_checkpoint(tmp_path / "blip2.pth", 1, None, image_width=96)
    model = Blip2.from_pretrained(tmp_path / "blip2.pth", vit=TINY[0], bert=TINY[1])
    report = capsys.readouterr().out.splitlines()[1]
    assert re.search(
        r"blip2.pth: \d+ used, 1 ignored \(.*\), 2 ignored \(tied .*\), \d+ fresh \(the frozen ViT\)$", report
    )
    found = unload(model, LAVIS_STAGE1)
    assert tensors.keys() - found.keys() == {*TIED, COUNTER}
    assert all(torch.equal(found[key], tensors[key]) for key in found)
    block, theirs = model.qformer.blocks[2], "Qformer.bert.encoder.layer.2"
    assert torch.equal(block.ffn_text.up.weight, tensors[f"{theirs}.intermediate.dense.weight"])
    assert torch.equal(block.ffn_query.up.weight, tensors[f"{theirs}.intermediate_query.dense.weight"])
    assert torch.equal(block.cross.kv.weight[128:], tensors[f"{theirs}.crossattention.self.value.weight"])
    assert torch.equal(model.qformer.queries, tensors["query_tokens"])


@pytest.mark.parametrize("image_width, parameters", [(1408, 186_705_470), (1024, 183_165_758)])
def test_each_of_the_346_keys_of_blip2_pretrained_has_its_place(image_width, parameters):
    """At the real sizes, on the meta device: 336 keys of the Q-Former and 10 others, used or ignored for a reason."""
    sizes = dict(width=768, depth=12, mlp=3072, words=30523, positions=512, queries=32, embed=256)
    with torch.device("meta"):
        vit = ViT(ViTConfig(image_width, 1, 16, 8, key_bias=False))
        model = Blip2(vit, QFormer(QFormerConfig(image_width=image_width)), tokenizer=None)
        file = {name: torch.empty(shape) for name, shape in lavis_shapes(1, image_width, **sizes).items()}
    assert len(file) == 346 and sum(key.startswith("Qformer.") for key in file) == 336
    plan, report = match(model, file, LAVIS_STAGE1, "blip2_pretrained.pth")
    used = {key for _, keys in plan.values() for key in keys}
    assert file.keys() - used == {*TIED, COUNTER}
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vit.")) == parameters


@pytest.mark.parametrize("llm", LLMS)
def test_a_lavis_checkpoint_of_stage_2_opens_over_the_vits_file_and_a_language_model(llm, small_encoders, tmp_path):
    """blip2_pretrained_* has no ViT and no text branch. LAVIS sets Flan-T5's GELU to the one by erf."""
    tensors = lavis_checkpoint(tmp_path / "stage2.pth", 2, None, llm)
    published = replace(ENCODERS["eva-g"], depth=3)
    vit = random_tensors(eva_shapes(published))
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="pass --vit eva-g:eva_vit_g.pth and --llm FOLDER"):
        Blip2.from_pretrained(tmp_path / "stage2.pth")
    model = Blip2.from_pretrained(tmp_path / "stage2.pth", vit=f"eva-g:{tmp_path / 'vit.pth'}", llm=LLMS[llm])
    found = unload(model.vit, EVA)
    assert found.keys() == {key for key in vit if ".2." not in key}
    assert all(torch.equal(found[key], vit[key]) for key in found)
    assert torch.equal(model.llm_proj.weight, tensors[f"{llm}_proj.weight"])
    assert torch.equal(model.qformer.queries, tensors["query_tokens"])
    assert model.llm.cfg.act == "gelu" if llm == "t5" else model.llm.fits_fp16


def test_a_lavis_checkpoint_says_which_folders_it_needs(small_encoders, tmp_path):
    path = tmp_path / "blip2.pth"
    with pytest.raises(UserError, match="blip2.pth does not exist: expected a LAVIS checkpoint or a run folder"):
        Blip2.from_pretrained(path)
    for vit, flag in ((None, "eva-g:eva_vit_g.pth"), ("eva-g", "eva-g"), ("clip-l", "clip-l")):
        lavis_checkpoint(path, 1, vit)
        with pytest.raises(UserError, match=f"does not say its architecture: pass --vit {flag} and --bert FOLDER"):
            Blip2.from_pretrained(path)


# --- our own runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm", [None, *LLMS])
def test_a_saved_model_opens_as_the_same_model(llm, tmp_path):
    """It holds what was trained, the text branch included; its frozen parts stay in their folders."""
    model, _ = Blip2.build(*TINY, image_size=64, num_queries=4, embed_dim=8)
    images = [ShapesWorld("val").image(i) for i in range(3)]
    if llm:
        model.attach_llm(LLMS[llm], template="Q: {} A:")
    model.eval().save_pretrained(tmp_path / "run")
    again = Blip2.from_pretrained(tmp_path / "run")
    assert torch.equal(model.itc_scores(images, ["a red circle"]), again.itc_scores(images, ["a red circle"]))
    assert not llm or (again.template == "Q: {} A:" and again.ask(images, "what?") == model.ask(images, "what?"))
    saved = load_file(tmp_path / "run/model.safetensors")
    assert not any(name.startswith(("vit.", "llm.")) for name in saved) and any(".ffn_text." in name for name in saved)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (tmp_path / "run" / config["vit"]).resolve() == (ROOT / "assets/tiny/vit").resolve()
    assert len({path.stat().st_mode for path in (tmp_path / "run").iterdir()}) == 1  # who may read one may read all


def test_a_run_of_the_code_before_the_last_block_was_always_dropped_opens(tmp_path):
    """Its config.json says "last_block"; with the block the model would be another one."""
    shutil.copytree(ROOT / "assets/tiny", tmp_path / "tiny")
    run = tmp_path / "tiny/blip2"
    edit_config(run, last_block=False)
    assert Blip2.from_pretrained(run).ask(ROOT / "assets/tiny/picture.png", "what color is the star?") == "green"
    edit_config(run, last_block=True)
    with pytest.raises(UserError, match="was trained with the last block of its ViT, which is always dropped now"):
        Blip2.from_pretrained(run)


@pytest.fixture
def run(stage2_run, tmp_path) -> Path:
    """A copy of a run of stage 2, to be changed."""
    return copy_of(stage2_run, tmp_path)


def changed_vit(folder: Path) -> str:
    """The tiny ViT with other weights."""
    shutil.copytree(ROOT / "assets/tiny/vit", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.cls_token"] += 1
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_the_frozen_parts_of_a_run_may_move_and_may_not_change(run, tmp_path):
    moved = str(shutil.copytree(ROOT / "assets/tiny/vit", tmp_path / "moved"))
    assert Blip2.from_pretrained(run, vit=moved).sources["vit"].spec == moved
    with pytest.raises(UserError, match="has other weights than .* was trained over: pass --vit with the right ones"):
        Blip2.from_pretrained(run, vit=changed_vit(tmp_path / "changed"))
    with pytest.raises(UserError, match="has other weights than .* was trained over: pass --llm with the right ones"):
        Blip2.from_pretrained(run, llm=LLMS["t5"])


def test_equivalent_weights_open_once_the_hash_is_removed(run, tmp_path):
    """As the error says."""
    vit = changed_vit(tmp_path / "changed")
    edit_config(run, vit_sha256=None)
    assert Blip2.from_pretrained(run, vit=vit).sources["vit"].spec == vit


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_may_have_colons(inside, tmp_path):
    """Only a known name before a colon is a name: "eva-g:file"."""
    run = tmp_path / "2026-05-01_12:30:00/run"
    folder = (run if inside else run.parent) / "v:1"
    parts = [shutil.copytree(ROOT / part, folder / Path(part).name) for part in (*TINY, LLMS["opt"])]
    vit, bert, llm = map(str, parts)
    model, _ = Blip2.build(vit, bert, image_size=64, num_queries=4)
    model.attach_llm(llm)
    model.save_pretrained(run)
    assert json.loads((run / "config.json").read_text())["vit"] == os.path.relpath(vit, run)
    again = Blip2.from_pretrained(run)
    assert (again.sources["vit"].spec, again.sources["llm"].spec) == (vit, llm)
    assert relative(f"eva-g:{folder}/x:y.pth", run) == f"eva-g:{os.path.relpath(folder, run)}/x:y.pth"
    assert relocated(relative(f"eva-g:{folder}/x:y.pth", run), run) == f"eva-g:{folder}/x:y.pth"
    assert relocated(relative("opt-125m", run), run) == "opt-125m"


def test_another_language_model_comes_with_its_own_hash(run, tmp_path):
    model = Blip2.from_pretrained(run)
    model.attach_llm(LLMS["t5"])
    model.save_pretrained(run.parent / "other")
    assert Blip2.from_pretrained(run.parent / "other").llm.cfg == model.llm.cfg


def test_a_trained_vit_that_is_frozen_in_half_precision_is_stored_as_it_was(retrieval_run, tmp_path):
    """And trained again from there, not from what was rounded."""
    before = load_file(retrieval_run / "model.safetensors")
    model = Blip2.from_pretrained(retrieval_run, precision="bf16")
    assert model.vit.pos_embed.dtype == torch.bfloat16
    run = copy_of(retrieval_run, tmp_path)
    for _ in range(2):  # the second time onto the file that is open
        model.save_pretrained(run)
        after = load_file(run / "model.safetensors")
        vit = [name for name in before if name.startswith("vit.")]
        assert vit and all(torch.equal(before[name], after[name]) for name in vit)
        model = Blip2.from_pretrained(run, precision="bf16")
    model.unfreeze_vit()
    assert torch.equal(model.vit.blocks[0].fc1.weight, before["vit.blocks.0.fc1.weight"])
    with torch.no_grad():
        model.vit.blocks[0].fc1.weight += 1
    model.save_pretrained(run)
    after = load_file(run / "model.safetensors")["vit.blocks.0.fc1.weight"]
    assert torch.equal(after, before["vit.blocks.0.fc1.weight"] + 1)


def test_a_run_is_not_opened_over_a_vit_of_another_width(run):
    sentence = "was trained over a ViT of width 96, clip-l has width 1024: pass --vit with the encoder it was trained"
    with pytest.raises(UserError, match=sentence):
        Blip2.from_pretrained(run, vit="clip-l")


def test_a_run_over_random_weights_is_not_opened_again(run, monkeypatch):
    """They are drawn anew each time: the model would be another one."""
    monkeypatch.setitem(PRESETS, "clip-l", ViTConfig(96, depth=1, heads=2, mlp=8, patch_size=8))
    (run / "config.json").write_text(
        json.dumps(json.loads((run / "config.json").read_text()) | {"vit": "clip-l", "vit_sha256": None})
    )
    with pytest.raises(UserError, match="was trained over a ViT of random weights .clip-l., which no file holds"):
        Blip2.from_pretrained(run)


def test_a_run_whose_tensors_do_not_fit_lists_them(run):
    tensors = load_file(run / "model.safetensors")
    tensors["vision_proj.weight"] = tensors["vision_proj.weight"][:5].clone()
    del tensors["temperature"]
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(UserError) as error:
        Blip2.from_pretrained(run)
    for part in ("2 problem(s)", "shape: vision_proj.weight", "missing: no source for temperature"):
        assert part in str(error.value)


def test_a_folder_that_is_neither_a_run_nor_a_whole_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing is not a run: expected config.json and model.safetensors"):
        Blip2.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="assets/tiny/opt is a opt, expected a run, or a whole BLIP-2"):
        Blip2.from_pretrained("assets/tiny/opt")


# --- files -----------------------------------------------------------------------------------------------------------


def test_shards_and_pickles_are_read_like_one_file(tmp_path):
    """opt-6.7b, for one, is in pickled shards."""
    tensors = save_dinov2(tmp_path)
    whole, names = load_vit(str(tmp_path))[0], sorted(tensors)
    (tmp_path / "model.safetensors").unlink()

    def save_shards(index: str, files: list[str], save) -> None:
        parts = dict(zip(files, (names[::2], names[1::2])))
        for file, keys in parts.items():
            save({key: tensors[key] for key in keys}, tmp_path / file)
        weight_map = {key: file for file, keys in parts.items() for key in keys}
        (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))

    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(whole, load_vit(str(tmp_path))[0])
    (tmp_path / "pytorch_model.bin").unlink()
    save_shards("pytorch_model.bin.index.json", ["1.bin", "2.bin"], torch.save)
    assert same(whole, load_vit(str(tmp_path))[0])
    save_shards("model.safetensors.index.json", ["1.safetensors", "2.safetensors"], save_file)  # preferred
    assert [file.name for file in weight_files(tmp_path)] == ["1.safetensors", "2.safetensors"]
    assert same(whole, load_vit(str(tmp_path))[0])


class Code:
    """A pickle of it makes a folder where it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def spoil(folder: Path, how: str) -> str:
    """Spoil a good checkpoint folder -> what the error has to say."""
    file, key = folder / "model.safetensors", "language_projection.weight"
    tensors = load_file(file)
    if how == "no file":
        file.unlink()
        return "has no weights: expected model.safetensors, its shards and index, or pytorch_model.bin"
    if how == "code":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Code(folder / "executed")}, protocol=2))
        return "pytorch_model.bin cannot be read as PyTorch weights"
    if how == "truncated":
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
        return "model.safetensors is not a whole safetensors file"
    if how in ("missing shard", "outside"):
        file.rename(folder / "a.safetensors")
        other = "b.safetensors" if how == "missing shard" else "../b.safetensors"
        index = {"weight_map": {key: "a.safetensors", "x": other}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "lacks b.safetensors" if how == "missing shard" else "names a file outside of"
    if how in ("shape", "nan"):
        tensors[key] = torch.zeros(2, 3) if how == "shape" else tensors[key].fill_(float("nan"))
        save_file(tensors, file, {"format": "pt"})
        return r"gives \(2, 3\)" if how == "shape" else f"{key} holds values that are not finite"
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, qformer_config=config["qformer_config"] | {"num_hidden_layers": 4})
    return "missing: no source for qformer.blocks.3"


@pytest.mark.parametrize(
    "how", ["no file", "code", "truncated", "missing shard", "outside", "shape", "nan", "config.json"]
)
def test_a_spoiled_checkpoint_is_one_error_that_names_it(how, public, tmp_path):
    folder = Path(shutil.copytree(public("opt")[1], tmp_path / "spoiled"))
    wanted = spoil(folder, how)
    with pytest.raises(UserError, match=wanted) as error:
        Blip2.from_pretrained(folder)
    assert str(folder) in str(error.value) and not (folder / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps({"model": print}, protocol=2)], ids=["empty", "text", "code"]
)
def test_a_file_that_is_no_checkpoint_is_one_sentence(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="x.pth cannot be read as PyTorch weights"):
        Blip2.from_pretrained(tmp_path / "x.pth", vit="eva-g", bert=TINY[1])
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth holds no state dict"):
        Blip2.from_pretrained(tmp_path / "list.pth", vit="eva-g", bert=TINY[1])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_of_git_lfs_says_so(name, tmp_path):
    save_dinov2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS, not the file itself: run git lfs pull in"):
        load_vit(str(tmp_path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_a_state_dict_in_a_wrapper_is_unwrapped(prefix, wrapper, tmp_path):
    tensors = {prefix + key: tensor for key, tensor in save_dinov2(tmp_path).items()}
    whole = load_vit(str(tmp_path))[0]
    (tmp_path / "model.safetensors").unlink()
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "pytorch_model.bin")
    assert same(whole, load_vit(str(tmp_path))[0])


def test_other_objects_beside_the_tensors_are_named_without_pytorchs_advice(tmp_path):
    torch.save({"a": torch.ones(1), "args": argparse.Namespace()}, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        open_tensors([tmp_path / "x.pth"])
    assert str(error.value) == (
        f"{tmp_path}/x.pth cannot be read as PyTorch weights (it holds a argparse.Namespace, and no code in a file is "
        "run): save its state dict alone"
    )
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth holds no state dict, only epoch, optimizer: expected tensors by name"):
        weights_command(["inspect", str(tmp_path / "x.pth")])


def test_hashing_and_loading_report_their_progress(tmp_path, monkeypatch):
    seen = []

    def progress(items, what, total=None):
        items = list(items)
        seen.append((what, len(items), total))
        return items

    for module in ("weights.load", "engine.files"):
        monkeypatch.setattr(f"{module}.progress", progress)
    load(toy(), toy_tensors(), TOY, "toy")
    (tmp_path / "x").write_bytes(b"x" * 2_500_000)
    assert sha256([tmp_path / "x"]) == hashlib.sha256(b"x" * 2_500_000).hexdigest()
    assert seen == [("loading toy", 4, None), (f"hashing {tmp_path}/x", 3, 3)]


def test_a_part_that_is_not_there_or_is_another_part_is_one_sentence(tmp_path):
    vit, bert = TINY
    cases = {
        ("nowhere", bert): "--vit nowhere does not exist: expected a folder, or a name .eva-g, clip-l, dinov2-s, ",
        (vit, "nowhere"): "--bert nowhere does not exist: expected a BERT folder",
        (bert, bert): "has model_type 'bert', expected an image encoder",
        (vit, vit): "has model_type 'dinov2'",
    }
    for (given_vit, given_bert), sentence in cases.items():
        with pytest.raises(UserError, match=sentence):
            Blip2.build(given_vit, given_bert)


def test_a_tokenizer_of_more_words_than_the_weights_is_refused(tmp_path):
    bert = Path(shutil.copytree(TINY[1], tmp_path / "bert"))
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = len(tokenizer["model"]["vocab"])
    (bert / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="expected the same: use the tokenizer that the weights were trained with"):
        Blip2.build(TINY[0], str(bert))


def test_a_hash_is_of_the_contents(tmp_path):
    for name, content in (("a", b"abc"), ("b", b"abc"), ("c", b"abd")):
        (tmp_path / name).write_bytes(content)
    assert sha256([tmp_path / "a"]) == sha256([tmp_path / "b"]) != sha256([tmp_path / "c"])


# --- the real ones, by name and shape, on the meta device ------------------------------------------------------------


def real_blip2(name: str) -> tuple[torch.nn.Module, dict]:
    """transformers' class of a published BLIP-2, and its config.json."""
    vision, qformer, text = {"image_size": 364 if "coco" in name else 224}, {}, None
    if name.startswith("itm"):
        qformer = {"vocab_size": 30523, "use_qformer_text_input": True}
    elif name.startswith("opt"):
        cfg, _ = llm_config(name.removesuffix("-coco"))
        text = dict(model_type="opt", vocab_size=50304, hidden_size=cfg.width, num_hidden_layers=cfg.depth,
                    ffn_dim=cfg.mlp, num_attention_heads=cfg.heads, word_embed_proj_dim=cfg.width)  # fmt: skip
    else:
        cfg, _ = llm_config(name.removesuffix("-coco"))
        text = dict(model_type="t5", vocab_size=32128, d_model=cfg.width, d_kv=cfg.head_width, d_ff=cfg.mlp,
                    num_layers=cfg.depth, num_heads=cfg.heads, feed_forward_proj="gated-gelu", **T5_V1_1)  # fmt: skip
    config = transformers.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text)
    with torch.device("meta"), no_init():
        theirs = getattr(transformers, CLASSES["retrieval" if text is None else "opt"])(config)
    config = config.to_dict()
    if text and text["model_type"] == "t5":  # transformers 5 writes v1.1 and v1.0 alike
        config["text_config"] |= T5_V1_1
    return theirs, config


BLIP2S = ["opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl", "opt-2.7b-coco", "opt-6.7b-coco", "flan-t5-xl-coco"]


@pytest.mark.parametrize("name", [*BLIP2S, "itm-vit-g", "itm-vit-g-coco"])
def test_each_key_of_the_published_blip2s_has_its_place(name, tmp_path):
    theirs, config = real_blip2(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, retrieval = theirs.state_dict(), name.startswith("itm")
    cfg, table = vit_config(tmp_path)
    with torch.device("meta"), no_init():
        model = Blip2(
            ViT(replace(cfg, depth=cfg.depth - 1)),
            QFormer(hf_qformer_config(config, retrieval)[0]),
            None,
            cfg.image_size,
        )
        if not retrieval:
            llm_cfg, family = llm_config(str(tmp_path))
            model.llm = family.kind(llm_cfg)
            model.llm_proj = torch.nn.Linear(768, model.llm.width)
    assert "fresh" not in match(model.vit, source, table, name)[1]
    parameters = sum(p.numel() for p in model.vit.parameters()) - (model.vit.pos_embed.numel() - 257 * 1408)
    assert parameters == 985_894_528
    match(model, source, HF_RETRIEVAL if retrieval else HF_BLIP2, name)
    if not retrieval:
        prefix = "language_model."
        words = {key.removeprefix(prefix): tensor for key, tensor in source.items() if key.startswith(prefix)}
        assert "fresh" not in match(model.llm, words, family.table, name)[1]


ENCODER_CLASSES = {
    "clip-vit-large-patch14": lambda: transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                           patch_size=14, image_size=224, projection_dim=768))),
    **{f"clip-vit-base-patch{patch}": lambda patch=patch: transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(patch_size=patch))) for patch in (16, 32)},
    "siglip-so400m-patch14-384": lambda: transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                           patch_size=14, image_size=384))),
    "siglip2-base-patch16-224": lambda: transformers.SiglipModel(transformers.SiglipConfig(
        text_config=dict(vocab_size=256_000))),
    "dinov2-giant": lambda: transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=1536, num_hidden_layers=40,
        num_attention_heads=24, image_size=518, patch_size=14, use_swiglu_ffn=True)),
    **{f"dinov2-{name}": lambda width=width, depth=depth: transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, image_size=518, patch_size=14))
       for name, width, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24))},
}  # fmt: skip
TEXT_CLASSES = {
    "bert-base-uncased": lambda: transformers.BertForPreTraining(transformers.BertConfig()),
    "opt-125m": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=50272, hidden_size=768,
        num_hidden_layers=12, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768)),
    "opt-350m": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=50272, hidden_size=1024,
        num_hidden_layers=24, ffn_dim=4096, num_attention_heads=16, word_embed_proj_dim=512,
        do_layer_norm_before=False)),
    **{name: lambda depth=depth, width=width: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=width * 5 // 2, num_layers=depth, num_heads=width // 64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False))
       for name, width, depth in (("flan-t5-xl", 2048, 24), ("t5-v1_1-xxl", 4096, 24))},
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODER_CLASSES | TEXT_CLASSES)
def test_each_key_of_the_published_parts_has_its_place(name, tmp_path):
    with torch.device("meta"), no_init():
        theirs = (ENCODER_CLASSES | TEXT_CLASSES)[name]()
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | (T5_V1_1 if "t5" in name else {})))
    with torch.device("meta"), no_init():
        if name in ENCODER_CLASSES:
            cfg, table = vit_config(tmp_path)
            ours = ViT(cfg)
        elif name.startswith("bert"):
            ours, table = QFormer(QFormerConfig(**bert_config(tmp_path))), BERT
        else:
            cfg, family = llm_config(str(tmp_path))
            ours, table = family.kind(cfg), family.table
    source = theirs.state_dict()
    if name.startswith("dinov2"):  # transformers 5 has other names in memory than in its files
        names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        names |= {"o_proj": "output.dense"}
        for key in [key for key in source if "gate_proj" in key]:
            (rows, *columns), device = source.pop(key).shape, source.pop(key.replace("gate", "up")).device
            source[key.replace("gate_proj", "weights_in")] = torch.empty(2 * rows, *columns, device=device)
        source = {key.replace("down_proj", "weights_out"): tensor for key, tensor in source.items()}
        source = {re.sub("[qkvo]_proj", lambda found: names[found[0]], key): tensor for key, tensor in source.items()}
    _, report = match(ours, source, table, name)
    assert "fresh" not in report or name.startswith("bert")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_checkpoint_is_without_reading_a_tensor(public, small_encoders, tmp_path, capsys):
    def inspect(path) -> str:
        weights_command(["inspect", str(path)])
        return capsys.readouterr().out

    printed = inspect("assets/tiny/blip2")
    assert "a run, stage 2, 64 px" in printed and "float16" in printed and "--llm ../opt" in printed
    printed = inspect(public("t5")[1])
    assert "a BLIP-2 of transformers with t5" in printed and "lacks the text branch" in printed
    parameters = sum(parameter.numel() for parameter in public("t5")[0].language_model.parameters())
    assert re.search(rf"language model +\d+ +{parameters:,} ", printed)
    printed = inspect(public("retrieval")[1])
    assert "a BLIP-2 of transformers for retrieval" in printed and "lacks ITC's temperature and ITG's head" in printed
    for stage, vit, what in ((1, None, "stage 1, without a ViT"), (2, "eva-g", "stage 2, with its ViT")):
        lavis_checkpoint(tmp_path / "lavis.pth", stage, vit, "opt")
        assert f"a LAVIS checkpoint, {what}" in inspect(tmp_path / "lavis.pth")
    assert "assets/tiny/opt: opt" in inspect("assets/tiny/opt")
    with pytest.raises(UserError, match="does not exist: expected a checkpoint folder or file"):
        inspect(tmp_path / "nowhere")


def test_inspect_lists_the_vit_of_a_fine_tuned_run(retrieval_run, capsys):
    weights_command(["inspect", str(retrieval_run)])
    printed = capsys.readouterr().out
    assert "a run, stage retrieval, 64 px" in printed and "--vit" not in printed and "ViT " in printed
