"""Counted work, not measured time: what a step computes is what the formulas of bench.py say, and no more."""

import json

import pytest
import torch
from conftest import random_batch, run_many, small_model, stage2_model

import bench
from blip2 import Blip2
from data import UserError, make_llm_batch
from losses import world


def padded_labels(rows: int) -> int:
    """On CPU the rows of the vocabulary's product are a multiple of 64."""
    return -(-rows // 64) * 64


@pytest.mark.parametrize(("photos", "depth", "queries"), [(2, 3, 3), (5, 4, 6)])
def test_a_step_of_stage_1_has_the_flops_of_the_formula(photos, depth, queries):
    """Frozen ViT forward only; image keys and values once; each pass once; no row that nobody reads."""
    model = small_model(depth=depth, num_queries=queries).train()
    batch = random_batch(photos)
    labels = padded_labels(len(batch.label_rows)) / photos
    wanted = photos * bench.stage1_flops(model, photos, batch.text_ids.shape[1], labels)
    found = bench.performed(lambda: sum(model(batch).values()).backward())
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize(("photos", "words"), [(2, 5), (3, 11)])
def test_a_step_of_stage_2_has_the_flops_of_the_formula(kind, photos, words):
    """The frozen language model's weights get no gradient, and its last block computes only what is read."""
    model = stage2_model(kind).train()
    texts = [[7] * words for _ in range(photos)]
    images = torch.zeros(photos, 3, 8, 8, dtype=torch.uint8)
    batch = make_llm_batch([[2]] * photos, texts, 0, model.llm.layout.pads, list(range(photos)), images=images)
    labels = padded_labels(len(batch.label_rows)) / photos
    wanted = photos * bench.stage2_flops(model, 1, batch.target_ids.shape[1], labels)
    found = bench.performed(lambda: model(batch)["lm"].backward())
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("photos", "texts"), [(2, 4), (3, 7)])
def test_matching_has_the_flops_of_the_formula(photos, texts):
    """Each photo through the ViT once and each pair through the Q-Former once."""
    model = small_model().requires_grad_(False)
    ids = [[2, 6, 7, 8, 9, 3]] * texts
    model.texts = type("Texts", (), {"encode": lambda self, texts: ids, "pad_id": 0})()
    images = torch.zeros(photos, 3, 8, 8, dtype=torch.uint8)
    found = bench.performed(lambda: model.itm_scores(images, [""] * texts))
    assert found == pytest.approx(bench.retrieval_flops(model, photos, texts, 8), rel=1e-9)


@pytest.mark.parametrize(
    "what, llm",
    [(what, "opt") for what in ("stage1", "stage2", "generate", "retrieval")] + [("stage2", "t5"), ("generate", "t5")],
)
def test_the_command_line_measures_and_writes(what, llm, tmp_path, capsys, monkeypatch):
    """On the tiny parts, beside transformers: the same results, and all numbers in the file."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 1e9)
    out = tmp_path / "numbers.json"
    sizes = ["--vit", "assets/tiny/vit", "--bert", "assets/tiny/bert", "--llm", f"assets/tiny/{llm}"]
    sizes += ["--image-size", "64"]
    small = ["--batch", "4", "--texts", "3", "--new-tokens", "4", "--queries", "8", "--warmup", "1", "--repeats", "1"]
    bench.main([what, *sizes, *small, "--precision", "fp32", "--vs", "transformers", "--json", str(out)])
    assert str(tmp_path) not in out.read_text()  # the numbers are to be shown to others
    numbers = json.loads(out.read_text())["numbers"]
    assert numbers["largest difference of the results"] < 1e-3
    assert numbers["MFU, %"] > 0 and numbers["times as many FLOPs in transformers"] >= 1
    assert "beside transformers" in capsys.readouterr().out


def test_it_measures_a_comparison_in_two_passes_and_what_compiling_gains(monkeypatch):
    """With a compiler that does nothing: a real one takes minutes."""
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 1e9)
    compile_blocks = Blip2.compile_blocks
    monkeypatch.setattr(Blip2, "compile_blocks", lambda self: compile_blocks(self, backend="eager"))
    sizes = ["--vit", "assets/tiny/vit", "--bert", "assets/tiny/bert", "--image-size", "64", "--batch", "2"]
    small = ["--queries", "4", "--warmup", "0", "--repeats", "1", "--precision", "fp32", "--dropout", "0"]
    record = bench.main(["stage1", *sizes, *small, "--itc-batch", "4", "--compile"])
    numbers, settings = record["numbers"], record["settings"]
    assert (settings["warmup"], settings["dropout"], settings["compile"]) == ("0", "0.0", "True")
    assert numbers["times as fast when compiled"] > 0 and numbers["part: frozen ViT, %"] > 0
    assert numbers["photos a second"] == pytest.approx(4 / numbers["seconds"])


@pytest.mark.parametrize("flags", [["generate", "--compile"], ["stage2", "--itc-batch", "8"]])
def test_what_does_not_go_together_gets_a_sentence(flags):
    with pytest.raises(UserError, match="leave it"):
        bench.main(flags)


@pytest.mark.parametrize("flag", ["--batch", "--beams", "--repeats", "--image-size"])
def test_sizes_of_nothing_get_a_sentence(flag):
    with pytest.raises(UserError, match=f"got {flag} 0, expected at least 1"):
        bench.main(["generate", flag, "0"])


def count_bytes(rank: int) -> None:
    sent = dict.fromkeys(("all_gather", "all_reduce", "all_to_all_single"), 0)
    model, batch = small_model().eval(), random_batch(4, rank, list(range(4 * rank, 4 * rank + 4)))
    with torch.no_grad(), bench.counted_bytes(sent):
        model(batch, generator=torch.Generator().manual_seed(0))
    cfg, P, V = model.qformer.cfg, 5, model.vit.cfg.width
    feats = 4 * (cfg.num_queries + 1) * model.embed_dim * 4
    small = 4 * (12 * 8 * 3 + 16 * (8 + 1) + 200)  # image ids, negatives' numbers, texts and masks
    assert feats <= sent["all_gather"] <= feats + small, (rank, world(), sent)
    assert sent["all_to_all_single"] <= 4 * P * V * 4 * 4  # at most the chosen photos' raw tokens


def test_between_processes_go_features_texts_and_the_chosen_photos_only():
    run_many(2, count_bytes)
