"""Paper 3: what each stage trains and how the losses are made: ITM's pairs, ITG's tokens, the frozen language model's
loss, the question in the Q-Former; and on a GPU the same, without a wait."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LLMS, ROOT, random_batch, small_model, stage2_model
from torch import Tensor

import model as model_module
from blip2 import Blip2
from config import TrainConfig
from data import Batch, collate_for, llm_batch
from engine.device import PRECISIONS
from engine.kernels import attention
from losses import IGNORE, Negatives, itc_loss, itc_similarity, smoothing_floor
from model import OBJECTIVES, Blip2Model
from qformer import QFormer, QFormerConfig
from sources.text import BertTokenizer
from train import build_optimizer, optimize
from vit import PRESETS, ViT
from weights.configs import llm_config
from weights.load import no_init
from weights.runs import trained_state

CAPTIONS = [
    "a small red circle above a large blue square",
    "there is a large white star at the top left",
    "a picture of a small green cross",
    "three shapes",
]
QUESTIONS = ["what color is the star?", "how many shapes are there?", "is it large?"]
ANSWERS = ["red", "two", "yes"]


def noise(count: int) -> Tensor:
    """Images of 8 x 8 random pixels."""
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def batch_of(model: Blip2, stage: str, texts: list[tuple[str, str]], first: int = 0) -> Batch:
    """A batch of a stage; its rows are those from `first` on of a larger batch."""
    rows = list(range(first, first + len(texts)))
    return collate_for(stage, model)(texts, [[0, row] for row in rows], rows, images=noise(rows[-1] + 1)[first:])


def asking_model(kind: str) -> Blip2:
    """A small model with the vocabulary of the tiny BERT, whose Q-Former reads the question."""
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    model = stage2_model(kind, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_positions=40)
    model.condition_on_question()
    return model


def trained(model: Blip2Model) -> set[str]:
    """Names of the trained parameters."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradient(model: Blip2Model) -> set[str]:
    """Names of the parameters that have a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- what each stage trains ------------------------------------------------------------------------------------------


def paper_model(vit: str, llm: str | None = None, image_size: int = 224) -> Blip2:
    """A model of the paper's size, on the meta device but for the position table."""
    with torch.device("meta"), no_init():
        encoder = ViT(PRESETS[vit])
        model = Blip2(encoder, QFormer(QFormerConfig(image_width=encoder.cfg.width)), None, image_size)
        if llm:
            cfg, family = llm_config(llm)
            model.add_llm(family.kind(cfg))
    encoder.pos_embed = torch.nn.Parameter(torch.zeros(encoder.pos_embed.shape), False)  # to be resized
    return model


def count_trained(model: Blip2Model) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "llm, vit, expected",
    [
        ("opt-2.7b", "eva-g", 107_133_696),
        ("opt-6.7b", "eva-g", 108_314_880),
        ("flan-t5-xl", "eva-g", 106_739_968),
        ("flan-t5-xxl", "eva-g", 108_314_880),
        ("opt-2.7b", "clip-l", 103_593_984),
        ("opt-6.7b", "clip-l", 104_775_168),
        ("flan-t5-xl", "clip-l", 103_200_256),
        ("flan-t5-xxl", "clip-l", 104_775_168),
    ],
)
def test_stage_2_trains_as_many_parameters_as_the_paper_says(llm, vit, expected):
    """Table 2: 107M, 108M, 107M, 108M; with ViT-L 104M and 103M. The checkpoint keeps what stage 1 alone trains."""
    model = paper_model(vit, llm)
    assert count_trained(model) == expected
    kept = sum(tensor.numel() for tensor in trained_state(model).values())
    assert kept == count_trained(paper_model(vit)) + sum(p.numel() for p in model.llm_proj.parameters())


@pytest.mark.parametrize(
    "stage, llm, vit, size, expected",
    [
        ("caption", "opt-2.7b", "eva-g", 364, 1.0936e9),  # Table 3: 1.1B
        ("caption", "flan-t5-xl", "eva-g", 364, 1.0932e9),
        ("caption", "opt-6.7b", "eva-g", 364, 1.0948e9),
        ("vqa", "flan-t5-xl", "eva-g", 490, 1.1698e9),  # Table 4: 1.2B
        ("vqa", "opt-2.7b", "eva-g", 490, 1.1702e9),
        ("vqa", "opt-6.7b", "eva-g", 490, 1.1714e9),
        ("retrieval", None, "clip-l", 364, 474.2e6),  # Table 5: 474M
        ("retrieval", None, "eva-g", 364, 1.1732e9),  # Table 5: 1.2B
    ],
)
def test_fine_tuning_trains_as_many_parameters_as_the_paper_says(stage, llm, vit, size, expected):
    model = paper_model(vit, llm, size)
    model.unfreeze_vit()
    if stage == "vqa":
        Blip2Model.condition_on_question(model)
    assert count_trained(model) == pytest.approx(expected, abs=1e5)


def test_stage_1_trains_everything_but_the_vit():
    """In one step every trained parameter gets a gradient and moves; the ViT stays in eval mode and as it is."""
    model = small_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert not model.vit.training and model.qformer.training
    optimizer = build_optimizer(model, TrainConfig(lr=1e-2, beta2=0.98, weight_decay=0.0))
    sum(model.stage1_losses(random_batch(4)).values()).backward()
    optimizer.step()
    assert with_gradient(model) == trained(model) == {name for name in before if not name.startswith("vit.")}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained(model)


@pytest.mark.parametrize("objectives", [("itc",), ("itm",), ("itg",), ("itm", "itg"), ("itc", "itg")], ids=",".join)
def test_any_choice_of_losses_trains_exactly_what_it_reaches(objectives):
    """What it does not reach is frozen, or DistributedDataParallel would wait for its gradient; the heads left out are
    named, so that no call uses them."""
    model, batch = small_model().train(), random_batch(4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train_heads(objectives)
    optimizer = build_optimizer(model, TrainConfig(lr=1e-2, beta2=0.98, weight_decay=0.0))
    losses = model.stage1_losses(batch, objectives)
    assert tuple(losses) == objectives
    sum(losses.values()).backward()
    optimizer.step()
    assert with_gradient(model) == trained(model) >= {"qformer.queries", "qformer.blocks.0.cross.kv.weight"}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained(model)
    heads = dict(itc=("vision_proj.", "text_proj.", "temperature"), itm=("itm_head.",), itg=("qformer.lm_head.",))
    for name, head in heads.items():
        assert any(parameter.startswith(head) for parameter in trained(model)) == (name in objectives), name
    assert model.untrained_heads == tuple(name for name in OBJECTIVES if name not in objectives)


@pytest.mark.parametrize("kind", LLMS)
def test_stage_2_trains_the_queries_their_part_of_the_qformer_and_the_projection(kind):
    """The gradient passes through the frozen language model, which has none; text branch and heads have none either."""
    model = stage2_model(kind).train()
    model.stage2_losses(batch_of(model, "2", [("", caption) for caption in CAPTIONS]))["lm"].backward()
    assert with_gradient(model) == trained(model)
    assert {"qformer.queries", "ln_vision.weight", "llm_proj.weight"} <= trained(model)
    assert {"qformer.blocks.0.ffn_query.up.weight", "qformer.blocks.2.cross.kv.weight"} <= trained(model)
    text_branch = ("qformer.word_embedding", "qformer.position", "qformer.lm_head", "vision_proj", "text_proj")
    frozen = ("vit.", "llm.", *text_branch, "itm_head", "temperature")
    assert not any(name.startswith(frozen) or ".ffn_text." in name for name in trained(model))
    assert not model.llm.training and not model.vit.training and model.qformer.training


@pytest.mark.parametrize("conditioned", [False, True])
def test_fine_tuning_for_vqa_trains_the_vit_and_what_reads_the_question(conditioned):
    """Every trained parameter gets a gradient: DistributedDataParallel would wait for one that has none."""
    model = asking_model("opt") if conditioned else stage2_model("opt")
    model.unfreeze_vit()
    model.stage2_losses(batch_of(model, "vqa", list(zip(QUESTIONS, ANSWERS))))["lm"].backward()
    assert with_gradient(model) == trained(model) >= {"vit.patch_embed.weight", "vit.pos_embed"}
    reads = {"qformer.word_embedding.weight", "qformer.blocks.1.ffn_text.up.weight"}
    assert reads <= trained(model) if conditioned else not reads & trained(model)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_an_image_passes_the_vit_and_the_keys_of_its_cross_attention_once():
    """Rows of a batch of 4, counted: ITC, ITM with its 12 pairs, and ITG share them."""
    model, rows = small_model(), {"vit": 0, "keys": 0, "queries": 0}

    def count(name):
        return lambda _, inputs: rows.update({name: rows[name] + len(inputs[0])})

    model.vit.register_forward_pre_hook(count("vit"))
    model.qformer.blocks[0].cross.kv.register_forward_pre_hook(count("keys"))
    model.qformer.blocks[0].cross.q.register_forward_pre_hook(count("queries"))
    model.stage1_losses(random_batch(4))
    assert rows == {"vit": 4, "keys": 4, "queries": 4 + 12}  # one query pass for ITC and ITG, one pass for ITM


def test_the_gradient_of_itc_reaches_the_images_and_the_texts_as_candidates_too():
    """Features are compared as they are: LAVIS detaches the candidates, and loses half of the gradient."""
    model, batch = small_model(), random_batch(4)
    heads = model.vision_proj.weight, model.text_proj.weight
    found = torch.autograd.grad(model.stage1_losses(batch, ("itc",))["itc"], heads)
    images, texts, _ = model.encode(model.image_kv(model.image_tokens(batch.images)), batch)
    loss = itc_loss(*itc_similarity(images, texts, images, texts, model.temperature), torch.eye(4, dtype=torch.bool))
    for ours, expected in zip(found, torch.autograd.grad(loss, heads), strict=True):
        torch.testing.assert_close(ours, expected)


def test_itm_compares_the_pairs_of_its_table(monkeypatch):
    """3B rows: own image with own text, own image with negative text, negative image with own text; the keys and values
    of the own images are not copied."""
    model, batch, seen = small_model(), random_batch(3), []
    forward = model.qformer.forward
    monkeypatch.setattr(model.qformer, "forward", lambda *args: seen.append(args) or forward(*args))
    found = torch.ones(3, dtype=torch.bool)
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), found, found)
    image_kv = model.image_kv(model.image_tokens(batch.images))
    negative_kv = model.negative_kv(model.image_tokens(batch.images), image_kv, negatives.images)
    model.itm(image_kv, negative_kv, batch, [batch.text_ids, batch.text_mask], negatives, torch.tensor(9))
    ((kind, ids, mask, kv),) = seen
    assert kind == "itm"
    assert torch.equal(ids, batch.text_ids[[0, 1, 2, 2, 0, 1, 0, 1, 2]])
    assert torch.equal(mask, batch.text_mask[[0, 1, 2, 2, 0, 1, 0, 1, 2]])
    for (k, v), (own_k, own_v, other_k, other_v) in zip(image_kv, kv, strict=True):
        assert own_k is k and own_v is v
        assert torch.equal(other_k, k[[1, 2, 0]]) and torch.equal(other_v, v[[1, 2, 0]])


@pytest.mark.parametrize("objectives, expected", [(("itc", "itm"), 0.7), (("itm",), 0.0), (("itm", "itg"), 0.0)])
def test_without_itc_the_negatives_of_itm_are_random(objectives, expected, monkeypatch):
    """A similarity that is not learned says nothing about what is hard. The loss is that of its pairs all the same."""
    hardness, model, batch = [], small_model(), random_batch(4)
    draw = model_module.draw_negatives
    monkeypatch.setattr(model_module, "draw_negatives", lambda *args: hardness.append(args[-1]) or draw(*args))
    alone = model.stage1_losses(batch, objectives, generator=torch.Generator().manual_seed(1), hardness=0.7)["itm"]
    all_three = model.stage1_losses(batch, generator=torch.Generator().manual_seed(1), hardness=expected)["itm"]
    assert hardness == [expected, expected]
    torch.testing.assert_close(alone, all_three)


def test_itm_is_the_mean_over_its_pairs_one_by_one(monkeypatch):
    """Each with the keys of its own image and its own label; without those whose negative was not found."""
    model, batch = small_model(), random_batch(3)
    has_negative_image, has_negative_text = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]), has_negative_image, has_negative_text)
    monkeypatch.setattr("model.draw_negatives", lambda *_: negatives)
    pairs = [(i, i, 1) for i in range(3)]
    pairs += [(negatives.images[i], i, 0) for i in (0, 2)] + [(i, negatives.texts[i], 0) for i in (0, 1)]
    image_kv, costs = model.image_kv(model.image_tokens(batch.images)), []
    for image, text, label in pairs:
        kv = [(k[image][None], v[image][None]) for k, v in image_kv]
        query_out, _ = model.qformer("itm", batch.text_ids[text][None], batch.text_mask[text][None], kv)
        logits = torch.stack([model.itm_head(query_out[0, q]) for q in range(3)])  # of each query, averaged
        costs.append(F.cross_entropy(logits.mean(dim=0), torch.tensor(label)))
    totals = {"itc": 3, "itm": len(costs), "itg": (batch.labels != IGNORE).sum()}
    torch.testing.assert_close(model.stage1_losses(batch, totals=totals)["itm"], sum(costs) / len(costs))


def test_itg_predicts_the_next_token_from_dec_on_and_no_padding(monkeypatch):
    """[DEC] t1 t2 predict t1 t2 [SEP]; [CLS] and padding are neither read nor predicted. Token by token through the
    joint pass."""
    model, batch, seen = small_model(), random_batch(2), []
    decode_text = model.qformer.decode_text
    monkeypatch.setattr(model.qformer, "decode_text", lambda *args: seen.append(args) or decode_text(*args))
    loss = model.stage1_losses(batch)["itg"]
    ((ids, _, _),) = seen
    assert model.qformer.dec_id == 29 and (ids[:, 0] == 29).all() and torch.equal(ids[:, 1:], batch.text_ids[:, 1:])

    costs = []
    for row in range(2):
        n = int(batch.text_mask[row].sum())
        own, mask = ids[row : row + 1, :n], torch.ones(1, n, dtype=torch.bool)
        _, text = model.qformer("itg", own, mask, model.image_kv(model.image_tokens(batch.images[row : row + 1])))
        logits = model.qformer.lm_logits(text[0, :-1])
        costs.append(F.cross_entropy(logits, batch.text_ids[row, 1:n], label_smoothing=0.1, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(costs).mean())


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_one_image_has_no_negatives_and_no_itm_pair_of_them(count):
    batch = random_batch(count, image_ids=[5] * count)
    totals = {name: int(total) for name, total in Blip2Model.stage1_totals([batch]).items()}
    assert totals == {"itc": count, "itm": count, "itg": int(batch.text_mask[:, 1:].sum())}  # the matching pairs only
    losses = small_model().stage1_losses(batch)
    assert all(loss.isfinite() and loss.shape == () for loss in losses.values())


def test_four_pairs_are_learned_by_heart():
    """All three losses fall far below chance: the gradients lead where they should."""
    model, batch = small_model(width=32, depth=2, dropout=0.0).train(), random_batch(4)
    optimizer = build_optimizer(model, TrainConfig(lr=1e-2, beta2=0.98, weight_decay=0.0))
    for _ in range(60):
        optimizer.zero_grad()
        losses = model(Blip2Model.stage1_losses, batch)
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["itc"] < smoothing_floor(4) + 0.3 and losses["itm"] < 0.3
    assert losses["itg"] < smoothing_floor(30) + 0.5


def test_in_bf16_the_frozen_vit_is_half_what_is_trained_is_fp32_and_the_losses_are_close():
    batch = random_batch(6)
    expected = small_model().stage1_losses(batch, generator=torch.Generator().manual_seed(3))
    model = small_model().set_precision("bf16")
    assert {p.dtype for p in model.vit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for name, loss in model.stage1_losses(batch, generator=torch.Generator().manual_seed(3)).items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected[name].item(), rel=0.1)


# --- stage 2 and fine-tuning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LLMS)
def test_the_loss_of_stage_2_is_the_mean_over_all_tokens(kind):
    """Each caption alone, without padding, summed and divided by the tokens of all."""
    model, pairs = stage2_model(kind), [("", caption) for caption in CAPTIONS]
    batch = batch_of(model, "2", pairs)
    tokens = (batch.labels != IGNORE).sum()
    assert Blip2Model.stage2_totals([batch]) == {"lm": tokens}
    alone = [batch_of(model, "2", pairs[row : row + 1], first=row) for row in range(4)]
    assert sum((part.labels != IGNORE).sum() for part in alone) == tokens
    losses = [model.stage2_losses(part, totals={"lm": 1})["lm"] for part in alone]
    torch.testing.assert_close(model.stage2_losses(batch)["lm"], sum(losses) / tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LLMS)
def test_recomputed_blocks_give_the_same_gradients(kind):
    """With the ViT trained, --grad-checkpointing changes memory and time only."""
    gradients = []
    for recompute in (False, True):
        model = stage2_model(kind)
        model.prompt = "a photo of"
        model.unfreeze_vit()
        model.vit.grad_checkpointing = model.llm.grad_checkpointing = recompute
        model.stage2_losses(batch_of(model, "caption", [("", "a red star"), ("", "two circles")]))["lm"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "vit.patch_embed.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", LLMS)
def test_the_queries_see_the_question(kind):
    """Paper Figure 7: each question has its own view of the image, in a batch as alone; without it there is one view of
    an image."""
    model, asked = asking_model(kind), [[QUESTIONS[0], QUESTIONS[1]], [QUESTIONS[0]]]
    images = model.encode_image(noise(2))
    _, query_out, _ = model.prepare_questions(images, asked, None)
    assert len(query_out) == 3 and not torch.allclose(query_out[0], query_out[1], atol=1e-3)
    alone = model.condition_queries(images, [1], [QUESTIONS[0]])
    torch.testing.assert_close(alone[0], query_out[2], rtol=1e-4, atol=1e-5)

    query_outs, llm_prefix = [], model.llm_prefix
    model.llm_prefix = lambda query_out, *rest: query_outs.append(query_out) or llm_prefix(query_out, *rest)
    batch = batch_of(model, "vqa", list(zip((QUESTIONS[0], QUESTIONS[0]), ANSWERS)))
    model.stage2_losses(batch)
    torch.testing.assert_close(query_outs[0], query_out[[0, 2]], rtol=1e-4, atol=1e-5)  # in training too

    model.conditioned = False
    _, query_out, _ = model.prepare_questions(images, asked, None)
    assert torch.equal(query_out, images.query_out[[0, 0, 1]])
    model.stage2_losses(batch)
    torch.testing.assert_close(query_outs[1], images.query_out, rtol=1e-4, atol=1e-5)


# --- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and pytest -m cuda")


@pytest.mark.cuda
@needs_gpu
def test_a_gpu_computes_what_the_cpu_computes():
    """Losses and gradients in fp32; in bf16 with the frozen ViT in fp16 (paper 3.4) the losses are close."""
    reference, batch = small_model(), random_batch(6)
    model = small_model().set_precision("fp32", "cuda")
    losses = []
    for m, b in ((reference, batch), (model, batch.to("cuda"))):
        losses.append(m.stage1_losses(b, generator=torch.Generator().manual_seed(3)))
        sum(losses[-1].values()).backward()
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=1e-4)
    for (name, cpu), (_, cuda) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        if cpu.grad is not None:
            torch.testing.assert_close(
                cuda.grad.cpu(), cpu.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    half = small_model().set_precision("bf16", "cuda")
    assert next(half.vit.parameters()).dtype == torch.float16
    for name, loss in half.stage1_losses(batch.to("cuda"), generator=torch.Generator().manual_seed(3)).items():
        assert loss.item() == pytest.approx(losses[0][name].item(), rel=0.1)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_attention_on_a_gpu_drops_the_share_that_it_is_given(precision):
    """Ones, averaged with dropout, are 1 on average; if 0.1 were rounded to sixteenths, it would be 1.04 or 0.97."""
    small_model().set_precision(precision, "cuda")
    zeros = torch.zeros(64, 12, 64, 64, device="cuda", dtype=PRECISIONS[precision])
    mean = attention(zeros, zeros, torch.ones_like(zeros), None, drop=0.1).float().mean().item()
    assert mean == pytest.approx(1, abs=0.01)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", ["stage 1", "stage 1, gradcache", "opt", "t5"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_host_never_waits_for_the_gpu_within_a_step(kind, precision):
    """It runs ahead: no .item(), no branch on a tensor of the device. fp16 has its loss scaled."""
    if (kind, precision) == ("t5", "fp16"):
        pytest.skip("T5 does not run in fp16")
    cfg = TrainConfig(clip=1.0, lr=1e-4, beta2=0.98, weight_decay=0.05, negatives_ramp=0)
    if kind in LLMS:
        model, objectives = stage2_model(kind, dropout=0.1), ("lm",)
        targets = [[7] * n for n in (3, 5, 9)]
        batches = [llm_batch([[2]] * 3, targets, model.llm_tokenizer, [1, 2, 3], images=noise(3))]
    else:
        model, objectives = small_model(dropout=0.1), OBJECTIVES
        batches = [random_batch(4, seed, list(range(4 * seed, 4 * seed + 4))) for seed in range(2)]
        cfg.gradcache = "gradcache" in kind
    model = model.set_precision(precision, "cuda").train()
    batches = [batch.pin_memory().to("cuda") for batch in batches]
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    optimize(model, optimizer, scaler, batches, cfg, objectives, 1)  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, norm = optimize(model, optimizer, scaler, batches, cfg, objectives, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all() and (norm.isfinite() or precision == "fp16")
