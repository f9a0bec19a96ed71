"""The calls a user makes (blip2.py, `eval.py ask`): images and texts in any number and shape; a ragged batch gives what
each gives alone; each image is encoded once; what is asked is what was trained."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LLMS, ROOT, TINY, small_model, stage2_model
from PIL import Image
from samples import few, shapes_model
from torch import Tensor

import blip2
import eval as evaluation
from blip2 import Blip2
from data import collate_for
from engine.errors import UserError
from generate import generate
from sources.text import BertTokenizer, fill_template

RED = Image.new("RGB", (9, 9), (200, 10, 10))
CONVERSATION = [("what?", "a star"), "where?"]
QUESTIONS = ["what color is the star?", "how many shapes are there?", "is it large?"]
ANSWERS = ["red", "two", "yes"]


def noise(count: int) -> Tensor:
    """uint8 images of 8 x 8 pixels."""
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def row_of(encoded, row: int):
    """One of several encoded images."""
    return type(encoded)(*(tensor[row : row + 1] for tensor in encoded))


def prompts_of(model: Blip2, monkeypatch) -> list:
    """A list that collects the prompts that the language model gets."""
    seen, encode = [], model.llm_tokenizer.encode_prompts
    monkeypatch.setattr(model.llm_tokenizer, "encode_prompts", lambda prompts: seen.append(prompts) or encode(prompts))
    return seen


def png(image: Image.Image) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# --- images ----------------------------------------------------------------------------------------------------------

UPRIGHT = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)  # larger than the model's 8 x 8
CHANNELS_FIRST = torch.from_numpy(UPRIGHT).permute(2, 0, 1)
SAME = {
    "a Pillow image": Image.fromarray(UPRIGHT),
    "a file's bytes": png(Image.fromarray(UPRIGHT)),
    "an open file": io.BytesIO(png(Image.fromarray(UPRIGHT))),
    "a uint8 tensor": CHANNELS_FIRST,
    "an int64 tensor": CHANNELS_FIRST.long(),
    "an int16 array": UPRIGHT.astype(np.int16),
    "a uint16 array, 8 bits": UPRIGHT.astype(np.uint16),
    "a uint16 array, 16 bits": UPRIGHT.astype(np.uint16) * 257,
    "torchvision's ToTensor": CHANNELS_FIRST / 255,
    "a float16 tensor": (CHANNELS_FIRST / 255).half(),
    "a tensor with gradient": (CHANNELS_FIRST / 255).requires_grad_(),
    "a float64 array": UPRIGHT / 255,
    "an opaque RGBA array": np.dstack((UPRIGHT, np.full((10, 12), 255, np.uint8))),
    "an opaque RGBA tensor": torch.cat((CHANNELS_FIRST, torch.full((1, 10, 12), 255, dtype=torch.uint8))),
}


def test_every_kind_of_image_gives_what_its_file_gives(tmp_path):
    """A batch of ToTensor would be almost black if it were taken as normalised, an image of another size would be read
    by resized positions: captions of another image, without a word."""
    model = small_model()
    Image.fromarray(UPRIGHT).save(tmp_path / "image.png")
    expected = model.encode_image(tmp_path / "image.png").query_out
    everything = [*SAME.values(), str(tmp_path / "image.png")]
    for kind, image in SAME.items():
        assert torch.equal(model.encode_image(image).query_out, expected), kind
    in_batches = [CHANNELS_FIRST.expand(2, -1, -1, -1), (UPRIGHT / 255)[None], *everything]
    assert torch.equal(model.encode_image(CHANNELS_FIRST[None]).query_out, expected)
    for many in (everything, tuple(everything), iter(everything), in_batches, torch.stack([CHANNELS_FIRST / 255] * 3)):
        found = model.encode_image(many, batch_size=4).query_out
        torch.testing.assert_close(found, expected.expand(len(found), -1, -1))
    assert len(found) == 3 and len(model.encode_image(in_batches).query_out) == 3 + len(everything)


def test_grey_images_are_read_as_grey():
    grey = Image.fromarray(UPRIGHT).convert("L")
    array, model = np.asarray(grey).copy(), small_model()
    expected = model.encode_image(grey).query_out
    for image in (array, array[:, :, None], array / 255, torch.from_numpy(array), torch.from_numpy(array)[None] / 255,
                  Image.fromarray((array / 255).astype(np.float32))):  # fmt: skip
        assert torch.equal(model.encode_image(image).query_out, expected)


def test_one_tensor_is_one_image_and_gets_one_answer():
    model = stage2_model("opt")
    one = noise(1)[0]
    assert model.caption(one) == model.caption(one[None])[0] == model.caption(iter([one]))[0]
    assert isinstance(model.ask(one, "what?"), str) and isinstance(model.ask(png(RED), "what?"), str)
    assert len(model.rank(one, "what?", ["a", "b"])) == 2


@pytest.mark.parametrize(
    "image, sentence",
    [
        ((CHANNELS_FIRST / 255 - 0.5) / 0.25, "got a tensor of float32 and shape (3, 10, 12) as an image with values"),
        (CHANNELS_FIRST.float(), "expected floats from 0 to 1 or integers from 0 to 255: convert it, or pass"),
        (CHANNELS_FIRST / 255 * float("nan"), "with values from nan to nan, expected floats from 0 to 1"),
        (CHANNELS_FIRST.long() * 2, "got a tensor of int64 and shape (3, 10, 12) as an image with values from "),
        (-UPRIGHT.astype(np.int32), "got an array of int32 and shape (10, 12, 3) as an image with values from -"),
        (CHANNELS_FIRST > 9, "got a tensor of bool and shape (3, 10, 12) as an image, expected floats from 0"),
        (
            CHANNELS_FIRST.permute(1, 2, 0),
            "got a tensor of uint8 and shape (10, 12, 3) as an image, expected (3, H, W)",
        ),
        (UPRIGHT.transpose(2, 0, 1), "got an array of uint8 and shape (3, 10, 12) as an image, expected (H, W, 3)"),
        (CHANNELS_FIRST[:, :0], "got a tensor of uint8 and shape (3, 0, 12) as an image, expected (3, H, W)"),
        (np.array(["a.jpg", "b.jpg"]), "got an array of <U5 and shape (2,) as an image, expected (H, W, 3)"),
        (b"no image", "is not an image that Pillow can read: convert it to JPEG or PNG"),
        (None, "got None as an image, expected a path, a Pillow image, an array (H, W, 3), a tensor"),
        (7, "got 7 as an image, expected a path, a Pillow image"),
        ([RED, None], "got None as an image, expected a path"),
        ([[RED, RED], RED], "as an image, expected a path"),
        ([small_model().encode_image(RED)], "got EncodedImages(tokens="),
        (CHANNELS_FIRST[None][:0], "got no images, expected at least one"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(image, sentence):
    """No guess: already normalised values are floats too, and would need another path through the model."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        small_model().encode_image(image)


def test_uint8_batches_of_the_models_size_are_not_looked_at(monkeypatch):
    """As the loaders give them: no copy to the host, no look at the values, for which the host would wait."""
    monkeypatch.setattr(blip2, "as_image", None)
    model, seen = small_model(), []
    monkeypatch.setattr(model.vit, "forward", lambda x, forward=model.vit.forward: seen.append(x) or forward(x))
    images = noise(3)
    model.encode_image(images)
    assert seen[0].data_ptr() == images.data_ptr()


# --- help and use ----------------------------------------------------------------------------------------------------

CALLS = ("encode_image", "encode_text", "itc_scores", "itm_scores", "caption", "ask", "rank", "score")


def test_help_names_every_decoding_option_and_its_default():
    options = {name: p.default for name, p in inspect.signature(generate).parameters.items() if name != "decoder"}
    del options["end_id"]
    for name, default in (options | blip2.CAPTIONS).items():
        assert f"{name}={default}" in Blip2.caption.__doc__, name
    for name, default in blip2.ANSWERS.items():
        assert f"{name}={default}" in Blip2.ask.__doc__, name


def test_the_examples_of_help_run(tmp_path, monkeypatch):
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    sizes = dict(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_positions=40)
    asking, matching = stage2_model("opt", **sizes), small_model(**sizes)
    monkeypatch.chdir(tmp_path)
    RED.save("a.jpg"), RED.save("b.jpg")
    for call in CALLS:
        doc = getattr(Blip2, call).__doc__
        (example,) = re.findall(rf"`(model\.{call}\(.*?)`", doc)
        result = eval(example, {"model": matching if "itm" in call else asking})
        if shape := re.search(rf"{re.escape(example)}`.* \((\d.*?)\)\.", doc):
            wanted = [{"Q": 3, "E": 6}.get(size) or int(size) for size in shape[1].split(", ")]
            assert list(result.shape) == wanted, call
        else:
            assert isinstance(result, (str, list)), call


def test_the_code_is_used_from_another_folder(tmp_path):
    """It is not installed: PYTHONPATH says where it is, as docs/own-images.md shows; paths are those of that folder."""
    page = (ROOT / "docs/own-images.md").read_text()
    assert "PYTHONPATH=path/to/blip2 python script.py" in page
    RED.save(tmp_path / "mine.png")
    tiny = ROOT / "assets/tiny/blip2"
    script = f"from blip2 import Blip2\nprint(Blip2.from_pretrained({str(tiny)!r}).caption('mine.png', num_beams=1))"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) > 3, done.stderr


# --- stage 1: scores and captions ------------------------------------------------------------------------------------


def test_any_images_are_scored_with_any_texts():
    """ITC is a cosine, ITM a probability; a batch gives what each pair gives alone, encoded before or not."""
    model = shapes_model()
    images = [few(4)[i].open() for i in range(4)]
    texts = ["a red circle", "a large blue square left of a small red circle", "no"]
    itc, itm = model.itc_scores(images, texts), model.itm_scores(images, texts)
    assert itc.shape == itm.shape == (4, 3)
    assert itc.abs().max() <= 1 + 1e-5 and 0 <= itm.min() and itm.max() <= 1
    torch.testing.assert_close(model.itm_scores(model.encode_image(images), model.encode_text(texts)), itm)
    for n in range(4):
        torch.testing.assert_close(model.itc_scores(images[n], texts), itc[n : n + 1])
        torch.testing.assert_close(model.itm_scores(images[n], texts[1]), itm[n : n + 1, 1:2])


def test_a_match_probability_is_one_softmax_of_the_averaged_logits():
    model = shapes_model()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([0.0, 2.0]))
    assert model.itm_scores(RED, "a red circle").item() == pytest.approx(1 / (1 + 2.718281828**-2), rel=1e-5)


def test_scores_encode_each_image_once_and_judge_each_pair_once():
    model, seen = shapes_model(), Counter()
    model.vit.blocks[0].register_forward_hook(lambda _, __, out: seen.update(vit=len(out)))
    model.qformer.register_forward_hook(lambda _, __, out: seen.update(pairs=len(out[0])))
    model.itm_scores(noise(3), ["a red circle", "a star", "no", "two"])
    assert seen == {"vit": 3, "pairs": 12}


def test_captions_by_the_q_former_are_in_a_batch_those_of_each_alone():
    model = shapes_model()
    images = [few(5)[i].open() for i in range(5)]
    for options in ({}, dict(num_beams=1), dict(length_penalty=-1.0)):
        together = model.caption(images, max_new_tokens=6, **options)
        assert together == [model.caption(image, max_new_tokens=6, **options) for image in images]
    assert [len(group) for group in model.caption(images, max_new_tokens=4, num_captions=2)] == [2] * 5


def test_calls_that_a_stage_1_model_cannot_do_say_so():
    model = shapes_model()
    for call in (
        lambda: model.ask(noise(1), "what?"),
        lambda: model.rank(noise(1), "what?", ["a"]),
        lambda: model.score(noise(1), "a"),
    ):
        with pytest.raises(UserError, match="this model has no language model to ask: open a run of stage 2"):
            call()
    with pytest.raises(UserError, match="got the prompt 'a photo of' for a model without a language model"):
        model.caption(noise(1), "a photo of")
    with pytest.raises(UserError, match="got max_new_tokens 99, expected at most 40, the positions of the Q-Former"):
        model.caption(noise(1), max_new_tokens=99)
    model.untrained_heads = ("itg",)
    with pytest.raises(UserError, match=r"the head that writes captions \(ITG\) is not trained here"):
        model.caption(noise(1))
    with pytest.raises(UserError, match="has no text branch to read a text with"):
        small_model().encode_text("a red circle")


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LLMS)
def test_answers_have_the_shape_of_the_questions(kind):
    """A string, a conversation, a list of them, one for all images, or one or several for each."""
    model, three = stage2_model(kind), noise(3)
    assert isinstance(model.ask(RED, "what?"), str) and isinstance(model.ask(RED, CONVERSATION), str)
    assert [type(answer) for answer in model.ask(RED, ["what?", CONVERSATION])] == [str, str]
    assert len(model.ask(three, "what?")) == 3 and len(model.ask(three, ["a?", CONVERSATION, "c?"])) == 3
    nested = model.ask(three, [["a?", "b?"], "c?", ["d?"]])
    assert [type(entry) for entry in nested] == [list, str, list] and len(nested[0]) == 2
    assert isinstance(model.caption(RED), str) and len(model.caption(three)) == 3
    assert len(model.ask(RED, "what?", num_captions=2)) == 2
    assert isinstance(model.ask(np.zeros((9, 9), np.uint8), "what?"), str)  # grey


def test_questions_that_fit_no_shape_are_refused():
    model, three = stage2_model("opt"), noise(3)
    with pytest.raises(UserError, match="got an empty list of questions"):
        model.ask(RED, [])
    with pytest.raises(UserError, match="got 2 questions for 3 images, expected one for all, or one"):
        model.ask(three, ["a?", "b?"])
    for nothing in ([], "star"):
        with pytest.raises(UserError, match=f"got the candidates {re.escape(repr(nothing))} to rank, expected a list"):
            model.rank(RED, "what?", nothing)
    for entries in ([["a?", "b"], "c?"], [("a?", "b")]):  # a turn that is a list, no question at the end
        with pytest.raises(UserError, match=r"got .'a\?', 'b'. as a question, expected a string, or a conversation: t"):
            model.ask(RED, entries)
    with pytest.raises(UserError, match="got no images"):
        model.ask([], "what?")
    with pytest.raises(UserError, match="got batch_size 0, expected at least 1"):
        model.encode_image(three, batch_size=0)
    with pytest.raises(UserError, match="got precision 'half', expected one of fp32, bf16, fp16"):
        Blip2.from_pretrained(ROOT / "assets/tiny/blip2", precision="half")
    with pytest.raises(UserError, match="got no text to score"):
        model.score(RED, [])


def test_a_prompt_longer_than_the_position_table_is_refused():
    model = stage2_model("opt")
    with pytest.raises(UserError, match="got 3 visual embeddings, a prompt of .* expected at most 128, .*shorten the"):
        model.ask(noise(1), "why " * 200)
    with pytest.raises(UserError, match="and 500 new ones"):
        model.caption(noise(1), max_new_tokens=500)
    stage2_model("t5").ask(noise(1), "why " * 200)  # relative positions have no table


@pytest.mark.parametrize("kind", LLMS)
def test_questions_go_into_the_template_of_the_run_and_free_prompts_stay_unchanged(kind, monkeypatch):
    model = stage2_model(kind)
    seen = prompts_of(model, monkeypatch)
    model.ask(noise(1), "what is it?")
    model.ask(noise(1), "a photo of", template="{}")
    model.template = "Q: {} A:"
    model.ask(noise(1), [[("one?", "two"), "three?"]])
    answer = {"opt": "Answer:", "t5": "Short answer:"}[kind]
    assert seen == [[f"Question: what is it? {answer}"], ["a photo of"], ["Q: one? A: two. Q: three? A:"]]


@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize("decoding", [{}, dict(num_beams=1), dict(num_beams=3, length_penalty=1.0)], ids=str)
def test_a_batch_of_questions_gives_what_each_gives_alone(kind, decoding):
    """Prompts of any length together, token for token in fp32."""
    model = stage2_model(kind)
    images = model.encode_image(noise(3))
    questions = ["what?", "what color is the large star that is left of the small circle?", "is it red?"]
    together = model.ask(images, [questions] * 3, **decoding)
    for i in range(3):
        assert together[i] == [model.ask(row_of(images, i), question, **decoding)[0] for question in questions]


def test_sampling_with_a_generator_is_repeatable():
    model, draws = stage2_model("opt"), []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        decoding = dict(num_beams=1, sample=True, top_p=0.9, num_captions=3, generator=generator)
        draws.append(model.caption(noise(2), **decoding))
    assert draws[0] == draws[1] != draws[2] and [len(group) for group in draws[0]] == [3, 3]


# --- probabilities ---------------------------------------------------------------------------------------------------


def brute_force(model: Blip2, images, prompt: str, text: str) -> tuple[float, int]:
    """The log-probability of one text after one prompt, by the whole pass, and its number of tokens."""
    target = torch.tensor(model.llm_tokenizer.encode_targets([text], [prompt]))
    prompts = torch.tensor(model.llm_tokenizer.encode_prompts([prompt]))
    prefix, mask = model.llm_prefix(images.query_out, prompts, torch.ones_like(prompts, dtype=torch.bool))
    logits = model.llm(prefix, mask, target)
    return -F.cross_entropy(logits[0], target[0], reduction="sum").item(), target.shape[1]


@pytest.mark.parametrize("kind", LLMS)
def test_rank_and_score_equal_brute_force(kind):
    model = stage2_model(kind)
    images = model.encode_image(noise(2))
    texts, questions = ["red", "a large blue square", "top left", "no"], ["what?", "what color is the longest star?"]
    with torch.no_grad():
        scores = model.score(images, texts, batch_size=3)
        both = model.rank(images, questions, texts)
        for n, question in enumerate(questions):
            one = row_of(images, n)
            for m, text in enumerate(texts):
                total, tokens = brute_force(model, one, "", text)
                assert scores.log_prob[n, m].item() == pytest.approx(total, abs=1e-3)
                assert scores.mean_log_prob[n, m].item() == pytest.approx(total / tokens, abs=1e-3)
            prompt = fill_template(model.template, question)
            wanted = sorted(((brute_force(model, one, prompt, text)[0], text) for text in texts), reverse=True)
            for ranked in (both[n], model.rank(one, [[question]], texts)[0][0]):
                assert [entry.answer for entry in ranked] == [text for _, text in wanted]
                assert [entry.log_prob for entry in ranked] == pytest.approx([total for total, _ in wanted], abs=1e-3)


@pytest.mark.parametrize("kind", LLMS)
def test_prompts_of_words_and_empty_prompts_rank_together_as_alone(kind):
    """After an empty prompt a text has no separator."""
    model, images, candidates = stage2_model(kind), noise(3), ["a star", "red"]
    prompts = ["", "a picture of", ""]
    together = model.rank(images, prompts, candidates, template="{}")
    for i, ranked in enumerate(together):
        (alone,) = model.rank(images[i : i + 1], prompts[i : i + 1], candidates, template="{}")
        assert [entry.answer for entry in ranked] == [entry.answer for entry in alone]
        assert [entry.log_prob for entry in ranked] == pytest.approx([entry.log_prob for entry in alone], abs=1e-3)


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("kind", LLMS)
def test_an_answer_is_ranked_with_the_loss_it_has_in_training(kind, conditioned):
    """Token for token: the prompt, and what the Q-Former reads of the question (Figure 7)."""
    tokenizer = BertTokenizer(ROOT / "assets/tiny/bert")
    model = stage2_model(kind, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, max_positions=40)
    model.condition_on_question()
    model.conditioned, images = conditioned, noise(3)
    together = model.rank(images, QUESTIONS, ANSWERS)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        batch = collate_for("vqa", model)([(question, answer)], [], [0], images=images[i : i + 1])
        with torch.no_grad():
            loss = model.stage2_losses(batch)["lm"].item()
        ((alone,),) = model.rank(images[i : i + 1], [[question]], [answer])
        among = next(entry for entry in together[i] if entry.answer == answer)
        assert alone[0].mean_log_prob == pytest.approx(-loss, abs=1e-4)
        assert among.mean_log_prob == pytest.approx(-loss, abs=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_a_caption_continues_the_prompt_it_was_trained_with(kind, monkeypatch):
    """Table 7: "a photo of" is read, not learned."""
    model, images = stage2_model(kind), noise(1)
    model.prompt = "a photo of"
    batch = collate_for("caption", model)([("", "A red star.")], [], [0], images=images)
    assert model.llm_tokenizer.decode(batch.prompt_ids[0].tolist()) == "a photo of"
    assert model.llm_tokenizer.decode(batch.target_ids[0].tolist()) == "a red star"
    with torch.no_grad():
        loss = model.stage2_losses(batch)["lm"].item()
    assert model.score(images, "a red star", "a photo of").mean_log_prob.item() == pytest.approx(-loss, abs=1e-4)
    seen = prompts_of(model, monkeypatch)
    model.caption(images)
    model.caption(images, "")
    assert seen == [["a photo of"], [""]]


@pytest.mark.parametrize("kind", LLMS)
def test_each_image_is_encoded_once_and_prompts_are_not_multiplied_by_beams_or_candidates(kind):
    """10 questions, 20 candidates, 5 beams: one pass through ViT and Q-Former, and each prompt once."""
    model, seen = stage2_model(kind), Counter()
    model.vit.register_forward_hook(lambda _, __, out: seen.update(vit=len(out)))
    encode_queries = model.qformer.encode_queries
    model.qformer.encode_queries = lambda kv, *rest: (
        seen.update(qformer=len(kv[0][0])),
        encode_queries(kv, *rest),
    )[1]
    first = (model.llm.blocks if kind == "opt" else model.llm.encoder.blocks)[0]
    first.register_forward_hook(lambda _, inputs, __: seen.update(tokens=inputs[0].shape[0] * inputs[0].shape[1]))
    questions = [f"is it number {n}?" for n in range(10)]
    candidates = [f"number {n}" for n in range(10, 30)]  # all of as many tokens
    queries = 3
    prompt = queries + len(model.llm_tokenizer.encode_prompts([fill_template(model.template, questions[0])])[0])

    def appended(prompt: str) -> int:
        """Tokens of the candidates that OPT reads; T5's encoder reads none."""
        ids = model.llm_tokenizer.encode_targets(candidates, [prompt] * 20)
        return sum(len(tokens) - 1 for tokens in ids) if kind == "opt" else 0

    model.ask(RED, questions, num_beams=5, max_new_tokens=1)
    assert seen == {"vit": 1, "qformer": 1, "tokens": 10 * prompt}
    seen.clear()
    model.rank(RED, questions, candidates)
    assert seen == {"vit": 1, "qformer": 1, "tokens": 10 * prompt + 10 * appended("x")}
    seen.clear()
    model.score(RED, candidates)
    assert seen == {"vit": 1, "qformer": 1, "tokens": queries + 1 + appended("")}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and pytest -m cuda")
def test_a_gpu_answers_as_the_cpu_does():
    """In fp32: features, captions, answers, ranks; and matching without a language model."""
    images, found = [few(5)[i].open() for i in range(5)], []
    for device in ("cpu", "cuda"):
        model = Blip2.from_pretrained(ROOT / "assets/tiny/blip2", device=device)
        captions = [model.caption(images), model.caption(images, num_beams=1), model.caption(images, num_captions=3)]
        answers, ranked = model.ask(images, QUESTIONS[1]), model.rank(images, "what is it?", ["a star", "red"])
        torch.manual_seed(0)
        matcher = Blip2.build(TINY[1], TINY[3], 64, device=device)[0].eval()
        numbers = [model.encode_image(images).query_out.cpu(), matcher.itm_scores(images, ["a star", "red"]).cpu()]
        numbers.append(torch.tensor([[entry.log_prob for entry in row] for row in ranked]))
        found.append((captions, answers, numbers))
    (*texts, on_cpu), (*others, on_gpu) = found
    assert others == texts
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- eval.py ask -----------------------------------------------------------------------------------------------------


def test_ask_without_arguments_answers_about_the_built_in_image(capsys):
    """The README's first minute: no training, no download."""
    (row,) = evaluation.main(["ask"])
    said = capsys.readouterr().out
    assert row["caption"] in said and "what color is the star?: green" in said
    assert row["how many shapes are there?"] == "two" and row["is the cross small or large?"] == "small"


def test_ask_passes_a_prompt_on_unchanged():
    prompt = "Question: how many shapes are there? Answer:"
    (row,) = evaluation.main(["ask", "--prompt", prompt])
    assert set(row) == {"image", prompt} and row[prompt] == "two"


def test_ask_about_a_folder_skips_files_that_are_no_images(tmp_path, capsys):
    question, out = "how many shapes are there?", tmp_path / "out.json"
    for i in range(3):
        few(3)[i].open().save(tmp_path / f"{i}.png")
    (tmp_path / "3.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("nor this")
    rows = evaluation.main(["ask", "--image", str(tmp_path), "--question", question, "--out", str(out)])
    assert [set(row) for row in rows] == [{"image", question}] * 3
    assert f"skipped: {tmp_path / '3.jpg'}" in capsys.readouterr().out and json.loads(out.read_text()) == rows
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images in it"):
        evaluation.main(["ask", "--image", str(tmp_path / "empty")])


def test_ask_captions_with_the_q_former_of_a_stage_1_run(stage1_run):
    (row,) = evaluation.main(["ask", "--checkpoint", str(stage1_run)])
    assert set(row) == {"image", "caption"}
    with pytest.raises(UserError, match="has no language model to ask"):
        evaluation.main(["ask", "--checkpoint", str(stage1_run), "--question", "what?"])


def test_a_chat_keeps_the_conversation(monkeypatch, capsys):
    typed, asked = iter(["what color is the star?", "is it small or large?", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(Blip2, "ask", lambda model, images, turns: asked.append(list(turns)) or ["green"])
    evaluation.main(["ask", "--chat"])
    assert asked[1] == [("what color is the star?", "green"), "is it small or large?"]
    assert "an empty line ends the conversation" in capsys.readouterr().out


def test_ask_refuses_what_cannot_work(tmp_path):
    for flag in ("--beams", "--max-new-tokens"):
        with pytest.raises(UserError, match=f"argument {flag}: got 0, expected at least 1"):
            evaluation.main(["ask", flag, "0"])
    with pytest.raises(UserError, match="--chat is for one image, .* is a folder"):
        evaluation.main(["ask", "--chat", "--image", str(tmp_path)])
