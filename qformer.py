"""The Querying Transformer (paper 3.1 and 3.2, Figure 2): BERT, plus queries, plus cross-attention to the image.

Two transformers share one self-attention: Q learned queries, which read the image through cross-attention in
every second block, and T text tokens, which never see the image. Queries and text have a feed-forward each. Who
may see whom is decided by one mask, drawn in `qformer_mask`, and the mask decides which of the three losses the
pass can serve.

In:  image tokens (B, P, V) of the frozen ViT after `ln_vision`, text ids (B, T) that start with [CLS] or [DEC]
Out: `query_out` (B, Q, D) and `text_out` (B, T, D)

Post-norm, as BERT is. There are no token-type embeddings (weights.py adds BERT's row 0 to the position table), the
queries have no positions, and text positions start at 0 in every pass.
Letters: B batch, Q queries (32), T text tokens, S = Q + T, P image tokens, V ViT width, D width (768), H heads,
K width of a head, W vocabulary (30,522 of BERT + [DEC]).
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generate import KVCache

# Of each block with cross-attention: keys and values (B, H, P, K), each photo's for the next R / B of R rows; or
# (k, v, k', v'), where the last rows see a photo of k' each, and those before them share k.
ImageKV = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former; the defaults are the paper's, over BERT-base and ViT-g."""

    vocab_size: int = 30523  # with [DEC], which is the last id
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_positions: int = 512
    num_queries: int = 32
    image_width: int = 1408
    cross_every: int = 2  # cross-attention in blocks 0, 2, 4, ...: "every other transformer block" (3.1)
    dropout: float = 0.1
    eps: float = 1e-12
    init_std: float = 0.02  # of all new weights; BERT's `initializer_range`


def qformer_mask(kind: str, text_mask: Tensor, num_queries: int) -> Tensor:
    """Who may attend to whom in one joint pass (paper Figure 2, right): bool (B, 1, S, S), True = may attend.

    kind: "itc", "itm" or "itg"; text_mask: (B, T) bool, True = real token, False = padding.
    Rows attend to columns. Three queries q, three words t and one padding p (`#` = may attend):

            itc: unimodal      itm: bi-directional   itg: multimodal causal
             q q q t t t p        q q q t t t p         q q q t t t p
        q    # # # . . . .        # # # # # # .         # # # . . . .
        q    # # # . . . .        # # # # # # .         # # # . . . .
        q    # # # . . . .        # # # # # # .         # # # . . . .
        t    . . . # # # .        # # # # # # .         # # # # . . .
        t    . . . # # # .        # # # # # # .         # # # # # . .
        t    . . . # # # .        # # # # # # .         # # # # # # .
        p    . . . # # # .        # # # # # # .         # # # # # # .

    Padding is hidden as a key only. Its rows stay non-empty, so no softmax runs over nothing; nobody reads them.
    """
    if text_mask.dtype != torch.bool:
        raise TypeError(f"got a text_mask of {text_mask.dtype}, expected torch.bool (True = real token): use .bool()")
    position = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device)
    row, key = position[:, None], position[None, :]
    row_is_query, key_is_query = row < num_queries, key < num_queries
    if kind == "itc":  # each side sees itself only: no leak between what is compared
        allowed = row_is_query == key_is_query
    elif kind == "itm":  # everybody sees everybody
        allowed = torch.ones_like(row == key)
    elif kind == "itg":  # text sees the queries and the text before it; queries see queries (UniLM)
        allowed = key_is_query | (~row_is_query & (key <= row))
    else:
        raise ValueError(f'got mask kind {kind!r}, expected "itc", "itm" or "itg"')
    key_is_real = F.pad(text_mask, (num_queries, 0), value=True)  # (B, S): queries are never padding
    return allowed & key_is_real[:, None, None, :]


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout: each element is 0 with probability p, and the others grow by 1 / (1 - p)."""
    if x.device.type != "cpu" or not p or torch.compiler.is_compiling():
        return F.dropout(x, p)
    # On CPU the random numbers are what costs: PyTorch draws 64 bits for each element, and 16 are enough. A comparison,
    # which makes bools, costs twice as much as clamping to the two numbers around the threshold.
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    below = min(max(round(p * 2**16), 1), 2**16 - 1) - 2**15 - 1  # the highest of the numbers that mean 0
    kept = bits[: x.numel()].view(x.shape).clamp_(below, below + 1).sub_(below)
    return (x * (1 / (1 - p))) * kept.to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v of (B, H, rows, K) and (B, H, keys, K); or of fewer k and v, each for the next B / n of q.

    mask: bool, True = may attend, or what is added to the scores; broadcast to them. scale: 1 / sqrt(K) if not given.
    """
    if len(k) < len(q):  # as if they were more rows of one
        together = q.unflatten(0, (len(k), -1)).transpose(1, 2)  # (B / n, H, n, rows, K)
        out = attend(together.flatten(2, 3), k, v, mask, dropout, scale)
        return out.view(together.shape).transpose(1, 2).flatten(0, 1)
    if q.is_cuda or not (torch.is_grad_enabled() or dropout):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    # Training on CPU, the plain products are faster than the fused kernel, whose backward recomputes them.
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # (B, H, rows, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return drop(scores.softmax(dim=-1), dropout) @ v


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., inputs) -> (..., outputs), as F.linear.

    For few rows in fp32 on CPU, as when words are generated, it is computed as W x^T: MKL gives each thread some rows
    of the left matrix and all of the right, and there it is the weights that are worth dividing.
    """
    few = x.device.type == "cpu" and x.dtype == torch.float32 and 1 < x.numel() // x.shape[-1] <= 64
    if not few or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    columns = x.flatten(0, -2).T
    out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.T.contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, S, H*K) -> (B, H, S, K)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def queries_keys_values(qkv: Linear, x: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's queries of the rows `asking` (B, rows, D) of x (B, S, D), keys and values of all. Where all ask, as
    everywhere but in a last block of which few rows are read, they are one product."""
    if asking is x:
        return qkv(x).chunk(3, dim=2)
    D = x.shape[2]
    k, v = linear(x, qkv.weight[D:], qkv.bias[D:]).chunk(2, dim=2)
    return linear(asking, qkv.weight[:D], qkv.bias[:D]), k, v


def predict(head, x: Tensor, rows: Tensor) -> Tensor:
    """Logits head(x) (n, W) of those rows b * S + s of x (B, S, D) that predict a word.

    n is another number in almost every step. On CPU, oneDNN keeps what it has prepared for each number of rows (35 MB a
    step, until the memory is full), so there the head sees a multiple of 64 rows.
    """
    x = x.flatten(0, 1)[rows]
    if x.device.type == "cpu":
        x = F.pad(x, (0, 0, 0, -len(rows) % 64))
    return head(x)[: len(rows)]


class Prefix:
    """A block's self-attention keys and values of the query pass, kept for the text that follows (ITG)."""

    def __init__(self):
        self.k = self.v = None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the first k, v (B, H, rows, K); later ones are returned with the kept in front of them."""
        if self.k is None:
            self.k, self.v = k, v
            return k, v
        return torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)


class SelfAttention(nn.Module):
    """Shared by queries and text; with the residual and the norm after it."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor, mask: Tensor | None, keep, read: int | None) -> Tensor:
        """(B, S, D) -> (B, S, D), or of the first `read` rows (B, read, D): what the others see, nobody asks.

        keep: None, or what takes the keys and values and returns them with those before.
        """
        asking = x if read is None else x[:, :read]
        q, k, v = (heads_of(part, self.heads) for part in queries_keys_values(self.qkv, x, asking))
        if keep is not None:
            k, v = keep(k, v)
        if mask is not None and read is not None:
            mask = mask[:, :, :read]
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
        return self.ln(asking + drop(self.proj(out), dropout))


class CrossAttention(nn.Module):
    """Queries read the image; no mask. The keys and values come from `image_kv`, made once for each image."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.q = Linear(cfg.width, cfg.width)
        self.kv = Linear(cfg.image_width, 2 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def image_kv(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, V) -> keys and values (B, H, P, K)."""
        k, v = self.kv(image_tokens).chunk(2, dim=2)
        return heads_of(k, self.heads), heads_of(v, self.heads)

    def forward(self, x: Tensor, image_kv: tuple[Tensor, ...]) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        k, v, *others = image_kv
        alone = len(others[0]) if others else 0  # rows that share no photo
        own, other = heads_of(self.q(x), self.heads).split((len(x) - alone, alone))
        out = attend(own, k, v, None, dropout).transpose(1, 2).flatten(2)
        if others:
            out = torch.cat((out, attend(other, *others, None, dropout).transpose(1, 2).flatten(2)))
        return self.ln(x + drop(self.proj(out), dropout))


class FeedForward(nn.Module):
    """BERT's two Linears with the exact (erf) GELU, the residual and the norm after it."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.dropout = cfg.dropout
        self.up = Linear(cfg.width, cfg.mlp)
        self.down = Linear(cfg.mlp, cfg.width)
        self.ln = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.ln(x + drop(self.down(F.gelu(self.up(x))), dropout))


class Block(nn.Module):
    """Self-attention for all; cross-attention and a feed-forward for the queries; another feed-forward for text."""

    def __init__(self, cfg: QFormerConfig, layer: int):
        super().__init__()
        self.attn = SelfAttention(cfg)
        self.cross = CrossAttention(cfg) if layer % cfg.cross_every == 0 else None
        self.ffn_query = FeedForward(cfg)
        self.ffn_text = FeedForward(cfg)

    def forward(self, x: Tensor, num_queries: int, mask: Tensor | None, image_kv, keep, read: int | None) -> Tensor:
        x = self.attn(x, mask, keep, read)  # (B, S, D), or (B, read, D)
        if num_queries == 0:
            return self.ffn_text(x)
        queries, text = x.split((num_queries, x.shape[1] - num_queries), dim=1)
        if self.cross is not None:
            queries = self.cross(queries, image_kv)
        queries = self.ffn_query(queries)
        return torch.cat((queries, self.ffn_text(text)), dim=1) if text.shape[1] else queries


class LMHead(nn.Module):
    """BERT's masked-word head, here predicting the next word (ITG). Its output matrix is the word embedding."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.dense = Linear(cfg.width, cfg.width)
        self.ln = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x: Tensor, word_embedding: Tensor) -> Tensor:
        return linear(self.ln(F.gelu(self.dense(x))), word_embedding, self.bias)


class QFormer(nn.Module):
    """The queries, BERT's embeddings and blocks, the cross-attention, the LM head.

    Five ways through the same blocks: the joint pass `forward`, which takes any of the three masks and is the one to
    read; and its parts, which do no work twice and none that nobody reads: `encode_queries`, `encode_text`,
    `encode_pairs`, and `decode_text` on the keys and values that `encode_queries` left in a cache. tests/test_masks.py
    proves them equal.
    """

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.cfg = cfg
        self.queries = nn.Parameter(torch.empty(1, cfg.num_queries, cfg.width))
        self.word_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embedding = nn.Embedding(cfg.max_positions, cfg.width)
        self.embedding_ln = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.lm_head = LMHead(cfg)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, names: Container[str] | None = None):
        """N(0, 0.02) as in BERT, the queries too: at 0, the first norm would divide nothing by nothing.

        names: of the parameters that are meant, if not all.
        """
        parameters = dict(self.named_parameters())
        parameters["queries"] = parameters.pop("queries")  # last: a seed draws what it drew for the logged runs
        for name, parameter in parameters.items():
            if names is not None and name not in names:
                continue
            if parameter.dim() == 1:  # biases, and the weights of norms
                parameter.fill_(0 if name.endswith("bias") else 1)
            else:
                parameter.normal_(0, self.cfg.init_std)

    @property
    def dec_id(self) -> int:
        """[DEC], the id appended to BERT's vocabulary; it starts a text that is to be generated (paper 3.2)."""
        return self.cfg.vocab_size - 1

    def image_kv(self, image_tokens: Tensor) -> ImageKV:
        """Cross-attention keys and values of (B, P, V) image tokens: computed once for all passes that need them."""
        return [block.cross.image_kv(image_tokens) for block in self.blocks if block.cross is not None]

    def forward(
        self, kind: str, text_ids: Tensor, text_mask: Tensor, image_kv: ImageKV, read: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The joint pass: queries and text at once under one of the three masks -> query_out, text_out; what lies
        beyond the first `read` rows, if given, is left out."""
        Q = self.cfg.num_queries
        x = torch.cat((self.queries.expand(len(text_ids), -1, -1), self.embed(text_ids)), dim=1)
        x = self.run(x, Q, qformer_mask(kind, text_mask, Q), image_kv, read=read)
        return x[:, :Q], x[:, Q:]

    def encode_queries(self, image_kv: ImageKV, cache=None) -> Tensor:
        """Queries alone -> query_out (B, Q, D). cache: for each block what keeps its self-attention keys and values."""
        batch = image_kv[0][0].shape[0]
        return self.run(self.queries.expand(batch, -1, -1), self.cfg.num_queries, None, image_kv, cache)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text alone, bi-directional -> text_out of [CLS] (B, D)."""
        return self.run(self.embed(text_ids), 0, qformer_mask("itc", text_mask, 0), read=1)[:, 0]

    def encode_pairs(self, text_ids: Tensor, text_mask: Tensor, image_kv: ImageKV) -> Tensor:
        """Image and text together, bi-directional -> query_out (B, Q, D)."""
        return self("itm", text_ids, text_mask, image_kv, read=self.cfg.num_queries)[0]

    def decode_text(self, text_ids: Tensor, text_mask: Tensor, cache, start: int = 0) -> Tensor:
        """Text under the causal mask, behind the queries that `cache` holds -> (B, T, D).

        text_ids are the tokens from position `start` on; text_mask (B, start + T) also covers those before them.
        """
        Q = self.cfg.num_queries
        mask = qformer_mask("itg", text_mask, Q)[:, :, Q + start :]
        return self.run(self.embed(text_ids, start), 0, mask, cache=cache)

    def lm_logits(self, text_out: Tensor) -> Tensor:
        """(..., D) -> next-token logits (..., W)."""
        return self.lm_head(text_out, self.word_embedding.weight)

    def embed(self, text_ids: Tensor, start: int = 0) -> Tensor:
        """Words and positions, before the norm: (B, T) -> (B, T, D)."""
        end = start + text_ids.shape[1]
        if end > self.cfg.max_positions:
            raise ValueError(
                f"got a text of {end} tokens, expected at most {self.cfg.max_positions} (BERT's position table): "
                "shorten it"
            )
        return self.word_embedding(text_ids) + self.position_embedding.weight[start:end]

    def run(
        self,
        x: Tensor,
        num_queries: int,
        mask: Tensor | None,
        image_kv: ImageKV = (),
        cache=None,
        read: int | None = None,
    ) -> Tensor:
        """All blocks over x (B, S, D), whose first `num_queries` rows are queries; of the result, only the first `read`
        rows if given."""
        x = drop(self.embedding_ln(x), self.cfg.dropout if self.training else 0.0)
        kv = iter(image_kv)
        for block, keep in zip(self.blocks, [None] * len(self.blocks) if cache is None else cache):
            block_kv = next(kv) if num_queries and block.cross is not None else None
            x = block(x, num_queries, mask, block_kv, keep, read if block is self.blocks[-1] else None)
        return x


class CaptionDecoder:
    """What generate.py drives: the text side of the Q-Former behind the queries of B images (ITG at inference)."""

    def __init__(self, qformer: QFormer, image_kv: ImageKV, max_new_tokens: int):
        cfg, like = qformer.cfg, image_kv[0][0]
        self.qformer = qformer
        length = cfg.num_queries + max_new_tokens  # [DEC] and all new tokens but the last, which nothing follows
        self.cache = KVCache(cfg.depth, like.shape[0], cfg.heads, length, cfg.width // cfg.heads, like)
        qformer.encode_queries(image_kv, self.cache)

    def start(self) -> Tensor:
        """[DEC] -> logits of the first word (B, W)."""
        rows = self.cache.k.shape[1]
        return self.step(torch.full((rows,), self.qformer.dec_id, device=self.cache.k.device))

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (R,) -> next-token logits (R, W)."""
        start = self.cache.length - self.qformer.cfg.num_queries
        text_mask = torch.ones(len(tokens), start + 1, dtype=torch.bool, device=tokens.device)
        text_out = self.qformer.decode_text(tokens[:, None], text_mask, self.cache, start)
        return self.qformer.lm_logits(text_out[:, 0])

    def select(self, rows: Tensor, beams: int = 1) -> None:
        """Row i becomes a copy of old row rows[i]."""
        self.cache.select(rows)


def copy_text_ffn_to_queries(qformer: QFormer) -> None:
    """The query feed-forward starts as BERT's text feed-forward (paper 3.1: "initialize Q-Former with BERT")."""
    for block in qformer.blocks:
        block.ffn_query.load_state_dict(block.ffn_text.state_dict())
