"""The Python interface: `Blip2` is the paper's model (model.py) that takes files, images and strings.

    Blip2.from_pretrained(path), save_pretrained(folder), Blip2.build(vit, bert), attach_llm(spec)
    encode_image, encode_text, itc_scores, itm_scores, caption; with a language model ask, rank, score

Every call takes images and strings, and tokenizes, pads and batches them; a row's result is that of the row alone.
Letters: N images, M texts; see also the glossary of qformer.py.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from io import IOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from engine.device import PRECISIONS, vit_dtype
from engine.distributed import print0
from engine.errors import expect
from engine.files import whole, writing
from generate import KVCache, generate
from losses import itc_similarity
from model import OBJECTIVES, Blip2Model
from qformer import ImageKV, QFormer
from sources.images import as_image, eval_transform
from sources.text import BertTokenizer, LLMTokenizer, pad
from vit import ViT
from weights.configs import llm_config
from weights.load import load, open_tensors
from weights.open import build_qformer, check_llm_dtype, check_size, describe, empty_vit, load_bert, load_llm, load_vit
from weights.runs import Source, check_frozen, run_table, trained_state, write_config

TINY = Path(__file__).parent / "assets/tiny"  # ships with the code
CAPTIONS = dict(max_new_tokens=30, num_beams=5, min_new_tokens=1)
ANSWERS = dict(max_new_tokens=10, num_beams=5, length_penalty=-1.0, min_new_tokens=1)  # paper 4.1


class EncodedImages(NamedTuple):
    """Images after the ViT and the Q-Former; every call that takes images takes this too."""

    tokens: Tensor  # (N, P, V), raw ViT tokens: what the Q-Former's cross-attention reads
    query_out: Tensor  # (N, Q, D)
    feats: Tensor  # (N, Q, E), unit length


class EncodedTexts(NamedTuple):
    """Texts after the Q-Former; every call that takes texts takes this too."""

    ids: Tensor  # (M, T), [CLS] ... [SEP], padded
    mask: Tensor  # (M, T) bool, True = real token
    cls: Tensor  # (M, D)
    feats: Tensor  # (M, E), unit length


class Ranked(NamedTuple):
    """An answer and its log-probability."""

    answer: str
    log_prob: float  # summed over its tokens, the end included
    mean_log_prob: float  # per token


class Scores(NamedTuple):
    """Log-probability of each text, given each image."""

    log_prob: Tensor  # (N, M), summed over the text's tokens, the end included
    mean_log_prob: Tensor  # (N, M), per token


class Blip2(Blip2Model):
    """The paper's model with its tokenizers and the sources of its parts; sizes: see `Blip2Model`."""

    def __init__(self, vit: ViT, qformer: QFormer, tokenizer: BertTokenizer | None, *sizes, **named_sizes):
        super().__init__(vit, qformer, *sizes, **named_sizes)
        self.tokenizer = tokenizer  # None without a text branch, as in public stage-2 checkpoints
        self.sources = {"vit": Source(""), "bert": Source("")}
        self.holds_vit = False  # is the ViT saved with the model? From `unfreeze_vit`
        self.vit_in_file: dict[str, Tensor] = {}  # of a trained ViT that is frozen in half precision now
        self.untrained_heads: tuple[str, ...] = ()  # objectives whose heads are untrained
        self.sharded: tuple[str, ...] = ()  # frozen parts, "vit" or "llm", that are spread over all processes
        self.llm_tokenizer, self.template, self.llm_act = None, None, None  # from `attach_llm`
        self.prompt = ""  # that captions continue; from fine-tuning

    # --- open and save -----------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        vit: str,
        bert: str,
        image_size: int = 224,
        embed_dim: int = 256,
        max_text_tokens: int = 32,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        sharded: tuple[str, ...] = (),
        **qformer_sizes,
    ) -> tuple["Blip2", list[str]]:
        """An untrained model from a ViT and a BERT (see `weights.open`) -> the model, and the load reports.

        sharded: frozen parts, "vit" or "llm", that are spread over all processes (engine/sharding.py).
        qformer_sizes: fields of QFormerConfig that differ from BERT's: num_queries, cross_every, dropout.
        """
        encoder, vit_report, vit_source = load_vit(vit, vit_dtype(precision, device), device, "vit" in sharded)
        qformer, bert_report, bert_source = load_bert(bert, image_width=encoder.cfg.width, **qformer_sizes)
        tokenizer = BertTokenizer(bert, max_text_tokens, qformer.cfg.vocab_size)
        check_size(image_size, encoder.cfg, vit)
        longest = qformer.cfg.max_positions // 8 * 8  # `pad` rounds up to 8
        expect(
            3 <= max_text_tokens <= longest,
            f"got --max-text-tokens {max_text_tokens}, expected 3 to {longest}, the positions that {bert} has",
        )
        model = cls(encoder, qformer, tokenizer, image_size, embed_dim)
        model.sources, model.sharded = {"vit": vit_source, "bert": bert_source}, sharded
        return model.set_precision(precision, device), [vit_report, bert_report]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        vit: str | None = None,
        bert: str | None = None,
        llm: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        dropout: float | None = None,
        image_size: int | None = None,
        train_vit: bool = False,
        sharded: tuple[str, ...] = (),
    ) -> "Blip2":
        """Open a run folder; a folder of transformers' Blip2ForConditionalGeneration or Blip2ForImageTextRetrieval; or
        a LAVIS checkpoint (.pth) with the folders it was trained over: `vit`, and `bert` or `llm`.

        vit, llm: paths of the frozen parts of a run, if they have moved. precision: "fp32", "bf16" or "fp16"; the
        frozen parts are read straight into it. dropout: of the Q-Former, by default the run's. image_size: by default
        the checkpoint's; the position table is resized. train_vit: train the ViT too (see `unfreeze_vit`). sharded:
        see `build`.
        """
        path = Path(path)
        found = describe(path, vit, bert, llm)
        report = print0 if found.table is not None else lambda *_: None  # a run has nothing to report
        dtype = vit_dtype("fp32" if train_vit else precision, device)
        if found.vit_config is not None:
            held = f"--shard-vit: {path} holds a ViT that was trained with it, which is not sharded: leave the flag out"
            expect("vit" not in sharded, held)
            encoder = empty_vit(str(path), found.vit_config, found.tensors, dtype, device)
            vit_source = Source(found.vit)
        else:
            encoder, vit_report, vit_source = load_vit(found.vit, dtype, device, "vit" in sharded)
            report(vit_report)
        fresh = found.table.fresh if found.table is not None else {}
        sizes = found.qformer if dropout is None else replace(found.qformer, dropout=dropout)
        model = cls(
            encoder,
            build_qformer(str(path), sizes, found.tensors, fresh, device),
            BertTokenizer(found.tokenizer, found.max_text_tokens, sizes.vocab_size) if found.tokenizer else None,
            found.image_size or encoder.cfg.image_size,
            found.embed_dim,
            found.ln_vision_eps,
        )
        model.sources = {"vit": vit_source, "bert": Source(found.bert)}
        model.untrained_heads, model.holds_vit = found.untrained_heads, found.vit_config is not None
        model.sharded = sharded
        model.vit.requires_grad_(train_vit)
        model.set_precision(precision, device)
        if found.llm is not None:
            report(model.attach_llm(found.llm, found.template, found.llm_act, found.prompt_format))
            model.prompt = found.prompt
        if found.conditioned:
            model.condition_on_question()
        for part, known in found.frozen_sha256.items():
            check_frozen(part, model.sources[part], known, path)
        report(load(model, found.tensors, found.table or run_table(model), str(path)))
        if model.holds_vit and not train_vit:
            model.vit_in_file = {name: t for name, t in found.tensors.items() if name.startswith("vit.")}
        if image_size is not None:
            check_size(image_size, model.vit.cfg, str(path))
            model.image_size = image_size
        if train_vit:
            model.unfreeze_vit()
        return model.eval()

    def attach_llm(
        self, spec: str, template: str | None = None, act: str | None = None, form: str | None = None
    ) -> str:
        """Put a frozen language model after the queries (see `add_llm`) -> its load report.

        spec: see `load_llm`; it is read straight into this model's precision, on its device. template: of questions,
        with {} for the question, by default the language model's. act: see `load_llm`. form: --prompt-format, by
        default what the folder says (sources/prompts.py).
        """
        cfg, family = llm_config(spec)  # the tokenizer first: its errors come before gigabytes are read
        kind, longest = family.kind, self.tokenizer.max_tokens if self.tokenizer else 32
        expect(
            form is None or kind.prompt_format is None,
            f"got --prompt-format {form} for {spec}: {kind.__name__} has a format of its own, leave it out",
        )
        folder = spec if os.path.isdir(spec) else TINY / kind.tokenizer  # random weights have no tokenizer
        tokenizer = LLMTokenizer(folder, kind.prompt_format, longest, form)
        expect(
            tokenizer.vocab_size <= cfg.vocab_size,
            f"{spec} has a tokenizer of {tokenizer.vocab_size} words and weights of {cfg.vocab_size}, expected no more "
            "words than weights: use the model's own tokenizer",
        )
        where = self.amp_dtype or torch.float32, self.device
        llm, report, source = load_llm(spec, *where, act, "llm" in self.sharded)
        self.add_llm(llm, len(tokenizer.before_image))
        self.sources["llm"], self.llm_act, self.llm_tokenizer = source, act, tokenizer
        self.template = template or tokenizer.format.template
        self.check_context_length(tokenizer.max_tokens, 0)
        return report + f"; prompt format {tokenizer.format_name}" * bool(tokenizer.format_name)

    def save_pretrained(self, folder: str | Path, relative_to: str | Path | None = None, **extra) -> None:
        """Write config.json, model.safetensors and tokenizer.json, from which `from_pretrained` opens the model.

        relative_to: the folder that paths in config.json are relative to, by default `folder`. extra: more entries of
        config.json.
        """
        folder = Path(folder)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_state().items()}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "model.safetensors", sum(t.nbytes for t in state.values())) as partial:
            save_file(state, partial, metadata={"format": "pt"})
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        self.write_config(folder, relative_to, **extra)

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that `save_pretrained` writes, by name: all but the frozen parts."""
        return trained_state(self)

    def write_config(self, folder: Path, relative_to: str | Path | None = None, **extra) -> None:
        """config.json of `save_pretrained`."""
        write_config(self, folder, Path(relative_to or folder), **extra)

    def load_trained(self, folder: str | Path) -> None:
        """Load everything but the frozen parts from a run folder; strict."""
        load(self, open_tensors([Path(folder) / "model.safetensors"]), run_table(self), str(folder))

    def set_precision(self, precision: str, device: str | torch.device = "cpu") -> "Blip2":
        """Move to the device. Below fp32, frozen weights are in half precision; trained weights are always fp32.

        The ViT takes fp16 on CUDA, as in paper 3.4, and bf16 on a CPU, which has no fast fp16. The language model takes
        the autocast precision: bf16 or, for OPT, fp16 (paper 3.4 has OPT in fp16 and T5 in bf16).
        """
        self.amp_dtype = PRECISIONS[precision]
        if self.llm is not None:
            check_llm_dtype(self.llm, self.amp_dtype, self.sources["llm"].spec)
            self.llm.to(self.amp_dtype or torch.float32)
        if not self.vit_is_trained:
            self.vit.to(vit_dtype(precision, device))
        if torch.device(device).type == "cuda":
            # cuDNN's attention, the default on some GPUs, takes long to plan each new shape, and decoding has many;
            # some of its kernels also round the dropout probability to sixteenths.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return self.to(device)

    def unfreeze_vit(self) -> None:
        """Train the ViT as well; from then on a checkpoint holds it."""
        if self.vit_in_file and self.vit.pos_embed.dtype != torch.float32:  # what was rounded is read again
            self.vit.float().load_state_dict({name[4:]: t for name, t in self.vit_in_file.items()})
        super().unfreeze_vit()
        self.holds_vit = True
        self.sources["vit"] = Source(self.sources["vit"].spec)  # without files: they no longer hold these weights

    def condition_on_question(self) -> None:
        """Let the Q-Former read each question with the image (paper Figure 7)."""
        self.need_text_branch("read a question with")
        super().condition_on_question()

    def train_heads(self, objectives: tuple[str, ...]) -> None:
        """As `Blip2Model.train_heads`; `untrained_heads` records the objectives left out."""
        super().train_heads(objectives)
        self.untrained_heads = tuple(name for name in OBJECTIVES if name not in objectives)

    # --- encode ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_image(self, images, batch_size: int = 64) -> EncodedImages:
        """Images through the ViT and the Q-Former -> `EncodedImages`, which every call takes in their place.

        images: one or any number of paths, bytes of image files, open files, Pillow images, arrays (H, W, 3), tensors
        (3, H, W), and batches (N, ...) of these two. RGB, grey or RGBA; floats from 0 to 1, integers from 0 to 255,
        uint16 to 65,535; not normalised, as the model does that. Each image is resized to the model's size, whatever
        its aspect ratio. Anything else is a UserError. batch_size: images on the device at a time.
        Example: `model.encode_image(["a.jpg", "b.jpg"]).feats` are unit vectors (2, Q, E).
        """
        if isinstance(images, EncodedImages):
            return images
        images = [images] if is_single(images) else images
        size = (3, self.image_size, self.image_size)
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8 and images.shape[1:] == size):
            images = [one for image in images for one in (image if getattr(image, "ndim", 0) == 4 else [image])]
        expect(len(images), "got no images, expected at least one")
        parts = []
        for pixels in chunked(images, batch_size):
            if not isinstance(pixels, Tensor):
                pixels = torch.stack([eval_transform(as_image(image), self.image_size) for image in pixels])
            parts.append(self.encode_tokens(self.image_tokens(pixels.to(self.device))))
        return EncodedImages(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> EncodedImages:
        """ViT tokens (N, P, V), just computed or from the feature cache -> features."""
        tokens = tokens.to(self.device)
        with self.autocast():
            query_out = self.qformer.encode_queries(self.image_kv(tokens))
            return EncodedImages(tokens, query_out.float(), self.image_feats(query_out))

    @torch.no_grad()
    def encode_text(self, texts, batch_size: int = 256) -> EncodedTexts:
        """Texts through the Q-Former -> `EncodedTexts`, which calls that take texts take in their place.

        texts: a string or a list; longer ones are cut to the model's max_text_tokens. UserError without a text branch.
        Example: `model.encode_text(["a dog", "two bikes"]).feats` are unit vectors (2, E).
        """
        if isinstance(texts, EncodedTexts):
            return texts
        self.need_text_branch("read a text with")
        ids = self.tokenizer.encode([texts] if isinstance(texts, str) else list(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # by length, so that a batch has little padding
        cls = torch.empty(len(ids), self.qformer.cfg.width, device=self.device)
        feats = torch.empty(len(ids), self.embed_dim, device=self.device)
        for rows in chunked(order, batch_size):
            text_ids, text_mask = pad([ids[i] for i in rows], self.tokenizer.pad_id)
            with self.autocast():
                text_cls = self.qformer.encode_text(text_ids.to(self.device), text_mask.to(self.device))
                cls[rows], feats[rows] = text_cls.float(), self.text_feats(text_cls)
        return EncodedTexts(*pad(ids, self.tokenizer.pad_id), cls, feats)

    def need_text_branch(self, purpose: str) -> None:
        """Refuse what a model without a text branch cannot do."""
        expect(
            self.tokenizer is not None,
            f"{self.sources['vit'].spec} has no text branch to {purpose}, as all public stage-2 checkpoints: open a "
            "run that has been through stage 1 here, or a checkpoint for retrieval; in --stage vqa pass --no-condition",
        )

    # --- compare images with texts -----------------------------------------------------------------------------------

    @torch.no_grad()
    def itc_scores(self, images, texts) -> Tensor:
        """Contrastive similarity of N images with M texts -> (N, M): the highest cosine over the queries, -1 to 1.

        images, texts: see `encode_image`, `encode_text`. `model.itc_scores("a.jpg", ["a dog", "two bikes"])` is (1, 2).
        """
        image_feats, text_feats = self.encode_image(images).feats, self.encode_text(texts).feats
        return itc_similarity(image_feats, text_feats[:0], image_feats[:0], text_feats, torch.ones(()))[0]

    @torch.no_grad()
    def itm_scores(self, images, texts) -> Tensor:
        """Probability, 0 to 1, that image n and text m match -> (N, M); slower and finer than `itc_scores`.

        images, texts: see `encode_image`, `encode_text`. `model.itm_scores("a.jpg", ["a dog", "two bikes"])` is (1, 2).
        """
        images, texts = self.encode_image(images), self.encode_text(texts)
        N, M = len(images.feats), len(texts.feats)
        logits = self.match_logits(images, texts, torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N))
        return logits.softmax(dim=1)[:, 1].view(N, M)

    @torch.no_grad()
    def match_logits(
        self, images: EncodedImages, texts: EncodedTexts, image_rows: Tensor, text_rows: Tensor, batch_size: int = 256
    ) -> Tensor:
        """ITM logits (n, 2) of the n pairs (image_rows[i], text_rows[i]); column 1 = match.

        Any pairs, in any order: each image's keys and values are computed once, and texts of similar length go
        together.
        """
        logits = torch.empty(len(image_rows), 2, device=self.device)
        for chunk, query_out in self.joint_passes(images, texts.ids, texts.mask, image_rows, text_rows, batch_size):
            with self.autocast():
                logits[chunk] = self.itm_logits(query_out)
        return logits

    def joint_passes(
        self, images: EncodedImages, ids: Tensor, mask: Tensor, image_rows: Tensor, text_rows: Tensor, batch_size: int
    ):
        """The bi-directional pass over the pairs of `match_logits`; yields (indices of pairs, query_out (n, Q, D))."""
        lengths = mask.sum(dim=1)[text_rows]
        for chosen in chunked(torch.unique(image_rows), 32):
            with self.autocast():
                image_kv = self.image_kv(images.tokens[chosen].to(self.device))
            pairs = torch.isin(image_rows, chosen).nonzero().squeeze(1)
            pairs = pairs[lengths[pairs].argsort()]
            for chunk in chunked(pairs, batch_size):
                rows = torch.searchsorted(chosen, image_rows[chunk]).to(self.device)
                longest = -(-int(lengths[chunk[-1]]) // 8) * 8  # as `pad` rounds
                text, real = (t[text_rows[chunk], :longest].to(self.device) for t in (ids, mask))
                with self.autocast():
                    kv = ((k[rows], v[rows]) for k, v in image_kv)  # copied for one block at a time
                    query_out, _ = self.qformer("itm", text, real, kv)
                yield chunk.to(self.device), query_out

    # --- generate ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, images, prompt: str | None = None, batch_size: int = 64, **decoding):
        """Captions: a string for each image; for a single image that is not in a list, its string.

        With a language model the caption continues the prompt, by default the one it was fine-tuned with. Without one
        (after stage 1) the Q-Former alone captions (ITG). images: see `encode_image`. batch_size: captions at a time.
        decoding, by name: max_new_tokens=30, min_new_tokens=1; num_beams=5, 1 is greedy; num_captions=1, above 1 a list
        of the best for each image; length_penalty=1.0, below 0 favours short ones; repetition_penalty=1.0, above 1
        avoids words again; sample=False, True (with num_beams=1) draws at temperature=1.0 from the most probable tokens
        that hold top_p=1.0, by a torch generator=None. ValueError: out of range; UserError: no trained head to caption.
        Example: `model.caption(["a.jpg", "b.jpg"], num_beams=3)` may be ["a dog on a beach", "two bikes"].
        """
        encoded, decoding = self.encode_image(images), CAPTIONS | decoding
        if self.llm is not None:
            prompts = [self.prompt if prompt is None else prompt] * len(encoded.query_out)
            captions = self.generate_texts(encoded.query_out, prompts, batch_size, **decoding)
        else:
            self.check_itg(prompt, decoding["max_new_tokens"])
            captions = []
            for tokens in chunked(encoded.tokens, batch_size):
                with self.autocast():
                    image_kv = self.image_kv(tokens.to(self.device))
                    decoder = CaptionDecoder(self.qformer, image_kv, decoding["max_new_tokens"])
                    captions += write(decoder, self.tokenizer, self.tokenizer.sep_id, **decoding)
        return captions[0] if is_single(images) else captions

    def check_itg(self, prompt: str | None, max_new_tokens: int) -> None:
        """Refuse what the Q-Former alone cannot caption."""
        expect(not prompt, f"got the prompt {prompt!r} for a model without a language model: leave it out")
        expect(
            "itg" not in self.untrained_heads,
            "the head that writes captions (ITG) is not trained here, as in runs of other --losses and in all public "
            "checkpoints for retrieval: open one with a language model",
        )
        most = self.qformer.cfg.max_positions
        got = f"got max_new_tokens {max_new_tokens}"
        expect(max_new_tokens <= most, f"{got}, expected at most {most}, the positions of the Q-Former's BERT")

    @torch.no_grad()
    def ask(self, images, questions, template: str | None = None, batch_size: int = 64, **decoding):
        """Answers to questions about images (paper 4.1); each image is encoded once.

        For one image: a question, or a list of them -> its answer, or a list. For a list of images: a question for
        all, or a list with one (or a list of them) for each -> a list of that shape.
        A question is a string, or a conversation [(question, answer), ..., question]; see `LLMTokenizer.fill`.
        template: for the questions, with {} for the question; by default the run's own. "{}" leaves a question
        unchanged, so it can be any prompt. decoding: as of `caption`, but by default max_new_tokens=10,
        min_new_tokens=1, num_beams=5, length_penalty=-1.0. UserError: no language model, questions that do not fit.
        Example: `model.ask("a.jpg", [("what is it?", "a dog"), "what color is it?"])` may be "brown".
        """
        asked, query_out, prompts = self.prepare_questions(images, questions, template)
        return asked.unflatten(self.generate_texts(query_out, prompts, batch_size, **(ANSWERS | decoding)))

    @torch.no_grad()
    def rank(self, images, questions, candidates: list[str], template: str | None = None, batch_size: int = 256):
        """The candidates in the order of their probability as the answer, for each question: lists of `Ranked`.

        images, questions, template: see `ask`, whose shape and errors the result has. Ordered by the log-probability
        (natural, summed over the tokens); image and question run through the language model once for all candidates.
        Example: `model.rank("a.jpg", "what is it?", ["a cat", "a dog"])[0].answer` may be "a dog".
        """
        expect(
            candidates and not isinstance(candidates, str),
            f"got the candidates {candidates!r} to rank, expected a list of at least one answer",
        )
        asked, query_out, prompts = self.prepare_questions(images, questions, template)
        total, mean = torch.empty(2, len(prompts), len(candidates))
        for empty in {not prompt for prompt in prompts}:  # a text has no separator after an empty prompt
            part = [i for i, prompt in enumerate(prompts) if (not prompt) == empty]
            of_part = query_out[part], [prompts[i] for i in part]
            total[part], mean[part] = self.log_probs(*of_part, candidates, batch_size)
        ranked = [
            [Ranked(candidates[i], total[row, i].item(), mean[row, i].item()) for i in order]
            for row, order in enumerate(total.argsort(dim=1, descending=True, stable=True).tolist())
        ]
        return asked.unflatten(ranked)

    @torch.no_grad()
    def score(self, images, texts, prompt: str = "", batch_size: int = 256) -> Scores:
        """Log-probability of M texts after each of N images and the prompt: `Scores` of (N, M).

        Natural logarithms; image and prompt run through the language model once for all texts. images: see
        `encode_image`. UserError: no text, no language model.
        Example: `model.score("a.jpg", ["a dog", "a cat"], prompt="a photo of").log_prob` is (1, 2).
        """
        expect(texts, "got no text to score, expected at least one")
        self.need_llm()
        query_out, texts = self.encode_image(images).query_out, [texts] if isinstance(texts, str) else list(texts)
        return Scores(*self.log_probs(query_out, [prompt] * len(query_out), texts, batch_size))

    def need_llm(self) -> None:
        """Refuse what a stage-1 model cannot do."""
        there = self.llm is not None
        expect(there, "this model has no language model to ask: open a run of stage 2, or train one (--stage 2)")

    def prepare_questions(self, images, questions, template: str | None):
        """-> the `QuestionBatch`, and for each question the queries' outputs (n, Q, D) and the prompt."""
        self.need_llm()
        encoded = self.encode_image(images)
        asked = QuestionBatch(questions, None if is_single(images) else len(encoded.tokens))
        prompts = [self.llm_tokenizer.fill(template or self.template, question) for question in asked.questions]
        if self.conditioned:
            return asked, self.condition_queries(encoded, asked.rows, asked.questions), prompts
        return asked, encoded.query_out[asked.rows], prompts

    def condition_queries(self, images: EncodedImages, rows: list[int], questions: list) -> Tensor:
        """Query outputs (n, Q, D) of each row's image with its question (paper Figure 7)."""
        last = [question if isinstance(question, str) else question[-1] for question in questions]
        (ids, mask), n = pad(self.tokenizer.encode(last), self.tokenizer.pad_id), len(rows)
        query_out = torch.empty(n, *images.query_out.shape[1:], device=self.device)
        for chunk, out in self.joint_passes(images, ids, mask, torch.tensor(rows), torch.arange(n), 256):
            query_out[chunk] = out.float()
        return query_out

    def prefill_batches(self, query_out: Tensor, prompts: list[str], new_tokens: int, batch_size: int):
        """Decoders after the image and prompt of each row, in batches of similar length; yields (rows, decoder)."""
        ids = self.llm_tokenizer.encode_prompts(prompts)
        self.check_context_length(max(map(len, ids)), new_tokens)
        for part in chunked(sorted(range(len(ids)), key=lambda i: len(ids[i])), batch_size):
            text, mask = self.llm_tokenizer.pad_prompts([ids[i] for i in part])
            visual = query_out[part].to(self.device)
            prefix, mask = self.llm_prefix(visual, text.to(self.device), mask.to(self.device))
            yield part, self.llm.decoder_for(prefix, mask, new_tokens)

    def generate_texts(self, query_out: Tensor, prompts: list[str], batch_size: int, **decoding) -> list:
        """Continue the prompt of each row after its image; see `write`."""
        texts, tokenizer = [None] * len(prompts), self.llm_tokenizer
        for part, decoder in self.prefill_batches(query_out, prompts, decoding["max_new_tokens"], batch_size):
            for i, text in zip(part, write(decoder, tokenizer, tokenizer.end_id, **decoding), strict=True):
                texts[i] = text
        return texts

    def log_probs(self, query_out: Tensor, prompts: list[str], texts: list[str], batch_size: int) -> tuple[Tensor, ...]:
        """Log-probability of each of M texts after the image and prompt of each row, sum and mean over its tokens:
        (rows, M) each. The prompts are all empty or all non-empty."""
        ids = self.llm_tokenizer.encode_targets(texts, prompts[:1] * len(texts))
        total = torch.empty(len(prompts), len(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for part, decoder in self.prefill_batches(query_out, prompts, max(map(len, ids)), batch_size):
            first, R = decoder.start().float().log_softmax(dim=-1), len(part)
            for columns in chunked(order, max(1, batch_size // R)):
                target, mask = pad([ids[i] for i in columns], self.llm_tokenizer.pad_id, multiple=1)
                target, mask = target.to(self.device), mask.to(self.device)
                log_prob = first[:, target[:, 0]]  # (R, C)
                if target.shape[1] > 1:  # each text after each prompt, all but its last token
                    appended = target[:, :-1].repeat(R, 1)
                    logits = decoder.expand(len(columns)).append(appended).float()  # (R * C, T - 1, W)
                    rest = -F.cross_entropy(logits.transpose(1, 2), target[:, 1:].repeat(R, 1), reduction="none")
                    log_prob = log_prob + (rest.view(R, len(columns), -1) * mask[:, 1:]).sum(dim=-1)
                total[torch.tensor(part)[:, None], torch.tensor(columns)] = log_prob.cpu()
        return total, total / torch.tensor([len(tokens) for tokens in ids])

    def check_context_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse what is longer than the language model's position table."""
        Q, limit = self.qformer.cfg.num_queries, self.llm.max_positions
        prompt_tokens += self.before_image
        expect(
            limit is None or Q + prompt_tokens + new_tokens <= limit,
            f"got {Q} visual embeddings, a prompt of {prompt_tokens} tokens and {new_tokens} new ones, expected at "
            f"most {limit}, the positions of {self.sources['llm'].spec}: shorten the prompt, or max_new_tokens",
        )


def write(decoder, tokenizer, end_id: int, **decoding) -> list:
    """A string for each row of the decoder; with num_captions above 1, a list of strings."""
    texts = [[tokenizer.decode(ids) for ids in group] for group in generate(decoder, end_id=end_id, **decoding)]
    return texts if decoding.get("num_captions", 1) > 1 else [group[0] for group in texts]


class CaptionDecoder:
    """Decoder of the Q-Former's captions (ITG): text tokens after the cached queries of B images."""

    def __init__(self, qformer: QFormer, image_kv: ImageKV, max_new_tokens: int):
        cfg, like = qformer.cfg, image_kv[0][0]
        self.qformer = qformer
        length = cfg.num_queries + max_new_tokens  # [DEC] and all new tokens but the last
        self.cache = KVCache(cfg.depth, like.shape[0], cfg.heads, length, cfg.width // cfg.heads, like)
        qformer.encode_queries(image_kv, self.cache)

    def start(self) -> Tensor:
        """[DEC] -> logits of the first token (B, W)."""
        rows = self.cache.k.shape[1]
        return self.step(torch.full((rows,), self.qformer.dec_id, device=self.cache.k.device))

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (R,) -> logits of the next (R, W)."""
        start = self.cache.length - self.qformer.cfg.num_queries
        text_mask = torch.ones(len(tokens), start + 1, dtype=torch.bool, device=tokens.device)
        text_out = self.qformer.decode_text(tokens[:, None], text_mask, self.cache, start)
        return self.qformer.lm_logits(text_out[:, 0])

    def select(self, rows: Tensor, beams: int = 1) -> None:
        """Row i becomes a copy of old row rows[i]."""
        self.cache.select(rows)


class QuestionBatch:
    """Questions about images in any of the shapes that `Blip2.ask` takes, as a flat list."""

    def __init__(self, questions, images: int | None):
        """images: their number; None for a single one that is not in a list."""
        self.single, count = images is None, 1 if images is None else images
        self.each = [questions] * count if self.single or is_question(questions) else questions
        expect(
            len(self.each) == count,
            f"got {len(self.each)} questions for {images} images, expected one for all, or one (or a list) for each",
        )
        groups = [[entry] if is_question(entry) else list(entry) for entry in self.each]
        self.questions = sum(groups, [])
        self.rows = [row for row, group in enumerate(groups) for _ in group]  # the image of each question
        expect(self.questions, "got an empty list of questions, expected at least one question")
        for question in self.questions:
            expect(
                is_question(question),
                f"got {question!r} as a question, expected a string, or a conversation: tuples (question, answer), "
                "then a question",
            )

    def unflatten(self, answers: list):
        """An answer for each of `questions` -> the shape of the questions."""
        left = iter(answers)
        shaped = [next(left) if is_question(entry) else [next(left) for _ in entry] for entry in self.each]
        return shaped[0] if self.single else shaped


def is_question(entry) -> bool:
    """A string, or a conversation: tuples (question, answer), then a question. (A list would be several questions.)"""
    if isinstance(entry, str) or len(entry) < 2:
        return isinstance(entry, str)
    *past, last = entry
    return isinstance(last, str) and all(isinstance(turn, tuple) and len(turn) == 2 for turn in past)


def is_single(images) -> bool:
    """One image that is not in a list."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim < 4
    return isinstance(images, (str, bytes, IOBase)) or not isinstance(images, Iterable)


def chunked(items, size: int):
    """Consecutive parts of a list or tensor."""
    expect(size >= 1, f"got batch_size {size}, expected at least 1")
    for start in range(0, len(items), size):
        yield items[start : start + size]
