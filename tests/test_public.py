"""Public weights in and out: what transformers or the original saved opens here and computes the same, and back."""

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLMS, ROOT, roughen, small_model
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN

import formats
import train
import weights
from blip2 import Blip2
from data import LLMTexts, UserError, eval_transform
from llm import OPT, PRESETS, T5
from vit import ViTConfig

transformers = pytest.importorskip("transformers")

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
QFORMER = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=16)
KINDS = {"opt": "Blip2ForConditionalGeneration", "t5": "Blip2ForConditionalGeneration"} | {
    "retrieval": "Blip2ForImageTextRetrieval"
}


def random_blip2(kind: str, folder: Path, seed: int = 0, bare_words: bool = False) -> torch.nn.Module:
    """A small random BLIP-2 of transformers, saved into the folder; OPT has a row for the image token or not."""
    torch.manual_seed(seed)
    text = None
    qformer = QFORMER | {"vocab_size": 40}
    tokenizer = ROOT / "assets/tiny" / ("bert" if kind == "retrieval" else kind)
    if kind == "retrieval":
        words = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 1
        qformer |= {"vocab_size": words, "use_qformer_text_input": True}
    else:
        words = LLMTexts(ROOT / LLMS[kind], {"opt": OPT, "t5": T5}[kind].layout).vocab_size + (not bare_words)
    if kind == "opt":
        text = transformers.OPTConfig(
            vocab_size=words, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=80,
        ).to_dict()  # fmt: skip
    elif kind == "t5":
        text = transformers.T5Config(
            vocab_size=words, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0,
        ).to_dict()  # fmt: skip
        text |= {"dense_act_fn": "gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False}
    config = transformers.Blip2Config(
        vision_config=VISION | {"patch_size": 14}, qformer_config=qformer, text_config=text, num_query_tokens=3,
        image_text_hidden_size=6,
        image_token_index=None if bare_words or kind == "retrieval" else words - 1,
    )  # fmt: skip
    model = roughen(getattr(transformers, KINDS[kind])(config), seed).eval()
    with torch.no_grad():  # EVA-CLIP has no bias of the keys
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[16:32] = 0
    model.save_pretrained(folder)
    if kind == "t5":  # transformers 5 saves v1.1 and v1.0 alike
        saved = json.loads((folder / "config.json").read_text())
        saved["text_config"] |= {"scale_decoder_outputs": False, "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(saved))
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return model


def reopened(folder: Path, caplog):
    """What transformers opens, without a warning and with nothing missing."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    caplog.clear()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        processor = transformers.Blip2Processor.from_pretrained(folder)
    assert not any(told.values()), told
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    return model.eval(), processor


def as_images(model: Blip2, picture) -> torch.Tensor:
    """uint8 (1, 3, H, W), as `encode_image` makes it."""
    return eval_transform(picture, model.image_size)[None]


def visual(model) -> torch.Tensor:
    """(1, Q, D): what the queries of a transformers model say of the same noise."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image = model.vision_model(pixels).last_hidden_state
        return model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=image).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_models_come_in_and_go_out_with_the_same_weights(kind, tmp_path, caplog, capsys):
    theirs = random_blip2(kind, tmp_path / "theirs")
    ours = Blip2.from_pretrained(tmp_path / "theirs")
    said = capsys.readouterr().out
    assert ("ITG's head" in said and "ITC's temperature" in said) if kind == "retrieval" else "the text branch" in said
    weights.main(["export", str(tmp_path / "theirs"), str(tmp_path / "out"), "--format", "hf"])
    again, processor = reopened(tmp_path / "out", caplog)
    text = "a small white cross" if kind == "retrieval" else "Question: what is it? Answer:"
    picture = transformers.image_utils.load_image(str(ROOT / "assets/tiny/picture.png"))
    given = processor(images=picture, text=text, return_tensors="pt")
    read = ours.texts.encode([text])[0] if kind == "retrieval" else ours.llm_texts.encode_prompts([text])[0]
    queries = [] if kind == "retrieval" else [again.config.image_token_index] * 3
    assert given["input_ids"][0].tolist() == queries + read
    assert torch.allclose(given["pixel_values"], ours.vit.normalize(as_images(ours, picture)), atol=1e-4)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(visual(theirs), visual(again))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(ours.encode_tokens(ours.vit(pixels)).query_out, visual(theirs), atol=1e-5)
    assert torch.equal(theirs.query_tokens[0], ours.qformer.queries.view(3, 16))


def test_retrieval_scores_are_those_of_transformers(tmp_path, caplog):
    theirs = random_blip2("retrieval", tmp_path / "theirs")
    ours = Blip2.from_pretrained(tmp_path / "theirs")
    texts = ["a small star", "two large crosses left of it"]
    pixels = torch.randn(2, 3, 28, 28)
    images = ours.encode_tokens(ours.vit(pixels))
    for text in texts:
        ids = torch.tensor(ours.texts.encode([text]))
        given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        with torch.no_grad():
            match = theirs(pixel_values=pixels, **{k: v.expand(2, -1) for k, v in given.items()},
                           use_image_text_matching_head=True)  # fmt: skip
            contrast = theirs(pixel_values=pixels, **given, use_image_text_matching_head=False)
        found = ours.itm_scores(images, [text])[:, 0]
        assert torch.allclose(found, match.logits_per_image.softmax(dim=-1)[:, 1], atol=1e-5)
        assert torch.allclose(ours.itc_scores(images, [text])[:, 0], contrast.logits_per_image.view(-1), atol=1e-5)
    ours.save_pretrained(tmp_path / "run")
    for model in (ours, Blip2.from_pretrained(tmp_path / "run")):
        with pytest.raises(UserError, match="the head that writes captions .ITG. is not trained"):
            model.caption(images)


def test_to_caption_a_picture_pytorchs_compiler_is_not_imported():
    """It takes longer than to open a model; arithmetic and random numbers on the meta device bring it."""
    code = (
        "import sys; from blip2 import TINY, Blip2; from data import open_picture; model = Blip2.from_pretrained("
        "TINY / 'blip2'); model.caption(open_picture(TINY / 'picture.png')); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_lacks_is_drawn_and_nothing_is_left_without_a_value(kind, tmp_path, monkeypatch):
    """Memory that nobody has written to is full of NaN here."""
    random_blip2(kind, tmp_path)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model = Blip2.from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    head = model.qformer.lm_head  # no public file has it
    assert 0.015 < head.dense.weight.std() < 0.025
    assert (head.ln.weight == 1).all() and not head.dense.bias.any() and not head.bias.any()


@pytest.mark.parametrize("kind", LLMS)
def test_a_stage_2_checkpoint_without_text_branch_says_so_and_can_be_saved(kind, tmp_path):
    random_blip2(kind, tmp_path / "theirs")
    ours = Blip2.from_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="has no text branch to read a text with"):
        ours.itc_scores(ours.encode_tokens(ours.vit(torch.zeros(1, 3, 28, 28))), ["a star"])
    ours.save_pretrained(tmp_path / "run")
    again = Blip2.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    assert again.llm.cfg == ours.llm.cfg


@pytest.mark.parametrize("split", [True, False])
def test_releases_that_differ_open_alike(split, tmp_path):
    """q, k, v fused or apart; in one file or in shards; with and without a row for the image token."""
    theirs = random_blip2("opt", tmp_path / "one", bare_words=split)
    tensors = load_file(tmp_path / "one/model.safetensors")
    if split:
        for key in [key for key in tensors if ".qkv." in key]:
            for part, tensor in zip("qkv", tensors.pop(key).chunk(3)):
                tensors[key.replace("qkv", f"{part}_proj")] = tensor.clone()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.remove(tmp_path / "two/model.safetensors")
    weights.write_shards(tmp_path / "two", tensors, torch.float32)
    ours, again = (Blip2.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) or (weights.first_match(formats.STAGE2_FRESH, name) and "vit" not in name), name
    weights.export(again, "hf", tmp_path / "out", "fp32")
    rows = load_file(tmp_path / "out/model.safetensors")["language_model.model.decoder.embed_tokens.weight"]
    own = theirs.language_model.model.decoder.embed_tokens.weight
    assert torch.equal(rows[: len(own)], own) and len(rows) == len(own) + split  # one for the image, where it lacked


def test_shards_are_written_as_their_index_says(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 100)
    tensors = {name: torch.randn(n) for name, n in (("a", 20), ("b", 10), ("c", 3), ("d", 40))}
    weights.write_shards(tmp_path, tensors, torch.float32)
    files = weights.weight_files(tmp_path)
    assert len(files) == 3  # a; b and c; d
    found = weights.open_tensors(files)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_we_trained_answers_the_same_in_transformers(tmp_path, caplog):
    """The run that ships with the code: its processor reads the picture and the question."""
    weights.main(["export", str(ROOT / "assets/tiny/blip2"), str(tmp_path / "out"), "--format", "hf"])
    theirs, processor = reopened(tmp_path / "out", caplog)
    picture, prompt = ROOT / "assets/tiny/picture.png", "Question: what color is the star? Answer:"
    given = processor(images=transformers.image_utils.load_image(str(picture)), text=prompt, return_tensors="pt")
    ids = theirs.generate(**given, num_beams=5, length_penalty=-1.0, min_new_tokens=1, max_new_tokens=10)
    said = processor.batch_decode(ids, skip_special_tokens=True)[0]
    model = Blip2.from_pretrained(tmp_path / "out")
    assert said.removeprefix(prompt).strip() == model.ask(picture, "what color is the star?") == "green"


# --- the original's files


@pytest.fixture
def lavis(tmp_path, monkeypatch):
    """The golden checkpoint of the original as a .pth, with its ViT, and the folder of its BERT."""
    if not GOLDEN.exists():
        pytest.skip(f"no golden file at {GOLDEN}: set GOLDEN to one")
    with weights.safe_open(GOLDEN, "pt") as file:
        cfg, vocab = (json.loads(file.metadata()[name]) for name in ("config", "vocab"))
        tensors = {key[2:]: file.get_tensor(key) for key in file.keys() if key.startswith("w.")}
    architecture = ViTConfig(cfg["vit_dim"], 9, cfg["vit_heads"], cfg["vit_mlp"], cfg["patch"], key_bias=False)
    monkeypatch.setitem(weights.PRESETS, "eva-g", architecture)  # depth and size come from the file
    bert = tmp_path / "bert"
    bert.mkdir()
    sizes = {"hidden_size": cfg["hidden"], "num_hidden_layers": cfg["layers"], "num_attention_heads": cfg["heads"]}
    sizes |= {"intermediate_size": cfg["mlp"], "max_position_embeddings": cfg["max_pos"], "vocab_size": len(vocab) - 1}
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    (bert / "vocab.txt").write_text("\n".join(vocab[:-1]) + "\n")
    torch.save({"model": tensors}, tmp_path / "tuned.pth")
    return tmp_path, tensors, str(bert)


def test_the_originals_stage_1_file_comes_in_and_goes_out_the_same(lavis):
    folder, tensors, bert = lavis
    model = Blip2.from_pretrained(folder / "tuned.pth", vit="eva-g", bert=bert)
    weights.export(model, "lavis", folder / "out.pth", "fp32")
    out = torch.load(folder / "out.pth", weights_only=True)["model"]
    counters = {"Qformer.bert.embeddings.position_ids"}
    assert out.keys() - counters == tensors.keys() - counters
    assert all(torch.equal(out[key], tensors[key]) for key in out.keys() - counters)
    model.save_pretrained(folder / "run")  # and a run made from it finds the ViT again
    again = Blip2.from_pretrained(folder / "run")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="pass --vit eva-g and --bert FOLDER"):
        Blip2.from_pretrained(folder / "tuned.pth")


@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize("tuned", [True, False])
def test_the_originals_stage_2_file_comes_in_and_goes_out_the_same(kind, tuned, lavis, monkeypatch):
    """blip2_pretrained_* has no ViT and no text branch, blip2_caption_* has the ViT."""
    folder, tensors, _ = lavis
    text = ("word_embeddings", "position_embeddings", ".intermediate.", ".output.dense", ".output.LayerNorm", ".cls.")
    attention = (".attention.", ".crossattention.")
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(("Qformer.", "query_tokens", "ln_vision.", "visual_encoder."))
        and (not any(part in key for part in text) or any(part in key for part in attention))
    }
    width = len(tensors["ln_vision.weight"]) and tensors["query_tokens"].shape[-1]
    llm = str(ROOT / LLMS[kind])
    llm_width = weights.load_llm(llm)[0].width
    kept |= {f"{kind}_proj.weight": torch.randn(llm_width, width), f"{kind}_proj.bias": torch.randn(llm_width)}
    vit = {key: tensor for key, tensor in kept.items() if key.startswith("visual_encoder.")}
    if not tuned:
        torch.save({key.removeprefix("visual_encoder."): tensor for key, tensor in vit.items()}, folder / "vit.pth")
        kept = {key: tensor for key, tensor in kept.items() if key not in vit}
    torch.save({"model": kept}, folder / "stage2.pth")
    if tuned:
        model = Blip2.from_pretrained(folder / "stage2.pth", vit="eva-g", llm=llm)
        weights.export(model, "lavis", folder / "out.pth", "fp32")
        out = torch.load(folder / "out.pth", weights_only=True)["model"]
        assert out.keys() == kept.keys()
        assert all(torch.equal(out[key], kept[key]) for key in kept if not key.endswith("position_ids"))
        assert model.llm.cfg.act == "gelu" if kind == "t5" else model.llm.fits_fp16
        model.save_pretrained(folder / "run")
        assert Blip2.from_pretrained(folder / "run").llm.cfg == model.llm.cfg
    else:
        with pytest.raises(UserError, match="pass --vit eva-g:eva_vit_g.pth and --llm FOLDER"):
            Blip2.from_pretrained(folder / "stage2.pth")
        depth = 1 + max(int(key.split(".")[2]) for key in vit if ".blocks." in key)
        grid = round((vit["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        own = weights.replace(weights.PRESETS["eva-g"], depth=depth)
        own = weights.replace(own, image_size=grid * own.patch_size)
        monkeypatch.setitem(weights.PRESETS, "eva-g", own)
        model = Blip2.from_pretrained(folder / "stage2.pth", vit=f"eva-g:{folder / 'vit.pth'}", llm=llm)
        found = weights.unload(model.vit, formats.LAVIS_VITS["eva-g"])
        assert found.keys() == vit.keys() and all(torch.equal(found[key], vit[key]) for key in vit)
        assert torch.equal(model.llm_proj.weight, kept[f"{kind}_proj.weight"])


# --- what cannot be exported


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = Blip2.from_pretrained(ROOT / "assets/tiny/blip2")
    with pytest.raises(UserError, match="neither an EVA-CLIP nor a CLIP encoder"):
        weights.export(model, "lavis", tmp_path / "out.pth", "fp32")
    model.vit.cfg = ViTConfig(96, 6, 3, 384, ln_pre=True)
    with pytest.raises(UserError, match="norm in front of its blocks .CLIP., which transformers' BLIP-2 classes"):
        weights.export(model, "hf", tmp_path / "out", "fp32")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        weights.export(model, "hf", tmp_path / "there", "fp32")
    with pytest.raises(UserError, match="does not exist, make it first"):
        weights.export(model, "hf", tmp_path / "no/out", "fp32")
    (tmp_path / "mine.part").mkdir()
    with pytest.raises(UserError, match="mine.part is left of an export"):
        weights.export(model, "run", tmp_path / "mine", "fp32")
    assert (tmp_path / "mine.part").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.part", "there"]


# --- bad files: one line that names the file, and nothing is half loaded


def broken(folder: Path, how: str) -> str:
    """Spoil a good checkpoint folder; -> what the error has to say."""
    tensors = load_file(folder / "model.safetensors")
    key = "language_projection.weight"
    if how == "code":
        os.remove(folder / "model.safetensors")

        class Code:
            def __reduce__(self):
                return os.mkdir, (str(folder / "executed"),)

        with open(folder / "pytorch_model.bin", "wb") as file:
            pickle.dump({"x": Code()}, file)
        return "pytorch_model.bin cannot be read as PyTorch weights"
    if how == "cut short":
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(os.path.getsize(folder / "model.safetensors") // 2)
        return "model.safetensors is not a whole safetensors file"
    if how in ("missing shard", "outside"):
        os.rename(folder / "model.safetensors", folder / "a.safetensors")
        other = "b.safetensors" if how == "missing shard" else "../b.safetensors"
        index = {"weight_map": {key: "a.safetensors", "x": other}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "lacks b.safetensors" if how == "missing shard" else "names a file outside of"
    if how == "shape":
        tensors[key] = torch.zeros(2, 3)
    if how == "nan":
        tensors[key][0, 0] = float("nan")
    if how in ("shape", "nan"):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return "gives \\(2, 3\\)" if how == "shape" else f"{key} holds values that are not finite"
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    return "missing: nothing for qformer.blocks.3"


@pytest.mark.parametrize("how", ["code", "cut short", "missing shard", "outside", "shape", "nan", "config"])
def test_a_bad_checkpoint_is_one_error_that_names_it(how, tmp_path):
    random_blip2("opt", tmp_path)
    wanted = broken(tmp_path, how)
    with pytest.raises(UserError, match=wanted) as error:
        Blip2.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and not (tmp_path / "executed").exists()


def test_parts_that_do_not_fit_to_each_other_are_listed_too():
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(2, 6)})
    table = formats.Table(formats.joined("{part}", ("q", "k", "v"), "qkv"))
    bad = {f"{part}.weight": torch.ones(2, 2 + (part == "k")) for part in "qkv"}
    bad |= {f"{part}.bias": torch.ones(2) for part in "qkv"}
    with pytest.raises(UserError, match=r"q.weight, k.weight, v.weight gives \(\(2, 2\), \(2, 3\), \(2, 2\)\)"):
        weights.load(model, bad, table, "bad")


@pytest.mark.parametrize("content", [b"", b"no pickle"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="x.pth cannot be read as PyTorch weights"):
        Blip2.from_pretrained(tmp_path / "x.pth", vit="eva-g", bert="assets/tiny/bert")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth holds no state dict"):
        Blip2.from_pretrained(tmp_path / "list.pth", vit="eva-g", bert="assets/tiny/bert")


def test_a_folder_of_one_part_is_no_model():
    with pytest.raises(UserError, match="assets/tiny/opt is a opt, expected a run, or a whole BLIP-2"):
        Blip2.from_pretrained("assets/tiny/opt")


def test_one_trains_from_a_public_checkpoint(tmp_path, few_test_pictures):
    """It is made a run, and stage 2 goes on from its projection."""
    random_blip2("opt", tmp_path / "theirs")
    flags = "--steps 2 --batch 4 --eval-every 0 --save-every 1 --precision fp32 --device cpu".split()
    with pytest.raises(UserError, match="make one of it with python weights.py export .* --format run runs/theirs"):
        train.main(["--stage", "2", "--init", str(tmp_path / "theirs"), *flags, "--out", str(tmp_path / "x")])
    weights.main(["export", str(tmp_path / "theirs"), str(tmp_path / "run"), "--format", "run"])
    start = Blip2.from_pretrained(tmp_path / "run")
    train.main(["--stage", "2", "--init", str(tmp_path / "run"), *flags, "--lr", "1e-6", "--out", str(tmp_path / "x")])
    end = Blip2.from_pretrained(tmp_path / "x")
    assert torch.allclose(start.llm_proj.weight, end.llm_proj.weight, atol=1e-4)
    assert not torch.equal(start.llm_proj.weight, end.llm_proj.weight)


def test_what_is_new_is_where_the_model_is():
    """The projection and a language model of random weights; the CPU is not always where it is."""
    with torch.device("meta"):
        model = small_model()
        model.attach_llm("opt-125m")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(UserError, match="in which T5 overflows"):
        model.amp_dtype = torch.float16
        model.attach_llm("flan-t5-xl")


def test_nothing_is_half_loaded():
    """A value that is not finite comes last: what came before is not in the model either."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = {name: torch.ones_like(tensor) for name, tensor in before.items()} | {"1.bias": torch.tensor([0, torch.inf])}
    table = formats.Table([formats.Row((name,), name) for name in before])
    with pytest.raises(UserError, match="1.bias holds values that are not finite in float32"):
        weights.load(model, bad, table, "bad")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dtype_that_is_too_narrow_is_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(1, 1, bias=False)
    table = formats.Table([formats.Row(("weight",), "weight")])
    with pytest.raises(UserError, match="not finite in float16: fetch it again, or take a wider dtype"):
        weights.load(model, {"weight": torch.tensor([[1e6]])}, table, "wide", torch.float16)
    weights.load(model, {"weight": torch.tensor([[1e6]])}, table, "wide", torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16


# --- the real ones, by name and shape, on the meta device


def meta_blip2(name: str):
    """transformers' class at the real configuration, and ours."""
    retrieval = name.startswith("itm")
    vision, qformer = {"image_size": 364 if "coco" in name else 224}, {"vocab_size": 30523} if retrieval else {}
    qformer |= {"use_qformer_text_input": True} if retrieval else {}
    text = None
    if not retrieval:
        cfg = PRESETS[name.removesuffix("-coco")]
        if name.startswith("opt"):
            text = dict(model_type="opt", vocab_size=50304, hidden_size=cfg.width, num_hidden_layers=cfg.depth,
                        ffn_dim=cfg.mlp, num_attention_heads=cfg.heads, word_embed_proj_dim=cfg.width)  # fmt: skip
        else:
            text = dict(model_type="t5", vocab_size=32128, d_model=cfg.width, d_kv=cfg.head_width, d_ff=cfg.mlp,
                        num_layers=cfg.depth, num_heads=cfg.heads, feed_forward_proj="gated-gelu",
                        dense_act_fn="gelu", tie_word_embeddings=False)  # fmt: skip
    config = transformers.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text)
    with torch.device("meta"):
        return getattr(transformers, KINDS["retrieval" if retrieval else "opt"])(config), config.to_dict()


NAMES = ["opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl", "opt-2.7b-coco", "opt-6.7b-coco", "flan-t5-xl-coco"]


@pytest.mark.parametrize("name", [*NAMES, "itm-vit-g", "itm-vit-g-coco"])
def test_every_key_of_the_public_checkpoints_has_its_place(name, tmp_path):
    theirs, config = meta_blip2(name)
    source = theirs.state_dict()
    if "text_config" in config and not name.startswith("itm"):
        config["text_config"] |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit_cfg, vit_table = weights.vit_config(tmp_path)
    retrieval = name.startswith("itm")
    with torch.device("meta"):
        vit = weights.ViT(weights.replace(vit_cfg, depth=vit_cfg.depth - 1))
        qformer = weights.QFormer(weights.hf_qformer_config(config, retrieval))
        model = Blip2(vit, qformer, None, vit_cfg.image_size)
        if not retrieval:
            llm_cfg, llm_table = weights.llm_config(str(tmp_path))
            model.llm = weights.build_llm(llm_cfg)
            model.llm_proj = torch.nn.Linear(768, model.llm.width)
    _, account = weights.match(vit, source, vit_table, name)
    assert "missing" not in account and sum(p.numel() for p in vit.parameters()) == 985_894_528 + (
        vit.pos_embed.numel() - 257 * 1408
    )
    weights.match(model, source, formats.HF_RETRIEVAL if retrieval else formats.HF_BLIP2, name)
    if not retrieval:
        weights.match(model.llm, source, weights.inside_blip2(llm_table), name)
    parts = [vit, model.qformer] + ([] if retrieval else [model.llm])
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())


ENCODERS = {
    "clip-vit-large-patch14": lambda: transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                           patch_size=14, image_size=224, projection_dim=768))),
    **{f"dinov2-{name}": lambda width=width, depth=depth: transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, image_size=518, patch_size=14))
       for name, width, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24))},
}  # fmt: skip
LANGUAGE = {
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


@pytest.mark.parametrize("name", ENCODERS | LANGUAGE)
def test_every_key_of_the_public_parts_has_its_place(name, tmp_path):
    with torch.device("meta"):
        theirs = (ENCODERS | LANGUAGE)[name]()
    config = theirs.config.to_dict() | (
        {"scale_decoder_outputs": False, "tie_word_embeddings": False} if "t5" in name else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        if name in ENCODERS:
            cfg, table = weights.vit_config(tmp_path)
            ours = weights.ViT(cfg)
        elif name.startswith("bert"):
            ours, table = weights.QFormer(weights.QFormerConfig(**weights.bert_config(tmp_path))), formats.BERT
        else:
            cfg, table = weights.llm_config(str(tmp_path))
            ours = weights.build_llm(cfg)
    source = theirs.state_dict()
    if name.startswith("dinov2"):  # transformers 5 has other names in memory than in its files
        new = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        new |= {"o_proj": "output.dense"}
        source = {re.sub("[qkvo]_proj", lambda found: new[found[0]], key): tensor for key, tensor in source.items()}
    _, account = weights.match(ours, source, table, name)
    assert "fresh" not in account or name.startswith("bert")


# --- inspect


def test_inspect_says_what_a_checkpoint_is_without_loading_it(tmp_path, capsys):
    weights.main(["inspect", str(ROOT / "assets/tiny/blip2")])
    said = capsys.readouterr().out
    assert "a run of this code, stage 2, 64 px" in said and "float16" in said and "--llm ../opt" in said
    random_blip2("t5", tmp_path)
    weights.main(["inspect", str(tmp_path)])
    said = capsys.readouterr().out
    assert "a BLIP-2 of transformers with t5" in said and "lacks the text branch" in said and "language model" in said
    with pytest.raises(UserError, match="does not exist"):
        weights.main(["inspect", str(tmp_path / "nowhere")])


# --- resolution


@pytest.mark.parametrize("size, other", [(28, 56), (56, 28)])
def test_a_checkpoint_opens_at_another_resolution_as_transformers_resizes_it(size, other, tmp_path):
    """Fine-tuned at one size, used at another: the table of positions is resized bicubically, with [CLS] kept."""
    vision = VISION | {"image_size": size, "patch_size": 14}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=QFORMER, num_query_tokens=3,
        text_config=dict(model_type="opt", vocab_size=440, hidden_size=16, num_hidden_layers=1, ffn_dim=24,
                         num_attention_heads=2, word_embed_proj_dim=16),
    )  # fmt: skip
    theirs = roughen(transformers.Blip2ForConditionalGeneration(config), 0).eval()
    theirs.save_pretrained(tmp_path)
    shutil.copy(ROOT / "assets/tiny/opt/tokenizer.json", tmp_path)
    ours = Blip2.from_pretrained(tmp_path, image_size=other)
    pixels = torch.randn(1, 3, other, other)
    with torch.no_grad():
        image = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        wanted = theirs.qformer(query_embeds=theirs.query_tokens, encoder_hidden_states=image).last_hidden_state
    assert torch.allclose(ours.encode_tokens(ours.vit(pixels)).query_out, wanted, atol=1e-5)
    assert ours.image_size == other
    with pytest.raises(UserError, match="--image-size 30 is no multiple of the patch size 14"):
        Blip2.from_pretrained(tmp_path, image_size=30)


def test_sharded_pickles_are_read_like_one_file(tmp_path):
    """As facebook/opt-6.7b has them."""
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    for name, key in (("1.bin", "a"), ("2.bin", "b")):
        torch.save({key: torch.ones(2)}, tmp_path / name)
    assert weights.open_tensors(weights.weight_files(tmp_path)).keys() == {"a", "b"}
