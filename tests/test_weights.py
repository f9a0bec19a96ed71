"""Loading is strict: every key used or ignored for a reason, every parameter filled or fresh, all problems told."""

import copy
import json
import re

import pytest
import torch
from conftest import roughen, small_model, small_qformer
from safetensors.torch import save_file

from blip2 import Blip2
from data import UserError
from formats import BERT, CLIP_BARE, DINOV2, EVA, LAVIS_STAGE1, Table, both
from qformer import QFormer, QFormerConfig, copy_text_ffn_to_queries
from vit import ViT, ViTConfig
from weights import load, load_bert, load_vit, open_tensors, sha256, unload


def toy():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))


TOY = Table(
    [*both("a", "0"), *both("b", "1")],
    ignored={r"junk\..*": "junk"},
)


def toy_tensors(**changes):
    tensors = {
        "a.weight": torch.ones(3, 2),
        "a.bias": torch.ones(3),
        "b.weight": torch.ones(1, 3),
        "b.bias": torch.ones(1),
    }
    return {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}


def test_every_key_is_accounted_for():
    model = toy()
    account = load(model, toy_tensors(**{"junk.x": torch.ones(1)}), TOY, "toy")
    assert account == "toy: 4 used, 1 ignored (junk)"
    assert all((p == 1).all() for p in model.parameters())


def test_all_problems_are_told_at_once_and_nothing_is_changed():
    model, before = toy(), copy.deepcopy(toy().state_dict())
    model.load_state_dict(before)
    bad = toy_tensors(**{"a.weight": torch.ones(2, 2), "b.bias": None, "c.weight": torch.ones(5)})
    with pytest.raises(UserError) as error:
        load(model, bad, TOY, "toy.safetensors")
    message = str(error.value)
    assert "toy.safetensors does not fit, nothing was loaded; 3 problem(s)" in message
    assert "shape: a.weight gives (2, 2), 0.weight is (3, 2)" in message
    assert "missing: nothing for 1.bias (1,), wanted b.bias" in message
    assert "unknown: c.weight (5,) has no place here" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fresh_parameters_need_a_reason():
    table = Table(TOY.rows[:2], fresh={r"1\..*": "the head"})
    assert (
        load(toy(), toy_tensors(**{"b.weight": None, "b.bias": None}), table, "toy")
        == "toy: 2 used, 2 fresh (the head)"
    )


# --- each format, from the public names back to the same function


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("table, key_bias, conv_bias", [(EVA, False, True), (DINOV2, True, True)])
def test_image_encoders_round_trip(table, key_bias, conv_bias):
    cfg = ViTConfig(8, depth=2, heads=2, mlp=12, patch_size=4, image_size=8, key_bias=key_bias, conv_bias=conv_bias)
    vit, other = roughen(ViT(cfg)), ViT(cfg)
    load(other, unload(vit, table), table, "round trip")
    assert same(vit, other)


def lavis_clip(cfg: ViTConfig) -> dict[str, torch.Tensor]:
    """Random tensors under the names of clip_vit_L.pth, one block more than `cfg` has, norm and projection too."""
    V, mlp = cfg.width, cfg.mlp
    shapes = {
        "class_embedding": (V,),
        "positional_embedding": ((cfg.image_size // cfg.patch_size) ** 2 + 1, V),
        "conv1.weight": (V, 3, cfg.patch_size, cfg.patch_size),
        **{f"{norm}.{kind}": (V,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        "proj": (V, 4),
    }
    for block in range(cfg.depth + 1):
        shapes |= {
            f"transformer.resblocks.{block}.{name}": shape
            for name, shape in {
                "attn.in_proj_weight": (3 * V, V),
                "attn.in_proj_bias": (3 * V,),
                "attn.out_proj.weight": (V, V),
                "attn.out_proj.bias": (V,),
                "ln_1.weight": (V,),
                "ln_1.bias": (V,),
                "ln_2.weight": (V,),
                "ln_2.bias": (V,),
                "mlp.c_fc.weight": (mlp, V),
                "mlp.c_fc.bias": (mlp,),
                "mlp.c_proj.weight": (V, mlp),
                "mlp.c_proj.bias": (V,),
            }.items()
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_bare_clip_file_is_the_same_encoder_as_transformers_clip(tmp_path):
    """clip_vit_L.pth has fused qkv and its own names; transformers has them apart. One function."""
    transformers = pytest.importorskip("transformers")
    cfg = ViTConfig(16, 2, 4, 24, 4, 16, act="quick_gelu", eps=1e-5, ln_pre=True, conv_bias=False, align_corners=True)
    bare = lavis_clip(cfg)
    last = r"transformer\.resblocks\.2\..*"
    vit = ViT(cfg)
    account = load(vit, bare, Table(CLIP_BARE.rows, {last: "last block"} | CLIP_BARE.ignored), "bare")
    assert "12 ignored (last block)" in account and "3 ignored (the final norm and projection, unused)" in account

    config = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, patch_size=4, image_size=16
    )
    peer = transformers.CLIPVisionModel(config).eval()
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
        for theirs, hf in names.items():
            key = key.replace(theirs, hf)
        if "attn.in_proj" in key:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = chunk
        elif key != "proj":
            state[key] = tensor
    peer.load_state_dict({**peer.state_dict(), **state})
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            vit(images), peer(images, output_hidden_states=True).hidden_states[-2], rtol=0, atol=1e-4
        )


def test_bert_round_trip_keeps_everything_but_dec():
    ours, other = small_qformer(0), small_qformer(1)
    load(other, unload(ours, BERT), BERT, "round trip")
    assert torch.equal(ours.word_embedding.weight[:-1], other.word_embedding.weight[:-1])
    assert not torch.equal(ours.word_embedding.weight[-1], other.word_embedding.weight[-1])  # [DEC] is new
    assert torch.equal(ours.lm_head.bias[:-1], other.lm_head.bias[:-1]) and other.lm_head.bias[-1] == 0
    for a, b in zip(ours.blocks, other.blocks, strict=True):
        assert same(a.attn, b.attn) and same(a.ffn_text, b.ffn_text)


def test_berts_names_of_2018_are_understood():
    """bert-base-uncased as its hub serves it: the prefix `bert.`, gamma and beta, a pooler."""
    ours, other = small_qformer(0), small_qformer(1)
    old = {}
    for key, tensor in unload(ours, BERT).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[key if key.startswith("cls.") else f"bert.{key}"] = tensor
    old |= {"bert.pooler.dense.weight": torch.ones(16, 16), "cls.seq_relationship.bias": torch.ones(2)}
    account = load(other, old, BERT, "bert")
    assert "2 ignored (BERT's next-sentence head)" in account
    assert torch.equal(ours.embedding_ln.weight, other.embedding_ln.weight)


def test_lavis_stage1_checkpoint_loads_into_the_whole_model():
    """Nothing is left over or missing but the ViT, which is in a file of its own."""
    model = small_model()
    tensors = unload(model, LAVIS_STAGE1)
    tensors |= {
        "Qformer.cls.predictions.decoder.weight": torch.ones(30, 16),
        "Qformer.cls.predictions.decoder.bias": torch.ones(30),
        "Qformer.bert.embeddings.position_ids": torch.arange(20)[None],
    }
    other = small_model(seed=1)
    account = load(other, tensors, LAVIS_STAGE1, "lavis")
    assert "fresh (the frozen ViT)" in account
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.startswith("vit."):
            assert torch.equal(a, b), name


def lavis_keys() -> set[str]:
    """The names in blip2_pretrained.pth, spelt out."""
    attention = ["self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"]
    feed_forward = ["intermediate.dense", "output.dense", "output.LayerNorm"]
    feed_forward += ["intermediate_query.dense", "output_query.dense", "output_query.LayerNorm"]
    modules = ["ln_vision", "vision_proj", "text_proj", "itm_head", "Qformer.bert.embeddings.LayerNorm"]
    modules += [f"Qformer.cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "decoder")]
    for block in range(12):
        parts = [f"attention.{name}" for name in attention] + feed_forward
        parts += [f"crossattention.{name}" for name in attention] if block % 2 == 0 else []
        modules += [f"Qformer.bert.encoder.layer.{block}.{part}" for part in parts]
    single = {"query_tokens", "temp", "Qformer.cls.predictions.bias", "Qformer.bert.embeddings.position_ids"}
    single |= {f"Qformer.bert.embeddings.{name}_embeddings.weight" for name in ("word", "position")}
    return single | {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


def test_lavis_checkpoint_opens_as_a_model(tmp_path):
    """The file, and the two folders that say its architecture."""
    folders = dict(vit="assets/tiny/vit", bert="assets/tiny/bert")
    model, _ = Blip2.build(**folders, num_queries=4)
    for part in (model.qformer, model.ln_vision, model.vision_proj, model.text_proj, model.itm_head):
        roughen(part)
    torch.save({"model": unload(model, LAVIS_STAGE1)}, tmp_path / "blip2.pth")
    opened = Blip2.from_pretrained(tmp_path / "blip2.pth", **folders)
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, opened.trained_state()[name]), name


@pytest.mark.parametrize("image_width", [1408, 1024])
def test_real_lavis_checkpoint_has_346_keys_and_each_has_its_place(image_width):
    """The real sizes on the meta device: 336 keys of the Q-Former and 10 others, all used or ignored for a reason."""
    with torch.device("meta"):
        vit = ViT(ViTConfig(image_width, 1, 16, 8, key_bias=False))
        model = Blip2(vit, QFormer(QFormerConfig(image_width=image_width)), texts=None)
    real = lavis_keys()
    assert len(real) == 346
    theirs = set(unload(model, LAVIS_STAGE1))
    unused = real - theirs
    assert theirs <= real and all(any(re.fullmatch(p, key) for p in LAVIS_STAGE1.ignored) for key in unused)
    assert {key.rpartition(".")[0] for key in unused} == {"Qformer.cls.predictions.decoder", "Qformer.bert.embeddings"}
    assert (
        sum(p.numel() for n, p in model.named_parameters() if not n.startswith("vit."))
        == {
            1408: 186_705_470,
            1024: 183_165_758,
        }[image_width]
    )


# --- folders


def save_encoder(folder, **changes):
    """A small DINOv2 folder."""
    cfg = ViTConfig(8, depth=3, heads=2, mlp=16, patch_size=4, image_size=8)
    tensors = unload(roughen(ViT(cfg)), DINOV2)
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        model_type="dinov2",
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=4,
        image_size=8,
    )
    (folder / "config.json").write_text(json.dumps(config | changes))
    return tensors


def test_last_block_is_dropped_unless_asked_for(tmp_path):
    save_encoder(tmp_path)
    vit, account, _ = load_vit(str(tmp_path))
    assert len(vit.blocks) == 2 and "18 ignored (the last block, dropped (paper 3.4))" in account
    assert len(load_vit(str(tmp_path), last_block=True)[0].blocks) == 3


def test_mean_and_std_come_from_the_preprocessor_then_config_then_clip(tmp_path):
    save_encoder(tmp_path)
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.48145466, 0.4578275, 0.40821073)
    save_encoder(tmp_path, image_mean=[0.1, 0.2, 0.3])
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    assert load_vit(str(tmp_path))[0].cfg.mean == (0.4, 0.5, 0.6)


def test_shards_and_pickles_are_read_like_one_file(tmp_path):
    tensors = save_encoder(tmp_path)
    whole = load_vit(str(tmp_path))[0]
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(whole, load_vit(str(tmp_path))[0])

    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-2.safetensors"):
        load_vit(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(whole, load_vit(str(tmp_path))[0])


def test_pickles_that_would_run_code_are_refused(tmp_path):
    torch.save({"model": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read"):
        open_tensors([tmp_path / "evil.pth"])


def test_names_build_random_weights_and_say_so_loudly(monkeypatch):
    import weights

    monkeypatch.setitem(weights.PRESETS, "eva-g", ViTConfig(8, depth=2, heads=2, mlp=16, key_bias=False))
    vit, account, files = load_vit("eva-g")
    assert "RANDOM WEIGHTS" in account and files == [] and len(vit.blocks) == 2


def test_bare_file_needs_the_architectures_name(tmp_path, monkeypatch):
    import weights

    cfg = ViTConfig(8, depth=2, heads=2, mlp=16, patch_size=4, image_size=8, key_bias=False)
    monkeypatch.setitem(weights.PRESETS, "eva-g", cfg)
    complete = roughen(ViT(ViTConfig(8, 3, 2, 16, 4, 8, key_bias=False)))
    tensors = unload(complete, EVA) | {
        "norm.weight": torch.ones(8),
        "norm.bias": torch.ones(8),
        "head.weight": torch.ones(1),
    }
    torch.save(tensors, tmp_path / "eva.pth")
    vit, account, _ = load_vit(f"eva-g:{tmp_path / 'eva.pth'}")
    assert len(vit.blocks) == 2 and "3 ignored (the final norm and head, unused)" in account
    assert torch.equal(vit.blocks[1].fc1.weight, complete.blocks[1].fc1.weight)


def test_query_feed_forward_is_copied_from_bert(tmp_path):
    bert = small_qformer()
    save_file(unload(bert, BERT), tmp_path / "model.safetensors")
    config = dict(
        model_type="bert",
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _, _ = load_bert(str(tmp_path), image_width=10)
    for ours, theirs in zip(model.blocks, bert.blocks, strict=True):
        assert same(ours.ffn_query, theirs.ffn_text) and same(ours.ffn_text, theirs.ffn_text)
    other = load_bert(str(tmp_path), image_width=10)[0]
    copy_text_ffn_to_queries(other)
    assert same(other.blocks[0].ffn_query, model.blocks[0].ffn_query)


def test_hash_is_of_the_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "c").write_bytes(b"abd")
    assert sha256([tmp_path / "a"]) == sha256([tmp_path / "b"]) != sha256([tmp_path / "c"])
