"""bench.py counts the work it times: every measurement runs on the tiny parts and writes its numbers; the counters of
FLOPs and bytes are right; beside transformers, both compute the same."""

import itertools
import json

import pytest
import torch
from conftest import TINY, random_batch, small_model, stage2_model
from torch import nn

import bench
import train
from data import collate_lm
from engine.errors import UserError

CPU = torch.device("cpu")
SMALL = [*TINY, "--image-size", "64", "--batch", "4", "--queries", "4", "--precision", "fp32", "--device", "cpu"]
QUICK = ["--warmup", "0", "--repeats", "1"]
FAMILIES = ("opt", "t5", "llama", "llama-untied")


@pytest.fixture(autouse=True)
def a_machine_of_one_gigaflop(monkeypatch):
    """Its limit is not measured, which takes seconds."""
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 1e9)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_two_flops_are_counted_for_each_multiply_and_add():
    """Of products, of attention (scores and values), of a backward pass (twice the forward pass)."""
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert bench.counted_flops(lambda: a @ b, CPU) == 2 * 3 * 5 * 7
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8)  # (B, H, rows, K), (B, H, keys, K)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert bench.counted_flops(lambda: attention(q, k, k), CPU) == 2 * (2 * 2 * 4 * 6 * 9 * 8)
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert bench.counted_flops(lambda: layer(x).sum().backward(), CPU) == 3 * (2 * 3 * 5 * 7)


def flops_of(run) -> int:
    return bench.counted_flops(run, CPU)


def batch_of(count: int):
    """A stage-1 batch of texts of one length."""
    batch = random_batch(count).map(lambda x: x[:1].expand_as(x).contiguous())
    batch.image_ids = torch.arange(count)
    return batch


def test_a_step_of_stage_1_computes_every_pass_once_and_the_frozen_vit_forward_only():
    """Image keys and values once per image, for all three passes; ITM has three rows per image. What is trained has a
    backward pass of twice its products."""
    model, batch = small_model().train(), batch_of(2)
    tokens = model.image_tokens(batch.images)
    kv = model.image_kv(tokens)
    *_, cache = model.encode(kv, batch)
    ids, mask, pairs_kv = batch.text_ids.repeat(3, 1), batch.text_mask.repeat(3, 1), [(*own, *own) for own in kv]
    similarities, total = 2 * (2 * 2 * 2 * 3 * 6), torch.tensor(1)  # both ways: 2 images, 2 texts, 3 queries, width 6
    passes = (
        lambda: model.image_kv(tokens),
        lambda: model.encode(kv, batch),  # queries, text, and their projections
        lambda: model.itm_logits(model.qformer("itm", ids, mask, pairs_kv)[0]),
        lambda: model.itg(batch, cache, total),
    )
    trained = similarities + sum(map(flops_of, passes))
    vit = flops_of(lambda: model.image_tokens(batch.images))
    assert flops_of(lambda: model.stage1_losses(batch)) == vit + trained
    assert flops_of(lambda: sum(model.stage1_losses(batch).values()).backward()) == vit + 3 * trained


def test_a_step_of_stage_1_grows_with_the_batch_and_only_itc_with_its_square():
    def step(count):
        model, batch = small_model().train(), batch_of(count)
        return flops_of(lambda: sum(model.stage1_losses(batch).values()).backward())

    two, three, four = map(step, (2, 3, 4))
    similarities = 3 * 2 * (2 * 3 * 6)  # of a pair: forward and backward, both ways, 3 queries of width 6
    assert four - 2 * three + two == 2 * similarities and similarities < 0.01 * (three - two)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_of_stage_2_computes_no_gradient_of_the_language_models_weights(kind, llm_specs):
    """Its backward pass has the products of its forward pass once more, not twice; only those of attention have two
    factors with gradient."""
    model = stage2_model(llm_specs[kind]).train()
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    targets = [("", "a small red star")] * 2
    batch = collate_lm(model.llm_tokenizer, targets, [[0], [0]], [0, 1], images=images)
    tokens = model.image_tokens(images)
    kv = model.image_kv(tokens)
    query_out = model.qformer.encode_queries(kv)
    prefix, mask = (x.detach() for x in model.llm_prefix(query_out, batch.prompt_ids, batch.prompt_mask))
    runs = (
        lambda: model.image_kv(tokens),
        lambda: model.qformer.encode_queries(kv),
        lambda: model.llm_proj(query_out),
    )
    trained = sum(map(flops_of, runs))
    llm = flops_of(lambda: model.llm(prefix, mask, batch.target_ids))
    both = flops_of(lambda: model.llm(prefix.requires_grad_(), mask, batch.target_ids).sum().backward())
    vit = flops_of(lambda: model.image_tokens(images))
    assert 1.9 * llm < both < 2.1 * llm
    assert flops_of(lambda: model.stage2_losses(batch)["lm"].backward()) == vit + 3 * trained + both


# --- bytes -----------------------------------------------------------------------------------------------------------


def count_bytes(rank: int) -> None:
    sent = dict.fromkeys(bench.CALLS, 0)
    model, batch = small_model(), random_batch(4, rank, list(range(4 * rank, 4 * rank + 4)))
    with torch.no_grad(), bench.counted_bytes(sent):
        model.stage1_losses(batch, generator=torch.Generator().manual_seed(0))
    P, V, Q, E = 5, 10, 3, 6
    feats = 4 * (Q + 1) * E * 4
    small = 4 * (12 * 8 * 3 + 16 * (8 + 1) + 200)  # image ids, negatives' numbers, texts and masks
    assert feats <= sent["all_gather"] <= feats + small, sent
    assert sent["all_to_all_single"] <= 4 * P * V * 4 * 4, sent  # at most the chosen images' raw tokens


def measure_stage1(_) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "peak_flops", lambda *_: 1e9)
        patch.setattr(bench, "counted_flops", lambda *_: 1e9)  # seconds of imports
        numbers = bench.main(["stage1", *SMALL, *QUICK])["numbers"]
    model = bench.Blip2.build(TINY[1], TINY[3], 64, num_queries=4)[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers["sent as gradients, MB"] == pytest.approx(4 * trained / 1e6)
    assert all(numbers[f"sent by {name}, MB"] > 0 for name in ("all_gather", "all_reduce"))
    assert all(f"part: waiting for {name}, %" in numbers for name in bench.CALLS)


def test_ranks_send_features_texts_and_the_chosen_images_only(ranks):
    ranks(2, count_bytes)


def test_on_several_ranks_the_bytes_are_among_the_numbers(ranks):
    ranks(2, measure_stage1)


# --- the command -----------------------------------------------------------------------------------------------------


def test_gradcache_is_measured_as_one_step_over_all_micro_batches(monkeypatch):
    steps, two_pass_losses = [], train.two_pass_losses
    monkeypatch.setattr(
        train,
        "two_pass_losses",
        lambda model, batches, *rest: steps.append(batches) or two_pass_losses(model, batches, *rest),
    )
    record = bench.main(["stage1", *SMALL, *QUICK, "--gradcache", "2", "--dropout", "0"])
    numbers, settings = record["numbers"], record["settings"]
    assert (settings["gradcache"], settings["warmup"], settings["dropout"]) == ("2", "0", "0.0")
    assert numbers["images a second"] == pytest.approx(8 / numbers["seconds"])
    assert steps and all([len(batch) for batch in batches] == [4, 4] for batches in steps)
    assert numbers["part: frozen ViT, %"] > 0 and numbers["part: joint pass (ITM), %"] > 0


@pytest.mark.parametrize(
    "what, llm", [("stage1", "opt"), ("retrieval", "opt"), *itertools.product(("stage2", "generate"), FAMILIES)]
)
def test_a_measurement_beside_transformers_has_the_same_results_and_writes_its_numbers(
    what, llm, llm_specs, tmp_path, capsys
):
    pytest.importorskip("transformers")
    out = tmp_path / "numbers.json"
    sizes = ["--llm", llm_specs[llm], "--texts", "3", "--new-tokens", "4", "--json", str(out)]
    record = bench.main([what, *SMALL, *QUICK, *sizes, "--vs", "transformers"])
    numbers = record["numbers"]
    assert numbers["largest difference of the results"] < 1e-3
    assert numbers["MFU, %"] > 0 and numbers["times as many FLOPs in transformers"] > 0
    assert any(name.startswith("part: ") for name in numbers)
    assert json.loads(out.read_text()) == record and str(tmp_path) not in out.read_text()  # numbers are for others
    assert "beside transformers" in capsys.readouterr().out


def test_load_measures_from_the_disk_to_the_model():
    pytest.importorskip("transformers")
    numbers = bench.main(["load", *SMALL, *QUICK, "--vs", "transformers"])["numbers"]
    assert numbers["seconds"] > 0 and numbers["seconds of transformers"] > 0
    assert numbers["GB a second"] == pytest.approx(numbers["checkpoint, GB"] / numbers["seconds"])


def test_data_measures_from_the_disk_to_batches(monkeypatch):
    """With and without workers, over JPEGs of the size of photos."""
    noise = bench.noise_images
    monkeypatch.setattr(bench, "noise_images", lambda folder, count: noise(folder, 8))
    monkeypatch.setattr(bench, "cores", lambda: 1)
    numbers = bench.main(["data", *SMALL])["numbers"]
    assert set(numbers) == {
        "images a second, this process",
        "images a second, 1 workers",
        "of this: whole decoding, ms an image",
    }
    assert all(value > 0 for value in numbers.values())


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["stage2", "--gradcache", "2"], "--gradcache is of stage1, and nothing that transformers does: leave it"),
        (
            ["stage1", "--gradcache", "2", "--vs", "transformers"],
            "nothing that transformers does: leave it or --vs out",
        ),
        (["data", "--vs", "transformers"], "transformers has nothing like this to compare with: leave --vs out"),
        (["stage1", "--json", "nowhere/a.json"], "--json nowhere/a.json: the folder nowhere does not exist"),
    ],
)
def test_wrong_flags_get_a_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(flags)


def test_sizes_of_nothing_are_refused():
    with pytest.raises(UserError, match="argument --batch: got 0, expected at least 1"):
        bench.main(["generate", "--batch", "0"])
