"""The frozen language model behind the queries (paper 3.3): OPT, a decoder, and T5 v1.1 / Flan-T5, encoder and decoder.

What the rest of the code asks of a language model, and all that a third architecture has to offer, in one class:

    layout, width, max_positions, fits_fp16           of its text, of its embeddings; None for no limit
    embed(ids)                                        (B, T) -> (B, T, L)
    forward(prompt, prompt_mask, target, label_rows)  logits at some positions of the target, given the prompt
    decoder_for(prompt, prompt_mask, max_new_tokens)  what generate.py drives: start, step, select; `append` and `fork`

A prompt is a sequence of embeddings, the visual ones in front. OPT reads it from left to right and goes on; T5's
encoder reads it, and T5's decoder answers. The model is frozen: no dropout (the original leaves it on), no gradient of
its weights, which live in half precision. But the gradient flows through it to the visual embeddings.

Letters: B rows, n prompt positions, T target tokens, S positions, L width, H heads, K width of a head, W vocabulary.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generate import KVCache, Recorded
from qformer import Linear, attend, heads_of, linear, predict, queries_keys_values


@dataclass(frozen=True)
class Layout:
    """How a language model's text is laid out behind the visual embeddings; data.LLMTexts goes by it."""

    prompt_start: str  # token in front of a prompt
    prompt_end: str  # token behind it
    text_end: str  # token that ends what the model writes
    glue: str  # between a prompt and the words that go on from it
    pads: str  # side on which the prompts of a batch are padded
    prefix_lm: bool  # trained on the second part of a caption given the first (paper 3.3), or on all of it
    template: str  # of a question


def causal_mask(real: Tensor, rows: int) -> Tensor:
    """(B, S) bool, True = no padding -> whom the last `rows` positions may attend to: bool (B, 1, rows, S).

    Everybody sees what is real and not later, and itself: so a row of padding is never empty.
    """
    position = torch.arange(real.shape[1], device=real.device)
    row, key = position[-rows:, None], position[None, :]
    return (((key < row) & real[:, None, :]) | (key == row))[:, None]


# --- OPT -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OPTConfig:
    """Sizes and habits; the defaults are OPT-2.7B's."""

    vocab_size: int = 50272
    width: int = 2560
    depth: int = 32
    heads: int = 32
    mlp: int = 10240
    max_positions: int = 2048
    embed_width: int = 2560  # of the word embeddings; where it differs, a projection leads in and out (350m)
    pre_norm: bool = True  # OPT-350m normalises behind each part instead, and not at the end


class OPTBlock(nn.Module):
    """Causal self-attention and a ReLU feed-forward, with the norm before (or, in 350m, behind) each."""

    def __init__(self, cfg: OPTConfig):
        super().__init__()
        self.heads, self.pre_norm = cfg.heads, cfg.pre_norm
        self.ln_1 = nn.LayerNorm(cfg.width)
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln_2 = nn.LayerNorm(cfg.width)
        self.fc1 = Linear(cfg.width, cfg.mlp)
        self.fc2 = Linear(cfg.mlp, cfg.width)

    def forward(self, x: Tensor, mask: Tensor, keep=None, read: int | None = None) -> Tensor:
        """(B, rows, L) -> the same, or of the last `read` rows (B, read, L): what the others see, nobody asks.

        keep: None, or what takes the keys and values and returns them with those before.
        """
        behind = x if read is None else x[:, -read:]
        if self.pre_norm:
            x = behind + self.attention(self.ln_1(x), mask, keep, read)
            return x + self.fc2(F.relu(self.fc1(self.ln_2(x))))
        x = self.ln_1(behind + self.attention(x, mask, keep, read))
        return self.ln_2(x + self.fc2(F.relu(self.fc1(x))))

    def attention(self, x: Tensor, mask: Tensor, keep, read: int | None) -> Tensor:
        """Self-attention, also to what was kept."""
        asking = x if read is None else x[:, -read:]
        q, k, v = (heads_of(part, self.heads) for part in queries_keys_values(self.qkv, x, asking))
        if keep is not None:
            k, v = keep(k, v)
        return self.proj(attend(q, k, v, mask[:, :, -asking.shape[1] :]).transpose(1, 2).flatten(2))


class OPT(nn.Module):
    """Decoder-only (paper Figure 3, top): [visual] [BOS] prompt text, each position predicting the next.

    [BOS] stands behind the visual embeddings and is never a label, as in the original; but where the prompt is empty,
    the original trains [BOS] too. The text ends in a newline. Prompts are padded on the left, between the visual part
    and [BOS]: so the last position of every row is its last word.
    """

    layout = Layout("</s>", "", "\n", " ", "left", prefix_lm=False, template="Question: {} Answer:")
    fits_fp16 = True

    def __init__(self, cfg: OPTConfig):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpointing = False  # recompute each block in the backward pass: slower, far less memory
        self.word_embedding = nn.Embedding(cfg.vocab_size, cfg.embed_width)
        self.position_embedding = nn.Embedding(cfg.max_positions + 2, cfg.width)  # row 0 is never read, 1 is padding's
        projects = cfg.embed_width != cfg.width
        self.project_in = Linear(cfg.embed_width, cfg.width, bias=False) if projects else nn.Identity()
        self.blocks = nn.ModuleList(OPTBlock(cfg) for _ in range(cfg.depth))
        self.ln_final = nn.LayerNorm(cfg.width) if cfg.pre_norm else nn.Identity()
        self.project_out = Linear(cfg.width, cfg.embed_width, bias=False) if projects else nn.Identity()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 1 / sqrt(width)), so that a Linear keeps the size of what goes through it; 0.02 at OPT-2.7B's width."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, self.cfg.width**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    @property
    def width(self) -> int:
        """Of the prompt's embeddings: those of the words, before `project_in`."""
        return self.cfg.embed_width

    @property
    def max_positions(self) -> int:
        """Visual embeddings, prompt and text together."""
        return self.cfg.max_positions

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, L)."""
        return self.word_embedding(ids)

    def forward(self, prompt: Tensor, prompt_mask: Tensor, target: Tensor, label_rows: Tensor) -> Tensor:
        """Logits (len(label_rows), W) of the target's tokens at the flat positions b * T + t.

        prompt (B, n, L), prompt_mask (B, n) bool; target (B, T), padded on the right, which nobody sees: it stands
        behind everything.
        """
        x = torch.cat((prompt, self.embed(target[:, :-1])), dim=1)
        real = F.pad(prompt_mask, (0, target.shape[1] - 1), value=True)
        x = self.read(x, real, rows=target.shape[1])  # the prompt's last position predicts the first token
        return predict(self.logits, x, label_rows)

    def read(self, x: Tensor, real: Tensor, cache: KVCache | None = None, rows: int | None = None) -> Tensor:
        """Run x (B, n, L), the last n of the positions `real` (B, S); of the result, only the last `rows` if given."""
        positions = (real.cumsum(dim=1) * real + 1)[:, -x.shape[1] :]  # OPT counts real tokens only, and from 2
        return self.run(x, positions, causal_mask(real, x.shape[1]), cache, rows)

    def run(self, x: Tensor, positions: Tensor, mask: Tensor, cache=None, read: int | None = None) -> Tensor:
        """All blocks over x (B, n, L) at `positions` (B, n) of OPT's table, under a mask as `attend` takes it; of the
        result, only the last `read` rows if given. cache: for each block what keeps its keys and values."""
        x = self.project_in(x) + self.position_embedding(positions)
        for block, keep in zip(self.blocks, [None] * len(self.blocks) if cache is None else cache):
            rows = read if block is self.blocks[-1] else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, None, rows, use_reentrant=False)
            else:
                x = block(x, mask, keep, rows)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(..., L) -> (..., W); the output matrix is the word embedding."""
        return linear(self.project_out(self.ln_final(x)), self.word_embedding.weight)

    def decoder_for(self, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> "OPTDecoder":
        """For generate.py."""
        return OPTDecoder(self, prompt, prompt_mask, max_new_tokens)


class LLMDecoder:
    """What OPT's and T5's decoders share (see generate.py)."""

    def __init__(self, cache: KVCache):
        self.cache, self.recorded = cache, Recorded()

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (R,) to each row -> logits (R, W)."""
        logits = self.recorded(self.one_more, tokens)
        self.cache.length += 1
        return logits

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """Row i becomes a copy of old row rows[i]; returns whether all has moved to another place in memory."""
        moved = self.cache.select(rows)
        if moved:
            self.recorded = Recorded()
        return moved

    def fork(self, copies: int) -> "LLMDecoder":
        """Another decoder, with so many copies of each row after another; this one stays as it is."""
        twin, k = copy.copy(self), self.cache.k
        twin.cache = copy.copy(self.cache)  # before any beams there are, `select` puts new tensors into it
        twin.select(torch.arange(k.shape[1], device=k.device).repeat_interleave(copies), copies)
        return twin


class OPTDecoder(LLMDecoder):
    """One prompt a row, run once; then tokens are appended behind it."""

    def __init__(self, model: OPT, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int):
        cfg, (B, n, _) = model.cfg, prompt.shape
        super().__init__(KVCache(cfg.depth, B, cfg.heads, n + max_new_tokens, cfg.width // cfg.heads, prompt))
        self.model, self.prompt = model, prompt
        self.real = F.pad(prompt_mask, (0, self.cache.room - n), value=False)  # (R, room): filled, and not padding

    def start(self) -> Tensor:
        """Run the prompt -> logits of the first token (B, W)."""
        real = self.real[:, : self.prompt.shape[1]]
        return self.model.logits(self.model.read(self.prompt, real, self.cache, rows=1)[:, 0])

    def append(self, tokens: Tensor) -> Tensor:
        """Tokens (R, T) behind what is there -> logits (R, T, W) of what follows each."""
        end = self.cache.length + tokens.shape[1]
        self.real[:, self.cache.length : end] = True
        return self.model.logits(self.model.read(self.model.embed(tokens), self.real[:, :end], self.cache))

    def one_more(self, tokens: Tensor) -> Tensor:
        """Of `step`; see `KVCache.one_more`."""
        self.real.index_fill_(1, self.cache.place, True)
        positions = self.real.sum(dim=1, keepdim=True) + 1
        x = self.model.embed(tokens[:, None])
        hidden = torch.zeros_like(self.real, dtype=x.dtype).masked_fill(~self.real, float("-inf"))
        x = self.model.run(x, positions, hidden[:, None, None], self.cache.one_more())
        return self.model.logits(x[:, 0])

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """As above; beams of an image have the same prompt."""
        moved = super().select(rows)
        if moved:
            self.real = self.real[rows]
        return moved


# --- T5 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class T5Config:
    """Sizes and habits; the defaults are Flan-T5-XL's."""

    vocab_size: int = 32128
    width: int = 2048
    depth: int = 24
    decoder_depth: int = 24
    heads: int = 32
    head_width: int = 64  # heads * head_width need not be the width
    mlp: int = 5120
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # beyond which all are in the last bucket
    eps: float = 1e-6
    act: str = "gelu_new"  # by tanh; the original's BLIP-2 checkpoints were trained with "gelu", by erf
    pad_id: int = 0  # the decoder starts with it


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


class RMSNorm(nn.Module):
    """T5's norm: no mean, no bias, fp32 inside."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * y.to(self.weight.dtype)


class T5Attention(nn.Module):
    """softmax(q k^T + bias) v: T5 does not divide by sqrt(K), its initialisation did."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.heads, inner = cfg.heads, cfg.heads * cfg.head_width
        self.q = Linear(cfg.width, inner, bias=False)
        self.kv = Linear(cfg.width, 2 * inner, bias=False)
        self.proj = Linear(inner, cfg.width, bias=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, L) -> k, v (B, H, S, K)."""
        k, v = self.kv(x).chunk(2, dim=2)
        return heads_of(k, self.heads), heads_of(v, self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = attend(heads_of(self.q(x), self.heads), k, v, mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """Self-attention, in the decoder cross-attention, and a gated feed-forward; the norm before each."""

    def __init__(self, cfg: T5Config, is_decoder: bool):
        super().__init__()
        self.act = ACTIVATIONS[cfg.act]
        self.ln_1, self.attn = RMSNorm(cfg.width, cfg.eps), T5Attention(cfg)
        self.ln_cross = RMSNorm(cfg.width, cfg.eps) if is_decoder else None
        self.cross = T5Attention(cfg) if is_decoder else None
        self.ln_2 = RMSNorm(cfg.width, cfg.eps)
        self.gate = Linear(cfg.width, cfg.mlp, bias=False)
        self.up = Linear(cfg.width, cfg.mlp, bias=False)
        self.down = Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory=None, memory_mask=None, keep=None) -> Tensor:
        normed = self.ln_1(x)
        k, v = self.attn.keys_values(normed)
        if keep is not None:
            k, v = keep(k, v)
        x = x + self.attn(normed, k, v, bias)
        if self.cross is not None:
            x = x + self.cross(self.ln_cross(x), *memory, memory_mask)
        normed = self.ln_2(x)
        return x + self.down(self.act(self.gate(normed)) * self.up(normed))


def before(rows: Tensor, keys: int) -> Tensor:
    """Whom the positions `rows` (n,) may attend to of 0 .. keys, themselves and those before: bool (n, keys)."""
    return torch.arange(keys, device=rows.device) <= rows[:, None]


class T5Stack(nn.Module):
    """The encoder, or the decoder: blocks, a final norm, and one table of position biases for all blocks."""

    def __init__(self, cfg: T5Config, depth: int, is_decoder: bool):
        super().__init__()
        self.cfg, self.is_decoder = cfg, is_decoder
        self.position_bias = nn.Embedding(cfg.buckets, cfg.heads)
        self.blocks = nn.ModuleList(T5Block(cfg, is_decoder) for _ in range(depth))
        self.ln_final = RMSNorm(cfg.width, cfg.eps)

    def forward(
        self, x: Tensor, rows: Tensor, allowed: Tensor, recompute: bool, memory=None, memory_mask=None, cache=None
    ) -> Tensor:
        """x (B, n, L) at the positions `rows` (n,) of S; allowed: bool, broadcast to (B, 1, n, S).

        In the decoder, memory holds the keys and values of what the encoder has read, for each block.
        """
        bias = self.bias(rows, allowed.shape[-1]).masked_fill(~allowed, float("-inf"))
        nothing = [None] * len(self.blocks)
        for block, read, keep in zip(self.blocks, memory or nothing, nothing if cache is None else cache):
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, read, memory_mask, use_reentrant=False)
            else:
                x = block(x, bias, read, memory_mask, keep)
        return self.ln_final(x)

    def bias(self, rows: Tensor, keys: int) -> Tensor:
        """What is added to the scores of positions `rows` (n,) with those of 0 .. keys: (1, H, n, keys)."""
        distance = torch.arange(keys, device=rows.device) - rows[:, None]
        return self.position_bias(self.bucket(distance)).permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """Key minus row -> number of a bucket: one a distance when near, logarithmic up to max_distance. The decoder
        looks back only; in the encoder each side has half of the buckets."""
        buckets, side = self.cfg.buckets, 0
        if self.is_decoder:
            distance = (-distance).clamp(min=0)
        else:
            buckets //= 2
            side, distance = (distance > 0) * buckets, distance.abs()
        exact = buckets // 2
        share = torch.log(distance.clamp(min=1) / exact) / math.log(self.cfg.max_distance / exact)
        far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
        return side + torch.where(distance < exact, distance, far)


class T5(nn.Module):
    """Encoder-decoder (paper Figure 3, bottom): the encoder reads visual embeddings and prefix, the decoder writes the
    suffix. Positions are relative, so a prompt is padded on the right: nothing may come between its tokens."""

    layout = Layout("", "</s>", "</s>", "", "right", prefix_lm=True, template="Question: {} Short answer:")
    fits_fp16 = False  # its activations overflow there
    max_positions = None

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpointing = False  # recompute each block in the backward pass: slower, far less memory
        self.word_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.encoder = T5Stack(cfg, cfg.depth, is_decoder=False)
        self.decoder = T5Stack(cfg, cfg.decoder_depth, is_decoder=True)
        self.lm_head = Linear(cfg.width, cfg.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self):
        """T5's own: N(0, 1) for words, and for a Linear what keeps the size of what goes through it. The missing
        1 / sqrt(K) of the attention is in q."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
                if name.endswith(".q"):
                    module.weight.mul_(self.cfg.head_width**-0.5)
        self.word_embedding.weight.normal_(0, 1)
        for stack in (self.encoder, self.decoder):
            stack.position_bias.weight.normal_(0, self.cfg.width**-0.5)

    @property
    def width(self) -> int:
        """Of the prompt's embeddings."""
        return self.cfg.width

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, L)."""
        return self.word_embedding(ids)

    def forward(self, prompt: Tensor, prompt_mask: Tensor, target: Tensor, label_rows: Tensor) -> Tensor:
        """Logits (len(label_rows), W) of the target's tokens at the flat positions b * T + t.

        prompt (B, n, L), prompt_mask (B, n) bool; target (B, T), padded on the right.
        """
        memory = self.read(prompt, prompt_mask)
        x = self.embed(F.pad(target[:, :-1], (1, 0), value=self.cfg.pad_id))  # one place to the right
        rows = torch.arange(target.shape[1], device=target.device)
        x = self.decoder(x, rows, before(rows, len(rows)), self.grad_checkpointing, *memory)
        return predict(self.lm_head, x, label_rows)

    def read(self, prompt: Tensor, prompt_mask: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The encoder, and what the decoder's cross-attention needs of it: each block's keys and values, the mask."""
        mask = prompt_mask[:, None, None, :]
        x = self.encoder(prompt, torch.arange(prompt.shape[1], device=prompt.device), mask, self.grad_checkpointing)
        return [block.cross.keys_values(x) for block in self.decoder.blocks], mask

    def decoder_for(self, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> "T5Decoder":
        """For generate.py."""
        return T5Decoder(self, prompt, prompt_mask, max_new_tokens)


class T5Decoder(LLMDecoder):
    """One prompt a row, through the encoder once; then the decoder writes."""

    def __init__(self, model: T5, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int):
        cfg = model.cfg
        super().__init__(KVCache(cfg.decoder_depth, len(prompt), cfg.heads, max_new_tokens, cfg.head_width, prompt))
        self.model, self.beams = model, 1
        self.memory, self.mask = model.read(prompt, prompt_mask)

    def start(self) -> Tensor:
        """Logits of the first token (B, W)."""
        return self.step(torch.full((len(self.mask),), self.model.cfg.pad_id, device=self.mask.device))

    def append(self, tokens: Tensor) -> Tensor:
        """Tokens (R, T) behind what is there -> logits (R, T, W) of what follows each."""
        end = self.cache.length + tokens.shape[1]
        rows = torch.arange(self.cache.length, end, device=tokens.device)
        return self.write(tokens, rows, end, self.cache)

    def one_more(self, tokens: Tensor) -> Tensor:
        """Of `step`; see `KVCache.one_more`."""
        return self.write(tokens[:, None], self.cache.place, self.cache.room, self.cache.one_more())[:, 0]

    def write(self, tokens: Tensor, rows: Tensor, keys: int, cache) -> Tensor:
        """Tokens (R, T) at the positions `rows` (T,) -> logits (R, T, W)."""
        x = self.model.embed(tokens)
        x = self.model.decoder(x, rows, before(rows, keys), False, self.memory, self.mask, cache)
        return self.model.lm_head(x)

    def select(self, rows: Tensor, beams: int = 1) -> bool:
        """As above. What the encoder has read is there once for all beams."""
        moved, last = super().select(rows), self.beams
        self.beams = beams
        if moved and len(prompts := rows[::beams] // last) != len(self.mask):
            self.memory = [(k[prompts], v[prompts]) for k, v in self.memory]
            self.mask = self.mask[prompts]
        return moved


# --- by name ---------------------------------------------------------------------------------------------------------

# The paper's four (3.4), and the smallest OPT.
PRESETS = {
    "opt-125m": OPTConfig(width=768, depth=12, heads=12, mlp=3072, embed_width=768),
    "opt-2.7b": OPTConfig(),
    "opt-6.7b": OPTConfig(width=4096, depth=32, heads=32, mlp=16384, embed_width=4096),
    "flan-t5-xl": T5Config(),
    "flan-t5-xxl": T5Config(width=4096, heads=64, mlp=10240),
}


LLMS = {OPTConfig: OPT, T5Config: T5}


def build_llm(cfg: OPTConfig | T5Config) -> nn.Module:
    """The model of a configuration, its weights not yet set."""
    return LLMS[type(cfg)](cfg)
