"""What is exported opens in transformers, and in LAVIS's layout, with the same weights and the same answers.

The tables that read a public format write it too. What a format cannot hold is refused, and nothing is written.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import LLMS, ROOT, roughen, shared, small_qformer, stage2_model
from public_checkpoints import (
    CLASSES,
    COUNTER,
    ENCODER_SHAPES,
    ENCODERS,
    T5_V1_1,
    lavis_checkpoint,
    public_blip2,  # noqa: F401  the fixture `public`
    random_tensors,
)
from safetensors import safe_open
from safetensors.torch import load_file

import train
from blip2 import Blip2
from engine.errors import UserError
from llm import OPTConfig, T5Config
from qformer import QFormerConfig
from sources.images import eval_transform
from sources.shapes import ShapesWorld
from tools.weights import main as weights_command
from vit import PRESETS, SIGLIP, ViT, ViTConfig
from weights import configs, export
from weights.load import load, open_tensors, unload, weight_files
from weights.tables import BERT, CLIP_BARE, DINOV2, EVA, HF_BLIP2_VIT, OPT_TABLE, T5_TABLE

transformers = pytest.importorskip("transformers")
IMAGE = ROOT / "assets/tiny/picture.png"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- tables work in both directions ----------------------------------------------------------------------------------

# Every field other than its default, as far as the format has it.
ODD_VIT = dict(width=24, depth=5, heads=3, mlp=72, patch_size=7, image_size=21, eps=1e-3)
ODD_BERT = dict(vocab_size=51, width=24, depth=5, heads=3, mlp=40, max_positions=33, dropout=0.3, eps=1e-3)
ODD_OPT = dict(vocab_size=51, width=24, depth=5, heads=3, mlp=40, max_positions=33, embed_width=12, pre_norm=False)
ODD_T5 = dict(vocab_size=51, width=24, depth=5, decoder_depth=4, heads=3, head_width=6, mlp=40, buckets=16, pad_id=3)
FAMILIES = {  # model_type -> field table, configuration, what config.json says besides
    "dinov2": (configs.DINOV2_FIELDS, ViTConfig(**ODD_VIT), {"mlp_ratio": 3}),
    "clip_vision_model": (
        configs.CLIP_FIELDS,
        ViTConfig(**ODD_VIT, act="gelu", ln_pre=True, conv_bias=False, align_corners=True),
        {},
    ),
    "siglip_vision_model": (configs.SIGLIP_FIELDS, ViTConfig(**ODD_VIT, act="gelu", **SIGLIP), {}),
    "blip_2_vision_model": (configs.BLIP2_VIT_FIELDS, ViTConfig(**ODD_VIT, key_bias=False), {}),
    "bert": (configs.BERT_FIELDS, QFormerConfig(**ODD_BERT, init_std=0.5), {}),
    "blip_2_qformer": (configs.QFORMER_FIELDS, QFormerConfig(**ODD_BERT, image_width=15, cross_every=3), {}),
    "opt": (configs.OPT_FIELDS, OPTConfig(**ODD_OPT), {}),
    "t5": (
        configs.T5_FIELDS,
        T5Config(**ODD_T5, max_distance=99, eps=1e-3, act="gelu"),
        {"feed_forward_proj": "gated-gelu", **T5_V1_1},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_field_tables_read_what_they_write(family, tmp_path):
    """Our configuration -> config.json -> our configuration."""
    fields, cfg, more = FAMILIES[family]
    written = {"model_type": family} | configs.write_fields(fields, cfg) | more
    (tmp_path / "config.json").write_text(json.dumps(written))
    if family == "bert":
        found = QFormerConfig(**configs.bert_config(tmp_path) | {"vocab_size": written["vocab_size"]})  # [DEC] is ours
    elif family == "blip_2_qformer":
        found = configs.hf_qformer_config({"qformer_config": written}, retrieval=True)[0]
    elif family in ("opt", "t5"):
        found = configs.llm_config(str(tmp_path))[0]
    else:
        if family == "blip_2_vision_model":  # its place is a whole BLIP-2; published without its last block
            written = {"model_type": "blip-2", "vision_config": written | {"num_hidden_layers": cfg.depth - 1}}
            (tmp_path / "config.json").write_text(json.dumps(written))
        found = configs.vit_config(tmp_path)[0]
    assert found == cfg


def test_field_tables_have_the_names_and_the_defaults_of_transformers():
    classes = {"blip_2_qformer": "Blip2QFormerConfig", "blip_2_vision_model": "Blip2VisionConfig"}
    classes |= {"dinov2": "Dinov2Config", "clip_vision_model": "CLIPVisionConfig", "bert": "BertConfig"}
    classes |= {"opt": "OPTConfig", "t5": "T5Config", "siglip_vision_model": "SiglipVisionConfig"}
    for family, (fields, _, _) in FAMILIES.items():
        theirs = getattr(transformers, classes[family])()
        as_another = {"word_embed_proj_dim": theirs.hidden_size, "num_decoder_layers": theirs.num_hidden_layers}
        for name, default in fields.values():
            assert getattr(theirs, name) == (as_another[name] if default is None else default), (family, name)


VITS = {
    "EVA": (EVA, ENCODERS["eva-g"]),
    "CLIP, bare": (CLIP_BARE, ENCODERS["clip-l"]),
    "DINOv2": (DINOV2, ViTConfig(12, 2, 2, 24, 4, 8)),
    "BLIP-2 of transformers": (HF_BLIP2_VIT, ENCODERS["eva-g"]),
}


@pytest.mark.parametrize("name", VITS)
def test_key_tables_of_encoders_read_what_they_write(name):
    table, cfg = VITS[name]
    vit, other = roughen(ViT(cfg)), ViT(cfg)
    load(other, unload(vit, table), table, "round trip")
    assert same(vit, other)


@pytest.mark.parametrize("kind, table", [("opt", OPT_TABLE), ("t5", T5_TABLE)])
def test_key_tables_of_language_models_read_what_they_write(kind, table):
    llm, other = (stage2_model(kind).llm for _ in range(2))
    load(roughen(other), unload(llm, table), table, "round trip")
    assert same(llm, other)


def test_berts_key_table_keeps_everything_but_dec():
    bert, other = small_qformer(0), small_qformer(1)
    load(other, unload(bert, BERT), BERT, "round trip")
    assert torch.equal(bert.word_embedding.weight[:-1], other.word_embedding.weight[:-1])
    assert not torch.equal(bert.word_embedding.weight[-1], other.word_embedding.weight[-1])  # [DEC] is new
    assert torch.equal(bert.position_embedding.weight, other.position_embedding.weight)
    assert torch.equal(bert.lm_head.bias[:-1], other.lm_head.bias[:-1]) and other.lm_head.bias[-1] == 0
    for a, b in zip(bert.blocks, other.blocks, strict=True):
        assert same(a.attn, b.attn) and same(a.ffn_text, b.ffn_text)


# --- transformers ----------------------------------------------------------------------------------------------------


def reopened(folder: Path, caplog):
    """The model and the processor that transformers opens, with nothing missing and without a warning."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    caplog.clear()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        processor = transformers.Blip2Processor.from_pretrained(folder)
    assert not any(report.values()), report
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    return model.eval(), processor


def query_out(theirs, pixels: torch.Tensor) -> torch.Tensor:
    """(N, Q, D) of a transformers model."""
    with torch.no_grad():
        image = theirs.vision_model(pixels).last_hidden_state
        queries = theirs.query_tokens.expand(len(pixels), -1, -1)
        return theirs.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_of_transformers_comes_in_and_goes_out_with_the_same_weights(kind, public, tmp_path, caplog):
    """And its processor reads an image and a text as ours do."""
    theirs, folder = public(kind)
    ours = Blip2.from_pretrained(folder)
    weights_command(["export", str(folder), str(tmp_path / "out"), "--format", "hf"])
    again, processor = reopened(tmp_path / "out", caplog)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(query_out(theirs, pixels), query_out(again, pixels))
    assert torch.allclose(ours.encode_tokens(ours.vit(pixels)).query_out, query_out(theirs, pixels), atol=1e-5)

    text = "a small white cross" if kind == "retrieval" else "Question: what is it? Answer:"
    image = transformers.image_utils.load_image(str(IMAGE))
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = ours.tokenizer.encode([text])[0] if kind == "retrieval" else ours.llm_tokenizer.encode_prompts([text])[0]
    queries = [] if kind == "retrieval" else [again.config.image_token_index] * 3
    assert inputs["input_ids"][0].tolist() == queries + ids
    pixels = ours.vit.normalize(eval_transform(image, ours.image_size)[None])
    assert torch.allclose(inputs["pixel_values"], pixels, atol=1e-4)


@pytest.mark.parametrize("had_row", [True, False])
def test_the_image_token_gets_a_row_where_the_words_lack_one(had_row, public, tmp_path):
    theirs, folder = public("opt", image_token=had_row)
    export.export(Blip2.from_pretrained(folder), "hf", tmp_path / "out", "fp32")
    rows = load_file(tmp_path / "out/model.safetensors")["language_model.model.decoder.embed_tokens.weight"]
    own = theirs.language_model.model.decoder.embed_tokens.weight
    assert torch.equal(rows[: len(own)], own) and len(rows) == len(own) + (not had_row)


def test_a_trained_run_answers_the_same_in_transformers(tmp_path, caplog):
    """The run that ships with the code; transformers' processor reads the image and the question."""
    weights_command(["export", str(ROOT / "assets/tiny/blip2"), str(tmp_path / "out"), "--format", "hf"])
    theirs, processor = reopened(tmp_path / "out", caplog)
    prompt = "Question: what color is the star? Answer:"
    inputs = processor(images=transformers.image_utils.load_image(str(IMAGE)), text=prompt, return_tensors="pt")
    ids = theirs.generate(**inputs, num_beams=5, length_penalty=-1.0, min_new_tokens=1, max_new_tokens=10)
    answer = processor.batch_decode(ids, skip_special_tokens=True)[0].removeprefix(prompt).strip()
    assert answer == Blip2.from_pretrained(tmp_path / "out").ask(IMAGE, "what color is the star?") == "green"


def test_a_fine_tuned_run_is_exported_with_its_own_vit(retrieval_run, tmp_path, caplog):
    """And with the position table of the image size that it takes."""
    model = Blip2.from_pretrained(retrieval_run)
    before = Blip2.build("assets/tiny/vit", "assets/tiny/bert", image_size=64)[0].vit
    assert not torch.equal(model.vit.blocks[0].fc1.weight, before.blocks[0].fc1.weight)
    model.image_size = 48
    notes = export.export(model, "hf", tmp_path / "hf", "fp32")
    assert any("ln_vision has eps 1e-05 here and 1e-06 there" in note for note in notes)
    theirs, processor = reopened(tmp_path / "hf", caplog)
    assert theirs.config.vision_config.image_size == 48
    again, image = Blip2.from_pretrained(tmp_path / "hf"), ShapesWorld("train").image(0)
    processor.save_pretrained(tmp_path / "again")  # in the files of its release
    assert configs.image_norm(tmp_path / "again") == {"mean": model.vit.cfg.mean, "std": model.vit.cfg.std}
    assert again.image_size == 48 and torch.equal(again.vit.blocks[0].fc1.weight, model.vit.blocks[0].fc1.weight)
    wanted = model.encode_image(image)
    torch.testing.assert_close(again.encode_image(image).feats, wanted.feats, rtol=0, atol=1e-4)  # the other eps
    pixels = processor(images=image, text="", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(query_out(theirs, pixels), wanted.query_out, rtol=0, atol=1e-3)


def test_shards_are_written_as_their_index_says(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 100)
    tensors = {name: torch.randn(n) for name, n in (("a", 20), ("b", 10), ("c", 3), ("d", 40))}
    export.write_shards(tmp_path, tensors, torch.float32)
    files = weight_files(tmp_path)
    assert len(files) == 3  # a; b and c; d
    found = open_tensors(files)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# --- LAVIS -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_encoders(monkeypatch):
    """The names "eva-g" and "clip-l" stand for small encoders; depth and image size come from the file."""
    for name, cfg in ENCODERS.items():
        monkeypatch.setitem(PRESETS, name, cfg)


def round_trip(path: Path, tensors: dict, **folders) -> Blip2:
    """In and out: the same names and the same values; and a run that is made of it finds the ViT again."""
    model = Blip2.from_pretrained(path, **folders)
    export.export(model, "lavis", path.with_name("out.pth"), "fp32")
    out = torch.load(path.with_name("out.pth"), weights_only=True)["model"]
    assert out.keys() - {COUNTER} == tensors.keys() - {COUNTER}
    assert all(torch.equal(out[key], tensors[key]) for key in out.keys() - {COUNTER})
    assert torch.equal(out[COUNTER], torch.arange(model.qformer.cfg.max_positions)[None])
    model.save_pretrained(path.with_name("run"))
    assert same(model, Blip2.from_pretrained(path.with_name("run")))
    return model


@pytest.mark.parametrize("vit", ENCODERS)
def test_a_lavis_checkpoint_of_stage_1_comes_in_and_goes_out_the_same(vit, small_encoders, tmp_path):
    tensors = lavis_checkpoint(tmp_path / "tuned.pth", 1, vit)
    round_trip(tmp_path / "tuned.pth", tensors, vit=vit, bert="assets/tiny/bert")


@pytest.mark.parametrize("llm", LLMS)
def test_a_lavis_checkpoint_of_stage_2_comes_in_and_goes_out_the_same(llm, small_encoders, tmp_path):
    """blip2_caption_*: with its fine-tuned ViT, without text branch."""
    tensors = lavis_checkpoint(tmp_path / "tuned.pth", 2, "eva-g", llm)
    model = round_trip(tmp_path / "tuned.pth", tensors, vit="eva-g", llm=str(ROOT / LLMS[llm]))
    assert Blip2.from_pretrained(tmp_path / "run").llm.cfg == model.llm.cfg


@pytest.mark.parametrize("vit", ENCODERS)
def test_a_vit_from_laviss_own_file_stays_out(vit, small_encoders, tmp_path):
    """LAVIS reads it from there."""
    cfg = ENCODERS[vit]
    published = ViTConfig(**vars(cfg) | {"depth": cfg.depth + 1})
    torch.save(random_tensors(ENCODER_SHAPES[vit](published)), tmp_path / "vit.pth")
    tensors = lavis_checkpoint(tmp_path / "blip2.pth", 1, None, image_width=cfg.width)
    spec = f"{vit}:{tmp_path / 'vit.pth'}"
    model = round_trip(tmp_path / "blip2.pth", tensors, vit=spec, bert="assets/tiny/bert")
    assert f"without its ViT, which LAVIS reads from its own file ({spec})" in export.export(
        model, "lavis", tmp_path / "again.pth", "fp32"
    )


def test_the_golden_checkpoint_of_lavis_comes_in_and_goes_out_the_same(tmp_path, monkeypatch):
    with safe_open(shared("golden/stage1_a.safetensors"), "pt") as file:
        cfg, vocab = (json.loads(file.metadata()[name]) for name in ("config", "vocab"))
        tensors = {key[2:]: file.get_tensor(key) for key in file.keys() if key.startswith("w.")}
    architecture = ViTConfig(cfg["vit_dim"], 9, cfg["vit_heads"], cfg["vit_mlp"], cfg["patch"], key_bias=False)
    monkeypatch.setitem(PRESETS, "eva-g", architecture)  # depth and image size come from the file
    bert = tmp_path / "bert"
    bert.mkdir()
    sizes = {"hidden_size": cfg["hidden"], "num_hidden_layers": cfg["layers"], "num_attention_heads": cfg["heads"]}
    sizes |= {"intermediate_size": cfg["mlp"], "max_position_embeddings": cfg["max_pos"], "vocab_size": len(vocab) - 1}
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (bert / "vocab.txt").write_text("\n".join(vocab[:-1]) + "\n")
    torch.save({"model": tensors}, tmp_path / "tuned.pth")
    round_trip(tmp_path / "tuned.pth", tensors, vit="eva-g", bert=str(bert))


# --- a run of a public checkpoint ------------------------------------------------------------------------------------


def test_a_public_checkpoint_is_made_a_run_to_train_from(public, tmp_path, monkeypatch):
    """Stage 2 continues with its projection."""
    monkeypatch.setattr(train, "final_evaluation", lambda *_: None)
    folder, run, out = public("opt")[1], tmp_path / "run", tmp_path / "out"
    flags = "--stage 2 --steps 2 --batch 4 --eval-every 0 --precision fp32 --device cpu --lr 1e-6".split()
    with pytest.raises(UserError, match="make one of it with python -m tools.weights export .* --format run runs/opt"):
        train.main([*flags, "--init", str(folder), "--out", str(out)])
    weights_command(["export", str(folder), str(run), "--format", "run"])
    start = Blip2.from_pretrained(run)
    train.main([*flags, "--init", str(run), "--out", str(out)])
    end = Blip2.from_pretrained(out)
    assert torch.allclose(start.llm_proj.weight, end.llm_proj.weight, atol=1e-4)
    assert not torch.equal(start.llm_proj.weight, end.llm_proj.weight)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    model = Blip2.from_pretrained(ROOT / "assets/tiny/blip2")
    with pytest.raises(UserError, match="neither an EVA-CLIP nor a CLIP encoder, and LAVIS knows no other: .* hf"):
        export.export(model, "lavis", tmp_path / "out.pth", "fp32")
    model.vit.cfg = ViTConfig(96, 6, 3, 384, ln_pre=True)
    with pytest.raises(UserError, match="has a norm before its blocks .CLIP., which transformers' BLIP-2 classes"):
        export.export(model, "hf", tmp_path / "out", "fp32")
    for odd, what in (({"cls_token": False}, r"no .CLS. .SigLIP."), ({"act": "swiglu"}, "gates in its feed-forwards")):
        model.vit.cfg = ViTConfig(96, 6, 3, 384, **odd)
        sentence = f"tiny/vit has {what}.*, which transformers' BLIP-2 classes cannot hold: export with --format run"
        with pytest.raises(UserError, match=sentence):
            export.export(model, "hf", tmp_path / "out", "fp32")
        with pytest.raises(UserError, match="LAVIS knows no other: export with --format run"):
            export.export(model, "lavis", tmp_path / "out.pth", "fp32")
    model.sources["vit"].files = []
    with pytest.raises(UserError, match="has random weights, which are not worth exporting"):
        export.export(model, "hf", tmp_path / "out", "fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "lavis"])
@pytest.mark.parametrize("part", ["model", "vit"])
def test_a_tensor_that_the_format_has_no_place_for_ends_the_export(part, form, small_encoders, tmp_path):
    """A module, or a buffer, that somebody has added."""
    lavis_checkpoint(tmp_path / "tuned.pth", 1, "eva-g")
    model = Blip2.from_pretrained(tmp_path / "tuned.pth", vit="eva-g", bert="assets/tiny/bert")
    owner = model.vit if part == "vit" else model
    owner.extra, owner.more = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
    sentence = r"no place for 7 of the \d+ tensors of \w+ .extra.weight, extra.bias, more.weight, \.\.\."
    with pytest.raises(UserError, match=sentence):
        export.export(model, form, tmp_path / "out.pth", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.pth"]


@pytest.mark.parametrize("form", ["hf", "lavis"])
def test_a_q_former_that_reads_the_question_is_refused(form, vqa_run, tmp_path):
    sentence = f"reads the question too .--stage vqa., which BLIP-2 in {form} cannot: use it here"
    with pytest.raises(UserError, match=sentence):
        export.export(Blip2.from_pretrained(vqa_run), form, tmp_path / "out", "fp32")
    assert not list(tmp_path.iterdir())


def test_an_export_overwrites_nothing(tmp_path):
    model = Blip2.from_pretrained(ROOT / "assets/tiny/blip2")
    (tmp_path / "there").mkdir()

    for out, sentence in {
        "there": "exists already: pass another name, or remove it first",
        "no/out": "does not exist, create it first",
    }.items():
        with pytest.raises(UserError, match=sentence):
            export.export(model, "run", tmp_path / out, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.export(Blip2.from_pretrained(ROOT / "assets/tiny/blip2"), "hf", tmp_path / "out", "fp32")
    assert not list(tmp_path.iterdir())
