"""The Querying Transformer (paper 3.1 and 3.2, Figure 2): BERT, plus queries, plus cross-attention to the image.

Two transformers share one self-attention: Q learned queries, which read the image by cross-attention in every second
block, and T text tokens, which reach it only through the queries. Each has its own feed-forward. One mask, drawn in
`qformer_mask`, decides who may attend to whom, and so which of the three losses a pass computes.

In:  image tokens (B, P, V) of the frozen ViT after `ln_vision`, text ids (B, T) that start with [CLS] or [DEC]
Out: `query_out` (B, Q, D) and `text_out` (B, T, D)

Post-norm, as in BERT. No token-type embeddings (BERT's row 0 is added to the position table at load time), no
positions for queries, and text positions start at 0 in every pass.

Glossary of all files:
    B rows of a rank's micro-batch    N rows of all ranks       P image tokens, [CLS] and patches   V ViT width
    Q queries (32)                    T text tokens             S sequence, here Q + T              D Q-Former width
    H heads, K head width             E shared embedding (256)  L width of the language model       W vocabulary
    image         any input of the ViT, drawn by sources/shapes.py or read from a file
    mask          bool, True = may be attended; text_mask: True = real token, False = padding
    image_kv      cross-attention keys and values of an image, computed once per step
    cache         self-attention keys and values of earlier positions, to which later ones are appended
    *_feats       projected to width E and L2-normalised, to be compared
    labels        (B, T) token ids to predict, -100 = ignored; labels[t] is token t + 1 in stage 1, token t in stage 2
    rank          one process of a distributed run; the global batch is that of all ranks and micro-batches
    reference     a caption or answer written by a person
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import LayerNorm, Linear, attention, cross_attention, dropout, linear

# Keys and values (B, H, P, K) for each block with cross-attention; for ITM's pairs see `kernels.cross_attention`.
ImageKV = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former; the defaults are the paper's, over BERT-base and ViT-g."""

    vocab_size: int = 30523  # with [DEC], the last id
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
    Rows attend to columns. Three queries q, three tokens t and one padding p (`#` = may attend):

            itc: unimodal      itm: bi-directional   itg: multimodal causal
             q q q t t t p        q q q t t t p         q q q t t t p
        q    # # # . . . .        # # # # # # .         # # # . . . .
        q    # # # . . . .        # # # # # # .         # # # . . . .
        q    # # # . . . .        # # # # # # .         # # # . . . .
        t    . . . # # # .        # # # # # # .         # # # # . . .
        t    . . . # # # .        # # # # # # .         # # # # # . .
        t    . . . # # # .        # # # # # # .         # # # # # # .
        p    . . . # # # .        # # # # # # .         # # # # # # .

    Padding is masked as a key only; its rows stay non-empty, so that no softmax sees an all-masked row.
    """
    if text_mask.dtype != torch.bool:
        raise TypeError(f"got a text_mask of {text_mask.dtype}, expected torch.bool (True = real token): use .bool()")
    position = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device)
    row, key = position[:, None], position[None, :]
    row_is_query, key_is_query = row < num_queries, key < num_queries
    if kind == "itc":  # queries see queries, text sees text: no leak between what is compared
        allowed = row_is_query == key_is_query
    elif kind == "itm":  # all see all
        allowed = torch.ones_like(row == key)
    elif kind == "itg":  # text sees the queries and the text before it; queries see queries (UniLM)
        allowed = key_is_query | (~row_is_query & (key <= row))
    else:
        raise ValueError(f'got mask kind {kind!r}, expected "itc", "itm" or "itg"')
    key_is_real = F.pad(text_mask, (num_queries, 0), value=True)  # (B, S): queries are never padding
    return allowed & key_is_real[:, None, None, :]


def checked(image_kv: ImageKV) -> ImageKV:
    """Refuse nothing, or image tokens, in the place of their keys and values."""
    if image_kv is None or isinstance(image_kv, Tensor):
        raise ValueError(f"got a {type(image_kv).__name__} as image_kv, expected qformer.image_kv(image_tokens)")
    return image_kv


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, H*K) -> (B, H, S, K)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class QueryCache:
    """Self-attention keys and values of the query pass, by layer, for the text that follows (ITG)."""

    def __init__(self):
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the first k, v (B, H, rows, K) of a layer; return later ones appended to the stored ones."""
        if layer not in self.kv:
            self.kv[layer] = k, v
            return k, v
        return tuple(torch.cat(pair, dim=2) for pair in zip(self.kv[layer], (k, v)))


class SelfAttention(nn.Module):
    """Self-attention shared by queries and text, with dropout, residual and LayerNorm."""

    def __init__(self, cfg: QFormerConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.dropout = layer, cfg.heads, cfg.dropout
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln = LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor, mask: Tensor | None, cache) -> Tensor:
        drop = self.dropout if self.training else 0.0
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = attention(q, k, v, mask, drop).transpose(1, 2).flatten(2)
        return self.ln(x + dropout(self.proj(out), drop))


class CrossAttention(nn.Module):
    """Cross-attention of queries to image tokens, without a mask; `image_kv` is computed once per image."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.q = Linear(cfg.width, cfg.width)
        self.kv = Linear(cfg.image_width, 2 * cfg.width)
        self.proj = Linear(cfg.width, cfg.width)
        self.ln = LayerNorm(cfg.width, eps=cfg.eps)

    def image_kv(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, V) -> keys and values (B, H, P, K)."""
        k, v = self.kv(image_tokens).chunk(2, dim=2)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, image_kv: tuple[Tensor, ...]) -> Tensor:
        drop = self.dropout if self.training else 0.0
        out = cross_attention(split_heads(self.q(x), self.heads), image_kv, drop).transpose(1, 2).flatten(2)
        return self.ln(x + dropout(self.proj(out), drop))


class FeedForward(nn.Module):
    """BERT's MLP with exact (erf) GELU, dropout, residual and LayerNorm."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.dropout = cfg.dropout
        self.up = Linear(cfg.width, cfg.mlp)
        self.down = Linear(cfg.mlp, cfg.width)
        self.ln = LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor) -> Tensor:
        drop = self.dropout if self.training else 0.0
        return self.ln(x + dropout(self.down(F.gelu(self.up(x))), drop))


class Block(nn.Module):
    """Self-attention for all; cross-attention and a feed-forward for queries; another feed-forward for text."""

    def __init__(self, cfg: QFormerConfig, layer: int):
        super().__init__()
        self.attn = SelfAttention(cfg, layer)
        self.cross = CrossAttention(cfg) if layer % cfg.cross_every == 0 else None
        self.ffn_query = FeedForward(cfg)
        self.ffn_text = FeedForward(cfg)

    def forward(self, x: Tensor, num_queries: int, mask: Tensor | None, image_kv, cache) -> Tensor:
        x = self.attn(x, mask, cache)  # (B, S, D)
        if num_queries == 0:
            return self.ffn_text(x)
        queries, text = x.split((num_queries, x.shape[1] - num_queries), dim=1)
        if self.cross is not None:
            queries = self.cross(queries, image_kv)
        queries = self.ffn_query(queries)
        return torch.cat((queries, self.ffn_text(text)), dim=1) if text.shape[1] else queries


class LMHead(nn.Module):
    """BERT's masked-language-modelling head, here for next-token prediction (ITG); tied to the word embedding."""

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.dense = Linear(cfg.width, cfg.width)
        self.ln = LayerNorm(cfg.width, eps=cfg.eps)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x: Tensor, word_embedding: Tensor) -> Tensor:
        return linear(self.ln(F.gelu(self.dense(x))), word_embedding, self.bias)


class QFormer(nn.Module):
    """Queries, BERT's embeddings and blocks, cross-attention, LM head.

    Read the joint pass `forward` first: it takes any of the three masks. Training calls it for ITM and VQA; for ITC and
    ITG it calls the equivalent parts `encode_queries`, `encode_text` and `decode_text` (tests/test_masks.py).
    """

    def __init__(self, cfg: QFormerConfig):
        super().__init__()
        self.cfg = cfg
        self.queries = nn.Parameter(torch.empty(1, cfg.num_queries, cfg.width))
        self.word_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embedding = nn.Embedding(cfg.max_positions, cfg.width)
        self.embedding_ln = LayerNorm(cfg.width, eps=cfg.eps)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.lm_head = LMHead(cfg)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, names: Container[str] | None = None):
        """N(0, 0.02) as in BERT, the queries too: zero queries would have zero variance in the first LayerNorm.

        names: the parameters to initialize, by default all.
        """
        parameters = dict(self.named_parameters())
        parameters["queries"] = parameters.pop("queries")  # drawn last, so that a seed reproduces the logged runs
        for name, parameter in parameters.items():
            if names is not None and name not in names:
                continue
            if parameter.dim() == 1:  # biases and norms
                parameter.fill_(0 if name.endswith("bias") else 1)
            else:
                parameter.normal_(0, self.cfg.init_std)

    @property
    def dec_id(self) -> int:
        """Id of [DEC], appended to BERT's vocabulary: the start token of generated text (paper 3.2)."""
        return self.cfg.vocab_size - 1

    def image_kv(self, image_tokens: Tensor) -> ImageKV:
        """Cross-attention keys and values of image tokens (B, P, V), for all passes that need them."""
        return [block.cross.image_kv(image_tokens) for block in self.blocks if block.cross is not None]

    def forward(self, kind: str, text_ids: Tensor, text_mask: Tensor, image_kv: ImageKV) -> tuple[Tensor, Tensor]:
        """The joint pass: queries and text under one of the three masks -> query_out, text_out."""
        Q = self.cfg.num_queries
        x = torch.cat((self.queries.expand(len(text_ids), -1, -1), self.embed(text_ids)), dim=1)
        x = self.run(x, Q, qformer_mask(kind, text_mask, Q), checked(image_kv))
        return x[:, :Q], x[:, Q:]

    def encode_queries(self, image_kv: ImageKV, cache=None) -> Tensor:
        """Queries alone -> query_out (B, Q, D); their self-attention keys and values go into the cache, if given."""
        batch = checked(image_kv)[0][0].shape[0]
        return self.run(self.queries.expand(batch, -1, -1), self.cfg.num_queries, None, image_kv, cache)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Text alone, bi-directional -> text_out of [CLS] (B, D)."""
        return self.run(self.embed(text_ids), 0, qformer_mask("itc", text_mask, 0))[:, 0]

    def decode_text(self, text_ids: Tensor, text_mask: Tensor, cache, start: int = 0) -> Tensor:
        """Text under the causal mask, after the queries that are in the cache -> text_out (B, T, D).

        Training and captioning both come here: a mask that looks ahead cannot be written token by token, and shows
        ITG its labels (`data.qformer_batch`). text_ids are the tokens from position `start` on; text_mask
        (B, start + T) covers those before them too.
        """
        Q = self.cfg.num_queries
        mask = qformer_mask("itg", text_mask, Q)[:, :, Q + start :]
        return self.run(self.embed(text_ids, start), 0, mask, cache=cache)

    def lm_logits(self, text_out: Tensor) -> Tensor:
        """(..., D) -> next-token logits (..., W)."""
        return self.lm_head(text_out, self.word_embedding.weight)

    def embed(self, text_ids: Tensor, start: int = 0) -> Tensor:
        """Word and position embeddings, before the norm: (B, T) -> (B, T, D)."""
        end = start + text_ids.shape[1]
        if end > self.cfg.max_positions:
            raise ValueError(f"got {end} tokens, expected at most {self.cfg.max_positions}, BERT's position table")
        return self.word_embedding(text_ids) + self.position_embedding.weight[start:end]

    def run(self, x: Tensor, num_queries: int, mask: Tensor | None, image_kv: ImageKV = (), cache=None) -> Tensor:
        """All blocks over x (B, S, D), whose first `num_queries` positions are queries."""
        x = dropout(self.embedding_ln(x), self.cfg.dropout if self.training else 0.0)
        image_kv = iter(image_kv)
        for block in self.blocks:
            block_kv = next(image_kv) if num_queries and block.cross is not None else None
            x = block(x, num_queries, mask, block_kv, cache)
        return x


def copy_text_ffn_to_queries(qformer: QFormer) -> None:
    """The query feed-forward starts as BERT's text feed-forward (paper 3.1: "initialize Q-Former with BERT")."""
    for block in qformer.blocks:
        block.ffn_query.load_state_dict(block.ffn_text.state_dict())
