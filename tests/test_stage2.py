"""Stage 2 and its calls: what the language model is trained on, what it is asked, and how often anything runs."""

import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LLMS, ROOT, SHARED, TINY, roughen, run_many, small_model, stage2_model
from safetensors.torch import load_file

import train
from blip2 import Blip2, stage2_totals
from data import LLMTexts, TrainBatches, UserError, ask_in, cut_in_two, open_photos
from llm import OPT, T5
from shapes import ShapesWorld


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def batch_of(model: Blip2, captions: list[str], seed: int = 0, **rest):
    seeds = [[seed, row] for row in range(len(captions))]
    images = rest.pop("images", pictures(len(captions)))
    return model.llm_texts.batch(
        [("", caption) for caption in captions], seeds, list(range(len(captions))), images=images, **rest
    )


CAPTIONS = [
    "a small red circle above a large blue square",
    "there is a large white star at the top left",
    "a picture of a small green cross",
    "three shapes",
]


# --- what is trained on


def test_opt_learns_the_whole_caption_behind_bos_and_ends_with_a_newline():
    """FACTS 2.2: [visual][BOS][text][newline]; the visual part, [BOS] and the padding are no labels."""
    model = stage2_model("opt")
    batch = batch_of(model, CAPTIONS)
    tokenizer, texts = model.llm_texts.tokenizer, model.llm_texts
    assert batch.prompt_ids.tolist() == [[2]] * 4 and tokenizer.id_to_token(2) == "</s>"
    labels = batch.target_ids.flatten()[batch.label_rows].tolist()
    assert tokenizer.decode(labels) == "\n".join(CAPTIONS) + "\n"
    assert labels.count(texts.end_id) == 4 and not {texts.pad_id, 2} & set(labels)


def test_a_long_caption_keeps_its_newline():
    model = stage2_model("opt")
    long = " ".join(["red circle"] * 40)
    batch = batch_of(model, [long, "a star"])
    first = batch.target_ids[0][: (batch.label_rows < batch.target_ids.shape[1]).sum()]
    assert len(first) + 1 == model.llm_texts.max_tokens == 32  # with [BOS], as in the original
    assert first[-1] == model.llm_texts.end_id and batch.truncated == 1


def test_t5_learns_the_rest_of_the_caption_after_a_prefix_of_any_length():
    """Paper 3.3, prefix language modelling: the encoder reads the first part, the decoder writes the second."""
    model = stage2_model("t5")
    batch = batch_of(model, CAPTIONS * 8)
    decode, end = model.llm_texts.tokenizer.decode, model.llm_texts.end_id
    assert end == model.llm_texts.tokenizer.token_to_id("</s>") == 1
    prefixes = set()
    for row, caption in enumerate(CAPTIONS * 8):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
        target = [token for token in batch.target_ids[row].tolist() if token != model.llm_texts.pad_id]
        assert prompt[-1] == target[-1] == end
        assert (decode(prompt[:-1]) + decode(target[:-1])).split() == caption.split()
        prefixes.add(decode(prompt[:-1]).strip())
    assert "" in prefixes and len(prefixes) > 8


def test_the_cut_is_uniform_and_leaves_at_least_one_word():
    rng = np.random.default_rng(0)
    cuts = Counter(len(cut_in_two("a b c d", rng)[0].split()) for _ in range(4000))
    assert sorted(cuts) == [0, 1, 2, 3] and all(900 < count < 1100 for count in cuts.values())
    assert cut_in_two("one", rng) == ("", "one")


def test_the_cut_belongs_to_the_sample():
    """The same position in a run has the same prefix, whoever makes the batch."""
    photos, texts = open_photos(["shapes"], "train", 8), stage2_model("t5").llm_texts
    batches = TrainBatches(photos, texts, 8, seed=3)
    both = batches.__getitems__([(5, 7), (6, 9)])
    alone = batches.__getitems__([(6, 9)])
    row = both.prompt_ids[1][both.prompt_mask[1]]
    assert torch.equal(row, alone.prompt_ids[0])


@pytest.mark.parametrize("kind", LLMS)
def test_loss_is_the_mean_over_all_words_and_its_gradient_reaches_the_queries_only(kind):
    model = stage2_model(kind)
    batch = batch_of(model, CAPTIONS)
    loss, alone = model(batch)["lm"], []
    for row in range(4):
        part = batch_of(model, CAPTIONS[row : row + 1], seed=row, images=pictures(4)[row : row + 1])
        alone.append(model(part, {"lm": 1})["lm"])
    if kind == "opt":  # T5's cut belongs to the sample
        torch.testing.assert_close(loss, sum(alone) / stage2_totals([batch])["lm"], rtol=1e-4, atol=1e-5)
    model.train()
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"qformer.queries", "ln_vision.weight", "llm_proj.weight", "qformer.blocks.0.ffn_query.up.weight"} <= trained
    left_alone = (
        "vit.",
        "llm.",
        "qformer.word_embedding",
        "qformer.position",
        "qformer.lm_head",
        "itm_head",
        "text_proj",
    )
    assert not any(name.startswith(left_alone) or ".ffn_text." in name for name in trained)
    assert not model.llm.training and not model.vit.training and model.qformer.training


def test_stage_2_learns_and_leaves_what_is_frozen_alone():
    model = stage2_model("opt").train()
    batch = batch_of(model, CAPTIONS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(batch)["lm"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def same_gradients(rank, kind, expected):
    model = stage2_model(kind)
    whole = batch_of(model, CAPTIONS)
    rows = slice(2 * rank, 2 * rank + 2)
    ids = whole.target_ids[rows]
    width = ids.shape[1]
    mine = torch.arange(len(whole.target_ids) * width).view(-1, width)[rows].flatten()
    labels = torch.searchsorted(mine, whole.label_rows[torch.isin(whole.label_rows, mine)])
    part = type(whole)(
        whole.image_ids[rows], labels, prompt_ids=whole.prompt_ids[rows], prompt_mask=whole.prompt_mask[rows],
        target_ids=ids, images=whole.images[rows],
    )  # fmt: skip
    model.stage2_losses(part, stage2_totals([part]))["lm"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.distributed.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", LLMS)
def test_two_processes_have_the_gradient_of_the_big_batch(kind):
    model = stage2_model(kind)
    model.stage2_losses(batch_of(model, CAPTIONS))["lm"].backward()
    run_many(2, same_gradients, kind, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


# --- prompts


def test_questions_and_conversations_in_the_template():
    """DESIGN: turns joined as "Question: q Answer: a. Question: q2 Answer:", in the template's words."""
    template = OPT.layout.template
    assert ask_in(template, "what is it?") == "Question: what is it? Answer:"
    turns = [("what is it?", "a dog"), ("is it large?", "no."), "what color?"]
    said = "Question: what is it? Answer: a dog. Question: is it large? Answer: no. Question: what color? Answer:"
    assert ask_in(template, turns) == said
    assert ask_in(T5.layout.template, "what is it?") == "Question: what is it? Short answer:"
    assert ask_in("{}", "a photo of") == "a photo of"


@pytest.mark.parametrize("kind", LLMS)
def test_ask_reads_the_runs_template_and_lets_a_free_prompt_through(kind, monkeypatch):
    model, seen = stage2_model(kind), []
    encode = model.llm_texts.encode_prompts
    monkeypatch.setattr(model.llm_texts, "encode_prompts", lambda prompts: seen.append(prompts) or encode(prompts))
    picture = pictures(1)
    model.ask(picture, "what is it?")
    model.ask(picture, "a photo of", template="{}")
    model.template = "Q: {} A:"
    model.ask(picture, [[("one?", "two"), "three?"]])
    answer = {"opt": "Answer:", "t5": "Short answer:"}[kind]
    assert seen == [[f"Question: what is it? {answer}"], ["a photo of"], ["Q: one? A: two. Q: three? A:"]]


def test_real_opt_tokenizer_has_its_newline_and_its_bos():
    """vocab.json and merges.txt, as facebook/opt-* has them: </s> 2 in front, newline 50118 at the end."""
    folder = SHARED / "data/tokenizers/opt"
    if not folder.exists():
        pytest.skip("no tokenizers beside the project (they are expected in ../shared)")
    texts = LLMTexts(folder, OPT.layout)
    assert texts.end_id == 50118 and texts.pad_id == 1
    assert texts.encode_prompts(["", "a photo of"]) == [[2], [2, 102, 1345, 9]]
    assert texts.encode_texts(["a dog"], ["a photo of"]) == [[10, 2335, 50118]]  # glued with a space
    assert texts.decode([10, 2335, 50118]) == "a dog"
    t5 = LLMTexts(SHARED / "data/tokenizers/t5", T5.layout)
    assert (
        t5.encode_prompts([""]) == [[1]]
        and t5.end_id == 1
        and t5.decode(t5.encode_texts(["a dog"], [""])[0]) == "a dog"
    )


# --- calls


@pytest.mark.parametrize("kind", LLMS)
def test_answers_have_the_shape_of_the_questions(kind):
    from PIL import Image

    model = stage2_model(kind)
    photo = Image.new("RGB", (9, 9), (200, 10, 10))
    talk = [("what?", "a star"), "where?"]
    assert isinstance(model.ask(photo, "what?"), str) and isinstance(model.ask(photo, talk), str)
    assert [type(a) for a in model.ask(photo, ["what?", talk])] == [str, str]
    three = pictures(3)
    assert len(model.ask(three, "what?")) == 3 and len(model.ask(three, ["a?", talk, "c?"])) == 3
    nested = model.ask(three, [["a?", "b?"], "c?", ["d?"]])
    assert [type(entry) for entry in nested] == [list, str, list] and len(nested[0]) == 2
    assert isinstance(model.caption(photo), str) and len(model.caption(three)) == 3
    assert len(model.ask(photo, "what?", num_captions=2)) == 2
    with pytest.raises(UserError, match="got an empty list of questions"):
        model.ask(photo, [])
    with pytest.raises(UserError, match="got 2 questions for 3 photos, expected one for all, or one"):
        model.ask(three, ["a?", "b?"])
    for nothing in ([], "star"):
        with pytest.raises(UserError, match=f"got the candidates {re.escape(repr(nothing))} to rank, expected a list"):
            model.rank(photo, "what?", nothing)
    with pytest.raises(UserError, match="got no photos"):
        model.ask([], "what?")
    with pytest.raises(UserError, match="got no text to score"):
        model.score(photo, [])
    assert isinstance(model.ask(np.zeros((9, 9), np.uint8), "what?"), str)  # grey


@pytest.mark.parametrize("kind", LLMS)
def test_a_batch_ranks_as_each_alone_behind_words_and_behind_none(kind):
    model, photos, candidates = stage2_model(kind), pictures(3), ["a star", "red"]
    prompts = ["", "a picture of", ""]
    together = model.rank(photos, prompts, candidates, template="{}")
    for i, ranked in enumerate(together):
        alone = model.rank(photos[i : i + 1], prompts[i : i + 1], candidates, template="{}")[0]
        assert [entry.answer for entry in ranked] == [entry.answer for entry in alone]
        assert [entry.log_prob for entry in ranked] == pytest.approx([entry.log_prob for entry in alone], abs=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, and pytest -m cuda")
def test_a_cuda_card_answers_as_the_processor_does():
    """In fp32: features, captions, answers, what is likely; and matching without a language model."""
    photos, found = pictures(5), []
    for device in ("cpu", "cuda"):
        model = Blip2.from_pretrained(ROOT / "assets/tiny/blip2", device=device)
        captions = [model.caption(photos), model.caption(photos, num_beams=1), model.caption(photos, num_captions=3)]
        ranked = model.rank(photos, "what is it?", ["a star", "red"])
        torch.manual_seed(0)
        matcher = Blip2.build(TINY[1], TINY[3], 64, device=device)[0].eval()
        numbers = [model.encode_image(photos).query_out.cpu(), matcher.itm_scores(photos, ["a star", "red"]).cpu()]
        numbers += [torch.tensor([[entry.log_prob for entry in row] for row in ranked])]
        found.append((captions, model.ask(photos, "what color is it?"), numbers))
    (captions, answers, cpu), (*others, cuda) = found
    assert others == [captions, answers]
    for a, b in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card, and pytest -m cuda")
@pytest.mark.parametrize("kind", LLMS)
def test_a_step_that_a_card_has_recorded_is_the_step(kind):
    """Recorded once for four beams and once for the two that stay; in between, beams change places."""
    generator, found = torch.Generator().manual_seed(0), []
    prompt, tokens = torch.randn(2, 5, 128, generator=generator), torch.randint(5, 20, (9, 4), generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for device in ("cpu", "cuda"):
        llm = stage2_model(kind).set_precision("fp32", device).llm
        decoder = llm.decoder_for(prompt.to(device), mask.to(device), 12)
        logits = [decoder.start().cpu()]
        for step, words in enumerate(tokens):
            rows = [0, 0, 1, 1] if step == 0 else [1, 0, 2, 2] if step < 5 else [2, 3] if step == 5 else [1, 0]
            decoder.select(torch.tensor(rows, device=device), 2)
            logits.append(decoder.step(words[: len(rows)].to(device)).cpu())
        found.append(logits)
    assert decoder.recorded.graph is not None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_what_a_recorded_step_reads_stays_where_it_is(kind):
    """As long as the recording does: until rows multiply or leave."""
    llm, seen = stage2_model(kind).llm, []
    decoder = llm.decoder_for(torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool), 9)
    decoder.start()
    for rows in ([0, 0, 1, 1], [1, 0, 2, 2], [0, 1, 3, 2], [2, 3], [1, 0]):  # of two images; then one has finished
        decoder.select(torch.tensor(rows), 2)
        read = [decoder.cache.k, decoder.cache.v, decoder.cache.place]
        read += [decoder.real] if kind == "opt" else [decoder.mask, *(x for kv in decoder.memory for x in kv)]
        seen.append((decoder.recorded, [x.data_ptr() for x in read]))
        decoder.step(torch.full((len(rows),), 7))
    same = [(before is after, old == new) for (before, old), (after, new) in itertools.pairwise(seen)]
    assert same == [(True, True), (True, True), (False, False), (True, True)]


@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize("decoding", [{}, dict(num_beams=1), dict(num_beams=3, length_penalty=1.0)], ids=str)
def test_a_batch_of_questions_gives_what_each_gives_alone(kind, decoding):
    """Prompts of any length together, token for token in fp32."""
    model = stage2_model(kind)
    images = model.encode_image(pictures(3))
    questions = ["what?", "what color is the large star that is left of the small circle?", "is it red?"]
    together = model.ask(images, [questions] * 3, **decoding)
    for i in range(3):
        one = type(images)(*(tensor[i : i + 1] for tensor in images))
        assert together[i] == [model.ask(one, question, **decoding)[0] for question in questions]


def brute_force(model, images, prompt, text):
    """The log-probability of one text behind one prompt, by the whole forward pass."""
    ids = model.llm_texts.encode_texts([text], [prompt])
    target = torch.tensor(ids)
    prompts = torch.tensor(model.llm_texts.encode_prompts([prompt]))
    embeds, mask = model.llm_prompt(images.query_out, prompts, torch.ones_like(prompts, dtype=torch.bool))
    logits = model.llm(embeds, mask, target, torch.arange(target.shape[1]))
    return -F.cross_entropy(logits, target[0], reduction="sum").item(), target.shape[1]


@pytest.mark.parametrize("kind", LLMS)
def test_rank_and_score_equal_brute_force(kind):
    model = stage2_model(kind)
    images = model.encode_image(pictures(2))
    texts = ["red", "a large blue square", "top left", "no"]
    with torch.no_grad():
        scores = model.score(images, texts, batch_size=3)
        for n in range(2):
            one = type(images)(*(tensor[n : n + 1] for tensor in images))
            for m, text in enumerate(texts):
                total, tokens = brute_force(model, one, "", text)
                assert scores.log_prob[n, m].item() == pytest.approx(total, abs=1e-3)
                assert scores.mean_log_prob[n, m].item() == pytest.approx(total / tokens, abs=1e-3)
            question = "what color is the longest star?" if n else "what?"
            prompt = ask_in(model.template, question)
            ranked = model.rank(one, [[question]], texts)[0][0]
            wanted = sorted(((brute_force(model, one, prompt, t)[0], t) for t in texts), reverse=True)
            assert [r.answer for r in ranked] == [t for _, t in wanted]
            assert [r.log_prob for r in ranked] == pytest.approx([total for total, _ in wanted], abs=1e-3)
    both = model.rank(images, ["what?", "what color is the longest star?"], texts)
    assert [len(r) for r in both] == [4, 4]


@pytest.mark.parametrize("kind", LLMS)
def test_each_photo_is_encoded_once_and_prompts_are_not_multiplied_by_beams(kind):
    """Paper-sized savings: 10 questions, 20 candidates, 5 beams, and one pass through ViT and Q-Former per photo."""
    model, seen = stage2_model(kind), Counter()
    model.vit.register_forward_hook(lambda _, __, out: seen.update(vit=len(out)))
    queries = model.qformer.encode_queries
    model.qformer.encode_queries = lambda kv, *rest: (seen.update(qformer=len(kv[0][0])), queries(kv, *rest))[1]
    first = (model.llm.blocks if kind == "opt" else model.llm.encoder.blocks)[0]
    first.register_forward_hook(lambda _, inputs, __: seen.update(tokens=inputs[0].shape[0] * inputs[0].shape[1]))
    questions = [f"is it number {n}?" for n in range(10)]
    prompt = len(model.llm_texts.encode_prompts([ask_in(model.template, questions[0])])[0]) + 3  # 3 queries
    from PIL import Image

    photo = Image.new("RGB", (9, 9), (200, 10, 10))
    model.ask(photo, questions, num_beams=5, max_new_tokens=1)
    assert seen == {"vit": 1, "qformer": 1, "tokens": 10 * prompt}
    seen.clear()
    candidates = [f"number {n}" for n in range(10, 30)]  # all of as many tokens
    model.rank(photo, questions, candidates)
    texts = model.llm_texts.encode_texts(candidates, ["x"] * 20)
    behind = 10 * sum(len(ids) - 1 for ids in texts) if kind == "opt" else 0  # T5's encoder sees no candidate
    assert seen == {"vit": 1, "qformer": 1, "tokens": 10 * prompt + behind}
    seen.clear()
    model.score(photo, candidates)
    behind = sum(len(ids) - 1 for ids in model.llm_texts.encode_texts(candidates, [""] * 20)) if kind == "opt" else 0
    assert seen == {"vit": 1, "qformer": 1, "tokens": 3 + 1 + behind}


def test_sampling_with_a_generator_is_repeatable():
    model, draws = stage2_model("opt"), []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        draws.append(
            model.caption(pictures(2), num_beams=1, sample=True, top_p=0.9, num_captions=3, generator=generator)
        )
    assert draws[0] == draws[1] != draws[2] and [len(group) for group in draws[0]] == [3, 3]


def test_calls_that_need_a_language_model_say_so():
    model = small_model()
    for call in (lambda: model.ask(pictures(1), "what?"), lambda: model.rank(pictures(1), "what?", ["a"]),
                 lambda: model.score(pictures(1), "a")):  # fmt: skip
        with pytest.raises(UserError, match="this model has no language model to ask: open a run of stage 2"):
            call()


def test_a_prompt_longer_than_the_position_table():
    model = stage2_model("opt")
    with pytest.raises(
        UserError, match="got 3 visual embeddings, a prompt of .* expected at most 128, .*shorten the prompt"
    ):
        model.ask(pictures(1), "why " * 200)
    with pytest.raises(UserError, match="and 500 new ones"):
        model.caption(pictures(1), max_new_tokens=500)
    stage2_model("t5").ask(pictures(1), "why " * 200)  # relative positions have no table to end


def test_t5_is_never_fp16():
    """Its activations overflow there; paper 3.4 has it in bf16."""
    with pytest.raises(UserError, match="got precision fp16 for .*t5, in which T5 overflows: pass bf16"):
        stage2_model("t5").set_precision("fp16")
    model = stage2_model("t5").set_precision("bf16")
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in stage2_model("opt").set_precision("fp16").llm.parameters()} == {torch.float16}
    assert model.llm_proj.weight.dtype == torch.float32
    assert torch.isfinite(model(batch_of(model, CAPTIONS))["lm"])


def test_a_folder_without_a_tokenizer(tmp_path):
    shutil.copytree(ROOT / LLMS["opt"], tmp_path / "llm")
    (tmp_path / "llm/tokenizer.json").unlink()
    with pytest.raises(
        UserError, match="has no tokenizer: expected tokenizer.json, vocab.txt, or vocab.json with merges"
    ):
        small_model().attach_llm(str(tmp_path / "llm"))


def test_a_tokenizer_of_another_model(tmp_path):
    shutil.copytree(ROOT / LLMS["opt"], tmp_path / "llm")
    shutil.copy(ROOT / "assets/tiny/bert/tokenizer.json", tmp_path / "llm")
    with pytest.raises(UserError, match="has no token '</s>': use the language model's own"):
        small_model().attach_llm(str(tmp_path / "llm"))


# --- runs and public folders


def test_a_saved_run_opens_as_the_same_model_and_checks_its_language_model(tmp_path):
    model, _ = Blip2.build("assets/tiny/vit", "assets/tiny/bert", image_size=64, num_queries=4, embed_dim=8)
    model.attach_llm(LLMS["t5"], template="Q: {} A:")
    model.eval().save_pretrained(tmp_path / "run")
    again = Blip2.from_pretrained(tmp_path / "run")
    photos = [ShapesWorld("val").picture(i) for i in range(3)]
    assert again.template == "Q: {} A:" and again.ask(photos, "what?") == model.ask(photos, "what?")
    assert model.trained_state().keys() == again.trained_state().keys()
    assert not any(name.startswith(("vit.", "llm.")) for name in model.trained_state())
    assert any(".ffn_text." in name for name in model.trained_state())  # the text branch survives
    with pytest.raises(UserError, match="holds other weights than .* was trained over: pass --llm"):
        Blip2.from_pretrained(tmp_path / "run", llm=LLMS["opt"])


@pytest.mark.parametrize("kind", LLMS)
def test_whole_model_of_transformers(kind, tmp_path):
    """Saved there, opened here: the same logits and the same text by 5 beams."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    qformer = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                   encoder_hidden_size=16, vocab_size=40)  # fmt: skip
    words = LLMTexts(ROOT / LLMS[kind], {"opt": OPT, "t5": T5}[kind].layout).vocab_size + 1  # + the image token
    if kind == "opt":
        text = transformers.OPTConfig(
            vocab_size=words, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=80,
        )  # fmt: skip
    else:
        text = transformers.T5Config(
            vocab_size=words, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0,
        )  # fmt: skip
        text.dense_act_fn = "gelu"  # as the public BLIP-2 checkpoints have it
    config = transformers.Blip2Config(
        vision_config=vision | {"patch_size": 14}, qformer_config=qformer, text_config=text.to_dict(),
        num_query_tokens=3, image_token_index=words - 1,
    )  # fmt: skip
    theirs = roughen(transformers.Blip2ForConditionalGeneration(config), 1).eval()
    with torch.no_grad():
        theirs.language_projection.weight.mul_(20)  # so that what is said depends on the photo
        for parameter in theirs.language_model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    theirs.save_pretrained(tmp_path)
    shutil.copy(ROOT / LLMS[kind] / "tokenizer.json", tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if kind == "t5":  # transformers 5 saves v1.1 and v1.0 alike
        saved["text_config"] |= {"scale_decoder_outputs": False, "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps(saved))
    ours = Blip2.from_pretrained(tmp_path)
    assert ours.llm.cfg.act == "gelu" if kind == "t5" else ours.llm.cfg.pre_norm

    torch.manual_seed(1)
    pixels = torch.randn(24, 3, 28, 28)
    prompt = "Question: what color is the star? Answer:"
    ids = torch.tensor(ours.llm_texts.encode_prompts([prompt])).expand(24, -1)
    with_image = torch.cat((torch.full((24, 3), words - 1), ids), dim=1)
    mask = torch.ones_like(with_image)
    with torch.no_grad():
        images = ours.encode_tokens(ours.vit(pixels))
        embeds, ours_mask = ours.llm_prompt(images.query_out, ids, torch.ones_like(ids, dtype=torch.bool))
        if kind == "opt":
            wanted = theirs(pixel_values=pixels, input_ids=with_image, attention_mask=mask).logits[:, 2:]
            found = ours.llm(embeds[:, :3], ours_mask[:, :3], ids, torch.arange(ids.numel())).view(24, -1, words)
            wanted = wanted[:, : ids.shape[1]]
        else:
            target = torch.randint(2, words - 1, (24, 5))
            wanted = theirs(pixel_values=pixels, input_ids=with_image, attention_mask=mask, labels=target).logits
            found = ours.llm(embeds, ours_mask, target, torch.arange(120)).view(24, 5, -1)
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
        out = theirs.generate(
            pixel_values=pixels, input_ids=with_image, attention_mask=mask, num_beams=5, max_new_tokens=8,
            length_penalty=-1.0, eos_token_id=ours.llm_texts.end_id, min_new_tokens=1,
        )  # fmt: skip
    texts = []
    for row in out[:, 1:] if kind == "t5" else out[:, with_image.shape[1] :] if out.shape[1] > 8 else out:
        row = row.tolist()
        texts.append(
            ours.llm_texts.decode(row[: row.index(ours.llm_texts.end_id)] if ours.llm_texts.end_id in row else row)
        )
    assert ours.ask(images, prompt, template="{}", max_new_tokens=8) == texts
    assert len(set(texts)) > 1  # the comparison means something


# --- training


@pytest.fixture
def stage1_run(tmp_path):
    """A run of stage 1, of two steps."""
    folder = str(tmp_path / "stage1")
    train.main(
        [
            *TINY,
            *"--steps 2 --batch 4 --queries 4 --eval-every 0 --precision fp32 --losses itc".split(),
            "--out",
            folder,
        ]
    )
    return folder


@pytest.fixture(autouse=True)
def nothing_to_evaluate(monkeypatch):
    """The evaluation of 1,000 pictures at the end of a run is left out."""
    way = {"image_to_text": dict.fromkeys(("R@1", "R@5", "R@10"), 0.0)}
    way["text_to_image"] = way["image_to_text"]
    nothing = dict.fromkeys(("chance", "shuffled pictures", "itc"), way) | {"subsets": {}, "mistakes": []}
    monkeypatch.setattr(
        train, "retrieval", lambda *_, **__: {"task": "retrieval", "photos": 0, "texts": 0, "seconds": 0, **nothing}
    )
    answers = {"pictures": 0, "questions": 0, "accuracy": {"the picture": {"all": 50.0}}, "kinds": {}, "mistakes": []}
    monkeypatch.setattr(
        train, "answering", lambda *_, **__: {"task": "answers", **answers, "captions right": 0.0, "seconds": 0}
    )


STAGE2 = "--stage 2 --batch 4 --eval-every 0 --precision fp32".split()


def losses_of(folder) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["lm"] for line in lines if "lm" in line]


@pytest.mark.parametrize("kind", LLMS)
def test_stage_2_goes_on_from_stage_1_and_can_be_resumed_bit_for_bit(kind, stage1_run, tmp_path):
    flags = [
        *STAGE2,
        "--init",
        stage1_run,
        "--llm",
        str(ROOT / LLMS[kind]),
        "--steps",
        "4",
        "--save-every",
        "2",
        "--keep",
        "2",
    ]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train.main([*flags, "--dropout", "0.1", "--out", str(straight)])
    train.main([*flags, "--dropout", "0.1", "--out", str(broken)])
    shutil.rmtree(broken / "step-000004")  # as if it had died after the checkpoint of step 2
    shutil.rmtree(stage1_run)  # which is not needed any more
    train.main(["--resume", "--out", str(broken)])
    assert losses_of(straight) == losses_of(broken) and len(losses_of(straight)) == 4
    one, other = (load_file(run / "model.safetensors") for run in (straight, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(name.startswith(("llm.", "vit.")) for name in one)
    assert Blip2.from_pretrained(straight).qformer.cfg.num_queries == 4  # as in stage 1
    assert json.loads((straight / "answers.json").read_text())["accuracy"]


def test_the_text_branch_of_stage_1_is_kept_as_it_was(stage1_run, tmp_path):
    train.main([*STAGE2, "--init", stage1_run, "--steps", "2", "--out", str(tmp_path / "run")])
    before, after = (load_file(f"{run}/model.safetensors") for run in (stage1_run, tmp_path / "run"))
    assert before.keys() < after.keys()
    for name in before:
        kept = ".ffn_text." in name or name.startswith(
            (
                "qformer.word_embedding",
                "qformer.position",
                "qformer.lm_head",
                "vision_proj",
                "text_proj",
                "itm_head",
                "temp",
            )
        )
        assert torch.equal(before[name], after[name]) == kept, name


def test_a_run_that_goes_on_over_the_same_language_model_keeps_its_projection(stage1_run, tmp_path, capsys):
    """However its folder is spelled."""
    train.main([*STAGE2, "--init", stage1_run, "--steps", "1", "--out", str(tmp_path / "run")])
    assert "the projection to it is new" in capsys.readouterr().out
    again = ["--init", str(tmp_path / "run"), "--llm", "./assets/tiny/opt/", "--steps", "1", "--lr", "1e-9"]
    train.main([*STAGE2, *again, "--out", str(tmp_path / "again")])
    assert "projection to it is new" not in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "model.safetensors")["llm_proj.weight"] for name in ("run", "again"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_init_none_starts_from_bert(tmp_path):
    """The ablation of the paper's Figure 5."""
    train.main([*STAGE2, *TINY, "--init", "none", "--steps", "1", "--lr", "1e-9", "--out", str(tmp_path / "run")])
    torch.manual_seed(0)
    fresh, _ = Blip2.build(TINY[1], TINY[3], 64, 8, 2, 64)
    found = load_file(tmp_path / "run/model.safetensors")["qformer.blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(found, fresh.qformer.blocks[0].attn.qkv.weight.detach(), rtol=0, atol=1e-6)


def test_accumulated_micro_batches_are_the_big_batch(stage1_run, tmp_path):
    """Every word counts the same, whichever micro-batch it is in."""
    flags = [*STAGE2, "--init", stage1_run, "--steps", "3"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    train.main([*flags, "--out", str(tmp_path / "parts"), "--micro-batch", "2"])
    train.main([*flags, "--out", str(tmp_path / "again"), "--grad-checkpointing"])
    whole = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == pytest.approx(whole, rel=1e-4)
    assert losses_of(tmp_path / "again") == pytest.approx(whole, rel=1e-5)


def test_paper_recipes_of_stage_2_are_the_papers(stage1_run):
    """Section 3.4: 80k steps of 1920 (OPT) or 1520 (FlanT5), warm-up 2k, peak 1e-4, down to 5e-5."""
    for llm, batch in (("opt-2.7b", 1920), ("flan-t5-xl", 1520)):
        flags = ["--stage", "2", "--init", "none", "--data", "coco.json", "--llm", llm]
        cfg, why = train.complete(*train.parse_flags(flags))
        assert (cfg.steps, cfg.batch, cfg.warmup, cfg.lr, cfg.min_lr) == (80_000, batch, 2000, 1e-4, 5e-5)
        assert (cfg.beta2, cfg.weight_decay, cfg.image_size, cfg.queries) == (0.98, 0.05, 224, 32)
        assert why.startswith('recipe "stage 2, paper, ')
    cfg, why = train.complete(*train.parse_flags(["--stage", "2", "--init", stage1_run]))
    assert cfg.queries == 4 and cfg.image_size == 64 and f"from {stage1_run}: " in why


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "stage 2 starts from a run of stage 1: pass --init runs/stage1, or --init none"),
        (
            ["--init", "nowhere"],
            "--init nowhere is not a run: train it with --stage 1 --out nowhere, or pass --init none",
        ),
        (["--init", "none", "--losses", "itc"], "got --losses, a flag of stage 1, retrieval, in stage 2: leave it out"),
        (
            ["--init", "none", "--llm", "nowhere"],
            "--llm nowhere does not exist: expected a folder, or a name (opt-125m",
        ),
        (["--init", "RUN", "--queries", "9"], "got --queries 9, but "),
        (["--init", "RUN", "--stage", "3"], "got --stage 3, expected 1, 2, caption, vqa or retrieval"),
        (
            ["--init", "RUN", "--stage", "1"],
            "got --init, a flag of stage 2, caption, vqa, retrieval, in stage 1: leave it out",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_of_stage_2(flags, sentence, stage1_run, tmp_path):
    flags = [stage1_run if flag == "RUN" else flag for flag in flags]
    with pytest.raises(UserError) as error:
        train.main(["--stage", "2", "--out", str(tmp_path / "run"), *flags])
    assert sentence in str(error.value)
    assert not (tmp_path / "run").exists()
