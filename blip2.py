"""BLIP-2: a frozen image encoder, the Q-Former, and what is trained around them (paper 3).

Stage 1 (paper 3.2) is `Blip2.stage1_losses`. Around it are the calls a user makes, which take pictures and strings and
pad, tokenize and batch by themselves: `encode_image`, `encode_text`, `itc_scores`, `itm_scores`, `caption`; and
`Blip2.build`, `from_pretrained`, `save_pretrained`.
Letters: B rows of this process, N of all processes, P image tokens, V ViT width, Q queries, T text tokens, D Q-Former
width, E shared embedding, W vocabulary.
"""

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import weights
from data import Batch, Texts, UserError, eval_transform, open_picture, pad, read_json, to_rgb
from generate import generate
from losses import (
    all_gather,
    all_gather_ragged,
    all_sum,
    fetch_rows,
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    sample_hard_negatives,
    world,
)
from qformer import CaptionDecoder, ImageKV, Prefix, QFormer, QFormerConfig
from vit import PRESETS, ViT

OBJECTIVES = ("itc", "itm", "itg")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class EncodedImages(NamedTuple):
    """Photos that have been through the ViT and the Q-Former; every call that takes photos takes this too."""

    tokens: Tensor  # (N, P, V), raw ViT tokens: what the Q-Former's cross-attention reads
    query_out: Tensor  # (N, Q, D)
    feats: Tensor  # (N, Q, E), unit length: to be compared with a text's, the highest counts


class EncodedTexts(NamedTuple):
    """Texts that have been through the Q-Former; every call that takes texts takes this too."""

    ids: list[list[int]]  # [CLS] ... [SEP]
    cls: Tensor  # (M, D)
    feats: Tensor  # (M, E), unit length


class Blip2(nn.Module):
    """The model of stage 1.

    The ViT is frozen for good: eval mode, no gradient, not in the checkpoint. Trained are the Q-Former and its queries,
    `ln_vision` (in the place of the ViT's dropped final norm), two projections, the ITM head and the temperature.
    """

    def __init__(
        self,
        vit: ViT,
        qformer: QFormer,
        texts: Texts | None,
        image_size: int = 224,
        embed_dim: int = 256,
        ln_vision_eps: float = 1e-5,
        sources: dict | None = None,
    ):
        super().__init__()
        self.vit, self.qformer, self.texts = vit, qformer, texts
        self.image_size, self.embed_dim, self.sources = image_size, embed_dim, sources or {}
        width = qformer.cfg.width
        self.ln_vision = nn.LayerNorm(vit.cfg.width, eps=ln_vision_eps)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)  # column 1 = match
        self.temperature = nn.Parameter(torch.tensor(0.07))  # learned, divides; train.py keeps it within bounds
        self.amp_dtype: torch.dtype | None = None  # of the products in the trained part; None is fp32
        vit.requires_grad_(False).eval()

    # --- open and save -----------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        vit: str,
        bert: str,
        image_size: int = 224,
        num_queries: int = 32,
        cross_every: int = 2,
        embed_dim: int = 256,
        max_text_tokens: int = 32,
        last_block: bool = False,
        dropout: float | None = None,
    ) -> tuple["Blip2", list[str]]:
        """An untrained model over two folders (see `weights.load_vit`) -> it, and the accounts of what was loaded."""
        encoder, vit_account, vit_files = weights.load_vit(vit, last_block)
        sizes = dict(image_width=encoder.cfg.width, num_queries=num_queries, cross_every=cross_every)
        if dropout is not None:
            sizes["dropout"] = dropout
        qformer, bert_account, _ = weights.load_bert(bert, **sizes)
        texts = Texts(bert, max_text_tokens)
        if texts.vocab_size != qformer.cfg.vocab_size:
            raise UserError(
                f"{bert} has a tokenizer of {texts.vocab_size - 1} words and weights of {qformer.cfg.vocab_size - 1}, "
                "expected the same: use the tokenizer that the weights were trained with"
            )
        patch, longest = encoder.cfg.patch_size, qformer.cfg.max_positions // 8 * 8  # `pad` rounds up to 8
        if image_size % patch or image_size < patch:
            raise UserError(
                f"--image-size {image_size} is no multiple of the patch size {patch} of {vit}: "
                f"pass --image-size {max(1, round(image_size / patch)) * patch}"
            )
        if not 3 <= max_text_tokens <= longest:
            raise UserError(
                f"got --max-text-tokens {max_text_tokens}, expected 3 to {longest}, the positions that {bert} has"
            )
        sources = {"vit": vit, "vit_files": vit_files, "last_block": last_block, "bert": bert}
        model = cls(encoder, qformer, texts, image_size, embed_dim, sources=sources)
        return model, [vit_account, bert_account]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        vit: str | None = None,
        bert: str | None = None,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> "Blip2":
        """Open a run folder, or LAVIS's stage-1 checkpoint (a .pth, with the `vit` and `bert` it was made from).

        vit: where the frozen encoder is now, if it has moved. precision: "fp32", "bf16" or "fp16".
        """
        path = Path(path)
        if path.suffix in (".pth", ".pt"):
            model = cls._from_lavis(path, vit, bert)
        else:
            model = cls._from_run(path, vit)
        return model.set_precision(precision, device).eval()

    @classmethod
    def _from_run(cls, folder: Path, vit: str | None) -> "Blip2":
        """A folder that `save_pretrained` has written."""
        if not (folder / "model.safetensors").exists():
            raise UserError(
                f"{folder} is not a run: expected config.json and model.safetensors in it, as train.py writes"
            )
        config = read_json(folder / "config.json")
        spec = vit or relocated(config["vit"], folder)
        encoder, _, files = weights.load_vit(spec, config["last_block"])
        trained_over = config["qformer"]["image_width"]
        if encoder.cfg.width != trained_over:
            raise UserError(
                f"{folder} was trained over a ViT of width {trained_over}, {spec} has width {encoder.cfg.width}: "
                f"pass --vit with the encoder it was trained over ({config['vit']})"
            )
        if config["vit_sha256"] not in (None, weights.sha256(files)):
            raise UserError(
                f"{spec} holds other weights than {folder} was trained over: pass --vit with the right ones, "
                f'or take "vit_sha256" out of {folder}/config.json if you know that they are as good'
            )
        if spec in PRESETS and not files:
            raise UserError(
                f"{folder} was trained over a ViT of random weights ({spec}), which no file holds: "
                "pass --vit with real ones, or train again"
            )
        qformer = QFormer(QFormerConfig(**config["qformer"]))
        sources = {"vit": spec, "vit_files": files, "last_block": config["last_block"], "bert": config["bert"]}
        model = cls(
            encoder,
            qformer,
            Texts(folder, config["max_text_tokens"]),
            config["image_size"],
            config["embed_dim"],
            config["ln_vision_eps"],
            sources,
        )
        model.load_trained(folder)
        return model

    @classmethod
    def _from_lavis(cls, path: Path, vit: str | None, bert: str | None) -> "Blip2":
        """The original's stage-1 checkpoint; it has no config, so the two folders say the architecture."""
        if not path.exists():
            raise UserError(f"{path} does not exist: expected a LAVIS checkpoint or a run folder")
        if vit is None or bert is None:
            raise UserError(f"{path} does not say its architecture: pass --vit eva-g:eva_vit_g.pth and --bert FOLDER")
        tensors = weights.open_tensors([path])
        if any(key.startswith("visual_encoder.") for key in tensors):
            raise UserError(f"{path} holds a ViT that was fine-tuned with it, expected a checkpoint of stage 1")
        encoder, _, files = weights.load_vit(vit)
        sizes = dict(image_width=encoder.cfg.width)
        if "query_tokens" in tensors:
            sizes["num_queries"] = tensors["query_tokens"].shape[1]
        qformer, _, _ = weights.load_bert(bert, **sizes)
        sources = {"vit": vit, "vit_files": files, "last_block": False, "bert": bert}
        model = cls(encoder, qformer, Texts(bert), sources=sources)
        weights.load(model, tensors, weights.LAVIS_STAGE1, str(path))
        return model

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that is not frozen for good, by name: what a checkpoint holds."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("vit.")}

    def load_trained(self, folder: str | Path) -> None:
        """Everything but the frozen ViT, from a folder that `save_pretrained` has written; strict."""
        rows = [weights.Row((name,), name) for name in self.trained_state()]
        table = weights.Table(rows, fresh={r"vit\..*": "the frozen ViT"})
        weights.load(self, weights.open_tensors([Path(folder) / "model.safetensors"]), table, str(folder))

    def save_pretrained(self, folder: str | Path, home: str | Path | None = None, **extra) -> None:
        """Write config.json, model.safetensors and tokenizer.json, from which `from_pretrained` opens the model.

        home: the folder from which the paths in config.json shall be valid, if the files are moved there afterwards.
        extra: further entries of config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_state().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        self.texts.save(folder)
        self.write_config(folder, home, **extra)
        # safetensors lets only the owner read its files; a colleague may read this one as any other.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")

    def write_config(self, folder: Path, home: str | Path | None = None, **extra) -> None:
        """config.json of `save_pretrained`."""
        home = Path(home or folder)
        config = {
            "model": "blip2",
            "vit": relative(self.sources.get("vit", ""), home),
            "vit_sha256": self.vit_sha256,
            "last_block": self.sources.get("last_block", False),
            "bert": relative(self.sources.get("bert", ""), home),  # where the Q-Former started; not needed any more
            "image_size": self.image_size,
            "embed_dim": self.embed_dim,
            "max_text_tokens": self.texts.max_tokens,
            "ln_vision_eps": self.ln_vision.eps,
            "qformer": asdict(self.qformer.cfg),
            **extra,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    # --- precision and freezing --------------------------------------------------------------------------------------

    def set_precision(self, precision: str, device: str | torch.device = "cpu") -> "Blip2":
        """Move to the device. Below fp32, the frozen ViT's weights become half, the trained ones stay fp32 masters.

        The ViT takes fp16 on CUDA, as in paper 3.4, and bf16 on CPU, which has no fast fp16.
        """
        self.to(device)
        self.amp_dtype = PRECISIONS[precision]
        if self.amp_dtype is not None:
            self.vit.to(torch.float16 if torch.device(device).type == "cuda" else self.amp_dtype)
        return self

    def train(self, mode: bool = True):
        """As usual, but what is frozen stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        return self

    @cached_property
    def vit_sha256(self) -> str | None:
        """A hash of the frozen encoder's files; None if it came from none."""
        files = self.sources.get("vit_files")
        return weights.sha256(files) if files else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.temperature.device

    def autocast(self):
        """Half-precision products of the trained part, whose weights are fp32."""
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)

    # --- the parts of the model --------------------------------------------------------------------------------------

    def image_tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the frozen ViT's tokens (B, P, V), in its own precision and without gradient."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.vit(images)

    def image_kv(self, image_tokens: Tensor) -> ImageKV:
        """ln_vision, in fp32, and every cross-attention's keys and values."""
        tokens = self.ln_vision(image_tokens.float())
        return self.qformer.image_kv(tokens if self.amp_dtype is None else tokens.to(self.amp_dtype))

    def image_feats(self, query_out: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E)."""
        return F.normalize(self.vision_proj(query_out).float(), dim=-1)

    def text_feats(self, text_cls: Tensor) -> Tensor:
        """[CLS] outputs (B, D) -> unit vectors (B, E)."""
        return F.normalize(self.text_proj(text_cls).float(), dim=-1)

    def itm_logits(self, query_out: Tensor) -> Tensor:
        """(R, Q, D) of the bi-directional pass -> (R, 2): a verdict of each query, averaged (paper 3.2)."""
        return self.itm_head(query_out).float().mean(dim=1)

    # --- stage 1 -----------------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """`stage1_losses`, under the name that DistributedDataParallel wraps."""
        return self.stage1_losses(*args, **kwargs)

    def stage1_losses(
        self,
        batch: Batch,
        objectives: tuple[str, ...] = OBJECTIVES,
        totals: dict[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        hardness: float = 1.0,
    ) -> dict[str, Tensor]:
        """The losses of paper 3.2 on one batch; their sum is what stage 1 minimises.

        totals: from `stage1_totals`, what each loss is divided by; by default this batch over all processes.
        generator: of the hard negatives' draw; the same on all processes.
        hardness: 1 draws ITM's negatives by their similarity (the paper), 0 draws any, between is between.
        """
        if totals is None:
            totals = stage1_totals([batch])
        with self.autocast():
            image_tokens = batch.image_tokens if batch.images is None else self.image_tokens(batch.images)
            image_kv = self.image_kv(image_tokens)  # once, for all the passes below
            cache = Prefix()
            query_out = self.qformer.encode_queries(image_kv, cache)  # (B, Q, D)
            text_out = self.qformer.encode_text(batch.text_ids, batch.text_mask)  # (B, T, D)

            feats = torch.cat((self.image_feats(query_out), self.text_feats(text_out[:, 0])[:, None]), dim=1)
            feats_all = all_gather(feats)  # (N, Q+1, E), with gradient
            positives = batch.image_ids[:, None] == all_gather(batch.image_ids)  # (B, N): of one photo
            sim_i2t, sim_t2i = itc_similarity(
                feats[:, :-1], feats[:, -1], feats_all[:, :-1], feats_all[:, -1], self.temperature
            )
            losses = {"itc": itc_loss(sim_i2t, sim_t2i, positives, totals["itc"])}
            if "itm" in objectives:
                first_row = world()[0] * len(batch)
                image_neg, image_found = sample_hard_negatives(hardness * sim_t2i, positives, generator, first_row)
                text_neg, text_found = sample_hard_negatives(hardness * sim_i2t, positives, generator, first_row)
                found = torch.cat((image_found, text_found))
                losses["itm"] = self._itm(batch, image_tokens, image_kv, image_neg, text_neg, found, totals["itm"])
            if "itg" in objectives:
                losses["itg"] = self._itg(batch, cache, totals["itg"])
        return losses

    def _itm(self, batch, image_tokens, image_kv, image_neg, text_neg, found, total) -> Tensor:
        """Image-text matching, bi-directional, over 3B rows:

         rows        image      text       match
         0 .. B      own        own        yes
         B .. 2B     hard neg   own        no
         2B .. 3B    own        hard neg   no

        image_neg, text_neg: (B,) numbers among the N of all processes; found: (2B,), False where there is no negative.
        """
        B = len(batch)
        fetched, image_neg = fetch_rows(image_tokens, image_neg)
        if len(fetched):  # photos of other processes; those that are here have their keys and values already
            foreign_kv = self.image_kv(fetched)
            image_kv = [
                (torch.cat((k, fk)), torch.cat((v, fv))) for (k, v), (fk, fv) in zip(image_kv, foreign_kv, strict=True)
            ]
        image_kv = [tuple(torch.cat((t[:B], t.index_select(0, image_neg), t[:B])) for t in (k, v)) for k, v in image_kv]
        ids, mask, ids_all, mask_all = all_gather_ragged(batch.text_ids, batch.text_mask)
        text_ids = torch.cat((ids, ids, ids_all[text_neg]))
        text_mask = torch.cat((mask, mask, mask_all[text_neg]))
        query_out, _ = self.qformer("itm", text_ids, text_mask, image_kv)
        is_match = torch.arange(3 * B, device=text_ids.device) < B
        return itm_loss(self.itm_logits(query_out), is_match, F.pad(found, (B, 0), value=True), total)

    def _itg(self, batch: Batch, cache: Prefix, total: Tensor) -> Tensor:
        """Image-grounded text generation: [DEC] w1 w2 ... behind the cached queries, each predicting the next."""
        ids = batch.text_ids.clone()
        ids[:, 0] = self.qformer.dec_id  # "We also replace the [CLS] token with a new [DEC] token"
        text_out = self.qformer.decode_text(ids, batch.text_mask, cache)
        logits = self.qformer.lm_logits(text_out.flatten(0, 1)[batch.label_rows])  # only where there is a next word
        return itg_loss(logits, batch.text_ids.flatten()[batch.label_rows + 1], total)

    # --- the calls a user makes --------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_image(self, images, batch_size: int = 64) -> EncodedImages:
        """Photos (paths, Pillow pictures, uint8 (H, W, 3) arrays, (N, 3, H, W) tensors; one or a list) -> features."""
        if isinstance(images, EncodedImages):
            return images
        parts = []
        for pixels in batches_of(images, batch_size):
            if not isinstance(pixels, Tensor):
                pixels = torch.stack([eval_transform(as_picture(picture), self.image_size) for picture in pixels])
            parts.append(self.encode_tokens(self.image_tokens(pixels.to(self.device))))
        return EncodedImages(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> EncodedImages:
        """The frozen ViT's tokens (N, P, V), just computed or from a cache -> features."""
        tokens = tokens.to(self.device)
        with self.autocast():
            query_out = self.qformer.encode_queries(self.image_kv(tokens))
            return EncodedImages(tokens, query_out.float(), self.image_feats(query_out))

    @torch.no_grad()
    def encode_text(self, texts, batch_size: int = 256) -> EncodedTexts:
        """Strings (one or a list) -> features. Texts longer than the model's limit are cut."""
        if isinstance(texts, EncodedTexts):
            return texts
        ids = self.texts.encode([texts] if isinstance(texts, str) else list(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that a batch needs little padding
        cls = torch.empty(len(ids), self.qformer.cfg.width, device=self.device)
        feats = torch.empty(len(ids), self.embed_dim, device=self.device)
        for rows in batches_of(order, batch_size):
            text_ids, text_mask = pad([ids[i] for i in rows], self.texts.pad_id)
            with self.autocast():
                text_cls = self.qformer.encode_text(text_ids.to(self.device), text_mask.to(self.device))[:, 0]
                cls[rows], feats[rows] = text_cls.float(), self.text_feats(text_cls)
        return EncodedTexts(ids, cls, feats)

    @torch.no_grad()
    def itc_scores(self, images, texts) -> Tensor:
        """Contrastive similarity of N photos with M texts -> (N, M): the highest cosine over the queries."""
        image_feats, text_feats = self.encode_image(images).feats, self.encode_text(texts).feats
        return itc_similarity(image_feats, text_feats[:0], image_feats[:0], text_feats, torch.ones(()))[0]

    @torch.no_grad()
    def itm_scores(self, images, texts) -> Tensor:
        """Probability that photo n and text m match, for N photos and M texts -> (N, M)."""
        images, texts = self.encode_image(images), self.encode_text(texts)
        N, M = len(images.feats), len(texts.ids)
        logits = self.match_logits(images, texts, torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N))
        return logits.softmax(dim=1)[:, 1].view(N, M)

    @torch.no_grad()
    def match_logits(
        self, images: EncodedImages, texts: EncodedTexts, image_rows: Tensor, text_rows: Tensor, batch_size: int = 256
    ) -> Tensor:
        """ITM logits (n, 2) of the n pairs (image_rows[i], text_rows[i]); column 1 = match.

        Any pairs, in any order: each photo's keys and values are computed once for all its pairs, and pairs with texts
        of similar length go together.
        """
        lengths = torch.tensor([len(ids) for ids in texts.ids])[text_rows]
        logits = torch.empty(len(image_rows), 2, device=self.device)
        for photos in batches_of(torch.unique(image_rows), 32):
            with self.autocast():
                image_kv = self.image_kv(images.tokens[photos].to(self.device))
            pairs = torch.isin(image_rows, photos).nonzero().squeeze(1)
            pairs = pairs[lengths[pairs].argsort()]
            for chunk in batches_of(pairs, batch_size):
                rows = torch.searchsorted(photos, image_rows[chunk]).to(self.device)
                ids, mask = pad([texts.ids[row] for row in text_rows[chunk].tolist()], self.texts.pad_id)
                with self.autocast():
                    kv = [(k[rows], v[rows]) for k, v in image_kv]
                    query_out, _ = self.qformer("itm", ids.to(self.device), mask.to(self.device), kv)
                    logits[chunk.to(self.device)] = self.itm_logits(query_out)
        return logits

    @torch.no_grad()
    def caption(self, images, max_new_tokens: int = 30, num_beams: int = 3, batch_size: int = 64, **decoding) -> list:
        """Captions by the Q-Former alone (ITG), without a language model: a string for each photo.

        decoding: see `generate.generate`; with num_captions above 1, a list of strings for each photo.
        """
        images, captions = self.encode_image(images), []
        for tokens in batches_of(images.tokens, batch_size):
            with self.autocast():
                decoder = CaptionDecoder(self.qformer, self.image_kv(tokens.to(self.device)), max_new_tokens)
                ids = generate(
                    decoder, end_id=self.texts.sep_id, max_new_tokens=max_new_tokens, num_beams=num_beams, **decoding
                )
            captions += [[self.texts.decode(text) for text in group] for group in ids]
        return captions if decoding.get("num_captions", 1) > 1 else [group[0] for group in captions]


def local_device(wanted: str = "auto") -> torch.device:
    """This process's device: "auto" is its CUDA card, else Apple's MPS, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda, but PyTorch sees no CUDA card here: pass --device cpu, or install a CUDA build"
            )
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(
                f"here are {torch.cuda.device_count()} CUDA cards for {os.environ['LOCAL_WORLD_SIZE']} processes: "
                f"pass torchrun --nproc_per_node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def choose_precision(device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """ "fp32", "bf16" or "fp16" for the products on the device, and the reason."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = ("bf16", "the card has it") if has_bf16 else ("fp16", "the card has no bf16; with loss scaling")
    elif device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")  # elsewhere than on Linux, fp32
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        fast = [name for name, flag in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if flag in flags]
        best = ("bf16", f"the processor has {fast[0]}") if fast else ("fp32", "the processor has no AMX or AVX512-BF16")
    else:
        best = ("fp32", f"the safe choice on {device.type}")
    if wanted == "auto":
        return best
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA card, this is {device.type}: pass --precision {best[0]}")
    return wanted, "asked for"


def stage1_totals(batches: list[Batch]) -> dict[str, Tensor]:
    """How many rows or words each loss of one optimizer step counts, over all its micro-batches and processes.

    ITC: the texts (and as many images). ITM: the pairs, without the negatives that cannot be found because a batch
    shows one photo only. ITG: the words to predict.
    """
    rows = words = negatives = 0
    for batch in batches:
        rows += len(batch)
        words += len(batch.label_rows)
        negatives += 2 * (batch.image_ids[:, None] != all_gather(batch.image_ids)).any(dim=1).sum()
    counts = torch.stack((negatives + rows, *torch.tensor((rows, words), device=batches[0].text_ids.device)))
    itm, itc, itg = all_sum(counts).unbind()
    return {"itc": itc, "itm": itm, "itg": itg}


def batches_of(items, size: int):
    """Consecutive parts of a list or tensor; a single picture or string is a list of one."""
    if isinstance(items, (str, Path, Image.Image)) or (isinstance(items, np.ndarray) and items.ndim == 3):
        items = [items]
    for start in range(0, len(items), size):
        yield items[start : start + size]


def as_picture(image) -> Image.Image:
    """A path, Pillow picture or uint8 (H, W, 3) array -> RGB picture."""
    if isinstance(image, (str, Path)):
        return open_picture(image)
    return to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


def relative(spec: str, folder: Path) -> str:
    """A folder or a name:file as it is written from inside `folder`; a bare name stays."""
    name, colon, file = spec.partition(":")
    if colon:
        return f"{name}:{os.path.relpath(file, folder)}"
    return os.path.relpath(spec, folder) if os.path.isdir(spec) else spec


def relocated(spec: str, folder: Path) -> str:
    """The other way round."""
    name, colon, file = spec.partition(":")
    if colon:
        return f"{name}:{os.path.normpath(folder / file)}"
    path = os.path.normpath(folder / spec)
    return path if os.path.isdir(path) or os.sep in spec else spec
