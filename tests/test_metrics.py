"""Metrics: recall at k by hand and against chance; BLEU, ROUGE-L, CIDEr-D and the words they count are pycocoevalcap's;
VQA accuracy is the official tool's."""

import importlib.util
import json
import math
import os
import random

import pytest
import torch
from conftest import ROOT, shared

from tasks.metrics import (
    any_match,
    bleu,
    caption_words,
    chance,
    cider,
    direct_answer_accuracy,
    gqa_match,
    lemmatize,
    normalize_answer,
    ranks,
    recalls,
    reranked,
    rouge_l,
    vqa_accuracy,
)

# --- recall ----------------------------------------------------------------------------------------------------------


def test_recall_of_four_by_four():
    scores = torch.tensor([[4, 1, 2, 3], [4, 3, 2, 1], [1, 2, 3, 4], [1, 3, 4, 2.0]])
    rank = ranks(scores, torch.eye(4, dtype=torch.bool))
    assert rank.tolist() == [0, 1, 1, 2]
    assert recalls(rank) == {"R@1": 25, "R@5": 100, "R@10": 100}


def test_the_best_of_several_positives_counts():
    scores = torch.tensor([[5.0, 1.0, 4.0], [1.0, 2.0, 3.0]])
    positives = torch.tensor([[False, True, True], [True, True, False]])
    assert ranks(scores, positives).tolist() == [1, 1]


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_a_model_with_constant_or_nan_scores_finds_nothing(score):
    assert ranks(torch.full((3, 3), score), torch.eye(3, dtype=torch.bool)).tolist() == [2, 2, 2]


def test_reranking_orders_the_first_k_and_nothing_else():
    first = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(4, 1)
    second = torch.tensor([[0.0, 9.0, 1.0, 99.0]]).repeat(4, 1)
    eye = torch.eye(4, dtype=torch.bool)
    assert ranks(reranked(first, second, 2), eye).tolist() == [1, 0, 2, 3]
    assert ranks(reranked(first, second, 3), eye).tolist() == [2, 0, 1, 3]
    assert ranks(reranked(first, second, 4), eye).tolist() == [3, 1, 2, 0]
    assert ranks(reranked(first, second, 99), eye).tolist() == [3, 1, 2, 0]


def test_chance_is_the_recall_of_random_scores():
    positives = torch.zeros(50, 100, dtype=torch.bool)
    positives[torch.arange(50), torch.arange(50)] = True
    positives[:25, 60:64] = True
    drawn = [recalls(ranks(torch.rand(50, 100), positives)) for _ in range(400)]
    for name, expected in chance(positives).items():
        assert sum(d[name] for d in drawn) / 400 == pytest.approx(expected, abs=1.0)


# --- captions --------------------------------------------------------------------------------------------------------

WORDS = "a the dog cat man red blue runs sits on in with two grass beach".split()


def corpus(seed: int, count: int = 60):
    """Random captions with references; some references share n-grams with them, some are short."""
    rng = random.Random(seed)

    def text(longest=14):
        return rng.choices(WORDS, k=rng.randint(1, longest))

    captions, references = [], []
    for _ in range(count):
        caption = text()
        other = caption[: rng.randint(0, len(caption))] + text(6)
        captions.append(caption)
        references.append([text(), other, text()][: rng.randint(1, 3)])
    captions[0] = captions[0][:1]
    return captions, references


def oracle(captions, references):
    """pycocoevalcap's BLEU-1 to 4, CIDEr and ROUGE-L of tokenized text."""
    generated = {i: [" ".join(words)] for i, words in enumerate(captions)}
    truth = {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)}
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge_scorer = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    return (
        bleu_scorer.compute_score(truth, generated, verbose=0)[0],
        cider_scorer.compute_score(truth, generated)[0],
        rouge_scorer.compute_score(truth, generated)[0],
    )


def equal_to_oracle(captions, references):
    """All three, to the last digits."""
    their_bleu, their_cider, their_rouge = oracle(captions, references)
    assert bleu(captions, references) == pytest.approx(their_bleu, abs=1e-9)
    assert cider(captions, references) == pytest.approx(their_cider, abs=1e-9)
    assert rouge_l(captions, references) == pytest.approx(their_rouge, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_captions_are_scored_as_by_pycocoevalcap(seed):
    equal_to_oracle(*corpus(seed))


def test_human_and_corrupted_captions_are_scored_as_by_pycocoevalcap():
    """Flickr8k's captions: the first of each image against the four others; whole, then corrupted: words dropped,
    doubled, shuffled, all but one removed, all removed."""
    images = json.loads(shared("data/flickr8k/val.json").read_text())[:400]
    texts = [[caption_words(text) for text in image["caption"]] for image in images]
    captions, references, rng = [group[0] for group in texts], [group[1:] for group in texts], random.Random(0)
    equal_to_oracle(captions, references)
    corruptions = (
        lambda words: [word for word in words if rng.random() < 0.6],
        lambda words: [word for word in words for _ in range(rng.randint(1, 3))],
        lambda words: rng.sample(words, len(words)),
        lambda words: words[:1],
        lambda words: [],
    )
    equal_to_oracle([corruptions[i % 5](words) for i, words in enumerate(captions)], references)


def test_bleu_by_hand():
    caption, reference = "a dog runs".split(), "a dog runs on the grass".split()
    scores = bleu([caption], [[reference]])
    penalty = math.exp(1 - 6 / 3)  # every n-gram is right, but half of the words are missing
    assert scores[0] == pytest.approx(penalty, abs=1e-6) and scores[2] == pytest.approx(penalty, abs=1e-6)
    assert bleu([reference], [[reference]]) == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert bleu([["cat"] * 4], [[reference]])[0] == pytest.approx(0, abs=1e-6)
    assert bleu([["a"] * 4], [[reference]])[0] == pytest.approx(0.25 * math.exp(1 - 6 / 4), abs=1e-6)  # counted once


def test_cider_weights_rare_words_and_the_length():
    references = [["a dog runs".split()], ["a cat sits".split()], ["a man sits".split()]]
    whole = cider([texts[0] for texts in references], references)
    assert whole == pytest.approx(10 * 3 / 4)  # three words have no 4-gram
    rare = cider(["dog".split(), ["x"], ["x"]], references)
    common = cider(["a".split(), ["x"], ["x"]], references)
    assert rare > common == 0  # a word of all references has weight 0


def test_rouge_by_hand():
    caption, reference = "a dog runs fast".split(), "a brown dog runs".split()
    assert rouge_l([caption], [[reference]]) == pytest.approx(0.75)  # three of four words, both ways
    assert rouge_l([reference], [[caption, reference]]) == pytest.approx(1)
    assert rouge_l([["cat"]], [[reference]]) == 0
    assert rouge_l([caption], [[[], reference]]) == pytest.approx(0.75)  # a reference "?", of which no word is left


# Output of the COCO evaluation's tokenizer (Stanford's PTBTokenizer 3.4.1, pycocoevalcap's list of punctuation),
# written down once, so that no Java is needed.
PTB = [
    ("I cannot go, I'm gonna stay; don't ask.", "i can not go i 'm gon na stay do n't ask"),
    ("'Tis the dog's bone, isn't it?", "'t is the dog 's bone is n't it"),
    ("y'all can't've seen Mr. Smith's dog at 3 p.m. in the U.S.",
     "y' all ca n't 've seen mr. smith 's dog at 3 p.m. in the u.s."),
    ("He paid $5.50 for 10,000 apples (1/2 off) & left...",
     "he paid $ 5.50 for 10,000 apples -lrb- 1/2 off -rrb- & left"),
    ("a well-known state-of-the-art T-shirt and/or red/blue hat",
     "a well-known state-of-the-art t-shirt and/or red/blue hat"),
    ("The sign says \"STOP\" – it’s a “curly” quote…", "the sign says stop it 's a curly quote"),
    ("a [bracket] {brace} 100% sure @ home #1", "a -lsb- bracket -rsb- -lcb- brace -rcb- 100 % sure @ home # 1"),
    ("visit www.example.com or http://a.b/c?d=e today!", "visit www.example.com or http://a.b/c?d=e today"),
    ("Dr. Who lives on Main St. near 5th Ave.", "dr. who lives on main st. near 5th ave."),
    ("two men... one dog!!! what?!", "two men one dog !!! what ?!"),
    ("a café with naïve über-cool décor", "a café with naïve über-cool décor"),
    ("it's 5:30 p.m. and the kids' toys weren't there", "it 's 5:30 p.m. and the kids toys were n't there"),
    ("rock 'n' roll at five o'clock 'quoted words' here", "rock 'n' roll at five o'clock quoted words here"),
    ("A.B. and C are friends. They run. Fast.", "a.b. and c are friends they run fast"),
    ("she's they're we've i'd you'll who'd", "she 's they 're we 've i 'd you 'll who 'd"),
    ("a man -- old -- sits", "a man old sits"),
    ("e-mail bob@x.org", "e-mail bob@x.org"),
    ("No. 7 shirt vs. No. 8", "no. 7 shirt vs. no. 8"),
    ("I wanna go, gimme that, lemme see, gotta run, more'n enough",
     "i wan na go gim me that lem me see got ta run more 'n enough"),
    ("a dog\na cat", "a dog a cat"),
    ("x=y + z * 2", "x = y + z * 2"),
    ("the '90s and 1990's", "the '90s and 1990 's"),
    ("Jan. 5, 2020", "jan. 5 2020"),
    ("Ph.D. student etc. and so on", "ph.d. student etc. and so on"),
    ("", ""),
    ("...", ""),
    ("snow-covered hill, 20-foot wall, six-year-old's", "snow-covered hill 20-foot wall six-year-old 's"),
    ("a+b c/d 3/4-inch", "a + b c/d 3/4-inch"),
    ("James' dog and the boys' room", "james dog and the boys room"),
    ("it ain't so; shouldn't've", "it ai n't so should n't 've"),
    ("8 ft. tall sign by 3 in. board", "8 ft. tall sign by 3 in board"),
    ("numbers 24, 33, and 57, play.", "numbers 24 33 and 57 play"),
    ("a 4x4 truck and a 2x4 board", "a 4x4 truck and a 2x4 board"),
    ("Dale Earnhardt, Jr., in car #15.", "dale earnhardt jr. in car # 15"),
]  # fmt: skip


@pytest.mark.parametrize("caption, words", PTB)
def test_words_of_a_caption_are_those_of_the_coco_tokenizer(caption, words):
    """Lower case, clitics apart, no punctuation."""
    assert caption_words(caption) == words.split()


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("A dog.", "dog"), ("two dogs", "2 dogs"), ("10,000", "10000"), ("T-shirt", "t shirt"), ("none", "0"),
        ("its 3.5 ft.", "its 3.5 ft"), ("red/blue", "red blue"), ("dont", "don't"), ("couldnt've", "couldn't've"),
        ("the\tcat\n", "cat"), ("somebody'd", "somebodyd"), ("well - done", "well done"), ("a, b-c", "b c"),
        ("." * 40, "." * 8), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_normalized_with_all_quirks_of_the_official_tool(answer, normal):
    assert normalize_answer(answer) == normal


def test_vqa_accuracy_leaves_each_reference_out_once():
    assert vqa_accuracy("Red.", ["red"] * 10) == 1
    for count, value in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)):
        assert vqa_accuracy("red", ["red"] * count + ["blue"] * (10 - count)) == pytest.approx(value)
    assert vqa_accuracy("T-shirt", ["T-shirt"] * 10) == 0  # references that are all equal are not normalized
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1  # others lose their punctuation
    assert vqa_accuracy("the dog", ["the dog"] * 9 + ["dog"]) == pytest.approx(0.3)  # but not their articles


def test_vqa_accuracy_is_what_the_official_tool_computed():
    """250 answers with ten references each, and the tool's accuracy in per cent, two decimals."""
    rows = json.loads((ROOT / "tests/official_vqa.json").read_text())
    for answer, references, accuracy in rows:
        assert 100 * vqa_accuracy(answer, references) == pytest.approx(accuracy, abs=0.006), (answer, references)
    assert 50 < sum(accuracy > 0 for *_, accuracy in rows) < 200


def test_vqa_accuracy_equals_the_official_tool():
    """5,000 answers, of all kinds that the tool treats in a way of its own. Its vqa_eval.py is inside the wheel of
    salesforce-lavis 1.0.2."""
    if not os.environ.get("VQA_EVAL"):
        pytest.skip("set VQA_EVAL to the official tool's vqa_eval.py")
    spec = importlib.util.spec_from_file_location("vqa_eval", os.environ["VQA_EVAL"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(0)
    bits = "dog T-shirt red/blue 10,000 3.5 ft. a the An two none ten dont its couldnt've y'allll somebody'd Id've"
    bits = [*bits.split(), *"-,?é_ \n\t", "...", '"x"', "(b)"]

    def text():
        return rng.choice(("", " ")).join(rng.choices(bits, k=rng.randint(0, 5)))

    references, answers = [], []
    for _ in range(5000):
        pool = [text() for _ in range(rng.randint(1, 3))]
        references.append([rng.choice(pool) for _ in range(10)])
        answers.append(rng.choice([*pool, text()]))

    class Vqa:
        def __init__(self, qa):
            self.qa = qa

        def getQuesIds(self):
            return list(self.qa)

    truth = {}
    for i, texts in enumerate(references):
        rows = [{"answer": text, "answer_id": n} for n, text in enumerate(texts)]
        truth[i] = {"question_type": "", "answer_type": "", "answers": rows}
    tool = module.VQAEval(Vqa(truth), Vqa({i: {"answer": answer} for i, answer in enumerate(answers)}), n=2)
    tool.evaluate()
    ours = [100 * vqa_accuracy(answer, texts) for answer, texts in zip(answers, references)]
    assert [round(value, 9) for value in ours] == pytest.approx([tool.evalQA[i] for i in range(5000)], abs=0.006)
    assert round(sum(ours) / 5000, 2) == tool.accuracy["overall"]
    assert 0 < sum(value > 0 for value in ours) < 5000


def test_other_data_sets_have_other_rules():
    assert gqa_match("A dog", ["dog"]) == 1 and gqa_match("dogs", ["dog"]) == 0
    assert direct_answer_accuracy("red", ["red", "red", "blue"]) == pytest.approx(2 / 3)
    assert direct_answer_accuracy("Red", ["red"] * 10) == 0
    assert any_match("two", ["2", "pair"]) == 1 and any_match("three", ["2", "pair"]) == 0


def test_lemmas_are_singulars_and_infinitives():
    pairs = "dogs:dog men:man berries:berry boxes:box glass:glass bus:bus tennis:tennis riding:ride running:run "
    pairs += "walking:walk dancing:dance eating:eat cycling:cycle surfing:surf snowboarding:snowboard playing:play "
    pairs += "skating:skate king:king string:string swimming:swim watching:watch buildings:building yes:yes"
    assert {p: lemmatize(p.split(":")[0]) for p in pairs.split()} == {p: p.split(":")[1] for p in pairs.split()}
    assert lemmatize("Riding horses") == "ride horse"
