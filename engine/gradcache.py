"""Stage 1 with ITC over all micro-batches of a step, in two passes (GradCache, Gao et al., 2021).

The activations of all micro-batches do not fit into memory together, their features do. The first pass keeps only
features and finds the gradient of ITC at each of them; the second runs each micro-batch again and passes that gradient
on. Losses, gradients and hard negatives are those of one big batch. The frozen ViT runs once; its tokens are kept.

Letters: A micro-batches of B rows on each of W ranks, N = A * B * W; see also the glossary of qformer.py.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed import all_gather, all_gather_padded, all_sum, fetch_rows, rank, world_size
from losses import draw_negatives, itc_loss, itc_similarity, random_numbers


def merge(batches: list) -> object:
    """Micro-batches as one batch of texts, padded to the longest; its images stay where they are."""
    longest = max(batch.text_ids.shape[1] for batch in batches)
    merged = {"image_ids": torch.cat([batch.image_ids for batch in batches])}
    for name, value in {"text_ids": 0, "text_mask": False, "labels": -100}.items():
        columns = [getattr(batch, name) for batch in batches]
        merged[name] = torch.cat([F.pad(x, (0, longest - x.shape[1]), value=value) for x in columns])
    return replace(batches[0], **merged)


@torch.no_grad()
def two_pass_losses(
    model, batches: list, objectives: tuple[str, ...], generator: torch.Generator, hardness: float
) -> Callable:
    """The first pass -> losses(model, batch), the second, to be called for each micro-batch in order.

    For generator and hardness see `Blip2Model.stage1_losses`.
    """
    A, B, W = len(batches), len(batches[0]), world_size()
    merged, seeds = merge(batches), torch.randint(2**62, (A,)).tolist()
    totals, all_tokens, feats = model.stage1_totals([merged]), None, []
    with model.autocast():
        for number, (seed, batch) in enumerate(zip(seeds, batches)):
            image_tokens = model.batch_tokens(batch)
            if all_tokens is None:
                all_tokens = image_tokens.new_empty(A, *image_tokens.shape)
            all_tokens[number] = image_tokens
            torch.manual_seed(seed)  # both passes drop the same
            image_feats, text_feats, _ = model.encode(model.image_kv(image_tokens), batch)
            feats.append(torch.cat((image_feats, text_feats[:, None]), dim=1))  # (B, Q+1, E)

    # A gather is rank by rank; in the order of the samples, micro-batch a of rank r begins at row (a*W + r) * B.
    order = torch.arange(A * B * W, device=model.device).view(W, A, B).transpose(0, 1).flatten()
    feats_all = all_gather(torch.cat(feats))[order].requires_grad_()  # (N, Q+1, E)
    ids_all = all_gather(merged.image_ids)[order]
    texts_all = all_gather_padded(merged.text_ids, merged.text_mask)  # rank by rank
    uniform = random_numbers(len(ids_all), generator, model.device)
    leaves, gradient, found = (feats_all, model.temperature), torch.zeros_like(feats_all), []
    for number in range(A):
        own = slice((number * W + rank()) * B, (number * W + rank() + 1) * B)
        same_image = ids_all[own, None] == ids_all
        with torch.enable_grad():
            each = feats_all[own, :-1], feats_all[own, -1], feats_all[:, :-1], feats_all[:, -1]
            sims = itc_similarity(*each, model.temperature)
            itc = itc_loss(*sims, same_image, totals["itc"])
            feats_grad, temperature_grad = torch.autograd.grad(itc, leaves)
        gradient += feats_grad
        drawn = draw_negatives(*sims, same_image, uniform[:, own], hardness)
        negatives = drawn._replace(images=order[drawn.images], texts=order[drawn.texts])
        found.append((own, itc.detach(), temperature_grad, negatives))
    gradient = all_sum(gradient)  # features of other ranks owe this rank's rows a gradient too

    firsts = iter(zip(seeds, all_tokens, found))

    def losses(model, batch) -> dict[str, Tensor]:
        seed, image_tokens, (own, itc, temperature_grad, negatives) = next(firsts)
        torch.manual_seed(seed)
        with model.autocast():
            image_kv = model.image_kv(image_tokens)
            image_feats, text_feats, cache = model.encode(image_kv, batch)
            feats = torch.cat((image_feats, text_feats[:, None]), dim=1)
            proxy = (feats * gradient[own]).sum() + model.temperature * temperature_grad  # has ITC's gradient
            out = {"itc": itc + proxy - proxy.detach()}
            if "itm" in objectives:
                negative_kv = model.image_kv(rows_of(all_tokens.flatten(0, 1), negatives.images))
                out["itm"] = model.itm(image_kv, negative_kv, batch, texts_all, negatives, totals["itm"])
            if "itg" in objectives:
                out["itg"] = model.itg(batch, cache, totals["itg"])
        return out

    return losses


def rows_of(x: Tensor, wanted: Tensor) -> Tensor:
    """Rows `wanted` (m,) of the gathered x (n, P, V), without gradient and without joining own and fetched rows."""
    fetched, index = fetch_rows(x, wanted)
    if len(fetched) == 0:
        return x[index]
    foreign = fetched[(index - len(x)).clamp(min=0)]
    return torch.where((index < len(x))[:, None, None], x[index.clamp(max=len(x) - 1)], foreign)
