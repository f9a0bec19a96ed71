"""Metrics: recall at k; BLEU, ROUGE-L and CIDEr-D of captions; accuracy of answers."""

import math
import re
from collections import Counter

import torch
from torch import Tensor

RECALLS = (1, 5, 10)


def ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """(n, m) scores of m candidates for n queries, positives (n, m) bool -> rank (n,) of the best positive, 0 = first.

    A wrong candidate with an equal score ranks first: a model with constant scores finds nothing, nor one with NaN.
    """
    best = scores.masked_fill(~positives, float("-inf")).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~positives).sum(dim=1)


def reranked(first: Tensor, second: Tensor, k: int) -> Tensor:
    """The k best candidates by `first` re-ordered by `second`, above the others; all (n, m) scores, here fp64."""
    best = first.topk(min(k, first.shape[1]), dim=1).indices
    chosen = torch.zeros_like(first, dtype=torch.bool).scatter_(1, best, True)
    return torch.where(chosen, second, first.double() - first.max() + second[chosen].min() - 1)


def recalls(rank: Tensor) -> dict[str, float]:
    """Ranks (n,) -> {"R@1": ..., "R@5": ..., "R@10": ...} in per cent."""
    return {f"R@{k}": 100 * (rank < k).double().mean().item() for k in RECALLS}


def chance(positives: Tensor) -> dict[str, float]:
    """Expected recalls of a random order, in per cent; positives (n, m)."""
    m, found = positives.shape[1], positives.sum(dim=1).double()
    expected = {}
    for k in RECALLS:
        missed = torch.ones_like(found)
        for drawn in range(min(k, m)):  # none of the first k is a positive
            missed *= ((m - found - drawn) / (m - drawn)).clamp(min=0)
        expected[f"R@{k}"] = 100 * (1 - missed).mean().item()
    return expected


# --- captions --------------------------------------------------------------------------------------------------------

# COCO's tokenization of captions: as in the Penn Treebank, lower case, without punctuation. Its list of punctuation has
# the brackets in upper case, though all was lower-cased before: "-lrb-" and "-rrb-" count as words.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = (  # that keep their period; so do single letters: u.s., a.m.
    "mr mrs ms messrs dr drs prof rev gen sen rep gov sgt col lt capt cpl maj adm hon jr sr bros inc ltd co corp ave "
    "blvd rd st mt ft vs etc jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri cos dept "
    "univ"
)
SPLIT = {  # one word that counts as two
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "y'all": "y' all", "'tis": "'t is", "'twas": "'t was", "d'ye": "d' ye", "more'n": "more 'n",
}  # fmt: skip
STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")  # quotes, dashes, three dots
PUNCTUATION = re.compile(r"'|\"|`|-+|\.+|[,:;.?!]")
TOKEN = re.compile(
    r"""https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+   # addresses
    | '(?:s|m|d|re|ve|ll)(?!\w) | n't(?!\w)                      # clitics
    | '(?:tis|twas|em)\b | '\d\ds?\b | '?n'(?!\w) | y'all\b | o'clock\b | d'ye\b | more'n\b
    | <\w+> | no\.(?=\s*\d) | ph\.d\.
    | [$#]                                                      # apart from their number
    | [a-z](?:\.[a-z])+\.? | [a-z]\.(?=\s*\S) | (?:ABBREVIATIONS)\.
    | at&t | [a-z]&[a-z](?=s?\b)                                # r&b, m&m's
    | :\d{2}(?!\d) | [+-]?\.?\d\w*(?:[,./:-]\w+)*
    | \w+?(?=n't(?!\w)) | \w+(?:[-/.]\w+|'\w{2,}(?!\w)(?<!'re)(?<!'ve)(?<!'ll))*
    | \.\.\.+ | -+ | [!?]+ | [^\w\s]""".replace("ABBREVIATIONS", ABBREVIATIONS.replace(" ", "|")),
    re.VERBOSE,
)


def caption_words(caption: str) -> list[str]:
    """The words of a caption in the COCO evaluation: lower case, clitics apart ("dog 's", "do n't"), no punctuation."""
    words = TOKEN.findall(caption.lower().translate(STRAIGHT).replace("&amp;", "&"))
    words = " ".join(SPLIT.get(word, BRACKETS.get(word, word)) for word in words).split()
    return [word for word in words if not PUNCTUATION.fullmatch(word)]


def ngrams(words: list[str]) -> list[Counter]:
    """Counts of all n-grams, for n = 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def bleu(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to 4 of a corpus (Papineni et al., 2002), between 0 and 1: words of N captions, and of their references.
    The brevity penalty takes the reference of the closest length, the shorter of two."""
    right, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for words, texts in zip(captions, references, strict=True):
        counts, most = ngrams(words), [Counter() for _ in range(4)]
        for text in texts:
            for n, found in enumerate(ngrams(text)):
                most[n] |= found  # the highest count in any reference
        for n in range(4):
            total[n] += max(0, len(words) - n)
            right[n] += (counts[n] & most[n]).total()
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    penalty = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    # The small constants are those of the COCO evaluation, for captions without a match.
    precisions = [(hits + 1e-15) / (count + 1e-9) for hits, count in zip(right, total)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def cider(captions: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D of a corpus (Vedantam et al., 2015), between 0 and 10: see `bleu`. The references of the corpus also give
    the document frequency of n-grams."""
    sigma = 6.0  # of the length penalty
    counts = [[ngrams(text) for text in texts] for texts in references]
    seen_in = Counter(ngram for group in counts for ngram in {g for text in group for found in text for g in found})
    log_n = math.log(len(references))

    def vector(found: list[Counter]) -> tuple[list[dict], list[float]]:
        weighted = [{g: count * (log_n - math.log(max(1, seen_in[g]))) for g, count in part.items()} for part in found]
        return weighted, [math.sqrt(sum(value**2 for value in part.values())) for part in weighted]

    scores = []
    for words, group in zip(captions, counts, strict=True):
        vectors, norms_of = vector(found := ngrams(words))
        total = 0.0
        for text in group:
            reference, reference_norms = vector(text)
            longer = found[1].total() - text[1].total()  # in bigrams, as in the COCO evaluation
            for n in range(4):
                weights = [(value, reference[n].get(g, 0.0)) for g, value in vectors[n].items()]
                product = sum(min(value, other) * other for value, other in weights)
                norms = norms_of[n] * reference_norms[n]
                total += (product / norms if norms else 0.0) * math.exp(-(longer**2) / (2 * sigma**2))
        scores.append(10 * total / 4 / len(group))
    return sum(scores) / len(scores)


def rouge_l(captions: list[list[str]], references: list[list[list[str]]]) -> float:
    """ROUGE-L of a corpus (Lin, 2004), between 0 and 1: see `bleu`. As in the COCO evaluation, precision and recall are
    each the best over the references, and recall counts 1.2 squared times as much."""
    weight = 1.2**2
    scores = []
    for words, texts in zip(captions, references, strict=True):
        # The COCO evaluation splits strings at spaces: an empty caption is one empty word.
        texts = [text or [""] for text in texts]
        shared = [longest_common(words or [""], text) for text in texts]
        precision = max(n / max(1, len(words)) for n in shared)
        recall = max(n / len(text) for n, text in zip(shared, texts))
        both = precision and recall
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if both else 0.0)
    return sum(scores) / len(scores)


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        left = diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = left = diagonal + 1 if word == other else max(above, left)
            diagonal = above
    return row[-1]


# --- answers ---------------------------------------------------------------------------------------------------------

# The official VQA tool equates these with the same words without one of the apostrophes. Its table has a spelling
# error, which counts, and lacks some ("shed", "well"), because these are words.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
).split()
WITH_APOSTROPHE = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
}
DIGITS = dict(
    zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split())
)


def without_punctuation(text: str) -> str:
    """The official tool's first step. A mark is deleted if it is next to a space anywhere in the text, or if the text
    has a number like 10,000; else it becomes a space. Then periods are deleted, but not those before a digit; and only
    the first 32, because the official tool passes a flag in the place of a count."""
    has_thousands, out = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        out = out.replace(mark, "" if has_thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def normalize_answer(answer: str) -> str:
    """The official tool's normalization of an answer: no punctuation or articles, lower case, digits, apostrophes."""
    answer = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """Official VQA accuracy of one answer (Antol et al., 2015), between 0 and 1: the mean over the references of
    min(1, number of other references that equal the answer / 3).

    References keep their case and articles, and if they are all equal their punctuation too, as in the official tool.
    It is made for ten of them; with three or fewer it can never be 1.
    """
    normalized = normalize_answer(answer)
    if len(set(references)) > 1:
        references = [without_punctuation(text) for text in references]
    same = [text == normalized for text in references]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(references)


def gqa_match(answer: str, references: list[str]) -> float:
    """GQA: 1 if the answer equals the reference after normalization, else 0."""
    return float(normalize_answer(answer) == normalize_answer(references[0]))


def direct_answer_accuracy(answer: str, references: list[str]) -> float:
    """A-OKVQA's direct answers: min(1, number of references that equal the answer / 3)."""
    return min(1.0, references.count(answer) / 3)


def any_match(answer: str, references: list[str]) -> float:
    """With fewer references than ten: 1 if the answer equals one of them after normalization, else 0."""
    return float(normalize_answer(answer) in map(normalize_answer, references))


IRREGULAR = dict(pair.split(":") for pair in (
    "men:man women:woman children:child feet:foot teeth:tooth mice:mouse geese:goose knives:knife leaves:leaf "
    "wolves:wolf shelves:shelf loaves:loaf ran:run sat:sit stood:stand ate:eat lying:lie tying:tie"
).split())  # fmt: skip


def lemmatize(answer: str) -> str:
    """Lemmas by rule, without a tagger: "riding horses" becomes "ride horse". LAVIS lemmatizes the answers of OK-VQA
    with spaCy's tagger, which is right more often."""
    return " ".join(map(lemma, answer.lower().split()))


def lemma(word: str) -> str:
    """The singular of a noun, the infinitive of a verb in -ing; else the word."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if re.search(r"[^aeiou]ies$", word) and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(ss|us|x|z|ch|sh)es$", word):
        return word[:-2]
    if re.search(r"[^sui]s$", word) and len(word) > 3:
        return word[:-1]
    stem = word.removesuffix("ing")
    if stem == word or not re.search(r"[aeiouy].*[^aeiou]$|ee$|[ao]o$", stem) or len(stem) < 3:
        return word
    if re.search(r"([bdgkmnprt])\1$", stem):  # run-n-ing
        return stem[:-1]
    one_syllable = len(re.findall(r"[aeiouy]+", stem)) == 1
    if re.search(r"[cvu]$|[^aeioul]l$", stem) or one_syllable and re.search(r"[^aeiou][aeiou][^aeiouwxy]$", stem):
        return stem + "e"  # danc-e, rid-e
    return stem  # walk, play
