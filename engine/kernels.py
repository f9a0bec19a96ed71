"""Attention, dropout, norms and Linear: PyTorch's functions, with faster variants on a CPU or in half precision."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Of the ViT, whose keys are always as many: cuDNN makes a plan for each length, so it is nothing for texts.
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each element to 0 with probability p and scale the others by 1 / (1 - p)."""
    if x.device.type != "cpu" or not p:
        return F.dropout(x, p)
    # On a CPU random numbers are the cost: PyTorch draws 64 bits per element, 16 are enough. Clamping to the two
    # integers around the threshold is twice as fast as a comparison, which makes bools.
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    below = min(max(round(p * 2**16), 1), 2**16 - 1) - 2**15 - 1  # the highest integer that means 0
    kept = bits[: x.numel()].view(x.shape).clamp_(below, below + 1).sub_(below)
    return (x * (1 / (1 - p))) * kept.to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float = 0.0, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v for q (B, H, rows, K) and k, v (B, H, keys, K).

    mask: bool, True = may attend, or a float bias of the scores; broadcast to (B, H, rows, keys). scale: default
    1 / sqrt(K). drop: dropout probability of the attention weights.
    """
    if q.is_cuda or not (torch.is_grad_enabled() or drop):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
    # Training on a CPU, plain products are faster than the fused kernel, whose backward pass recomputes them.
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return dropout(scores.softmax(dim=-1), drop) @ v


def image_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` over all tokens of an image; cuDNN's where no gradient is wanted."""
    if not q.is_cuda or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(FASTEST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0, scale: float | None = None
) -> Tensor:
    """`attention` of groups of n rows that share their keys, which are not copied: q (B, n, H, rows, K) and k, v
    (B, H, keys, K) -> (B, n, H, rows, K)."""
    q = q.transpose(1, 2)  # (B, H, n, rows, K): as if they were n times as many rows of one
    return attention(q.flatten(2, 3), k, v, mask, drop, scale).view(q.shape).transpose(1, 2)


def cross_attention(q: Tensor, image_kv: tuple[Tensor, ...], drop: float = 0.0) -> Tensor:
    """Attention of queries q (R, H, Q, K) to images, without a mask.

    image_kv: k and v (R, H, P, K); or own k and v (B, H, P, K), then those of R - 2B other images: rows b and B + b
    share the own image b, the last rows have the others. (Copies of the own images would take 6 of 49 GB and 2.5 % of
    a stage-1 step over ViT-g on an H100.)
    """
    k, v, *others = image_kv
    if not others:
        return attention(q, k, v, None, drop)
    pairs, rest = q.split((2 * len(k), len(q) - 2 * len(k)))
    out = shared_attention(pairs.unflatten(0, (2, -1)).transpose(0, 1), k, v, None, drop)  # (B, 2, H, Q, K)
    return torch.cat((out.transpose(0, 1).flatten(0, 1), attention(rest, *others, None, drop)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as in F.linear; for few fp32 rows on a CPU computed as W x^T.

    MKL splits the rows of the left matrix among its threads: while decoding, the weights are what is worth splitting.
    """
    few = x.device.type == "cpu" and x.dtype == torch.float32 and 1 < x.numel() // x.shape[-1] <= 64
    if not few or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    columns = x.flatten(0, -2).T
    out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.T.contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def activated(layer: nn.Linear, act: Callable, x: Tensor) -> Tensor:
    """act(layer(x)). In half precision on a GPU, without gradient, GELU is computed in the product's epilogue, in its
    tanh form: it differs from the erf form by at most 4.7e-4, as much as fp16 rounds a number between 1 and 2."""
    half = x.is_cuda and x.dtype != torch.float32 and layer.weight.dtype == x.dtype
    if not half or act is not F.gelu or torch.is_grad_enabled():
        return act(layer(x))
    rows = torch.ops.aten._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose output is, under autocast, of autocast's dtype: so is then the sum around each sublayer, and
    nothing between two products is in fp32. (By default a norm's output is in fp32.)"""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if x.is_meta or not torch.is_autocast_enabled(device):  # FLOPs are counted on the meta device
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            weights = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x.to(dtype), self.normalized_shape, *weights, self.eps)


class TiedEmbedding(nn.Embedding):
    """Word embeddings that are the output matrix too. Both ways in are `forward`, before which sharding gathers it."""

    def forward(self, x: Tensor) -> Tensor:
        """Token ids -> (..., L); hidden states (..., L), which are floats -> logits (..., W)."""
        return linear(x, self.weight) if x.is_floating_point() else super().forward(x)
