"""Decoding agrees with transformers token by token, and with common sense."""

import pytest
import torch
from conftest import small_model, small_qformer

from generate import KVCache, generate, nucleus, rows_to_keep
from qformer import CaptionDecoder

WORDS, END = 12, 3


class Table:
    """A decoder whose next word depends on the last two: logits out of a random table, a row a text."""

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


class Peer(Table):
    """A random GPT-2 of transformers as a decoder; an image is a prompt of two words."""

    def __init__(self, images: int, seed: int):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(seed)
        sizes = dict(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=40, initializer_range=0.5)
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=END)).eval()
        with torch.no_grad():
            self.model.transformer.wte.weight[END] *= 2  # texts of all lengths
        self.ids = torch.randint(4, WORDS, (images, 2))

    def step(self, tokens):
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
        return self.look_up()

    def select(self, rows, beams=1):
        self.ids = self.ids[rows]

    def look_up(self):
        return self.model(self.ids).logits[:, -1]

    def generate(self, **options):
        """transformers' own generate."""
        mask = torch.ones_like(self.ids)
        out = self.model.generate(
            self.ids, attention_mask=mask, eos_token_id=END, pad_token_id=END, do_sample=False, **options
        )
        texts = [row[2:].tolist() for row in out]
        return [text[: text.index(END)] if END in text else text for text in texts]


def flat(groups):
    return [text for group in groups for text in group]


OPTIONS = [
    dict(num_beams=1),
    dict(num_beams=1, repetition_penalty=1.5),
    dict(num_beams=1, min_new_tokens=5),
    dict(num_beams=3),
    dict(num_beams=3, length_penalty=-1.0),
    dict(num_beams=3, length_penalty=2.0),
    dict(num_beams=3, length_penalty=0.0),
    dict(num_beams=4, early_stopping=True),
    dict(num_beams=4, early_stopping="never", length_penalty=1.5),
    dict(num_beams=5, min_new_tokens=4, repetition_penalty=1.3),
    dict(num_beams=2, repetition_penalty=0.8),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers(options, seed):
    peer = Peer(images=12, seed=seed)
    theirs = peer.generate(max_new_tokens=8, **options)
    assert flat(generate(peer, end_id=END, max_new_tokens=8, prompt_ids=peer.ids, **options)) == theirs
    if options == dict(num_beams=3):
        assert len({len(text) for text in theirs}) > 1  # the comparison means something: texts end at different steps


@pytest.mark.parametrize("seed", range(3))
def test_several_captions_for_an_image_equal_transformers(seed):
    peer = Peer(images=4, seed=seed)
    theirs = peer.generate(max_new_tokens=6, num_beams=4, num_return_sequences=3)
    ours = generate(peer, end_id=END, max_new_tokens=6, num_beams=4, num_captions=3)
    assert [len(group) for group in ours] == [3] * 4
    assert flat(ours) == theirs


@pytest.mark.parametrize(
    "options", [dict(num_beams=1), dict(num_beams=3), dict(num_beams=3, length_penalty=-1)], ids=str
)
def test_an_image_gives_in_a_batch_what_it_gives_alone(options):
    together = generate(Table(5, 0), end_id=END, max_new_tokens=9, **options)
    for image in range(5):
        alone = Table(5, 0)
        alone.select(torch.tensor([image]))
        assert generate(alone, end_id=END, max_new_tokens=9, **options) == [together[image]]


def test_finished_rows_are_not_computed_any_more():
    decoder = Table(6, 1)
    texts = flat(generate(decoder, end_id=END, max_new_tokens=9))
    assert decoder.computed == sum(min(len(text) + 1, 9) for text in texts)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, early_stopping=True), {}], ids=str)
def test_finished_rows_that_stay_change_nothing(options, monkeypatch):
    """On a card they stay until they are half of all."""
    expected = generate(Table(6, 1), end_id=END, max_new_tokens=9, **options)
    for rule in (lambda works, _: None, lambda works, _: rows_to_keep(works, on_card=True)):
        monkeypatch.setattr("generate.rows_to_keep", rule)
        assert generate(Table(6, 1), end_id=END, max_new_tokens=9, **options) == expected


def test_beams_beat_greedy_in_probability():
    def log_probability(image, text):
        table, last, total = Table(6, 2).logits, (1, 1), 0.0
        for token in [*text, END]:
            total += table[image, last[0], last[1]].log_softmax(0)[token].item()
            last = (last[1], token)
        return total

    greedy = flat(generate(Table(6, 2), end_id=END, max_new_tokens=20))
    beams = flat(generate(Table(6, 2), end_id=END, max_new_tokens=20, num_beams=8, length_penalty=0.0))
    scores = [(log_probability(i, beams[i]), log_probability(i, greedy[i])) for i in range(6)]
    assert all(beam >= one - 1e-4 for beam, one in scores) and any(beam > one + 1e-4 for beam, one in scores)


def test_nucleus_keeps_the_fewest_words_that_hold_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(nucleus(logits, 0.8), torch.tensor([[0.5, 0.3, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(logits, 0.81), torch.tensor([[0.5, 0.3, 0.15, 0.0]]))
    torch.testing.assert_close(nucleus(logits, 0.01), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(logits, 1.0), logits.exp())


def test_sampling_follows_its_generator_and_its_temperature():
    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return generate(
            Table(1, 0), end_id=END, max_new_tokens=6, sample=True, num_captions=40, generator=generator, **options
        )

    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(text) for text in draw(0)[0]}) > len({tuple(text) for text in draw(0, temperature=0.3)[0]})
    greedy = generate(Table(1, 0), end_id=END, max_new_tokens=6)
    assert {tuple(text) for text in draw(0, top_p=1e-6)[0]} == {tuple(greedy[0][0])}


@pytest.mark.parametrize(
    "wrong", [dict(max_new_tokens=0), dict(num_beams=0), dict(num_captions=2), dict(top_p=0.0), dict(temperature=0.0),
              dict(early_stopping="soon"), dict(sample=True, num_beams=2)], ids=str,
)  # fmt: skip
def test_impossible_wishes_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        generate(Table(1, 0), **{"end_id": END, "max_new_tokens": 5} | wrong)


# --- the Q-Former as a decoder


def test_step_by_step_is_the_whole_text_at_once():
    """The cached steps of captioning give the logits of the ITG pass in training."""
    model = small_qformer()
    image_kv = model.image_kv(torch.randn(2, 4, 10))
    ids = torch.randint(5, 29, (2, 6))
    ids[:, 0] = model.dec_id
    with torch.no_grad():
        _, text = model("itg", ids, torch.ones_like(ids, dtype=torch.bool), image_kv)
        decoder = CaptionDecoder(model, image_kv, max_new_tokens=6)
        logits = [decoder.start()] + [decoder.step(ids[:, t]) for t in range(1, 6)]
    torch.testing.assert_close(torch.stack(logits, dim=1), model.lm_logits(text))


def test_selected_rows_go_on_as_their_originals_would():
    model = small_qformer()
    image_kv = model.image_kv(torch.randn(3, 4, 10))
    with torch.no_grad():
        straight, shuffled = (CaptionDecoder(model, image_kv, 4) for _ in range(2))
        rows = torch.tensor([2, 0, 0])
        torch.testing.assert_close(straight.start()[rows], shuffled.start()[rows])
        shuffled.select(rows)
        tokens = torch.tensor([5, 6, 7])
        torch.testing.assert_close(straight.step(tokens)[rows], shuffled.step(tokens[rows]))


def test_cache_is_allocated_once():
    cache = KVCache(layers=2, rows=3, heads=2, max_length=5, width=4, like=torch.empty(0))
    buffer = cache.k.data_ptr()
    for _ in range(5):
        for layer in range(2):
            k, _ = cache.extend(layer, torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4))
    assert k.shape == (3, 2, 5, 4) and cache.k.data_ptr() == buffer and cache.length == 5


def test_when_beams_change_places_only_what_follows_the_prompt_moves():
    """The prompt is theirs in common, so it stays where it is; rows that multiply or drop out are copied whole."""
    cache = KVCache(layers=1, rows=2, heads=1, max_length=4, width=1, like=torch.empty(0))
    cache.extend(0, *torch.tensor([[10.0, 11], [20, 21]]).view(1, 2, 1, 2, 1).expand(2, -1, -1, -1, -1))
    cache.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    k, _ = cache.extend(0, *torch.arange(6.0).view(1, 6, 1, 1, 1).expand(2, -1, -1, -1, -1))
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
    cache.select(torch.arange(6).repeat_interleave(2))  # more beams: what they wrote is not theirs in common
    assert cache.in_common == 2
    cache.select(torch.arange(0, 12, 2))
    cache.select(torch.tensor([4, 3, 5]))  # the first image has finished
    assert (
        cache.k[0, :, 0, :3, 0].tolist() == cache.v[0, :, 0, :3, 0].tolist() == [[20, 21, 5], [20, 21, 5], [20, 21, 3]]
    )


def test_image_is_read_once_however_many_beams_there_are():
    model, calls = small_model(), []
    model.qformer.blocks[0].cross.kv.register_forward_hook(lambda *_: calls.append(1))
    model.vit.blocks[0].register_forward_hook(lambda *_: calls.append("vit"))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    encoded = model.encode_image(images)
    calls.clear()
    generate(CaptionDecoder(model.qformer, model.image_kv(encoded.tokens), 5), end_id=3, max_new_tokens=5, num_beams=4)
    assert calls == [1]
