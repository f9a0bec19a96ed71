"""The frozen language models of stage 2 (paper 3.3): OPT and the Llama family, decoder-only; T5, encoder-decoder.

The interface of a language model, one class; docs/faq.md lists where another one is registered:

    cfg, grad_checkpointing, init_weights()           with vocab_size, width, depth, heads, mlp; bool; random weights
    prompt_format                                     `PromptFormat`; None: chosen by its folder (sources/prompts.py)
    presets, tokenizer                                name -> configuration, for --llm NAME; their folder in assets/tiny
    width, max_positions, fits_fp16                   L; None: no limit; False: overflows in fp16
    embed(ids)                                        (B, T) -> (B, T, L)
    forward(prompt, prompt_mask, target)              logits (B, T, W) of the target's tokens, given the prompt
    decoder_for(prompt, prompt_mask, max_new_tokens)  start, step, select of generate.py; append, expand for scoring

A prompt is a sequence of embeddings, the visual ones among them. OPT and Llama continue it; T5's encoder reads it and
T5's decoder writes the target. Frozen: eval mode (LAVIS leaves dropout on), no gradient for the weights, half precision
below fp32; the gradient flows through the model to the visual embeddings.

Letters: B rows, n prompt positions, T target tokens, S positions; see also the glossary of qformer.py.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.cuda_graph import CUDAGraphed
from engine.kernels import Linear, TiedEmbedding, attention, shared_attention
from engine.sharding import is_sharded
from generate import KVCache
from qformer import split_heads
from sources.prompts import PromptFormat


def causal_mask(real: Tensor, rows: int) -> Tensor:
    """(B, S) bool, True = no padding -> causal mask of the last `rows` positions: bool (B, 1, rows, S).

    A position sees the real ones before it, and itself even if it is padding, so that no row is all-masked.
    """
    position = torch.arange(real.shape[1], device=real.device)
    row, key = position[-rows:, None], position[None, :]
    return (((key < row) & real[:, None, :]) | (key == row))[:, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a bias of the scores, made once for all blocks; attention would make it in each."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


class RMSNorm(nn.Module):
    """The norm of T5 and Llama: no mean, no bias, fp32 inside."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# --- decoder-only ----------------------------------------------------------------------------------------------------


class CausalLM(nn.Module):
    """A decoder-only language model (paper Figure 3, top): each position predicts the next token.

    Prompts are left-padded, after the visual embeddings, so that the last position of every row is its last token.
    A subclass has word_embedding, blocks, width, kv_size (heads of the cache, their width), `run` and `logits`.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.max_positions = cfg.max_positions  # visual embeddings, prompt and text together
        self.grad_checkpointing = False  # recompute each block in the backward pass: slower, far less memory

    @torch.no_grad()
    def init_weights(self):
        """N(0, 1 / width), so that a Linear keeps the variance of its input; 0.02 at OPT-2.7B's width."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.cfg.width**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, L)."""
        return self.word_embedding(ids)

    def forward(self, prompt: Tensor, prompt_mask: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, W) of the target's tokens.

        prompt (B, n, L), prompt_mask (B, n) bool; target (B, T), right-padded, which needs no mask.
        """
        x = torch.cat((prompt, self.word_embedding(target[:, :-1])), dim=1)
        real = F.pad(prompt_mask, (0, target.shape[1] - 1), value=True)
        x = self.read(x, real)[:, -target.shape[1] :]  # the prompt's last position predicts the first token
        return self.logits(x)

    def read(self, x: Tensor, real: Tensor, cache: KVCache | None = None) -> Tensor:
        """All blocks over x (B, n, L), the last n of S positions; real: (B, S) bool, True = no padding."""
        positions = (real.cumsum(dim=1) * real - 1)[:, -x.shape[1] :]  # real tokens count from 0, padding is -1
        return self.run(x, positions, as_bias(causal_mask(real, x.shape[1]), x.dtype), cache)

    def run_blocks(self, x: Tensor, *context, cache=None) -> Tensor:
        """All blocks over x, each called with the context."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context, cache)
        return x

    def decoder_for(self, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> "CausalDecoder":
        """A decoder for generate.py."""
        return CausalDecoder(self, prompt, prompt_mask, max_new_tokens)


class LLMDecoder:
    """What decoders share (see generate.py)."""

    def __init__(self, cache: KVCache):
        self.cache, self.graphed = cache, CUDAGraphed()

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (R,) to each row -> logits of the next (R, W)."""
        sharded = is_sharded(self.model.word_embedding.weight)  # its gathering cannot be captured
        logits = self.static_step(tokens) if sharded else self.graphed(self.static_step, tokens)
        self.cache.length += 1
        return logits

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """Row i becomes a copy of old row rows[i]; returns whether the cache has been reallocated."""
        moved = self.cache.select(rows)
        if moved:
            self.graphed = CUDAGraphed()
        return moved

    def expand(self, copies: int) -> "LLMDecoder":
        """A copy of the decoder with each row repeated `copies` times; this one is unchanged."""
        twin, k = copy.copy(self), self.cache.k
        twin.cache = copy.copy(self.cache)  # shallow: without beams, `select` reallocates its tensors
        twin.select(torch.arange(k.shape[1], device=k.device).repeat_interleave(copies), copies)
        return twin


class CausalDecoder(LLMDecoder):
    """Decoder of a `CausalLM`: the prompt of each row runs once, then tokens are appended."""

    def __init__(self, model: CausalLM, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int):
        cfg, (B, n, _) = model.cfg, prompt.shape
        heads, head_width = model.kv_size
        super().__init__(KVCache(cfg.depth, B, heads, n + max_new_tokens, head_width, prompt))
        self.model, self.prompt = model, prompt
        self.real = F.pad(prompt_mask, (0, self.cache.capacity - n), value=False)  # (R, capacity): filled, not padding

    def start(self) -> Tensor:
        """Run the prompt -> logits of the first token (B, W)."""
        real = self.real[:, : self.prompt.shape[1]]
        return self.model.logits(self.model.read(self.prompt, real, self.cache)[:, -1])

    def append(self, tokens: Tensor) -> Tensor:
        """Append tokens (R, T) -> logits (R, T, W) of the token after each."""
        end = self.cache.length + tokens.shape[1]
        self.real[:, self.cache.length : end] = True
        return self.model.logits(self.model.read(self.model.embed(tokens), self.real[:, :end], self.cache))

    def static_step(self, tokens: Tensor) -> Tensor:
        """`step` with fixed shapes; see `KVCache.static_view`."""
        self.real.index_fill_(1, self.cache.position, True)
        positions = self.real.sum(dim=1, keepdim=True) - 1
        x = self.model.embed(tokens[:, None])
        bias = as_bias(self.real[:, None, None], x.dtype)
        x = self.model.run(x, positions, bias, self.cache.static_view())
        return self.model.logits(x[:, 0])

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """See `LLMDecoder.select`; `real` is equal in all beams of an image."""
        moved = super().select(rows)
        if moved:
            self.real = self.real[rows]
        return moved


# --- OPT -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OPTConfig:
    """Architecture; the defaults are OPT-2.7B's."""

    vocab_size: int = 50272
    width: int = 2560
    depth: int = 32
    heads: int = 32
    mlp: int = 10240
    max_positions: int = 2048
    embed_width: int = 2560  # of the word embeddings; if not `width`, they are projected (OPT-350m)
    pre_norm: bool = True  # False in OPT-350m: post-norm, no final norm


class OPTBlock(nn.Module):
    """Causal self-attention and a ReLU feed-forward; pre-norm, in OPT-350m post-norm."""

    def __init__(self, cfg: OPTConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.pre_norm = layer, cfg.heads, cfg.pre_norm
        self.ln_1 = nn.LayerNorm(cfg.width)
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln_2 = nn.LayerNorm(cfg.width)
        self.fc1 = Linear(cfg.width, cfg.mlp)
        self.fc2 = Linear(cfg.mlp, cfg.width)

    def forward(self, x: Tensor, mask: Tensor, cache=None) -> Tensor:
        """(B, rows, L) -> the same; the cache, if given, holds the keys and values of earlier positions."""
        if self.pre_norm:
            x = x + self.self_attention(self.ln_1(x), mask, cache)
            return x + self.fc2(F.relu(self.fc1(self.ln_2(x))))
        x = self.ln_1(x + self.self_attention(x, mask, cache))
        return self.ln_2(x + self.fc2(F.relu(self.fc1(x))))

    def self_attention(self, x: Tensor, mask: Tensor, cache) -> Tensor:
        """Self-attention of x to the cache and to itself."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class OPT(CausalLM):
    """[visual] [BOS] prompt text. [BOS] follows the visual embeddings and is never a label (in LAVIS it is one where
    the prompt is empty). The target ends in a newline."""

    prompt_format = PromptFormat("</s>", "", "\n", " ", "left", prefix_lm=False, template="Question: {} Answer:")
    presets = {  # the paper's (3.4), and the smallest
        "opt-125m": OPTConfig(width=768, depth=12, heads=12, mlp=3072, embed_width=768),
        "opt-2.7b": OPTConfig(),
        "opt-6.7b": OPTConfig(width=4096, depth=32, heads=32, mlp=16384, embed_width=4096),
    }
    tokenizer = "opt"
    fits_fp16 = True

    def __init__(self, cfg: OPTConfig):
        super().__init__(cfg)
        self.width = cfg.embed_width  # of the prompt's embeddings, before `project_in`
        self.kv_size = cfg.heads, cfg.width // cfg.heads  # of the cache: heads and their width
        self.word_embedding = TiedEmbedding(cfg.vocab_size, cfg.embed_width)
        self.position_embedding = nn.Embedding(cfg.max_positions + 2, cfg.width)  # row 0: unused, 1: padding
        projects = cfg.embed_width != cfg.width
        self.project_in = Linear(cfg.embed_width, cfg.width, bias=False) if projects else nn.Identity()
        self.blocks = nn.ModuleList(OPTBlock(cfg, layer) for layer in range(cfg.depth))
        self.ln_final = nn.LayerNorm(cfg.width) if cfg.pre_norm else nn.Identity()
        self.project_out = Linear(cfg.width, cfg.embed_width, bias=False) if projects else nn.Identity()

    def run(self, x: Tensor, positions: Tensor, mask: Tensor, cache=None) -> Tensor:
        """All blocks over x (B, n, L) at `positions` (B, n), -1 = padding; mask: see `kernels.attention`."""
        x = self.project_in(x) + self.position_embedding(positions + 2)
        return self.run_blocks(x, mask, cache=cache)

    def logits(self, x: Tensor) -> Tensor:
        """(..., L) -> (..., W); the output matrix is the word embedding."""
        return self.word_embedding(self.project_out(self.ln_final(x)))


# --- the Llama family ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama 2 or 3, SmolLM2, Mistral, Qwen2 or Qwen3; the defaults are SmolLM2-135M's."""

    vocab_size: int = 49152
    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3  # each is shared by heads / kv_heads queries
    head_width: int = 64  # heads * head_width need not be the width
    mlp: int = 1536
    max_positions: int = 8192
    eps: float = 1e-5
    rope_theta: float = 1e5
    rope_factor: float = 1.0  # RoPE of the type llama3: low frequencies are divided by it; 1: of the type default
    rope_low: float = 1.0  # turns within rope_positions at and below which a frequency is low
    rope_high: float = 4.0  # from which it is high, and stays
    rope_positions: int = 8192
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tied: bool = True  # the output matrix is the word embedding


def rope(positions: Tensor, cfg: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: cosines and signed sines (B, 1, n, K), fp32, of `rotate` at positions (B, n)."""
    half = torch.arange(0, cfg.head_width, 2, device=positions.device).float()
    frequency = 1 / cfg.rope_theta ** (half / cfg.head_width)
    turns = cfg.rope_positions * frequency / (2 * math.pi)
    high = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
    frequency = torch.lerp(frequency / cfg.rope_factor, frequency, high)
    angle = positions[:, None, :, None] * frequency
    return torch.cat((angle, angle), dim=-1).cos(), torch.cat((-angle, angle), dim=-1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of (B, H, n, K) by the angles of `rope`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class LlamaBlock(nn.Module):
    """Causal self-attention with rotary positions, in which groups of heads share keys, and SwiGLU; pre-norm."""

    def __init__(self, cfg: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, cfg.heads, cfg.kv_heads
        self.ln_1 = RMSNorm(cfg.width, cfg.eps)
        self.q = Linear(cfg.width, cfg.heads * cfg.head_width, bias=cfg.qkv_bias)
        self.kv = Linear(cfg.width, 2 * cfg.kv_heads * cfg.head_width, bias=cfg.qkv_bias)
        self.q_norm = RMSNorm(cfg.head_width, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_width, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.proj = Linear(cfg.heads * cfg.head_width, cfg.width, bias=False)
        self.ln_2 = RMSNorm(cfg.width, cfg.eps)
        self.gate = Linear(cfg.width, cfg.mlp, bias=False)
        self.up = Linear(cfg.width, cfg.mlp, bias=False)
        self.down = Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache=None) -> Tensor:
        """(B, n, L) -> the same; the cache, if given, holds the keys and values of earlier positions."""
        normed = self.ln_1(x)
        q = rotate(self.q_norm(split_heads(self.q(normed), self.heads)), cos, sin)
        k, v = (split_heads(part, self.kv_heads) for part in self.kv(normed).chunk(2, dim=2))
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        groups = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # heads that share a key, as more rows of one
        out = attention(groups, k, v, mask).reshape(q.shape)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        normed = self.ln_2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(CausalLM):
    """[BOS] [visual] prompt text [EOS] for a base model; a chat model reads the visual embeddings inside the user's
    turn, and writes the text in its own. `sources.prompts` has the formats."""

    prompt_format = None
    presets = {
        "smollm2-135m": LlamaConfig(),
        "qwen3-0.6b": LlamaConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, 1e-6, 1e6, qk_norm=True),
        "qwen2.5-3b": LlamaConfig(151936, 2048, 36, 16, 2, 128, 11008, 32768, 1e-6, 1e6, qkv_bias=True),
        "llama-3.2-3b": LlamaConfig(128256, 3072, 28, 24, 8, 128, 8192, 131072, 1e-5, 5e5, rope_factor=32.0),
        "llama-3.1-8b": LlamaConfig(
            128256, 4096, 32, 32, 8, 128, 14336, 131072, 1e-5, 5e5, rope_factor=8.0, tied=False
        ),
    }
    tokenizer = "opt"
    fits_fp16 = True

    def __init__(self, cfg: LlamaConfig):
        super().__init__(cfg)
        self.width, self.kv_size = cfg.width, (cfg.kv_heads, cfg.head_width)
        self.word_embedding = TiedEmbedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(LlamaBlock(cfg, layer) for layer in range(cfg.depth))
        self.ln_final = RMSNorm(cfg.width, cfg.eps)
        self.lm_head = None if cfg.tied else Linear(cfg.width, cfg.vocab_size, bias=False)

    def run(self, x: Tensor, positions: Tensor, mask: Tensor, cache=None) -> Tensor:
        """All blocks over x (B, n, L) at `positions` (B, n); mask: see `kernels.attention`."""
        cos, sin = (part.to(x.dtype) for part in rope(positions, self.cfg))
        mask = mask.repeat(1, 1, self.cfg.heads // self.cfg.kv_heads, 1)  # for the rows of a group
        return self.run_blocks(x, cos, sin, mask, cache=cache)

    def logits(self, x: Tensor) -> Tensor:
        """(..., L) -> (..., W)."""
        return (self.lm_head or self.word_embedding)(self.ln_final(x))


# --- T5 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class T5Config:
    """Architecture; the defaults are Flan-T5-XL's."""

    vocab_size: int = 32128
    width: int = 2048
    depth: int = 24
    decoder_depth: int = 24
    heads: int = 32
    head_width: int = 64  # heads * head_width need not be the width
    mlp: int = 5120
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # this and all above share the last bucket
    eps: float = 1e-6
    act: str = "gelu_new"  # by tanh; LAVIS's BLIP-2 checkpoints were trained with "gelu", by erf
    pad_id: int = 0  # the decoder starts with it


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


class T5Attention(nn.Module):
    """softmax(q k^T + bias) v, without 1 / sqrt(K), which is in T5's initialisation; beams may share k, v."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.heads, inner = cfg.heads, cfg.heads * cfg.head_width
        self.q = Linear(cfg.width, inner, bias=False)
        self.kv = Linear(cfg.width, 2 * inner, bias=False)
        self.proj = Linear(inner, cfg.width, bias=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, L) -> k, v (B, H, S, K)."""
        k, v = self.kv(x).chunk(2, dim=2)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.heads).unflatten(0, (len(k), -1))  # (B, beams, H, n, K): beams share k, v
        out = shared_attention(q, k, v, mask, scale=1.0).flatten(0, 1)
        return self.proj(out.transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """Self-attention, cross-attention in the decoder, and a gated feed-forward; pre-norm."""

    def __init__(self, cfg: T5Config, layer: int, is_decoder: bool):
        super().__init__()
        self.layer, self.act = layer, ACTIVATIONS[cfg.act]
        self.ln_1, self.attn = RMSNorm(cfg.width, cfg.eps), T5Attention(cfg)
        self.ln_cross = RMSNorm(cfg.width, cfg.eps) if is_decoder else None
        self.cross = T5Attention(cfg) if is_decoder else None
        self.ln_2 = RMSNorm(cfg.width, cfg.eps)
        self.gate = Linear(cfg.width, cfg.mlp, bias=False)
        self.up = Linear(cfg.width, cfg.mlp, bias=False)
        self.down = Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory=None, memory_mask=None, cache=None) -> Tensor:
        normed = self.ln_1(x)
        k, v = self.attn.keys_values(normed)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        x = x + self.attn(normed, k, v, bias)
        if self.cross is not None:
            x = x + self.cross(self.ln_cross(x), *memory, memory_mask)
        normed = self.ln_2(x)
        return x + self.down(self.act(self.gate(normed)) * self.up(normed))


def causal(rows: Tensor, keys: int) -> Tensor:
    """Causal mask of the positions `rows` (n,) over keys 0 to keys - 1: bool (n, keys)."""
    return torch.arange(keys, device=rows.device) <= rows[:, None]


class T5Stack(nn.Module):
    """The encoder, or the decoder: blocks that share one table of relative position biases, and a final norm."""

    def __init__(self, cfg: T5Config, depth: int, is_decoder: bool):
        super().__init__()
        self.cfg, self.is_decoder = cfg, is_decoder
        self.position_bias = nn.Embedding(cfg.buckets, cfg.heads)
        self.blocks = nn.ModuleList(T5Block(cfg, layer, is_decoder) for layer in range(depth))
        self.ln_final = RMSNorm(cfg.width, cfg.eps)

    def forward(
        self, x: Tensor, rows: Tensor, allowed: Tensor, recompute: bool, memory=None, memory_mask=None, cache=None
    ) -> Tensor:
        """x (B, n, L) at the positions `rows` (n,) of S; allowed: bool, broadcast to (B, 1, n, S).

        recompute: activation checkpointing. memory: cross-attention keys and values of each decoder block.
        """
        bias = self.bias(rows, allowed.shape[-1]).masked_fill(~allowed, float("-inf"))
        for block, kv in zip(self.blocks, memory or [None] * len(self.blocks)):
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, kv, memory_mask, use_reentrant=False)
            else:
                x = block(x, bias, kv, memory_mask, cache)
        return self.ln_final(x)

    def bias(self, rows: Tensor, keys: int) -> Tensor:
        """Relative position bias of positions `rows` (n,) to keys 0 to keys - 1: (1, H, n, keys)."""
        distance = torch.arange(keys, device=rows.device) - rows[:, None]
        return self.position_bias(self.bucket(distance)).permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """Key position minus row position -> bucket: exact when near, logarithmic up to max_distance. The decoder is
        causal; in the encoder each side has half of the buckets."""
        buckets, side = self.cfg.buckets, 0
        if self.is_decoder:
            distance = (-distance).clamp(min=0)
        else:
            buckets //= 2
            side, distance = (distance > 0) * buckets, distance.abs()
        exact = buckets // 2
        fraction = torch.log(distance.clamp(min=1) / exact) / math.log(self.cfg.max_distance / exact)
        far = (exact + (fraction * (buckets - exact)).long()).clamp(max=buckets - 1)
        return side + torch.where(distance < exact, distance, far)


class T5(nn.Module):
    """Encoder-decoder (paper Figure 3, bottom): the encoder reads visual embeddings and prefix, the decoder writes the
    suffix. Positions are relative, so prompts are right-padded: no gap after the visual embeddings."""

    prompt_format = PromptFormat("", "</s>", "</s>", "", "right", prefix_lm=True, template="Question: {} Short answer:")
    presets = {"flan-t5-xl": T5Config(), "flan-t5-xxl": T5Config(width=4096, heads=64, mlp=10240)}
    tokenizer = "t5"
    fits_fp16 = False  # its activations overflow there
    max_positions = None

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.cfg, self.width = cfg, cfg.width
        self.grad_checkpointing = False  # recompute each block in the backward pass: slower, far less memory
        self.word_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.encoder = T5Stack(cfg, cfg.depth, is_decoder=False)
        self.decoder = T5Stack(cfg, cfg.decoder_depth, is_decoder=True)
        self.lm_head = Linear(cfg.width, cfg.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self):
        """As in T5: words N(0, 1), a Linear N(0, 1 / its inputs); q has the 1 / sqrt(K) that the attention lacks."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                if name.endswith(".q"):
                    module.weight.mul_(self.cfg.head_width**-0.5)
        self.word_embedding.weight.normal_(0, 1)
        for stack in (self.encoder, self.decoder):
            stack.position_bias.weight.normal_(0, self.cfg.width**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, L)."""
        return self.word_embedding(ids)

    def forward(self, prompt: Tensor, prompt_mask: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, W) of the target's tokens; prompt (B, n, L), prompt_mask (B, n) bool; target (B, T)."""
        memory = self.read(prompt, prompt_mask)
        x = self.word_embedding(F.pad(target[:, :-1], (1, 0), value=self.cfg.pad_id))  # shifted right
        rows = torch.arange(target.shape[1], device=target.device)
        x = self.decoder(x, rows, causal(rows, len(rows)), self.grad_checkpointing, *memory)
        return self.lm_head(x)

    def read(self, prompt: Tensor, prompt_mask: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Run the encoder -> cross-attention keys and values of each decoder block, and their mask."""
        mask = prompt_mask[:, None, None, :]
        x = self.encoder(prompt, torch.arange(prompt.shape[1], device=prompt.device), mask, self.grad_checkpointing)
        return [block.cross.keys_values(x) for block in self.decoder.blocks], mask

    def decoder_for(self, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> "T5Decoder":
        """A decoder for generate.py."""
        return T5Decoder(self, prompt, prompt_mask, max_new_tokens)


class T5Decoder(LLMDecoder):
    """Decoder of T5: the encoder runs once over the prompt of each row, then tokens are appended."""

    def __init__(self, model: T5, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int):
        cfg = model.cfg
        super().__init__(KVCache(cfg.decoder_depth, len(prompt), cfg.heads, max_new_tokens, cfg.head_width, prompt))
        self.model, self.beams = model, 1
        self.memory, self.mask = model.read(prompt, prompt_mask)

    def start(self) -> Tensor:
        """Logits of the first token (B, W)."""
        return self.step(torch.full((len(self.mask),), self.model.cfg.pad_id, device=self.mask.device))

    def append(self, tokens: Tensor) -> Tensor:
        """Append tokens (R, T) -> logits (R, T, W) of the token after each."""
        end = self.cache.length + tokens.shape[1]
        rows = torch.arange(self.cache.length, end, device=tokens.device)
        return self.write(tokens, rows, end, self.cache)

    def static_step(self, tokens: Tensor) -> Tensor:
        """`step` with fixed shapes; see `KVCache.static_view`."""
        cache = self.cache
        return self.write(tokens[:, None], cache.position, cache.capacity, cache.static_view())[:, 0]

    def write(self, tokens: Tensor, rows: Tensor, keys: int, cache) -> Tensor:
        """Tokens (R, T) at the positions `rows` (T,) -> logits (R, T, W)."""
        x = self.model.embed(tokens)
        x = self.model.decoder(x, rows, causal(rows, keys), False, self.memory, self.mask, cache)
        return self.model.lm_head(x)

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """See `LLMDecoder.select`. The beams of an image share one copy of `memory`, the cross-attention's."""
        moved, last = super().select(rows), self.beams
        self.beams = beams
        if moved and len(prompts := rows[::beams] // last) != len(self.mask):
            self.memory = [(k[prompts], v[prompts]) for k, v in self.memory]
            self.mask = self.mask[prompts]
        return moved
