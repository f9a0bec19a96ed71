"""BLIP-2 of the paper (section 3): frozen image encoder, Q-Former, frozen language model; tensors in, losses out.

Stage 1 (3.2) is `stage1_losses`, stage 2 (3.3) is `stage2_losses`. Fine-tuning (4.2 to 4.4) uses the same two, with the
ViT trained as well, and for VQA with the question in the Q-Former. Files, strings and decoding are in blip2.py.
Letters: see the glossary of qformer.py.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from engine.distributed import all_gather, all_gather_padded, all_sum, fetch_rows, rank, world_size
from losses import IGNORE, draw_negatives, itc_loss, itc_similarity, itg_loss, itm_loss, lm_loss, random_numbers
from qformer import ImageKV, QFormer, QueryCache
from vit import ViT

OBJECTIVES = ("itc", "itm", "itg")


class Blip2Model(nn.Module):
    """The model of both stages.

                        stage 1    stage 2    fine-tuning
        ViT             frozen     frozen     trained, unless left frozen (`unfreeze_vit`)
        ln_vision       trained    trained    trained: it replaces the ViT's dropped final norm
        Q-Former        trained    query side retrieval: all; captions, VQA: query side; VQA: text side too
        ITC, ITM heads  trained    kept       trained for retrieval, else kept
        llm_proj        -          trained    trained for captions and VQA
        LLM             -          frozen     frozen (`add_llm`)

    Frozen: eval mode, no gradient, no optimizer state. Kept: no gradient, saved as stage 1 left it.
    """

    def __init__(
        self, vit: ViT, qformer: QFormer, image_size: int = 224, embed_dim: int = 256, ln_vision_eps: float = 1e-5
    ):
        super().__init__()
        self.vit, self.qformer, self.image_size, self.embed_dim = vit, qformer, image_size, embed_dim
        width = qformer.cfg.width
        self.ln_vision = nn.LayerNorm(vit.cfg.width, eps=ln_vision_eps)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)  # column 1 = match
        self.temperature = nn.Parameter(torch.tensor(0.07))  # learned divisor of the cosines; train.py clamps it
        self.llm = None  # from `add_llm`
        self.conditioned = False  # does the Q-Former read the question too? From `condition_on_question`
        self.amp_dtype: torch.dtype | None = None  # autocast dtype of the trained part; None is fp32
        vit.requires_grad_(False).eval()

    # --- what is trained ---------------------------------------------------------------------------------------------

    def add_llm(self, llm: nn.Module, before_image: int = 0) -> None:
        """Stage 2 (paper 3.3): put a frozen language model after the queries, with a new projection to its width.

        before_image: how many tokens of every prompt stand before the visual embeddings.

        Trained from here on: `ln_vision`, the queries and their part of the Q-Former, `llm_proj`.
        """
        self.llm, self.before_image = llm.requires_grad_(False).eval(), before_image
        self.llm_proj = nn.Linear(self.qformer.cfg.width, llm.width, device=self.device)
        text_branch = (
            self.qformer.word_embedding,
            self.qformer.position_embedding,
            *(block.ffn_text for block in self.qformer.blocks),
            self.qformer.lm_head,
        )
        for part in (*text_branch, self.vision_proj, self.text_proj, self.itm_head, self.temperature):
            part.requires_grad_(False)

    def condition_on_question(self) -> None:
        """VQA (paper 4.3, Figure 7): the Q-Former reads the question with the image, and its text side is trained."""
        ffns = [block.ffn_text for block in self.qformer.blocks[:-1]]  # nothing reads text after the last block
        for part in (self.qformer.word_embedding, self.qformer.position_embedding, *ffns):
            part.requires_grad_(True)
        self.conditioned = True

    def unfreeze_vit(self) -> None:
        """Fine-tuning (paper 4.2 to 4.4): train the ViT in fp32, with a position table for the images' size."""
        self.vit.float().requires_grad_(True)
        if self.vit.cfg.image_size != self.image_size:
            self.vit.resize_positions(self.image_size)

    def train_heads(self, objectives: tuple[str, ...]) -> None:
        """Freeze what no loss among the objectives reaches: heads, and in the last block what no loss reads."""
        itc, itm, itg = (name in objectives for name in ("itc", "itm", "itg"))
        for part in (self.vision_proj, self.text_proj, self.temperature):
            part.requires_grad_(itc)
        self.itm_head.requires_grad_(itm)
        self.qformer.lm_head.requires_grad_(itg)
        last = self.qformer.blocks[-1]
        last.ffn_text.requires_grad_(itc or itg)
        for part in filter(None, (last.cross, last.ffn_query)):
            part.requires_grad_(itc or itm)

    def train(self, mode: bool = True):
        """As usual, but the ViT and the language model stay in eval mode: no dropout."""
        super().train(mode)
        self.vit.eval()
        if self.llm is not None:
            self.llm.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.temperature.device

    @property
    def vit_is_trained(self) -> bool:
        """Does the ViT get a gradient?"""
        return self.vit.pos_embed.requires_grad

    def autocast(self):
        """Autocast of the trained parts: fp32 weights, half-precision matrix products."""
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)

    # --- parts that both stages and the calls of blip2.py share ------------------------------------------------------

    def image_tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> ViT tokens (B, P, V); a frozen ViT runs in its own precision, without gradient."""
        if self.vit_is_trained:
            with self.autocast():
                return self.vit(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.vit(images)

    def image_kv(self, image_tokens: Tensor) -> ImageKV:
        """ln_vision, in fp32, then the keys and values of every cross-attention."""
        tokens = self.ln_vision(image_tokens.float())
        return self.qformer.image_kv(tokens if self.amp_dtype is None else tokens.to(self.amp_dtype))

    def image_feats(self, query_out: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E)."""
        return F.normalize(self.vision_proj(query_out).float(), dim=-1)

    def text_feats(self, text_cls: Tensor) -> Tensor:
        """[CLS] outputs (B, D) -> unit vectors (B, E)."""
        return F.normalize(self.text_proj(text_cls).float(), dim=-1)

    def itm_logits(self, query_out: Tensor) -> Tensor:
        """(R, Q, D) of the bi-directional pass -> (R, 2): the logits of each query, averaged (paper 3.2)."""
        return self.itm_head(query_out).float().mean(dim=1)

    def llm_prefix(self, query_out: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Soft visual prompt (paper Figure 3): (B, Q, D), ids and mask (B, n) -> embeddings (B, Q + n, L), mask."""
        with self.autocast():
            visual = self.llm_proj(query_out)  # (B, Q, L)
        words, first = self.llm.embed(prompt_ids), self.before_image
        mask = F.pad(prompt_mask, (visual.shape[1], 0), value=True)  # neither these nor the first are ever padding
        return torch.cat((words[:, :first], visual.to(words.dtype), words[:, first:]), dim=1), mask

    # --- stage 1 -----------------------------------------------------------------------------------------------------

    def forward(self, losses_of, *args) -> dict[str, Tensor]:
        """Call losses_of(self, *args), as DistributedDataParallel averages gradients only of a pass through `forward`;
        losses_of: `stage1_losses`, `stage2_losses` or what `gradcache.two_pass_losses` returns."""
        return losses_of(self, *args)

    def stage1_losses(
        self,
        batch: Batch,
        objectives: tuple[str, ...] = OBJECTIVES,
        totals: dict[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        hardness: float = 1.0,
    ) -> dict[str, Tensor]:
        """The losses of paper 3.2 on one batch; stage 1 minimises their sum. ITC is always computed: ITM draws by it.

        totals: denominator of each loss, see `stage1_totals`; by default that of this batch on all ranks.
        generator: CPU generator of ITM's negatives, equal on all ranks. hardness: `draw_negatives`; 0 without ITC.
        """
        totals = totals or self.stage1_totals([batch])
        with self.autocast():
            image_tokens = self.batch_tokens(batch)  # (B, P, V)
            image_kv = self.image_kv(image_tokens)  # once per image, for all passes below

            image_feats, text_feats, cache = self.encode(image_kv, batch)  # (B, Q, E), (B, E)
            image_feats_all, text_feats_all = all_gather(image_feats), all_gather(text_feats)  # (N, ...), with gradient
            same_image = batch.image_ids[:, None] == all_gather(batch.image_ids)  # (B, N)
            sims = itc_similarity(image_feats, text_feats, image_feats_all, text_feats_all, self.temperature)
            losses = {"itc": itc_loss(*sims, same_image, totals["itc"])}

            if "itm" in objectives:
                uniform = random_numbers(len(text_feats_all), generator, self.device)  # (2, N)
                rows = slice(rank() * len(batch), (rank() + 1) * len(batch))
                hardness = hardness if "itc" in objectives else 0.0  # else the similarity is not learned
                negatives = draw_negatives(*sims, same_image, uniform[:, rows], hardness)
                negative_kv = self.negative_kv(image_tokens, image_kv, negatives.images)
                texts_all = all_gather_padded(batch.text_ids, batch.text_mask)  # (N, T) each
                losses["itm"] = self.itm(image_kv, negative_kv, batch, texts_all, negatives, totals["itm"])
            if "itg" in objectives:
                losses["itg"] = self.itg(batch, cache, totals["itg"])
        return {name: losses[name] for name in objectives}

    def batch_tokens(self, batch: Batch) -> Tensor:
        """ViT tokens (B, P, V) of a batch, computed or from the feature cache."""
        return batch.image_tokens if batch.images is None else self.image_tokens(batch.images)

    def encode(self, image_kv: ImageKV, batch: Batch) -> tuple[Tensor, Tensor, QueryCache]:
        """The two unimodal passes -> image_feats (B, Q, E), text_feats (B, E), and the query pass's cache for ITG."""
        cache = QueryCache()
        query_out = self.qformer.encode_queries(image_kv, cache)  # (B, Q, D)
        text_cls = self.qformer.encode_text(batch.text_ids, batch.text_mask)  # (B, D)
        return self.image_feats(query_out), self.text_feats(text_cls), cache

    def negative_kv(self, image_tokens: Tensor, image_kv: ImageKV, images: Tensor) -> ImageKV:
        """Keys and values of the images (B,), global row numbers: this rank's are reused, others' are computed from
        fetched ViT tokens; also from 0 fetched rows, as the backward pass of `fetch_rows` is a collective."""
        fetched, index = fetch_rows(image_tokens, images)
        if world_size() > 1:
            fetched_kv = self.image_kv(fetched)
            image_kv = [tuple(map(torch.cat, zip(own, other))) for own, other in zip(image_kv, fetched_kv)]
        return [(k.index_select(0, index), v.index_select(0, index)) for k, v in image_kv]  # [] sums in any order

    def itm(
        self, image_kv: ImageKV, negative_kv: ImageKV, batch: Batch, texts_all: list[Tensor], negatives, total: Tensor
    ) -> Tensor:
        """Image-text matching, bi-directional, over 3B rows (negatives: `losses.Negatives`):

        rows          image       text        match
        0  .. B-1     own         own         yes
        B  .. 2B-1    own         hard neg    no
        2B .. 3B-1    hard neg    own         no
        """
        kv = [(*own, *negative) for own, negative in zip(image_kv, negative_kv)]  # own images are not copied
        extra = texts_all[0].shape[1] - batch.text_ids.shape[1]  # texts of other ranks may be longer
        own_texts = [F.pad(x, (0, extra)) for x in (batch.text_ids, batch.text_mask)]
        ids, mask = (torch.cat((x, x_all[negatives.texts], x)) for x, x_all in zip(own_texts, texts_all))
        query_out, _ = self.qformer("itm", ids, mask, kv)

        yes = torch.ones_like(negatives.has_negative_image)
        is_match = torch.cat((yes, ~yes, ~yes))
        valid = torch.cat((yes, negatives.has_negative_text, negatives.has_negative_image))
        return itm_loss(self.itm_logits(query_out), is_match, valid, total)

    def itg(self, batch: Batch, cache: QueryCache, total: Tensor) -> Tensor:
        """Image-grounded text generation: [DEC] t1 t2 ... after the cached queries, each predicting the next token."""
        ids = batch.text_ids.clone()
        ids[:, 0] = self.qformer.dec_id  # "We also replace the [CLS] token with a new [DEC] token"
        text_out = self.qformer.decode_text(ids, batch.text_mask, cache)  # (B, T, D)
        return itg_loss(self.qformer.lm_logits(text_out), batch.labels, total)

    @staticmethod
    def stage1_totals(batches: list[Batch]) -> dict[str, Tensor]:
        """Denominator of each loss of an optimizer step: a count over all its micro-batches and ranks.

        ITC: rows. ITM: pairs, 3 per row, or 1 where all candidates are of the row's own image and none is negative.
        ITG: tokens to predict.
        """
        negatives, tokens = 0, 0
        for batch in batches:
            negatives += 2 * (batch.image_ids[:, None] != all_gather(batch.image_ids)).any(dim=1).sum()
            tokens += (batch.labels != IGNORE).sum()
        rows = torch.full_like(negatives, sum(map(len, batches)))  # torch.tensor would synchronise the host
        itc, itm, itg = all_sum(torch.stack((rows, rows + negatives, tokens))).unbind()
        return {"itc": itc, "itm": itm, "itg": itg}

    # --- stage 2 -----------------------------------------------------------------------------------------------------

    def stage2_losses(self, batch: Batch, totals: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Language modelling (paper 3.3): the frozen language model's loss on the captions, or on the answers.

        OPT predicts the whole caption, T5 its suffix given its prefix (prefix LM). totals: see `stage2_totals`.
        """
        totals = totals or self.stage2_totals([batch])
        with self.autocast():
            image_kv = self.image_kv(self.batch_tokens(batch))
            if self.conditioned:  # the queries read the question (Figure 7); text_out is unused
                query_out, _ = self.qformer("itm", batch.text_ids, batch.text_mask, image_kv)
            else:
                query_out = self.qformer.encode_queries(image_kv)  # (B, Q, D)
        prefix, prefix_mask = self.llm_prefix(query_out, batch.prompt_ids, batch.prompt_mask)
        logits = self.llm(prefix, prefix_mask, batch.target_ids)  # (B, T, W)
        return {"lm": lm_loss(logits, batch.labels, totals["lm"])}

    @staticmethod
    def stage2_totals(batches: list[Batch]) -> dict[str, Tensor]:
        """Denominator of the loss of an optimizer step: tokens to predict, over all its micro-batches and ranks."""
        return {"lm": all_sum(sum((batch.labels != IGNORE).sum() for batch in batches))}
