"""Exercise 9, decoding: write beam search.

Greedy search takes the best token, and may find out later that the second best had the better continuation. Beam
search keeps the best few texts instead. The rules are in `adapters.beam_search`: they are simpler than those of
`generate.beam_search`, which takes several images at once, and stops as soon as no running text can win.

Where to look: `topk` of the scores of all continuations, (R, W) flattened; number // W is the text, number % W the
token.
"""

import itertools

import pytest
import torch

from course.adapters import beam_search
from course.exercises.helpers import check

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_9]

END = 0


class Toy:
    """A language model of W tokens: the next token depends on the last two. Notes the texts that it was asked about."""

    def __init__(self, seed: int, vocabulary: int):
        generator = torch.Generator().manual_seed(seed)
        size = vocabulary + 1  # one more for "no token yet"
        self.table = (2 * torch.randn(size, size, vocabulary, generator=generator)).log_softmax(dim=-1)
        self.asked: list[list[list[int]]] = []

    def __call__(self, texts: torch.Tensor) -> torch.Tensor:
        assert texts.dtype == torch.int64 and texts.dim() == 2, "expected texts (R, n) int64"
        self.asked.append(texts.tolist())
        padded = torch.nn.functional.pad(texts, (2, 0), value=self.table.shape[2])
        return self.table[padded[:, -2], padded[:, -1]]

    def score(self, text: tuple[int, ...], length_penalty: float) -> float:
        """Log-probability of a whole text, its end token included, over its length to the penalty."""
        none = self.table.shape[2]
        tokens = none, none, *text
        total = sum(self.table[a, b, c].item() for a, b, c in zip(tokens, tokens[1:], tokens[2:]))
        return total / len(text) ** length_penalty


class Tree:
    """A language model given as {text: {token: probability}}; what is not given is improbable."""

    def __init__(self, tree: dict, vocabulary: int):
        self.tree, self.vocabulary = tree, vocabulary

    def __call__(self, texts: torch.Tensor) -> torch.Tensor:
        rows = [self.tree.get(tuple(text), {}) for text in texts.tolist()]
        return torch.tensor([[row.get(token, 1e-6) for token in range(self.vocabulary)] for row in rows]).log()


def exhaustive(toy: Toy, vocabulary: int, max_tokens: int, length_penalty: float) -> list[int]:
    """The best of all texts: those that end, and those that are cut at max_tokens."""
    words = range(1, vocabulary)
    ended = [(*text, END) for n in range(max_tokens) for text in itertools.product(words, repeat=n)]
    texts = ended + list(itertools.product(words, repeat=max_tokens))
    best = max(texts, key=lambda text: toy.score(text, length_penalty))
    return [token for token in best if token != END]


def expect(model, num_beams: int, max_tokens: int, length_penalty: float, text: list[int], hint: str) -> None:
    """The search finds this text; if not, one sentence says what is likely wrong."""
    got = beam_search(model, num_beams, END, max_tokens, length_penalty)
    how = f"{num_beams} beams, penalty {length_penalty}"
    check(got == text, f"({how}) got {got}, expected {text}: {hint}")


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("seed", range(6))
def test_with_enough_beams_it_finds_the_best_of_all_texts(seed, length_penalty):
    toy = Toy(seed, vocabulary=4)
    got = beam_search(toy, num_beams=4**4, end_id=END, max_tokens=4, length_penalty=length_penalty)
    best = exhaustive(toy, 4, 4, length_penalty)
    fine = isinstance(got, list) and all(isinstance(token, int) for token in got) and END not in got
    check(fine, f"got {got!r}, expected a list of tokens without the end token")
    scores = [toy.score((*text, END)[:4], length_penalty) for text in (got, best)]  # cut texts have no end token
    hint = f"(penalty {length_penalty}) got {got} of score {scores[0]:.3f}, expected {best} of {scores[1]:.3f}"
    check(got == best, f"{hint}: is it the best of all finished texts, with the end token in its length?")


@pytest.mark.parametrize("seed", range(4))
def test_with_one_beam_it_is_greedy(seed):
    toy, text = Toy(seed, vocabulary=7), []
    while len(text) < 8 and (not text or text[-1] != END):
        text.append(toy(torch.tensor([text], dtype=torch.long))[0].argmax().item())
    expect(
        toy, 1, 8, 1.0, [token for token in text if token != END], "one beam takes the best token and stops at its end"
    )


def test_two_beams_find_what_greedy_search_misses():
    """1 is the best first token, but its continuations are many; 2 has one that is almost sure."""
    tree = Tree({(): {1: 0.6, 2: 0.4}, (1,): {1: 0.34, 2: 0.33, 3: 0.33}, (2,): {3: 0.98}}, vocabulary=4)
    expect(tree, 1, 2, 1.0, [1, 1], "one beam takes the best token")
    expect(tree, 2, 2, 1.0, [2, 3], "keep the 2 best of all R * W sums, not the best of each text")


def test_a_finished_text_waits_and_may_win():
    """[1] ends with 0.5 * 0.9 = 0.45; what runs on gets less, but is longer."""
    tree = {(): {1: 0.5, 2: 0.45}, (1,): {END: 0.9, 3: 0.1}, (2,): {3: 0.9}, (2, 3): {1: 0.7, 3: 0.3}}
    expect(Tree(tree, 4), 2, 3, 0.0, [1], "are finished texts put aside until none runs?")
    expect(Tree(tree, 4), 2, 3, 3.0, [2, 3, 1], "does the search go on after the first text has ended?")


def test_a_text_that_ends_leaves_its_place_to_another():
    """[1] ends in the second step. Then two continuations of [2, 3] run on, and the second best of them wins."""
    tree = {(): {1: 0.5, 2: 0.45}, (1,): {END: 0.9}, (2,): {3: 0.9}, (2, 3): {1: 0.55, 3: 0.45}}
    tree |= {(2, 3, 1): {1: 0.4, 2: 0.3, 3: 0.3}, (2, 3, 3): {3: 0.99}}
    hint = "a finished text frees its place, the next step keeps 2 texts again"
    expect(Tree(tree, 4), 2, 4, 3.0, [2, 3, 3, 3], hint)


def test_the_length_penalty_counts_the_end_token():
    """[] has log 0.3 over 1 token; [1] has log 0.1 = log(0.4 * 0.25) over 2, better from the exponent 0.94 on."""
    tree = Tree({(): {END: 0.3, 1: 0.4}, (1,): {END: 0.25, 1: 0.2}}, vocabulary=2)
    for penalty, best in {0.0: [], 0.9: [], 1.0: [1]}.items():
        expect(tree, 2, 2, penalty, best, "does the length count the end token?")


@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_no_text_goes_on_after_its_end_and_no_more_than_the_beams_run(num_beams):
    toy = Toy(0, vocabulary=6)
    beam_search(toy, num_beams, END, 7, 1.0)
    check(toy.asked[0] == [[]], f"the search starts with one empty text, (1, 0), got {toy.asked[0]}")
    check(len(toy.asked) <= 7, "a text of max_tokens tokens is finished: nothing has to be asked about it")
    most = max(map(len, toy.asked))
    check(most <= num_beams, f"{most} texts run at once, of {num_beams} beams: keep num_beams of all R * W sums")
    ended = [text for texts in toy.asked for text in texts if END in text]
    check(not ended, f"the texts {ended[:2]} run on, although they have ended with {END}")
