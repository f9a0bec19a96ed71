"""Speed and memory: what the work costs, beside the machine's limit and beside transformers.

    python bench.py stage1                            a training step of stage 1; or stage2
    python bench.py stage2 --vs transformers          alternating with the same work done by transformers' classes
    python bench.py generate                          captions
    python bench.py retrieval                         ITM of photos with texts
    python bench.py load --checkpoint DIR             a checkpoint from the disk into the model
    python bench.py data --data a.json                photos from the disk into batches; without --data, 640 x 480 noise
    python bench.py stage1 --grow batch               how the cost grows: batch, image-size, texts or data
    torchrun --nproc_per_node 2 bench.py stage1       several processes, and the bytes that they send each other

Weights, words and photos are random: speed does not depend on them. --vit, --bert and --llm are names or folders.

FLOPs are model FLOPs: two for each multiply-and-add of the matrix products that the method asks for, by the formulas
below; what is recomputed does not count. MFU is their rate over that of the best of ten products of 4096 x 4096
matrices, in the same dtype, by the same threads or card, in the same run.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import blip2
import weights
from blip2 import OBJECTIVES, PRECISIONS, TINY, Blip2, choose_precision, local_device, vit_dtype
from data import (
    Annotations,
    Batch,
    Mixture,
    StepSampler,
    Texts,
    TrainBatches,
    UserError,
    cores,
    make_batch,
    make_llm_batch,
    open_photos,
    say_sentence,
    train_loader,
)
from formats import HF_BLIP2, HF_BLIP2_VIT, HF_RETRIEVAL
from generate import generate
from llm import OPTConfig, OPTDecoder, T5Config, T5Decoder
from losses import say, start_processes, world
from qformer import ImageKV, Prefix, QFormer, QFormerConfig, qformer_mask
from train import build_optimizer, gigabytes_used, keep_memory, optimize
from vit import ViTConfig

BATCHES = {"stage1": 16, "stage2": 8, "generate": 8, "retrieval": 8}


# --- model FLOPs -----------------------------------------------------------------------------------------------------


def linear(rows: int, inputs: int, outputs: int) -> int:
    """Of a matrix product."""
    return 2 * rows * inputs * outputs


def attention(rows: int, keys: int, width: int) -> int:
    """Of q k^T and of the weighted sum of the values, all heads together."""
    return 4 * rows * keys * width


def vit_flops(cfg: ViTConfig, image_size: int) -> int:
    """The encoder, forward, one photo."""
    patches = (image_size // cfg.patch_size) ** 2
    P, V = patches + 1, cfg.width
    block = linear(P, V, 4 * V) + attention(P, P, V) + linear(P, V, 2 * cfg.mlp)
    return linear(patches, 3 * cfg.patch_size**2, V) + cfg.depth * block


def image_kv_flops(cfg: QFormerConfig, P: int) -> int:
    """Keys and values of all cross-attentions, forward, one photo."""
    return -(-cfg.depth // cfg.cross_every) * linear(P, cfg.image_width, 2 * cfg.width)


def pass_flops(cfg: QFormerConfig, P: int, queries: int, words: int, read: tuple[int, int], past: int = 0) -> int:
    """One pass of the Q-Former, forward, one row: queries and words together, behind `past` positions in a cache. In
    the last block only `read` = (queries, words) are somebody's input."""
    total, D = 0, cfg.width
    for layer in range(cfg.depth):
        q, t = read if layer == cfg.depth - 1 else (queries, words)
        total += linear(queries + words, D, 2 * D) + linear(q + t, D, 2 * D)  # keys and values; queries and projection
        total += attention(q + t, past + queries + words, D) + linear(q + t, D, 2 * cfg.mlp)
        if layer % cfg.cross_every == 0:
            total += linear(q, D, 2 * D) + attention(q, P, D)
    return total


def opt_flops(cfg: OPTConfig, rows: int, read: int, past: int = 0) -> int:
    """OPT's blocks, forward: `rows` positions behind `past` others, of which the last `read` are somebody's input."""
    total, L = 0, cfg.width
    for layer in range(cfg.depth):
        asking = read if layer == cfg.depth - 1 else rows
        total += linear(rows, L, 2 * L) + linear(asking, L, 2 * L + 2 * cfg.mlp) + attention(asking, past + rows, L)
    return total


def t5_flops(cfg: T5Config, prompt: int, target: int, past: int = 0) -> int:
    """T5's encoder over `prompt` positions (not if there is a past), and its decoder over `target` behind `past`."""
    L, inner = cfg.width, cfg.heads * cfg.head_width
    read = cfg.depth * (linear(prompt, L, 4 * inner + 3 * cfg.mlp) + attention(prompt, prompt, inner))
    read += cfg.decoder_depth * linear(prompt, L, 2 * inner)
    block = linear(target, L, 6 * inner + 3 * cfg.mlp)
    block += attention(target, past + target, inner) + attention(target, prompt, inner)
    return (0 if past else read) + cfg.decoder_depth * block


def image_tokens_of(model: Blip2) -> int:
    """P."""
    return (model.image_size // model.vit.cfg.patch_size) ** 2 + 1


def stage1_flops(model: Blip2, photos: int, T: int, labels: float) -> float:
    """A training step, for one of `photos`, whose text has T tokens after padding, `labels` of them to predict."""
    cfg, P, E = model.qformer.cfg, image_tokens_of(model), model.embed_dim
    Q, D = cfg.num_queries, cfg.width
    forward = image_kv_flops(cfg, P)  # once
    forward += pass_flops(cfg, P, Q, 0, read=(Q, 0)) + pass_flops(cfg, P, 0, T, read=(0, 1))  # ITC
    forward += linear(Q + 1, D, E) + 2 * linear(Q, E, photos)
    forward += 3 * (pass_flops(cfg, P, Q, T, read=(Q, 0)) + linear(Q, D, 2))  # ITM
    forward += pass_flops(cfg, P, 0, T, read=(0, T), past=Q) + linear(labels, D, D + cfg.vocab_size)  # ITG
    return vit_flops(model.vit.cfg, model.image_size) + 3 * forward  # the backward pass has two products for each


def stage2_flops(model: Blip2, prompt: int, T: int, labels: float) -> float:
    """A training step, for one photo: `prompt` tokens behind the visual ones, T to be written after padding, `labels`
    of them real. In the frozen language model the backward pass has one product for each of the forward's."""
    cfg, llm, P = model.qformer.cfg, model.llm.cfg, image_tokens_of(model)
    Q = cfg.num_queries
    trained = image_kv_flops(cfg, P) + pass_flops(cfg, P, Q, 0, read=(Q, 0)) + linear(Q, cfg.width, llm.width)
    if isinstance(llm, OPTConfig):
        rows, depth, inner = Q + prompt + T - 1, llm.depth, llm.width
        frozen, scores = opt_flops(llm, rows, read=T), attention((depth - 1) * rows + T, rows, inner)
    else:
        n, inner = Q + prompt, llm.heads * llm.head_width
        frozen = t5_flops(llm, n, T)
        scores = llm.depth * attention(n, n, inner) + llm.decoder_depth * attention(T, T + n, inner)
    # Both sides of a score get a gradient, of a Linear only its input.
    backward = frozen + scores + linear(labels, llm.width, llm.vocab_size)
    if isinstance(llm, T5Config):  # up to its first look at the prompt, the decoder depends on nothing that is trained
        backward -= linear(T, llm.width, 5 * inner) + 2 * attention(T, T, inner) + attention(T, n, inner) / 2
    frozen += linear(labels, llm.width, llm.vocab_size)
    return vit_flops(model.vit.cfg, model.image_size) + 3 * trained + frozen + backward


def encode_flops(model: Blip2) -> int:
    """ViT and queries, forward, one photo."""
    cfg, P = model.qformer.cfg, image_tokens_of(model)
    return (
        vit_flops(model.vit.cfg, model.image_size)
        + image_kv_flops(cfg, P)
        + pass_flops(cfg, P, cfg.num_queries, 0, read=(cfg.num_queries, 0))
    )


def generate_flops(model: Blip2, prompt: int, new: int, beams: int) -> float:
    """`new` tokens for one photo: the prompt runs once, then a token at a time in each beam."""
    llm, Q = model.llm.cfg, model.qformer.cfg.num_queries
    total = encode_flops(model) + linear(Q, model.qformer.cfg.width, llm.width)
    logits = linear(1, llm.width, llm.vocab_size)
    for step in range(new):
        rows = beams if step else 1
        if isinstance(llm, OPTConfig):
            n = Q + prompt
            total += opt_flops(llm, 1, 1, past=n + step - 1) * rows if step else opt_flops(llm, n, 1)
        else:
            total += t5_flops(llm, Q + prompt, 1, past=step) * rows
        total += rows * logits
    return total


def retrieval_flops(model: Blip2, photos: int, texts: int, T: int) -> float:
    """ITM of all pairs: what is of a photo, or of a text, once."""
    cfg, P = model.qformer.cfg, image_tokens_of(model)
    Q, D, E = cfg.num_queries, cfg.width, model.embed_dim
    pair = pass_flops(cfg, P, Q, T, read=(Q, 0)) + linear(Q, D, 2)
    text = pass_flops(cfg, P, 0, T, read=(0, 1)) + linear(1, D, E)
    photo = encode_flops(model) + image_kv_flops(cfg, P) + linear(Q, D, E)
    return photos * photo + texts * text + photos * texts * pair


# --- the clock -------------------------------------------------------------------------------------------------------


def sync(device: torch.device) -> None:
    """Wait for the card."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable, device: torch.device) -> float:
    """Of one run."""
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """The best of ten matrix products; on a card, where one takes less than a millisecond, of ten times ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    together = 10 if device.type == "cuda" else 1

    def products():
        for _ in range(together):
            a @ b

    products()
    return 2 * size**3 * together / min(seconds(products, device) for _ in range(10))


@contextmanager
def clocked(methods: dict[str, list], spent: dict[str, float], device: torch.device):
    """In the block, the seconds in each method are added to its part. methods: part -> [(object, method's name)]."""
    before = []
    for part, places in methods.items():
        for thing, name in places:
            original = getattr(thing, name)

            def timed(*args, _original=original, _part=part, **kwargs):
                sync(device)
                start = time.perf_counter()
                out = _original(*args, **kwargs)
                sync(device)
                spent[_part] += time.perf_counter() - start
                return out

            before.append((thing, name, thing.__dict__.get(name)))
            setattr(thing, name, timed)
    try:
        yield
    finally:
        for thing, name, old in before:
            delattr(thing, name) if old is None else setattr(thing, name, old)


CALLS = ("all_gather", "all_reduce", "all_to_all_single")  # of torch.distributed, all that losses.py makes in a step


@contextmanager
def counted_bytes(sent: dict[str, int]):
    """In the block, count the bytes that this process hands over to the others, by the name of the call. (Of an
    all-reduce in a ring about twice as many travel.)"""
    originals = {name: getattr(dist, name) for name in CALLS}

    def counting(name):
        def call(*args, **kwargs):
            tensor = args[0] if name == "all_reduce" else args[1]
            sent[name] += tensor.numel() * tensor.element_size()
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counting(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


# --- the model and its peer ------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, with_llm: bool) -> Blip2:
    """Names give random weights, folders theirs."""
    encoder, *_ = weights.load_vit(args.vit, dtype=vit_dtype(args.precision, args.device), device=args.device)
    sizes = dict(image_width=encoder.cfg.width, num_queries=args.queries, dropout=args.dropout)
    torch.manual_seed(0)
    if args.bert == "bert-base":
        qformer = weights.build_qformer(QFormerConfig(**sizes), {".*": "random"}, args.device)
    else:
        qformer = weights.load_bert(args.bert, **sizes)[0]
    model = Blip2(encoder, qformer, Texts(TINY / "bert"), args.image_size).set_precision(args.precision, args.device)
    if with_llm:
        model.attach_llm(args.llm)
    return model


def random_batch(args: argparse.Namespace, model: Blip2, rows: int, number: int = 0) -> Batch:
    """What the loader would bring: noise, with captions of --words random words."""
    number = number * world()[1] + world()[0]
    generator, ids = torch.Generator().manual_seed(number), list(range(number * rows, (number + 1) * rows))
    images = torch.randint(0, 256, (rows, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=generator)
    words = (model.qformer if model.llm is None else model.llm).cfg.vocab_size
    texts = torch.randint(words // 2, words - 2, (rows, args.words), generator=generator).tolist()
    if model.llm is None:
        return make_batch([[101, *text, 102] for text in texts], 0, ids, images=images).to(args.device)
    layout, end = model.llm.layout, model.llm_texts.end_id
    prompts = [model.llm_texts.encode_prompts([""])[0]] * rows
    texts = [[*text, end] for text in texts]
    batch = make_llm_batch(prompts, texts, model.llm_texts.pad_id, layout.pads, ids, images=images)
    return batch.to(args.device)


def transformers_twin(model: Blip2) -> nn.Module:
    """transformers' class with the same weights, in the same precisions."""
    import transformers

    transformers.logging.set_verbosity_error()
    retrieval, config = model.llm is None, weights.hf_config(model)
    if not retrieval:
        llm, opt = model.llm.cfg, isinstance(model.llm.cfg, OPTConfig)
        if opt:
            names = dict(width="hidden_size", depth="num_hidden_layers", heads="num_attention_heads", mlp="ffn_dim")
            names |= dict(max_positions="max_position_embeddings", embed_width="word_embed_proj_dim")
            text = dict(model_type="opt", do_layer_norm_before=llm.pre_norm)
        else:
            names = dict(width="d_model", depth="num_layers", decoder_depth="num_decoder_layers", heads="num_heads")
            names |= dict(head_width="d_kv", mlp="d_ff", buckets="relative_attention_num_buckets")
            text = dict(model_type="t5", feed_forward_proj="gated-gelu", dense_act_fn=llm.act, is_gated_act=True)
            text |= dict(scale_decoder_outputs=False, tie_word_embeddings=False, decoder_start_token_id=llm.pad_id)
        text |= {theirs: getattr(llm, ours) for ours, theirs in names.items()} | dict(vocab_size=llm.vocab_size)
        text |= dict(eos_token_id=model.llm_texts.end_id, pad_token_id=model.llm_texts.pad_id)
        config |= {"image_token_index": llm.vocab_size - 1, "text_config": text}  # a word that no text has
    with torch.device(model.device):
        twin = getattr(transformers, config.pop("architectures")[0])(transformers.Blip2Config(**config))
    if not retrieval and not opt:  # whatever its configuration says, T5's head is tied to its words
        head = twin.language_model.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone())
    table, vision = HF_RETRIEVAL if retrieval else HF_BLIP2, weights.unload(model.vit, HF_BLIP2_VIT)
    grid = model.image_size // model.vit.cfg.patch_size
    vision["embeddings.position_embedding"] = model.vit.positions(grid, grid)
    state = weights.unload(model, table, table.fresh) | {f"vision_model.{k}": v for k, v in vision.items()}
    if not retrieval:
        llm_state = weights.unload_llm(model.llm, model.llm.cfg.vocab_size)
        state |= {f"language_model.{k}": v for k, v in llm_state.items()}
    lacking = twin.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False).missing_keys
    lacking = [key for key in lacking if not key.endswith(("lm_head.weight", "embed_tokens.weight", "position_ids"))]
    assert not lacking, lacking  # all but what is tied
    twin.to(model.device).requires_grad_(False).eval()
    products = model.amp_dtype or torch.float32  # our ViT's dtype may be another; theirs would be cast at every run
    twin.vision_model.encoder.to(products)
    twin.vision_model.embeddings.to(products)
    if not retrieval:
        twin.language_model.to(model.llm.word_embedding.weight.dtype)
    return twin


def pixels_of(model: Blip2, images: Tensor) -> Tensor:
    """Photos as the twin takes them."""
    return model.vit.normalize(images).to(model.amp_dtype or torch.float32)


class TheirViT(nn.Module):
    """transformers' encoder in the place of vit.ViT."""

    def __init__(self, vision_model: nn.Module, like: nn.Module):
        super().__init__()
        self.model, self.cfg, self.like = vision_model, like.cfg, [like]

    @property
    def pos_embed(self) -> Tensor:
        """Which says whether it is trained, and in which dtype it is."""
        return self.model.embeddings.position_embedding

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, P, V)."""
        pixels = self.like[0].normalize(images).to(self.pos_embed.dtype)
        return self.model.encoder(self.model.embeddings(pixels)).last_hidden_state


class TheirQFormer(nn.Module):
    """transformers' Q-Former in the place of qformer.QFormer. It makes the image's keys and values anew in each pass,
    so the tokens go where ours are; and it has no cache, so ITG is a joint pass."""

    def __init__(self, twin: nn.Module, like: QFormer):
        super().__init__()
        self.queries, self.embeddings, self.model = twin.query_tokens, twin.embeddings, twin.qformer
        self.lm_head, self.cfg, self.dec_id = copy.deepcopy(like.lm_head), like.cfg, like.dec_id

    def image_kv(self, tokens: Tensor) -> ImageKV:
        """The tokens themselves."""
        return [(tokens, tokens[:, :0])]

    def encode_queries(self, image_kv: ImageKV, cache: list[Prefix] | None = None) -> Tensor:
        """As ours."""
        if cache is not None:
            cache[0](*image_kv[0])
        tokens = image_kv[0][0]
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """As ours."""
        words, mask = self.embeddings(input_ids=text_ids), text_mask.long()
        return self.model(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state[:, 0]

    def joint(self, kind: str, text_ids: Tensor, text_mask: Tensor, tokens: Tensor) -> Tensor:
        """(B, Q + T, D)."""
        queries = self.queries.expand(len(text_ids), -1, -1)
        return self.model(
            query_embeds=self.embeddings(input_ids=text_ids, query_embeds=queries),
            query_length=self.cfg.num_queries,
            attention_mask=qformer_mask(kind, text_mask, self.cfg.num_queries),
            encoder_hidden_states=tokens,
        ).last_hidden_state

    def encode_pairs(self, text_ids: Tensor, text_mask: Tensor, image_kv: ImageKV) -> Tensor:
        """As ours."""
        tokens = torch.cat((image_kv[0][0].repeat_interleave(2, dim=0), image_kv[0][2]))
        return self.joint("itm", text_ids, text_mask, tokens)[:, : self.cfg.num_queries]

    def decode_text(self, text_ids: Tensor, text_mask: Tensor, cache: list[Prefix]) -> Tensor:
        """As ours."""
        return self.joint("itg", text_ids, text_mask, cache[0].k)[:, self.cfg.num_queries :]

    def lm_logits(self, text_out: Tensor) -> Tensor:
        """As ours; transformers lacks this head."""
        return self.lm_head(text_out, self.embeddings.word_embeddings.weight)


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """Something to be timed, and the same done by transformers."""

    unit: str  # what is counted
    amount: float  # how many of them a run does
    flops: float  # model FLOPs of a run; 0 if not known
    run: Callable
    result: Callable  # what both have to agree on
    parts: dict[str, list] = field(default_factory=dict)  # part -> methods, as `clocked` takes them
    peer: Callable | None = None  # builds the Work that transformers does
    model: Blip2 | None = None  # ours, to be compiled
    alone: Callable | None = None  # the same run without the gradients of other processes


def training(model: nn.Module, batches: list[Batch], objectives: tuple[str, ...], args: argparse.Namespace) -> Work:
    """A step of the optimizer over some micro-batches, as train.py takes it."""
    recipe = SimpleNamespace(lr=1e-6, beta2=0.98, weight_decay=0.05, vit_lr_decay=1.0, clip=1.0, seed=0)
    recipe.itc_batch, recipe.negatives_ramp = args.itc_batch, 0
    optimizer, scaler = build_optimizer(model, recipe), torch.amp.GradScaler(enabled=args.precision == "fp16")
    wrapped, photos = distributed(model), sum(map(len, batches))

    def step():
        optimize(wrapped, optimizer, scaler, batches, recipe, objectives, 1)

    def result():  # without dropout, so that two models can be compared
        model.eval()
        with torch.no_grad():
            losses = wrapped(batches[0]) if "lm" in objectives else wrapped(batches[0], generator=torch.Generator())
        model.train()
        return sum(losses.values()).float().cpu()

    def step_alone():
        with wrapped.no_sync():
            step()

    parts = {
        "forward, all": [(wrapped, "forward"), (model, "compare")] if args.itc_batch else [(wrapped, "forward")],
        "backward": [(Tensor, "backward")],
        "optimizer": [(nn.utils, "clip_grad_norm_"), (optimizer, "step")],
    }
    return Work("photos", photos, 0, step, result, parts, alone=step_alone if world()[1] > 1 else None)


def stage1(args: argparse.Namespace) -> Work:
    """A training step of stage 1."""
    model = build_model(args, with_llm=False).train()
    count = max(1, args.itc_batch // (args.batch * world()[1]))
    batches = [random_batch(args, model, args.batch, number) for number in range(count)]

    def work(model):
        done, qformer, B = training(model, batches, OBJECTIVES, args), model.qformer, args.batch
        done.flops = done.amount * stage1_flops(
            model, args.itc_batch or B * world()[1], batches[0].text_ids.shape[1], len(batches[0].label_rows) / B
        )
        losses = ("itc_similarity", "itc_loss", "draw_negatives", "itm_loss", "itg_loss")
        done.parts = {
            "frozen ViT": [(model, "image_tokens")],
            "image keys and values": [(model, "image_kv")],
            "queries, text (ITC)": [(qformer, "encode_queries"), (qformer, "encode_text")],
            "pairs (ITM)": [(qformer, "encode_pairs")],
            "text behind queries (ITG)": [(qformer, "decode_text")],
            "vocabulary": [(qformer, "lm_logits")],
            "losses": [(blip2, name) for name in losses],
        } | done.parts
        return done

    def peer():
        twin = transformers_twin(model)
        theirs = Blip2(TheirViT(twin.vision_model, model.vit), TheirQFormer(twin, model.qformer), None, args.image_size)
        for name in ("ln_vision", "vision_proj", "text_proj", "itm_head"):
            setattr(theirs, name, copy.deepcopy(getattr(model, name)))
        theirs.qformer.requires_grad_(True)
        theirs.amp_dtype = model.amp_dtype
        theirs.to(args.device)
        return work(theirs.train())

    ours = work(model)
    ours.model, ours.peer = model, peer
    return ours


class TheirStage2(nn.Module):
    """transformers' Blip2ForConditionalGeneration in the place of blip2.Blip2, in stage 2."""

    def __init__(self, model: Blip2, batch: Batch):
        super().__init__()
        self.twin, self.autocast = transformers_twin(model), model.autocast
        self.temperature = model.temperature
        for part in (self.twin.qformer, self.twin.language_projection, self.twin.vision_model.post_layernorm):
            part.requires_grad_(True)
        self.twin.query_tokens.requires_grad_(True)
        labels = torch.full_like(batch.target_ids, -100)
        labels.view(-1)[batch.label_rows] = batch.target_ids.view(-1)[batch.label_rows]
        ids = prefix = visual_prompt(self.twin, batch.prompt_ids)
        if isinstance(model.llm.cfg, OPTConfig):
            ids = torch.cat((prefix, batch.target_ids), dim=1)
            labels = torch.cat((torch.full_like(prefix, -100), labels), dim=1)
        mask = torch.cat((torch.ones_like(prefix), (labels != -100).long()[:, prefix.shape[1] :]), dim=1)
        pixels = pixels_of(model, batch.images)
        self.inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask[:, : ids.shape[1]], labels=labels)

    def train(self, mode: bool = True):
        """As ours: what is frozen stays in eval mode."""
        super().train(mode)
        self.twin.vision_model.eval(), self.twin.language_model.eval()
        return self

    def forward(self, *_) -> dict[str, Tensor]:
        """The loss."""
        with self.autocast():
            return {"lm": self.twin(**self.inputs).loss}


def stage2(args: argparse.Namespace) -> Work:
    """A training step of stage 2."""
    model = build_model(args, with_llm=True).train()
    batch = random_batch(args, model, args.batch)
    (B, T), n = batch.target_ids.shape, batch.prompt_ids.shape[1]
    work = training(model, [batch], ("lm",), args)
    work.flops = B * stage2_flops(model, n, T, len(batch.label_rows) / B)
    work.parts = {
        "frozen ViT": [(model, "image_tokens")],
        "image keys and values": [(model, "image_kv")],
        "queries": [(model.qformer, "encode_queries")],
        "language model": [(model.llm, "forward")],
        "losses": [(blip2, "lm_loss")],
    } | work.parts
    work.model = model

    def peer():
        return training(TheirStage2(model, batch).train(), [batch], ("lm",), args)

    work.peer = peer
    return work


def visual_prompt(twin: nn.Module, prompt_ids: Tensor) -> Tensor:
    """Image tokens, as transformers marks the places of the visual embeddings, and the prompt."""
    Q = twin.config.num_query_tokens
    return torch.cat((prompt_ids.new_full((len(prompt_ids), Q), twin.config.image_token_index), prompt_ids), dim=1)


def generate_(args: argparse.Namespace) -> Work:
    """Beam search, encoding included; --new-tokens of them, whatever the model says."""
    model = build_model(args, with_llm=True).eval().requires_grad_(False)
    batch, new, beams = random_batch(args, model, args.batch), args.new_tokens, args.beams
    settings = dict(max_new_tokens=new, min_new_tokens=new, num_beams=beams)

    @torch.no_grad()
    def ids():
        query_out = model.encode_image(batch.images).query_out
        prompt, mask = model.llm_prompt(query_out, batch.prompt_ids, batch.prompt_mask)
        decoder = model.llm.decoder_for(prompt, mask, new)
        return generate(decoder, end_id=model.llm_texts.end_id, **settings)

    def result():
        return torch.tensor([group[0] for group in ids()]).float()

    flops = args.batch * generate_flops(model, batch.prompt_ids.shape[1], new, beams)
    kind = OPTDecoder if isinstance(model.llm.cfg, OPTConfig) else T5Decoder
    named = {
        "encoding": [(model, "encode_image")],
        "prompt": [(model.llm, "decoder_for"), (kind, "start")],
        "steps": [(kind, "step")],
        "re-ordering": [(kind, "select")],
    }

    def peer():
        twin = transformers_twin(model)
        prefix = visual_prompt(twin, batch.prompt_ids)
        pixels = pixels_of(model, batch.images)
        start = 0 if isinstance(model.llm.cfg, OPTConfig) else 1

        @torch.no_grad()
        def their_ids():
            with model.autocast():
                out = twin.generate(
                    pixel_values=pixels, input_ids=prefix, attention_mask=torch.ones_like(prefix), do_sample=False,
                    eos_token_id=model.llm_texts.end_id, pad_token_id=model.llm_texts.pad_id, **settings,
                )  # fmt: skip
            return out[:, -new:] if start == 0 else out[:, 1 : new + 1]

        return Work("tokens", args.batch * new, 0, their_ids, lambda: their_ids().float().cpu())

    return Work("tokens", args.batch * new, flops, ids, result, named, peer, model)


def retrieval(args: argparse.Namespace) -> Work:
    """ITM of --batch photos with --texts texts each."""
    model = build_model(args, with_llm=False).eval().requires_grad_(False)
    images, batch = random_batch(args, model, args.batch).images, random_batch(args, model, args.texts)
    words = [ids[mask].tolist() for ids, mask in zip(batch.text_ids, batch.text_mask)]
    model.texts.encode = lambda texts: words

    def scores():
        return model.itm_scores(images, [""] * args.texts)

    flops = retrieval_flops(model, args.batch, args.texts, batch.text_ids.shape[1])
    named = {
        "encoding of photos": [(model, "encode_image")],
        "encoding of texts": [(model, "encode_text")],
        "image keys and values": [(model, "image_kv")],
        "pairs": [(model.qformer, "encode_pairs")],
    }

    def peer():
        twin = transformers_twin(model)
        pixels = pixels_of(model, images)
        mask = batch.text_mask.long()

        @torch.no_grad()
        def their_scores():
            rows = []
            for photo in pixels:  # a photo with all texts at a time
                with model.autocast():
                    out = twin(
                        pixel_values=photo.expand(args.texts, -1, -1, -1), input_ids=batch.text_ids,
                        attention_mask=mask, use_image_text_matching_head=True,
                    )  # fmt: skip
                rows.append(out.logits_per_image.float().softmax(dim=1)[:, 1])
            return torch.stack(rows)

        return Work("pairs", args.batch * args.texts, 0, their_scores, lambda: their_scores().cpu())

    return Work("pairs", args.batch * args.texts, flops, scores, lambda: scores().cpu(), named, peer, model)


def distributed(model: Blip2) -> nn.Module:
    """The model as train.py wraps it."""
    if world()[1] == 1:
        return model
    return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(work: Work, args: argparse.Namespace) -> dict:
    """Times, rates, memory, and the parts of a run."""
    device = args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup):
        work.run()
    times = [seconds(work.run, device) for _ in range(args.repeats)]
    median = statistics.median(times)
    peak = peak_flops(device, torch.float32 if args.precision == "fp32" else PRECISIONS[args.precision])
    numbers = {
        "seconds": median,
        "fastest": min(times),
        "slowest": max(times),
        f"{work.unit} a second": work.amount / median,
        "peak memory, GB": gigabytes_used(device),
        f"model GFLOPs of a {work.unit.removesuffix('s')}": work.flops / work.amount / 1e9,
        "GFLOP/s": work.flops / median / 1e9,
        "GFLOP/s of the best matrix product": peak / 1e9,
        "MFU, %": 100 * work.flops / median / peak,
    }
    spent, sent = defaultdict(float), defaultdict(int)
    calls = {f"waiting for {name}": [(dist, name)] for name in CALLS} if world()[1] > 1 else {}
    with clocked(work.parts | calls, spent, device), counted_bytes(sent):
        whole = seconds(work.run, device)
    numbers |= {f"part: {part}, %": 100 * spent[part] / whole for part in work.parts | calls}
    numbers |= {f"sent by {name}, MB": count / 1e6 for name, count in sent.items()}
    if work.alone:
        alone = statistics.median(seconds(work.alone, device) for _ in range(args.repeats))
        numbers["part: gradients not hidden by the backward pass, %"] = 100 * (median - alone) / median
        trained = [p for p in work.model.parameters() if p.requires_grad]
        numbers["sent as gradients, MB"] = sum(p.numel() * p.element_size() for p in trained) / 1e6
    return numbers


def gain_of_compiling(work: Work, args: argparse.Namespace) -> dict:
    """The same run with compiled blocks and without, in turns."""
    work.model.compile_blocks()
    first = seconds(work.run, args.device)
    work.run()
    pairs = []
    for _ in range(args.repeats):
        with work.model.uncompiled():
            plain = seconds(work.run, args.device)
        pairs.append((seconds(work.run, args.device), plain))
    return {
        "seconds of the first compiled run": first,
        "seconds, compiled, in turns": statistics.median(fast for fast, _ in pairs),
        "seconds, not compiled, in turns": statistics.median(plain for _, plain in pairs),
        "times as fast when compiled": statistics.median(plain / fast for fast, plain in pairs),
    }


def performed(run: Callable) -> int:
    """FLOPs of the matrix products of a run, as torch counts them; those of attention too, which it does not count in
    the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def versus(work: Work, args: argparse.Namespace) -> dict:
    """The same work by transformers: first the same result, then in turns; the ratio pair by pair."""
    if work.peer is None:
        raise UserError("transformers has nothing like this to compare with: leave --vs out")
    peer = work.peer()
    ours, theirs = work.result(), peer.result()
    difference = (ours - theirs).abs().max().item()
    tolerance = 1e-3 if args.precision == "fp32" else 5e-2
    same = difference <= tolerance * max(1.0, theirs.abs().max().item())
    if not same and (args.precision == "fp32" or work.unit != "tokens"):  # a rounding can turn a text in half precision
        raise UserError(f"the results differ by {difference:g}, expected the same: this is a bug, please report it")
    for run in (work.run, peer.run) * args.warmup:
        run()
    pairs = [(seconds(work.run, args.device), seconds(peer.run, args.device)) for _ in range(args.repeats)]
    ratios = [slow / fast for fast, slow in pairs]
    return {
        "largest difference of the results": difference,
        "seconds, in turns": statistics.median(fast for fast, _ in pairs),
        "seconds of transformers, in turns": statistics.median(slow for _, slow in pairs),
        "times as fast, median of the pairs": statistics.median(ratios),
        "times as fast, worst pair": min(ratios),
        "times as fast, best pair": max(ratios),
        "times as many FLOPs in transformers": performed(peer.run) / work.flops,
    }


def show(title: str, numbers: dict) -> None:
    """As a table."""
    say(title, *(f"  {name:44} {value:>14,.4g}" for name, value in numbers.items()))


def load(args: argparse.Namespace) -> dict:
    """Seconds from a checkpoint to a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.checkpoint or folder)
        if not args.checkpoint:
            model = build_model(args, with_llm=False)
            transformers_twin(model).save_pretrained(path)
            shutil.copy(TINY / "bert/tokenizer.json", path)
            del model
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        out = sys.stdout
        with open(os.devnull, "w") as sys.stdout:  # the account of the loading
            times = [
                seconds(lambda: Blip2.from_pretrained(path, device=args.device, precision=args.precision), args.device)
                for _ in range(args.repeats)
            ]
        sys.stdout = out
        numbers = {"seconds": statistics.median(times), "checkpoint, GB": size / 1e9}
        numbers |= {"GB a second": size / 1e9 / numbers["seconds"], "peak memory, GB": gigabytes_used(args.device)}
        if args.vs:
            import transformers

            name = json.loads((path / "config.json").read_text())["architectures"][0]
            dtype = PRECISIONS[args.precision] or torch.float32
            kind = getattr(transformers, name)
            times = [
                seconds(lambda: kind.from_pretrained(path, dtype=dtype).to(args.device), args.device)
                for _ in range(args.repeats)
            ]
            numbers["seconds of transformers"] = statistics.median(times)
    return numbers


# --- data ------------------------------------------------------------------------------------------------------------


def make_photos(folder: Path, count: int) -> Path:
    """An annotation file with JPEGs of 640 x 480 pixels, coarse noise, about as many bytes as photos have."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        records.append({"image": f"{i}.jpg", "caption": ["a picture of coarse noise"] * 5})
    (folder / "photos.json").write_text(json.dumps(records))
    return folder / "photos.json"


def data(args: argparse.Namespace) -> dict:
    """Photos a second from JPEGs on the disk to batches, for each core."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or make_photos(Path(folder), 256)
        photos = open_photos([str(path)], "train", args.image_size, args.images)
        texts, steps = Texts(TINY / "bert"), max(1, min(512, len(photos)) // args.batch)
        numbers = {}
        for workers in dict.fromkeys((0, cores())):
            sampler = StepSampler(photos, 0, args.batch, 1, 2 * steps, 0, 0, 1)
            batches = iter(train_loader(TrainBatches(photos, texts, args.image_size, 0), sampler, workers, pin=False))
            for _ in range(steps):  # workers start, the disk's cache fills
                next(batches)
            start = time.perf_counter()
            for _ in range(steps):
                next(batches)
            taken = time.perf_counter() - start
            name = "this process" if workers == 0 else f"{workers} workers"
            numbers[f"photos a second, {name}"] = steps * args.batch / taken
        opened = seconds(lambda: [photos.picture(i) for i in range(steps * args.batch)], torch.device("cpu"))
        numbers["of this: whole decoding, ms a photo"] = 1000 * opened / (steps * args.batch)
    return numbers


def private_megabytes(pid: int | str) -> float:
    """Memory of a process that it shares with no other. Linux."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def data_of(records: int, args: argparse.Namespace) -> dict:
    """Opening so many records, and what a loader's worker has for itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        with open(path, "w") as file:
            for i in range(records):
                file.write(f'{{"image": "{i}.jpg", "caption": ["a red circle above a blue square", "two shapes"]}}\n')
        before, start = private_megabytes("self"), time.perf_counter()
        photos = Mixture([Annotations(path)])
        opened, held = time.perf_counter() - start, private_megabytes("self") - before
        Image.new("RGB", (64, 64)).save(Path(folder) / "0.jpg")
        photos.parts[0].picture = lambda index: Image.open(Path(folder) / "0.jpg")
        sampler = StepSampler(photos, 0, args.batch, 1, 60, 0, 0, 1)
        batches = TrainBatches(photos, Texts(TINY / "bert"), 64, 0)
        batches.sample = lambda position, index: (photos.draw(index, np.random.default_rng(0)), index,
                                                  torch.zeros(3, 64, 64, dtype=torch.uint8), [])  # fmt: skip
        loader = iter(train_loader(batches, sampler, 1, pin=False))
        for _ in range(50):
            next(loader)
        worker = private_megabytes(loader._workers[0].pid)
    return {"seconds to open": opened, "MB held": held, "MB of a worker alone": worker, "peak GB": gigabytes_used(
        torch.device("cpu"))}  # fmt: skip


# --- the command line ------------------------------------------------------------------------------------------------

WORKS = {"stage1": stage1, "stage2": stage2, "generate": generate_, "retrieval": retrieval}
GROWTH = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "image-size": (112, 224, 364, 490),
    "texts": (16, 64, 256, 1024),
    "data": (10_000, 100_000, 1_000_000, 10_000_000),
}


def grow(args: argparse.Namespace) -> dict:
    """How the cost grows: each size up to --up-to."""
    rows = {}
    for size in GROWTH[args.grow]:
        if args.up_to and size > args.up_to:
            break
        if args.grow == "data":
            rows[size] = data_of(size, args)
        else:
            setattr(args, args.grow.replace("-", "_"), size)
            try:
                numbers = measure(WORKS[args.what](args), args)
            except torch.OutOfMemoryError:
                say(f"{size:12,} does not fit into the card's memory")
                break
            rows[size] = {k: v for k, v in numbers.items() if not k.startswith(("part", "sent"))}
        if size == GROWTH[args.grow][0]:
            say(f"{args.grow:>12} " + " ".join(f"{name:>22.22}" for name in rows[size]))
        say(f"{size:12,} " + " ".join(f"{value:22,.4g}" for value in rows[size].values()))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=[*WORKS, "load", "data"])
    parser.add_argument("--vit", default="dinov2-s", help="a name for random weights, or a folder")
    parser.add_argument("--bert", default="bert-base", help="bert-base for random weights, or a folder")
    parser.add_argument("--llm", default="opt-125m", help="a name for random weights, or a folder")
    parser.add_argument("--batch", type=int, help="photos of a process (default: 16 in stage 1, else 8)")
    parser.add_argument("--words", type=int, default=12, help="of a caption")
    parser.add_argument("--texts", type=int, default=64, help="retrieval: texts, each with each photo")
    parser.add_argument("--new-tokens", type=int, default=20, help="generate: of each caption")
    parser.add_argument("--beams", type=int, default=5, help="generate")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the Q-Former, in training")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument(
        "--itc-batch", type=int, default=0, help="stage1: ITC over so many, in micro-batches of --batch"
    )
    parser.add_argument("--compile", action="store_true", help="measure what compiling the blocks gains, too")
    parser.add_argument("--vs", choices=["transformers"], help="compare with it, in turns")
    parser.add_argument("--grow", choices=list(GROWTH), help="measure at growing sizes")
    parser.add_argument("--up-to", type=int, help="--grow: the largest size")
    parser.add_argument("--warmup", type=int, default=2, help="runs before the clock starts")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs")
    parser.add_argument("--checkpoint", help="load: its folder (default: random weights)")
    parser.add_argument("--data", help="data: an annotation file (default: noise)")
    parser.add_argument("--images", action="append", help="data: folder of the photos")
    parser.add_argument("--json", help="write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """The command line."""
    args = parse(argv)
    for name in ("batch", "words", "texts", "new_tokens", "beams", "image_size", "queries", "repeats"):
        if (got := getattr(args, name)) is not None and got < 1:
            raise UserError(f"got --{name.replace('_', '-')} {got}, expected at least 1")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {Path(args.json).parent} does not exist, make it first")
    if args.compile and args.what not in ("stage1", "stage2"):
        raise UserError(f"--compile is of training, {args.what} is not compiled: leave it out")
    if args.itc_batch and (args.what != "stage1" or args.vs):
        raise UserError("--itc-batch is of stage1, and nothing that transformers does: leave it or --vs out")
    if args.grow and (args.compile or args.vs or args.itc_batch):
        raise UserError("--grow measures plain runs of growing sizes: leave --compile, --vs and --itc-batch out")
    start_processes()
    args.device = local_device(args.device)
    args.precision = choose_precision(args.device, args.precision)[0]
    args.batch = args.batch or BATCHES.get(args.what, 16)
    if args.itc_batch % (args.batch * world()[1]):
        raise UserError(
            f"--itc-batch {args.itc_batch} is not made of batches of {args.batch * world()[1]}: pass a multiple"
        )
    if args.device.type == "cpu":
        keep_memory()
        if world()[1] > 1:
            torch.set_num_threads(cores())
    elif args.device.type == "cuda" and args.precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    title = f"{args.what}, {args.precision}, {machine}, {torch.get_num_threads()} threads, {world()[1]} process(es)"
    title += f", torch {torch.__version__}"
    say(title)
    if args.grow:
        numbers = grow(args)
    elif args.what in ("load", "data"):
        numbers = {"load": load, "data": data}[args.what](args)
        show("", numbers)
    else:
        work = WORKS[args.what](args)
        numbers = measure(work, args)
        show(f"{args.vit}, {args.image_size} px, batch {args.batch}", numbers)
        if args.vs:
            comparison = versus(work, args)
            show("beside transformers", comparison)
            numbers |= comparison
        if args.compile:
            gain = gain_of_compiling(work, args)
            show("compiled", gain)
            numbers |= gain
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    settings = {name: str(value) for name, value in given.items() if name != "json"}
    record = {"title": title, "settings": settings, "numbers": numbers}
    if world()[0] == 0:
        print(json.dumps(record))
        if args.json:
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(say_sentence(main))
