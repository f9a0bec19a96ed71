"""From samples to batches: what each stage reads and predicts, and an order of samples that depends on the seed only,
not on ranks, micro-batches, workers or interruptions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLMS, ROOT, stage2_model
from PIL import Image
from test_sources import ramp, write, write_annotations

from data import (
    EvalSet,
    StepSampler,
    TrainSet,
    collate_captions,
    collate_for,
    collate_lm,
    collate_pairs,
    collate_prompted,
    collate_questions,
    image_loader,
    loader_workers,
    qformer_batch,
    train_loader,
)
from engine.draws import SampleRngs
from engine.errors import UserError
from llm import OPT, T5
from sources.annotations import AnnotationFile, ShapesSource
from sources.images import eval_transform
from sources.mixture import Mixture, open_images
from sources.text import BertTokenizer, LLMTokenizer

CAPTIONS = [
    "a small red circle above a large blue square",
    "there is a large white star at the top left",
    "a picture of a small green cross",
    "three shapes",
]


def bert_tokenizer(max_tokens: int = 32) -> BertTokenizer:
    return BertTokenizer(ROOT / "assets/tiny/bert", max_tokens)


def llm_tokenizer(kind: str) -> LLMTokenizer:
    return LLMTokenizer(LLMS[kind], {"opt": OPT, "t5": T5}[kind].prompt_format)


def train_set(images: Mixture, size: int = 8, seed: int = 0, max_tokens: int = 32) -> TrainSet:
    """Of stage 1."""
    tokenizer = bert_tokenizer(max_tokens)
    return TrainSet(images, lambda *args, **rest: collate_captions(tokenizer, *args, **rest), size, seed)


def collated(collate, *args) -> SimpleNamespace:
    """A batch of targets, the last of `args`, and as strings: prompts, what is read, what is predicted."""
    targets = args[-1]
    seeds = [[0, row] for row in range(len(targets))]
    batch, tokenizer = collate(*args, seeds, list(range(len(targets)))), args[0].tokenizer
    prompts = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)]
    labels = [row[row != -100].tolist() for row in batch.labels]
    return SimpleNamespace(batch=batch, prompts=prompts, labels=labels, texts=[tokenizer.decode(ids) for ids in labels])


# --- the batch of each stage -----------------------------------------------------------------------------------------


def test_itg_predicts_from_each_token_the_next():
    """And nothing from the last one, [SEP], nor from padding."""
    batch = qformer_batch([[2, 5, 3], [2, 3]], 0, [7, 8])
    assert batch.text_ids.tolist() == [[2, 5, 3, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[5, 3, *[-100] * 6], [3, *[-100] * 7]]
    assert batch.text_mask.sum(dim=1).tolist() == [3, 2] and batch.image_ids.tolist() == [7, 8]


def test_opt_learns_the_whole_caption_after_bos_and_a_newline_at_its_end():
    """Paper 3.3, language modelling: [visual embeddings] [BOS] caption newline; only the caption and the newline are
    predicted. OPT's [BOS] is </s>."""
    tokenizer = llm_tokenizer("opt")
    made = collated(collate_lm, tokenizer, [("", caption) for caption in CAPTIONS])
    assert made.batch.prompt_ids.tolist() == [[2]] * 4 and tokenizer.tokenizer.id_to_token(2) == "</s>"
    assert made.texts == [caption + "\n" for caption in CAPTIONS]
    targets, labels = made.batch.target_ids, made.batch.labels
    assert torch.equal(targets[labels != -100], labels[labels != -100])  # at the same places
    assert (targets[labels == -100] == tokenizer.pad_id).all() and not {tokenizer.pad_id, 2} & set(sum(made.labels, []))


def test_a_truncated_caption_keeps_its_newline_and_is_counted():
    """32 tokens with [BOS], as in LAVIS, which cuts the newline off."""
    tokenizer = llm_tokenizer("opt")
    made = collated(collate_lm, tokenizer, [("", " ".join(["red circle"] * 40)), ("", "a star")])
    assert len(made.labels[0]) + 1 == tokenizer.max_tokens == 32
    assert made.labels[0][-1] == tokenizer.end_id and made.batch.truncated == 1


def test_t5_learns_the_suffix_of_a_caption_after_a_prefix_of_any_length():
    """Paper 3.3, prefix language modelling: the encoder reads the prefix, the decoder writes the suffix."""
    tokenizer = llm_tokenizer("t5")
    made = collated(collate_lm, tokenizer, [("", caption) for caption in CAPTIONS * 8])
    assert tokenizer.end_id == tokenizer.tokenizer.token_to_id("</s>") == 1
    for row, caption in enumerate(CAPTIONS * 8):
        prompt = made.batch.prompt_ids[row][made.batch.prompt_mask[row]].tolist()
        assert prompt[-1] == made.labels[row][-1] == 1
        assert (made.prompts[row] + " " + made.texts[row]).split() == caption.split()
        assert made.texts[row]
    assert "" in made.prompts and len(set(made.prompts)) > 8


def test_the_prefix_depends_on_the_sample_and_not_on_its_batch():
    """The same position in a run has the same prefix, whoever makes the batch."""
    tokenizer = llm_tokenizer("t5")
    samples = TrainSet(open_images(["shapes"], "train", 8), lambda *a, **k: collate_lm(tokenizer, *a, **k), 8, seed=3)
    both, alone = samples[[(5, 7), (6, 9)]], samples[[(6, 9)]]
    assert torch.equal(both.prompt_ids[1][both.prompt_mask[1]], alone.prompt_ids[0])


@pytest.mark.parametrize("kind", LLMS)
def test_captions_follow_the_prompt_in_fine_tuning(kind):
    """Table 7: "a photo of" is read, not learned."""
    made = collated(collate_prompted, llm_tokenizer(kind), "a photo of", [("", "A red star."), ("", "A circle")])
    assert [prompt.strip() for prompt in made.prompts] == ["a photo of"] * 2
    assert [text.strip() for text in made.texts] == ["a red star", "a circle"]


@pytest.mark.parametrize("kind", LLMS)
def test_answers_follow_their_questions_in_the_template(kind):
    """Paper 4.3 and Figure 7: the question is read by the language model and by the Q-Former; prompts of different
    lengths are padded where the model's format says."""
    targets = [("What color is it?", "red"), ("how many shapes are there?", "two")]
    template, bert = "Question: {} Answer:", bert_tokenizer()
    made = collated(collate_questions, llm_tokenizer(kind), template, bert, targets)
    batch = made.batch
    assert [prompt.strip() for prompt in made.prompts] == [template.replace("{}", question) for question, _ in targets]
    assert [text.strip() for text in made.texts] == ["red", "two"]
    padded = {"opt": batch.prompt_mask[:, 0], "t5": batch.prompt_mask[:, -1]}[kind]
    assert batch.prompt_mask.sum(dim=1)[0] != batch.prompt_mask.sum(dim=1)[1] and padded.sum() == 1
    read = [bert.decode(ids[mask].tolist()) for ids, mask in zip(batch.text_ids, batch.text_mask)]
    assert [text.replace(" ?", "?") for text in read] == ["what color is it?", "how many shapes are there?"]
    assert collated(collate_questions, llm_tokenizer(kind), template, None, targets).batch.text_ids is None


def test_a_long_question_loses_its_last_words_and_not_the_templates():
    tokenizer, template = llm_tokenizer("opt"), "Question: {} Answer:"
    prompt = tokenizer.question_prompt(template, "what color is " + "the star and " * 20)
    assert prompt.startswith("Question: what color is the star") and prompt.endswith("Answer:")
    assert len(tokenizer.encode_prompts([prompt])[0]) <= tokenizer.max_tokens
    assert tokenizer.question_prompt(template, "is it large?") == "Question: is it large? Answer:"


def test_each_stage_makes_its_own_batches():
    """By `collate_for`: captions for the Q-Former, or for the language model, after a prompt or not, or questions."""
    bert = bert_tokenizer()
    model = stage2_model("opt", tokenizer=bert, vocab_size=bert.vocab_size, max_positions=40)
    model.prompt = "a photo of"

    def batch_of(stage: str, target: tuple[str, str]):
        return collate_for(stage, model)([target], [[0, 0]], [0])

    def same(batch, other) -> bool:
        pairs = zip(vars(batch).values(), vars(other).values(), strict=True)
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)

    caption, question, llm = ("", "A red star."), ("what is red?", "a star"), model.llm_tokenizer
    for stage in ("1", "retrieval"):
        assert same(batch_of(stage, caption), collate_captions(bert, [caption], [], [0]))
    assert same(batch_of("2", caption), collate_lm(llm, [caption], [], [0]))
    assert same(batch_of("caption", caption), collate_pairs(llm, [("a photo of", "a red star")], [0]))
    assert same(batch_of("vqa", question), collate_questions(llm, model.template, None, [question], [], [0]))
    model.condition_on_question()
    assert same(batch_of("vqa", question), collate_questions(llm, model.template, bert, [question], [], [0]))
    assert not same(batch_of("caption", caption), batch_of("2", caption))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_images_texts_and_ids_of_its_samples(tmp_path):
    images = open_images([write_annotations(tmp_path)], "train", 8)
    batch = train_set(images)[[(0, 4), (1, 1)]]
    assert batch.images.shape == (2, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.images.float().mean(dim=(1, 2, 3)).tolist() == [40, 10]
    texts = [bert_tokenizer().decode(ids.tolist()) for ids in batch.text_ids]
    assert texts == ["a red circle very very very very big", "a red circle very big"]
    assert batch.image_ids.tolist() == [images.image_id(4), images.image_id(1)] and batch.broken == []


def test_one_of_several_captions_is_drawn_at_each_step():
    """Paper 3.4."""
    images = open_images(["shapes"], "train", 8)
    samples = train_set(images)
    texts = {tuple(samples[[(position, 3)]].text_ids[0].tolist()) for position in range(40)}
    assert len(texts) == len(images[3].captions) > 1


def test_texts_at_the_token_limit_are_counted(tmp_path):
    path = write_annotations(tmp_path, 2, captions=["a red circle", "a red circle left of a blue square"])
    samples = train_set(open_images([path], "train", 8), max_tokens=6)
    assert [samples[[(0, i)]].truncated for i in (0, 1)] == [0, 1]


def test_sets_that_are_mixed_have_image_ids_of_their_own(tmp_path):
    files = AnnotationFile(write_annotations(tmp_path))
    batch = train_set(Mixture([files, ShapesSource("val", 8)]))[[(0, 5), (1, 6)]]
    assert (batch.image_ids >> 48).tolist() == [0, 1]
    assert torch.equal(batch.images[1], eval_transform(ShapesSource("val", 8).image(0), 8))


def test_an_image_without_left_or_right_is_mirrored_in_half_of_the_steps(tmp_path):
    ramp(64, 64).save(tmp_path / "ramp.png")
    for captions, mirrored in ((["a ramp"], range(10, 31)), (["a ramp", "dark on the left"], [0])):
        file = write(tmp_path, "a.json", [{"image": "ramp.png", "caption": captions}])
        views = train_set(open_images([file], "train", 16), 16)[[(n, 0) for n in range(40)]].images.int()
        assert int((views[:, 0, 0, 0] > views[:, 0, 0, -1]).sum()) in mirrored


def test_an_unreadable_image_is_named_and_replaced_by_the_next_readable_one(tmp_path):
    """With the caption and the id of the image that takes its place."""
    path = write_annotations(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-30])  # cut off in its pixels
    images = open_images([path], "train", 8)
    batch = train_set(images)[[(0, 0), (1, 1)]]
    assert [name.rsplit("/", 1)[1] for name, _ in batch.broken] == ["1.png", "2.png"]
    assert "does not exist" in batch.broken[0][1] and "broken or cut short" in batch.broken[1][1]
    assert len(batch) == 2 and batch.images[1].float().mean() == 30
    assert bert_tokenizer().decode(batch.text_ids[1].tolist()) == "a red circle very very very big"
    assert batch.image_ids.tolist() == [images.image_id(0), images.image_id(3)]


def test_an_unreadable_image_of_an_evaluation_is_reported_and_not_replaced(tmp_path):
    path = write_annotations(tmp_path, 3)
    (tmp_path / "1.png").unlink()
    readable, broken, pixels = EvalSet(open_images([path], "val", 8), 8)[[0, 1, 2]]
    assert readable == [0, 2] and list(broken) == [1] and "1.png does not exist" in broken[1]
    assert pixels.float().mean(dim=(1, 2, 3)).tolist() == [0, 20]


# --- order -----------------------------------------------------------------------------------------------------------


def sampler(images, batch=4, accumulate=1, steps=20, start=0, rank=0, world=1, seed=0) -> StepSampler:
    return StepSampler(images, seed, batch, accumulate, steps, start, rank, world)


def steps_of(*args, **changes) -> list[list[tuple[int, int]]]:
    """(position, index) of the samples of each micro-batch of a rank."""
    return list(sampler(*args, **changes))


@pytest.fixture
def images(tmp_path) -> Mixture:
    """43 images with captions of 3 to 9 words."""
    captions = ["a " + "very " * (i % 7) + "red circle" for i in range(43)]
    return open_images([write_annotations(tmp_path, 43, (8, 8), captions)], "train", 8)


def test_each_epoch_shows_each_image_once_in_a_new_order(images):
    """Nothing is dropped: an epoch goes on in the middle of a step."""
    steps = steps_of(images, steps=129)  # of 4: 12 epochs of 43
    order = [index for _, index in sorted(sum(steps, []))]
    epochs = [order[start : start + 43] for start in range(0, len(order), 43)]
    assert all(sorted(epoch) == list(range(43)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert sorted(position for samples in steps for position, _ in samples) == list(range(516))
    assert steps != steps_of(images, steps=129, seed=1)
    whole = steps_of(images, batch=1, steps=43)
    assert sorted(index for ((_, index),) in whole) == list(range(43))


def test_the_twins_of_the_shapes_world_stay_in_one_batch():
    """So that ITC and ITM have to tell "red circle above blue square" from "blue circle above red square"."""
    for samples in steps_of(open_images(["shapes"], "train", 8), batch=16, steps=5):
        indices = {index for _, index in samples}  # the twin of an even index is the next one
        assert len(indices) == 16 and all(index ^ 1 in indices for index in indices)


@pytest.mark.parametrize("start", [1, 7, 10, 13])
def test_a_resumed_sampler_continues_where_the_other_stopped(images, start):
    assert steps_of(images, start=start) == steps_of(images)[start:]
    assert len(sampler(images, start=start, accumulate=2, batch=2)) == 2 * (20 - start)


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_steps_of_one(images, world, accumulate):
    size = 8 // world // accumulate
    parts = [steps_of(images, size, accumulate, rank=rank, world=world) for rank in range(world)]
    for step, samples in enumerate(steps_of(images, batch=8)):
        shares = [parts[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world)]
        assert sum(shares, []) == samples


def test_captions_of_a_step_are_of_similar_length(images):
    """So that little padding is computed; the steps themselves are not ordered by length."""
    lengths = [[len(images[index].captions[0].split()) for _, index in samples] for samples in steps_of(images)[:10]]
    assert np.mean([max(step) - min(step) for step in lengths]) < 1
    assert sorted(map(max, lengths)) != list(map(max, lengths))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 - 1])
def test_the_choices_of_many_samples_at_once_are_those_of_each(seed):
    positions = np.concatenate((np.arange(2000), 2**32 + np.arange(-9, 9), [2**40]))
    counts = np.random.default_rng(seed).integers(1, 30, len(positions))
    rngs = SampleRngs(seed, positions)
    assert rngs.choose(counts).tolist() == [int(rng.integers(count)) for rng, count in zip(rngs, counts)]


def test_a_large_batch_is_sorted_without_a_look_at_its_records(tmp_path, monkeypatch):
    """An annotation file knows the words of the captions that training will show."""
    captions = [["a dog", "a" + " very" * i + " small cat", "two"][: 1 + i % 3] for i in range(300)]
    records = [{"image": f"{i}.png", "caption": texts} for i, texts in enumerate(captions)]
    images = open_images([write(tmp_path, "a.json", records)], "train", 8)
    indices, rngs = np.arange(300)[::-1], SampleRngs(5, 1000 + np.arange(300))
    shown = [images[index].sample_text(rng)[1] for index, rng in zip(indices.tolist(), rngs)]
    monkeypatch.setattr(AnnotationFile, "__getitem__", None)
    assert images.words(0, indices, rngs).tolist() == [min(255, len(text.split())) for text in shown]
    assert len(steps_of(images, batch=30, steps=5)) == 5


def test_answers_of_one_length_are_spread_over_the_steps(tmp_path):
    """Answers of one length belong to questions of one kind, and a batch of one kind would pull one way."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    records = [{"image": "0.png", "question": "is it red?", "answer": ["no", "a dark red"][i % 2]} for i in range(64)]
    file = write(tmp_path, "q.json", records)
    steps = steps_of(open_images([file], "train", 8, questions=True), batch=16, steps=4)
    assert all(0 < sum(index % 2 for _, index in samples) < 16 for samples in steps)


def test_a_step_larger_than_the_set_is_refused(images):
    with pytest.raises(
        UserError, match="43 images are fewer than one step's 48 .4 x 3 accumulated x 4 processes.: pass"
    ):
        sampler(images, 4, accumulate=3, world=4)


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_the_data_of_a_step_depend_on_the_seed_only(tmp_path):
    """Captions, crops and mirroring are drawn from it and the position in the run: workers, ranks and a resume change
    nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": ["a dog", "two small dogs", "a cat"]} for i in range(8)]
    images = open_images([write(tmp_path, "a.json", records)], "train", 8)

    def batches(workers: int = 0, seed: int = 0, **place) -> list:
        return list(train_loader(train_set(images, seed=seed), sampler(images, steps=4, **place), workers, pin=False))

    def same(batch, other) -> bool:
        return all(torch.equal(getattr(batch, x), getattr(other, x)) for x in ("images", "text_ids", "image_ids"))

    steps = batches()
    assert len(steps) == 4 and all(map(same, steps, batches(workers=2)))
    assert all(map(same, steps[3:], batches(start=3)))
    halves = [batches(batch=2, rank=rank, world=2) for rank in range(2)]
    for step, (first, second) in zip(steps, zip(*halves)):
        assert torch.equal(step.images, torch.cat([first.images, second.images]))
    assert not any(map(same, steps, batches(seed=1)))  # of the data set alone, the order is the same


def test_reading_images_of_an_evaluation_leaves_the_random_state_alone(images):
    """Otherwise a validation would change the dropout of the steps after it."""
    before = torch.get_rng_state()
    rows = [readable for readable, _, _ in image_loader(images, 8, [[0, 1], [5]], workers=0)]
    assert rows == [[0, 1], [5]] and torch.equal(torch.get_rng_state(), before)


def test_image_files_are_decoded_by_workers_and_the_shapes_world_is_not(images):
    cfg = SimpleNamespace(workers=-1, data=["a.json"])
    assert loader_workers(cfg, images) >= 1
    assert loader_workers(SimpleNamespace(workers=-1, data=["shapes"]), images) == 0
    assert loader_workers(SimpleNamespace(workers=3, data=["shapes"]), images) == 3
    images.cached = object()
    assert loader_workers(cfg, images) == 0
