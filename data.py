"""From samples to batches: the batch of each stage, which sample comes when, loaders.

Whatever is random about a sample (which caption or answer, crop, flip) is drawn from (seed, its position in the run).
So the data of step n are the same for any number of ranks and workers, and after a resume.
Letters: see the glossary of qformer.py.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.device import cores
from engine.distributed import print0
from engine.draws import SampleRngs, sample_rng
from engine.errors import UserError, expect
from engine.stop import unheard
from sources.annotations import Target
from sources.images import eval_transform, open_image
from sources.mixture import Mixture, open_images
from sources.text import BertTokenizer, LLMTokenizer, clean_caption, pad, split_prefix

# --- the batch of each stage -----------------------------------------------------------------------------------------


@dataclass
class Batch:
    """One micro-batch of one rank: `images`, or `image_tokens` from the feature cache; text for the Q-Former (stage 1),
    prompt and target of the language model (stage 2), or both (VQA)."""

    image_ids: Tensor  # (B,) int64, equal for equal images
    labels: Tensor  # (B, T) token ids to predict, -100 where nothing is predicted
    text_ids: Tensor | None = None  # (B, T)
    text_mask: Tensor | None = None  # (B, T) bool, True = real token
    prompt_ids: Tensor | None = None  # (B, n)
    prompt_mask: Tensor | None = None  # (B, n) bool
    target_ids: Tensor | None = None  # (B, T), padded on the right
    images: Tensor | None = None  # (B, 3, H, W) uint8
    image_tokens: Tensor | None = None  # (B, P, V) fp16
    broken: list[tuple[str, str]] = field(default_factory=list)  # images that could not be read, and why
    truncated: int = 0  # texts that reach the token limit

    def __len__(self) -> int:
        return len(self.image_ids)

    def map(self, function: Callable) -> "Batch":
        """Apply `function` to all tensors."""
        return replace(self, **{name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def to(self, device: str | torch.device) -> "Batch":
        """Copy to the device; without waiting for a CUDA GPU. (On MPS such a copy may read memory that was freed.)"""
        return self.map(lambda tensor: tensor.to(device, non_blocking=torch.device(device).type == "cuda"))

    def pin_memory(self) -> "Batch":
        """Called by the loader."""
        return self.map(Tensor.pin_memory)


def qformer_batch(ids: list[list[int]], pad_id: int, image_ids: list[int], **rest) -> Batch:
    """Stage 1: texts for the Q-Former; position t predicts token t + 1 (ITG)."""
    text_ids, text_mask = pad(ids, pad_id)
    labels = torch.full_like(text_ids, -100)
    labels[:, :-1] = torch.where(text_mask[:, 1:], text_ids[:, 1:], -100)
    return Batch(torch.tensor(image_ids), labels, text_ids=text_ids, text_mask=text_mask, **rest)


def llm_batch(prompts: list[list[int]], targets: list[list[int]], tokenizer: LLMTokenizer, image_ids, **rest) -> Batch:
    """Stage 2: prompts and targets of the language model, as token ids."""
    prompt_ids, prompt_mask = tokenizer.pad_prompts(prompts)
    target_ids, target_mask = pad(targets, tokenizer.pad_id)
    labels = torch.where(target_mask, target_ids, -100)
    text = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, target_ids=target_ids)
    return Batch(torch.tensor(image_ids), labels, **text, **rest)


# A collate function makes a batch of B targets, after arguments of its own: (targets: list[Target], seeds: list,
# image_ids: list[int], **rest: other fields of the batch) -> Batch. `collate_for` chooses it.


def collate_captions(tokenizer: BertTokenizer, targets, seeds, image_ids, **rest) -> Batch:
    """Stage 1 and retrieval: captions."""
    ids = tokenizer.encode([caption for _, caption in targets])
    truncated = sum(len(tokens) == tokenizer.max_tokens for tokens in ids)
    return qformer_batch(ids, tokenizer.pad_id, image_ids, truncated=truncated, **rest)


def collate_pairs(tokenizer: LLMTokenizer, pairs: list[tuple[str, str]], image_ids, **rest) -> Batch:
    """Tokenize (prompt, target) pairs."""
    prompts, targets, truncated = tokenizer.encode_pairs(pairs)
    return llm_batch(prompts, targets, tokenizer, image_ids, truncated=truncated, **rest)


def collate_lm(tokenizer: LLMTokenizer, targets, seeds, image_ids, **rest) -> Batch:
    """Stage 2: the caption; for T5 its suffix, given its prefix (prefix LM)."""
    pairs = [("", clean_caption(caption)) for _, caption in targets]
    if tokenizer.format.prefix_lm:
        pairs = [split_prefix(text, np.random.default_rng(seed)) for (_, text), seed in zip(pairs, seeds)]
    return collate_pairs(tokenizer, pairs, image_ids, **rest)


def collate_prompted(tokenizer: LLMTokenizer, prompt: str, targets, seeds, image_ids, **rest) -> Batch:
    """Fine-tuning for captions (paper Table 7): the caption after a prompt."""
    return collate_pairs(tokenizer, [(prompt, clean_caption(text)) for _, text in targets], image_ids, **rest)


def collate_questions(
    tokenizer: LLMTokenizer, template: str, qformer_tokenizer: BertTokenizer | None, targets, seeds, image_ids, **rest
) -> Batch:
    """Fine-tuning for VQA (paper 4.3): the answer after its question, which the Q-Former reads too (Figure 7)."""
    pairs = [(tokenizer.question_prompt(template, question), answer) for question, answer in targets]
    if qformer_tokenizer is not None:
        ids = qformer_tokenizer.encode([question for question, _ in targets])
        rest["text_ids"], rest["text_mask"] = pad(ids, qformer_tokenizer.pad_id)
    return collate_pairs(tokenizer, pairs, image_ids, **rest)


def collate_for(stage: str, model) -> Callable:
    """The collate function of a stage."""
    if stage in ("1", "retrieval"):
        return partial(collate_captions, model.tokenizer)
    if stage == "2":
        return partial(collate_lm, model.llm_tokenizer)
    if stage == "caption":
        return partial(collate_prompted, model.llm_tokenizer, model.prompt)
    qformer_tokenizer = model.tokenizer if model.conditioned else None
    return partial(collate_questions, model.llm_tokenizer, model.template, qformer_tokenizer)


# --- samples ---------------------------------------------------------------------------------------------------------


class TrainSet(Dataset):
    """(position, index) pairs of a micro-batch -> Batch. An unreadable image is replaced by the next readable one."""

    def __init__(self, images: Mixture, collate: Callable, image_size: int, seed: int):
        self.images, self.collate, self.image_size, self.seed = images, collate, image_size, seed

    def __getitem__(self, samples: list[tuple[int, int]]) -> Batch:
        targets, rows, views, broken = zip(*(self.sample(*sample) for sample in samples), strict=True)
        seeds = [[self.seed, position, 1] for position, _ in samples]
        seen = {"image_tokens" if self.images.cached else "images": torch.stack(views)}
        return self.collate(targets, seeds, list(map(self.images.image_id, rows)), **seen, broken=sum(broken, []))

    def sample(self, position: int, index: int) -> tuple[Target, int, Tensor, list[tuple[str, str]]]:
        """-> target, row, image or its cached tokens, images that could not be read before it."""
        broken = []
        tries = min(100, len(self.images))  # so many unreadable images in a row are no accident
        for attempt in range(tries):
            row = (index + attempt) % len(self.images)
            rng, sample = sample_rng(self.seed, position), self.images[row]
            try:
                target = sample.sample_text(rng)
                if self.images.cached:
                    return target, row, self.images.cached.tokens(self.images.rows([row]))[0], broken
                return target, row, sample.augment(self.image_size, rng), broken
            except UserError as error:
                broken.append((sample.name, str(error)))
        raise UserError(f"none of {tries} images in a row can be read; the last: {broken[-1][1]}")


class EvalSet(Dataset):
    """Rows of images -> (readable rows, {row: reason} of the others, uint8 images (n, 3, size, size))."""

    def __init__(self, images: "Mixture | ImageFiles", image_size: int):
        self.images, self.image_size = images, image_size

    def __getitem__(self, rows: list[int]) -> tuple[list[int], dict[int, str], Tensor]:
        readable, broken, views = [], {}, []
        for row in rows:
            try:
                views.append(eval_transform(self.images[row].open(), self.image_size))
                readable.append(row)
            except UserError as error:
                broken[row] = str(error)
        return readable, broken, torch.stack(views) if views else torch.empty(0)


@dataclass
class ImageFiles:
    """Image files without texts, for `image_loader`."""

    paths: list[Path]
    cached = None

    def __getitem__(self, row: int) -> SimpleNamespace:
        return SimpleNamespace(open=partial(open_image, self.paths[row]))


# --- order and loaders -----------------------------------------------------------------------------------------------


class StepSampler(Sampler):
    """Which samples a rank sees, step by step, micro-batch by micro-batch; it can start at any step.

    Position p of a training is a draw from one of the sets, by their shares; each set goes through its samples in an
    order that is new in each epoch (`Mixture.drawn`). All of it is a pure function of the seed, so nothing is stored.
    Captions of a global batch have similar lengths (sorted within WINDOW batches), so that little padding is computed:
    on Flickr8k 16 tokens a text instead of 32. Each set is sorted by itself, so that a batch has its share of all. The
    order of the batches of a window is random again. Twins of the shapes world stay in one batch, so that ITC and ITM
    have to tell them apart.
    """

    WINDOW = 16

    def __init__(
        self, images: Mixture, seed: int, batch: int, accumulate: int, steps: int, start: int, rank: int, world: int,
        together: int = 0,
    ):  # fmt: skip
        """together: shards that are read at a time (--shuffle-shards); 0: all."""
        self.images, self.seed, self.steps, self.start, self.together = images, seed, steps, start, together
        self.batch, self.accumulate, self.rank, self.world = batch, accumulate, rank, world
        self.global_batch = batch * accumulate * world
        self.per_epoch = len(images) / self.global_batch
        expect(
            self.per_epoch >= 1,
            f"{len(images)} images are fewer than one step's {self.global_batch} ({batch} x {accumulate} accumulated x "
            f"{world} processes): pass a smaller --batch",
        )
        sets = len(images.parts)
        few = f"got {sets} sets of --data for a batch of {self.global_batch}, expected {sets * (sets - 1)} or more"
        expect(sets * (sets - 1) <= self.global_batch, f"{few}: pass a larger --batch")  # else draws could go back

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        for step in range(self.start, self.steps):
            window, place = divmod(step, self.WINDOW)
            if place == 0 or step == self.start:
                batches = self.window(window)
            for part in range(self.accumulate):  # this rank's rows of each micro-batch
                begin = (part * self.world + self.rank) * self.batch
                yield list(map(tuple, batches[place][begin : begin + self.batch].tolist()))

    def window(self, number: int) -> list[np.ndarray]:
        """The global batches of one window, in order, each of (position, index) pairs: (N, 2)."""
        size, images, group = self.WINDOW * self.global_batch, self.images, self.images.group_size
        position, last = number * size, min((number + 1) * size, self.steps * self.global_batch)
        count, last = last - position, last + -last % group  # no group is cut; what is too much is left out below
        groups, places = [], []  # of samples that stay together, and where in the window
        for part, (first, end) in enumerate(zip(images.draws(position), images.draws(last))):
            drawn = images.drawn(part, np.arange(first, end), self.seed, self.together)
            positions = position + np.arange(len(drawn))
            position += len(drawn)
            pairs = np.stack((positions, drawn), axis=1).reshape(-1, group, 2)
            if not images.asks:  # questions of one kind have one length: such a batch would pull one way
                words = images.words(part, drawn, SampleRngs(self.seed, positions))
                pairs = pairs[np.reshape(words, (-1, group)).max(axis=1).argsort(kind="stable")]
            groups.append(pairs)
            places.append((np.arange(len(pairs)) + 0.5) / max(1, len(pairs)))  # each set spreads over all batches
        order = np.concatenate(places).argsort(kind="stable")
        samples = np.concatenate(groups)[order].reshape(-1, 2)[:count]
        batches = [samples[i : i + self.global_batch] for i in range(0, len(samples), self.global_batch)]
        rng = np.random.default_rng([self.seed, number])
        return [batches[i] for i in rng.permutation(len(batches))]

    def shares(self) -> list[str]:
        """A line for each of several sets: its size, its share of a batch, how often it is shown."""
        if len(self.images.parts) == 1:
            return []
        shares, shown = self.images.shares(), self.images.draws(self.steps * self.global_batch)
        sizes = [np.ptp(self.images.blocks(part)) for part in range(len(self.images.parts))]
        return [
            f"  {part.name}: {size:,} images, {share:.1%} of each batch, each shown {count / size:,.2f} times"
            for part, size, share, count in zip(self.images.parts, sizes, shares, shown)
        ]


def decoding_workers() -> int:
    """Loader processes that are worth starting to decode images."""
    return min(8, max(1, cores() - 1))


def loader_workers(cfg, images: Mixture) -> int:
    """Loader processes of a training: to decode image files; drawn shapes and cached features are fast without."""
    if cfg.workers >= 0:
        return cfg.workers
    return 0 if images.cached or cfg.data == ["shapes"] else decoding_workers()


class Loader(DataLoader):
    """A DataLoader whose workers leave signals to this process, and whose lost workers are noticed in `next` only: by
    default PyTorch raises in the middle of whatever runs."""

    def __iter__(self):
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        with unheard():
            batches = super().__iter__()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
        return batches


def train_loader(train_set: TrainSet, sampler: StepSampler, workers: int, pin: bool):
    """Yield batches, made ahead of time by worker processes. New ones take the place of those that the system kills."""
    how = dict(num_workers=workers, pin_memory=pin, prefetch_factor=4 if workers else None)
    done, lost = 0, []  # batches since sampler.start; where workers were lost
    while True:
        own = torch.Generator()  # the global one would make them change the dropout
        try:
            for batch in Loader(train_set, None, sampler=islice(sampler, done, None), generator=own, **how):
                yield batch
                done += 1
            return
        except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: amid a batch
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
        sampler.start, done = sampler.start + done // sampler.accumulate, done % sampler.accumulate
        lost.append((sampler.start, done))
        often = f"loader workers are killed again and again: {workers} of them need more memory than there is"
        expect(lost.count(lost[-1]) < 3, f"{often}: pass --workers {workers // 2}")
        print0("a loader worker was killed, by the system if memory is short; new ones go on")


def image_loader(images: Mixture | ImageFiles, image_size: int, batches: list[list[int]], workers: int) -> DataLoader:
    """`EvalSet` over batches of rows, in order."""
    own = torch.Generator()  # the global one would make a validation change the dropout after it
    return Loader(EvalSet(images, image_size), None, sampler=batches, num_workers=workers, generator=own)


# --- what a training opens -------------------------------------------------------------------------------------------


def open_train(cfg) -> Mixture:
    """All images of --data, before any are held out."""
    return open_with_answers(cfg, "data", cfg.data, "train")


def split_validation(cfg, images: Mixture) -> tuple[Mixture, Mixture | None]:
    """The images to train on, and those to validate on if there are any; without ITC retrieval has nothing to rank."""
    if "itc" not in cfg.losses.split(","):
        return images, None
    if cfg.val_photos:
        return images.held_out(cfg.val_photos)
    if cfg.val_data or cfg.data == ["shapes"]:
        return images, open_with_answers(cfg, "val-data", [cfg.val_data or "shapes"], "val")
    return images, None


def open_with_answers(cfg, flag: str, specs: list[str], split: str) -> Mixture:
    """The images of a flag, with captions or questions. Refuses questions without answers, also in validation."""
    size = cfg.image_size or 64  # of the shapes world: it is drawn before the recipe is known, and resized
    images = open_images(specs, split, size, cfg.images, questions=cfg.stage == "vqa", field=cfg.caption_field)
    count = sum(part.unanswered for part in images.parts)
    expect(
        not count,
        f"{count:,} questions of --{flag} have no answer: remove them, or if the answers are in a second file, type "
        "python -m tools.data convert QUESTIONS ANNOTATIONS --out FILE and pass that",
    )
    return images
