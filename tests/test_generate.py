"""Greedy, sampling and beam search agree with transformers token by token, for any decoder; finished rows are not
computed; the cache moves no more than it must."""

import pytest
import torch
from conftest import small_model, small_qformer

from blip2 import CaptionDecoder
from generate import KVCache, draw, generate, nucleus, rows_to_keep

WORDS, END = 12, 3


class TableDecoder:
    """A decoder whose next token depends on the last two: logits from a random table, one for each image."""

    def __init__(self, images: int, seed: int, sharpness: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = sharpness * torch.randn(images, WORDS, WORDS, WORDS, generator=generator)
        self.image = torch.arange(images)
        self.last = torch.ones(images, 2, dtype=torch.long)
        self.computed = 0

    def start(self):
        return self.look_up()

    def step(self, tokens):
        self.last = torch.stack((self.last[:, 1], tokens), dim=1)
        return self.look_up()

    def select(self, rows, beams=1):
        self.image, self.last = self.image[rows], self.last[rows]

    def look_up(self):
        self.computed += len(self.image)
        return self.logits[self.image, self.last[:, 0], self.last[:, 1]]


class GPT2Decoder:
    """A random GPT-2 of transformers as a decoder; an image is a prompt of two words."""

    def __init__(self, images: int, seed: int):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(seed)
        sizes = dict(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=40, initializer_range=0.5)
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=END)).eval()
        with torch.no_grad():
            self.model.transformer.wte.weight[END] *= 2  # texts of all lengths
        self.ids = torch.randint(4, WORDS, (images, 2))

    def start(self):
        return self.model(self.ids).logits[:, -1]

    def step(self, tokens):
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
        return self.start()

    def select(self, rows, beams=1):
        self.ids = self.ids[rows]

    def generate(self, **options):
        """transformers' own generate, after the prompt's embeddings: its repetition penalty counts new tokens only."""
        out = self.model.generate(
            inputs_embeds=self.model.transformer.wte(self.ids), attention_mask=torch.ones_like(self.ids),
            eos_token_id=END, pad_token_id=END, do_sample=False, **options,
        )  # fmt: skip
        return [text[: text.index(END)] if END in text else text for text in out.tolist()]


def flat(groups):
    return [text for group in groups for text in group]


# --- the algorithms --------------------------------------------------------------------------------------------------

OPTIONS = [
    dict(num_beams=1),
    dict(num_beams=1, repetition_penalty=1.5),
    dict(num_beams=1, min_new_tokens=5),
    dict(num_beams=3),
    dict(num_beams=3, length_penalty=-1.0),
    dict(num_beams=3, length_penalty=2.0),
    dict(num_beams=3, length_penalty=0.0),
    dict(num_beams=3, length_penalty=-1.0, min_new_tokens=5),
    dict(num_beams=5, min_new_tokens=4, repetition_penalty=1.3),
    dict(num_beams=2, repetition_penalty=0.8),
]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # it counts new tokens only, here and there
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_texts_equal_those_of_transformers(options, seed):
    decoder = GPT2Decoder(images=12, seed=seed)
    theirs = decoder.generate(max_new_tokens=8, **options)
    assert flat(generate(decoder, end_id=END, max_new_tokens=8, **options)) == theirs
    if options == dict(num_beams=3):
        assert len({len(text) for text in theirs}) > 1  # the comparison means something: texts end at different steps


@pytest.mark.parametrize("seed", range(3))
def test_several_captions_of_an_image_equal_those_of_transformers(seed):
    decoder = GPT2Decoder(images=4, seed=seed)
    theirs = decoder.generate(max_new_tokens=6, num_beams=4, num_return_sequences=3)
    ours = generate(decoder, end_id=END, max_new_tokens=6, num_beams=4, num_captions=3)
    assert [len(group) for group in ours] == [3] * 4
    assert flat(ours) == theirs


@pytest.mark.parametrize(
    "options", [dict(num_beams=1), dict(num_beams=3), dict(num_beams=3, length_penalty=-1)], ids=str
)
def test_an_image_gives_in_a_batch_what_it_gives_alone(options):
    together = generate(TableDecoder(5, 0), end_id=END, max_new_tokens=9, **options)
    for image in range(5):
        alone = TableDecoder(5, 0)
        alone.select(torch.tensor([image]))
        assert generate(alone, end_id=END, max_new_tokens=9, **options) == [together[image]]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_text_has_at_least_min_new_tokens_before_its_end(num_beams):
    decoder = TableDecoder(4, 0)
    decoder.logits[..., END] += 20  # it would end at once
    texts = flat(generate(decoder, end_id=END, max_new_tokens=9, min_new_tokens=4, num_beams=num_beams))
    assert [len(text) for text in texts] == [4] * 4


def test_beams_are_at_least_as_probable_as_greedy():
    def log_probability(image, text):
        table, last, total = TableDecoder(6, 2).logits, (1, 1), 0.0
        for token in [*text, END]:
            total += table[image, last[0], last[1]].log_softmax(0)[token].item()
            last = (last[1], token)
        return total

    greedy = flat(generate(TableDecoder(6, 2), end_id=END, max_new_tokens=20))
    beams = flat(generate(TableDecoder(6, 2), end_id=END, max_new_tokens=20, num_beams=8, length_penalty=0.0))
    scores = [(log_probability(i, beams[i]), log_probability(i, greedy[i])) for i in range(6)]
    assert all(beam >= one - 1e-4 for beam, one in scores) and any(beam > one + 1e-4 for beam, one in scores)


def kept(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens of each row are in the nucleus."""
    R, W = probabilities.shape
    return torch.stack([nucleus(probabilities, torch.full((R,), token), top_p) for token in range(W)], dim=1)


def test_nucleus_keeps_the_fewest_tokens_that_hold_top_p():
    probabilities = torch.tensor([[0.3, 0.5, 0.15, 0.05]])
    assert kept(probabilities, 0.8).tolist() == [[True, True, False, False]]
    assert kept(probabilities, 0.81).tolist() == [[True, True, True, False]]
    assert kept(probabilities, 0.01).tolist() == [[False, True, False, False]]
    assert kept(probabilities, 1.0).all()
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]])  # no rounding: two tokens hold just 0.75
    assert kept(exact, 0.75).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("top_p", [0.2, 0.8, 1.0])
def test_tokens_are_drawn_from_the_nucleus_as_often_as_they_are_probable(top_p):
    """From a wide one as from a narrow one; words of no probability never."""
    generator, draws = torch.Generator().manual_seed(0), 40_000
    narrow = torch.tensor([0.0, 0.15, 0.5, 0.0, 0.05, 0.3] + [0.0] * 34).log()
    wide = torch.linspace(1, 2, 40).log()
    tokens = draw(torch.stack((narrow, wide)).repeat(draws // 2, 1), top_p, generator).view(-1, 2)
    for logits, drawn in zip((narrow, wide), tokens.T):
        probabilities = logits.softmax(dim=-1)
        wanted = probabilities * kept(probabilities[None], top_p)[0]
        found = drawn.bincount(minlength=40) / len(drawn)
        assert not found[wanted == 0].any()
        assert (found - wanted / wanted.sum()).abs().max() < 0.015


def test_sampling_follows_its_generator_and_its_temperature():
    def draw(seed, **options):
        options |= dict(sample=True, num_captions=40, generator=torch.Generator().manual_seed(seed))
        return generate(TableDecoder(1, 0), end_id=END, max_new_tokens=6, **options)

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(text) for text in draw(0)[0]}) > len({tuple(text) for text in draw(0, temperature=0.3)[0]})
    greedy = generate(TableDecoder(1, 0), end_id=END, max_new_tokens=6)
    assert {tuple(text) for text in draw(0, top_p=1e-6)[0]} == {tuple(greedy[0][0])}


@pytest.mark.parametrize(
    "wrong", [dict(max_new_tokens=0), dict(num_beams=0), dict(num_captions=2), dict(top_p=0.0), dict(temperature=0.0),
              dict(sample=True, num_beams=2)], ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        generate(TableDecoder(1, 0), **{"end_id": END, "max_new_tokens": 5} | wrong)


# --- finished rows ---------------------------------------------------------------------------------------------------


def test_finished_rows_are_not_computed():
    decoder = TableDecoder(6, 1)
    texts = flat(generate(decoder, end_id=END, max_new_tokens=9))
    assert decoder.computed == sum(min(len(text) + 1, 9) for text in texts)


def test_on_a_gpu_finished_rows_leave_when_they_are_half_of_all():
    assert rows_to_keep([0, 1, None, 3], on_gpu=False) == [0, 1, 3] and rows_to_keep([0, 1], on_gpu=False) is None
    assert rows_to_keep([0, 1, None, 3], on_gpu=True) is None and rows_to_keep([0, None], on_gpu=True) == [0]


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(num_beams=3)], ids=str)
def test_finished_rows_that_stay_change_nothing(options, monkeypatch):
    expected = generate(TableDecoder(6, 1), end_id=END, max_new_tokens=9, **options)
    for rule in (lambda owners, _: None, lambda owners, _: rows_to_keep(owners, on_gpu=True)):
        monkeypatch.setattr("generate.rows_to_keep", rule)
        assert generate(TableDecoder(6, 1), end_id=END, max_new_tokens=9, **options) == expected


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_is_allocated_once():
    cache = KVCache(layers=2, rows=3, heads=2, max_length=5, width=4, like=torch.empty(0))
    buffer = cache.k.data_ptr()
    for _ in range(5):
        for layer in range(2):
            k, _ = cache.update(layer, torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4))
    assert k.shape == (3, 2, 5, 4) and cache.k.data_ptr() == buffer and cache.length == 5 and cache.capacity == 8


def test_a_static_view_writes_what_update_writes_and_returns_the_whole_capacity():
    """The form of a step that a CUDA graph can replay."""
    plain, static = (KVCache(2, rows=1, heads=1, max_length=5, width=3, like=torch.empty(0)) for _ in range(2))
    for step in torch.randn(4, 2, 2, 1, 1, 1, 3):  # steps, layers, keys and values
        for layer, (k, v) in enumerate(step):
            filled = plain.update(layer, k, v)
            whole = static.static_view().update(layer, k, v)
            n = plain.length if layer else plain.length + 1
            assert all(torch.equal(a, b[:, :, :n]) and b.shape[2] == 8 for a, b in zip(filled, whole, strict=True))
        assert static.position.item() == plain.position.item() == plain.length


def test_when_beams_change_places_only_the_entries_after_the_prompt_move():
    """The prompt's entries are shared by an image's beams; rows that multiply or drop out are copied whole."""
    cache = KVCache(layers=1, rows=2, heads=1, max_length=4, width=1, like=torch.empty(0))
    cache.update(0, *torch.tensor([[10.0, 11], [20, 21]]).view(1, 2, 1, 2, 1).expand(2, -1, -1, -1, -1))
    cache.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    cache.update(0, *torch.arange(6.0).view(1, 6, 1, 1, 1).expand(2, -1, -1, -1, -1))
    buffer = cache.k.data_ptr()
    cache.select(torch.tensor([2, 0, 0, 5, 5, 3]))
    assert cache.k.data_ptr() == buffer
    assert cache.k[0, :, 0, :3, 0].tolist() == [
        [10, 11, 2],
        [10, 11, 0],
        [10, 11, 0],
        [20, 21, 5],
        [20, 21, 5],
        [20, 21, 3],
    ]
    cache.select(torch.arange(6).repeat_interleave(2))  # more beams: what they wrote is not shared
    assert cache.shared_length == 2
    cache.select(torch.arange(0, 12, 2))
    cache.select(torch.tensor([4, 3, 5]))  # the first image has finished
    for entries in (cache.k, cache.v):
        assert entries[0, :, 0, :3, 0].tolist() == [[20, 21, 5], [20, 21, 5], [20, 21, 3]]


# --- the Q-Former as a decoder ---------------------------------------------------------------------------------------


def test_cached_steps_of_a_caption_equal_the_itg_pass():
    """What captioning computes token by token is what training computed at once."""
    model = small_qformer()
    image_kv = model.image_kv(torch.randn(2, 4, 10))
    ids = torch.randint(5, 29, (2, 6))
    ids[:, 0] = model.dec_id
    with torch.no_grad():
        _, text_out = model("itg", ids, torch.ones_like(ids, dtype=torch.bool), image_kv)
        decoder = CaptionDecoder(model, image_kv, max_new_tokens=6)
        logits = [decoder.start()] + [decoder.step(ids[:, t]) for t in range(1, 6)]
    torch.testing.assert_close(torch.stack(logits, dim=1), model.lm_logits(text_out))


def test_selected_rows_continue_as_the_rows_they_copy():
    model = small_qformer()
    image_kv = model.image_kv(torch.randn(3, 4, 10))
    with torch.no_grad():
        straight, shuffled = (CaptionDecoder(model, image_kv, 4) for _ in range(2))
        rows = torch.tensor([2, 0, 0])
        torch.testing.assert_close(straight.start()[rows], shuffled.start()[rows])
        shuffled.select(rows)
        tokens = torch.tensor([5, 6, 7])
        torch.testing.assert_close(straight.step(tokens)[rows], shuffled.step(tokens[rows]))


def test_an_image_is_read_once_however_many_beams_there_are():
    model, calls = small_model(), []
    model.qformer.blocks[0].cross.kv.register_forward_hook(lambda *_: calls.append("cross-attention"))
    model.vit.blocks[0].register_forward_hook(lambda *_: calls.append("ViT"))
    encoded = model.encode_image(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    calls.clear()
    generate(CaptionDecoder(model.qformer, model.image_kv(encoded.tokens), 5), end_id=3, max_new_tokens=5, num_beams=4)
    assert calls == ["cross-attention"]
