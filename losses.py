"""The losses of both stages (paper 3.2, 3.3) as functions of tensors, and what they need from other processes.

    ITC  image-text contrast    which text of the whole batch belongs to this image, and the other way round
    ITM  image-text matching    does this pair match? a pair, and two that look alike
    ITG  text generation        the next word, given the queries' view of the image
    LM   language modelling     the frozen language model's next word, given the queries' view (stage 2)

Every loss is a sum over this process's rows divided by `total`, the number of rows in the whole step: over all
processes and all micro-batches of an accumulated step. So what the processes have adds up to the loss of the one big
batch, and so do their gradients (tests/test_distributed.py); micro-batches too, except that each finds its candidates
and negatives in itself, if they are not compared with each other (`Blip2.compare`). Without `total` a loss is the mean
over the rows given.

Similarities, softmax and cross-entropy are computed in fp32 whatever the model ran in.
Letters: B rows of this process, N rows of all processes, Q queries, E shared embedding, W vocabulary.
"""

import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1  # of ITC and ITG, as in the original; ITM has none
ITM_PRIOR = math.log(3) - 2 / 3 * math.log(2)  # 0.6365: what ITM costs when only "one pair in three matches" is known


def smoothing_floor(classes: int) -> float:
    """The least that a cross-entropy with label smoothing over so many classes can reach: the target's own entropy."""
    if classes == 1:
        return 0.0
    rest = LABEL_SMOOTHING / classes
    right = 1 - LABEL_SMOOTHING + rest
    return -right * math.log(right) - (classes - 1) * rest * math.log(rest)


# --- other processes -------------------------------------------------------------------------------------------------


def start_processes() -> None:
    """Join the other processes if torchrun started several; a single process needs no group."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # NCCL for what is on the cards, gloo for the few numbers that the host keeps for itself.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(*lines: str) -> None:
    """Print, on the first process."""
    if world()[0] == 0:
        print(*lines, sep="\n", flush=True)


class _AllGather(torch.autograd.Function):
    """Concatenation over the processes; the gradient of a row is the sum of what all processes owe it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        rank, size = world()
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(size)[rank]


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of each process -> (N, ...), in the order of the ranks; x itself without a process group.

    Gradients flow to every process whose rows were used. The original cuts them off, its own rows included, and so
    trains with half of the contrastive gradient.
    """
    return x if world()[1] == 1 else _AllGather.apply(x)


def gather_in_order(x: Tensor, micro_batches: int = 1) -> Tensor:
    """(A*B, ...) of each process, the rows of A micro-batches -> (A*W*B, ...) in the order of the samples: micro-batch
    a of process r begins at (a*W + r) * B."""
    return all_gather(x).unflatten(0, (world()[1], micro_batches, -1)).transpose(0, 1).flatten(0, 2)


def gathered_rows(rows: Tensor, batch: int, micro_batches: int) -> Tensor:
    """Rows of `gather_in_order`, with B = `batch` -> the same in `all_gather`."""
    micro_batch, within = rows // (world()[1] * batch), rows % (world()[1] * batch)
    return within // batch * micro_batches * batch + micro_batch * batch + within % batch


def all_gather_ragged(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, T) whose T differs between the processes -> the same, padded with zeros to the longest T, and then
    their gathered versions (N, T). Without a process group both are the tensors themselves."""
    if world()[1] > 1:
        longest = torch.tensor(tensors[0].shape[1])  # on the CPU: the host does not wait for the device
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        tensors = tuple(F.pad(x, (0, int(longest) - x.shape[1])) for x in tensors)
    return *tensors, *(all_gather(x) for x in tensors)


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over the processes, without gradient; x itself without a process group."""
    if world()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait for the other processes."""
    if world()[1] > 1:
        dist.barrier()


def gather_objects(thing) -> list:
    """Any small Python object of each process -> the list of all, in the order of the ranks."""
    things = [thing] * world()[1]
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things


class _FetchRows(torch.autograd.Function):
    """Rows travel from their owners; in the backward pass their gradients travel home."""

    @staticmethod
    def forward(ctx, x: Tensor, send_rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.save_for_backward(send_rows)
        ctx.shape, ctx.sent, ctx.received = x.shape, sent, received
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x[send_rows], received, sent)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (send_rows,) = ctx.saved_tensors
        home = grad.new_empty(sum(ctx.sent), *ctx.shape[1:])
        dist.all_to_all_single(home, grad.contiguous(), ctx.sent, ctx.received)
        return grad.new_zeros(ctx.shape).index_add_(0, send_rows, home), None, None, None


def fetch_rows(x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of all processes, bring here those that are wanted and not here yet; gradients travel back.

    x: (B, ...) of this process; wanted: (m,) row numbers of the gathered x. Returns `fetched` (n, ...) and `index` (m,)
    such that torch.cat((x, fetched))[index] is all_gather(x)[wanted]. Only the n rows travel. With several processes
    the host waits once for the device, because it has to know the sizes of the messages.
    """
    rank, size = world()
    if size == 1:
        return x[:0], wanted
    B = len(x)
    foreign = []  # of each process, the rows that it has to be sent, in ascending order
    for receiver, rows in enumerate(all_gather(wanted).view(size, -1).cpu()):
        rows = rows.unique()
        foreign.append(rows[rows // B != receiver])
    sent_rows = [rows[rows // B == rank] - rank * B for rows in foreign]
    received = torch.bincount(foreign[rank] // B, minlength=size).tolist()
    place = torch.searchsorted(foreign[rank].to(x.device, non_blocking=True), wanted)
    send_rows = torch.cat(sent_rows).to(x.device, non_blocking=True)
    fetched = _FetchRows.apply(x, send_rows, [len(rows) for rows in sent_rows], received)
    return fetched, torch.where(wanted // B == rank, wanted - rank * B, B + place)


# --- image-text contrast ---------------------------------------------------------------------------------------------


def itc_similarity(
    image_feats: Tensor, text_feats: Tensor, image_feats_all: Tensor, text_feats_all: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Paper 3.2: cosine of the text with every query's output, the highest one, over the temperature.

    image_feats (B, Q, E) and text_feats (B, E) of this process, *_all (N, Q, E) and (N, E) of all, all of unit length.
    Returns sim_i2t (B, N), each image with every text, and sim_t2i (B, N), each text with every image; fp32.
    """
    with torch.autocast(image_feats.device.type, enabled=False):
        sim_i2t = torch.einsum("bqe,ne->bnq", image_feats.float(), text_feats_all.float()).amax(dim=-1)
        sim_t2i = torch.einsum("be,nqe->bnq", text_feats.float(), image_feats_all.float()).amax(dim=-1)
    return sim_i2t / temperature, sim_t2i / temperature


def itc_loss(sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Mean of the image-to-text and the text-to-image cross-entropy over the N candidates.

    positives: (B, N) bool, True where row and candidate are of the same photo. A row's target is 0.9 spread evenly over
    its positives + 0.1 / N over all: with one positive, label smoothing as usual.
    """
    targets = (
        positives / positives.sum(dim=1, keepdim=True) * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / positives.shape[1]
    )
    i2t = -(targets * sim_i2t.float().log_softmax(dim=1)).sum()
    t2i = -(targets * sim_t2i.float().log_softmax(dim=1)).sum()
    return (i2t + t2i) / 2 / (len(positives) if total is None else total)


# --- image-text matching ---------------------------------------------------------------------------------------------


def negative_probabilities(sim: Tensor, positives: Tensor) -> Tensor:
    """With which probability each candidate becomes the row's hard negative: softmax of `sim` without the positives.

    sim, positives: (B, N) -> (B, N). A row that has positives only gets zeros.
    """
    sim = torch.nan_to_num(sim.detach().float())  # an overflow must not stop the draw; the loss itself will report it
    return torch.nan_to_num(sim.masked_fill(positives, float("-inf")).softmax(dim=1))


def sample_hard_negatives(sim: Tensor, positives: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate of another photo for each row, the more similar the likelier (as in ALBEF and BLIP).

    sim, positives: (B, N); uniform: (B,) random numbers between 0 and 1, by which the draw goes. Returns negative (B,),
    the candidate's number, and found (B,) bool, False for a row that has positives only. No host synchronisation.
    """
    cumulative = negative_probabilities(sim, positives).cumsum(dim=1)
    mass = cumulative[:, -1:]
    # Strictly below the mass, so that rounding cannot pick a candidate behind the last one of non-zero probability.
    negative = torch.searchsorted(cumulative, uniform[:, None] * mass * (1 - 1e-6), right=True).squeeze(1)
    found = mass.squeeze(1) > 0
    return torch.where(found, negative, 0), found


def itm_loss(logits: Tensor, is_match: Tensor, valid: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Two-way cross-entropy of (R, 2) logits (mean over the queries; column 1 = match) against (R,) bool labels.

    Rows with valid (R,) False, whose negative could not be found, do not count.
    """
    losses = F.cross_entropy(logits.float(), is_match.long(), reduction="none")
    return (losses * valid).sum() / (valid.sum().clamp(min=1) if total is None else total)


# --- image-grounded text generation ----------------------------------------------------------------------------------


def itg_loss(logits: Tensor, next_ids: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Cross-entropy with label smoothing of (n, W) logits, at the n positions that have a next token, against it."""
    loss = F.cross_entropy(logits.float(), next_ids, label_smoothing=LABEL_SMOOTHING, reduction="sum")
    return loss / (len(next_ids) if total is None else total)


# --- language modelling (stage 2) ------------------------------------------------------------------------------------


def lm_loss(logits: Tensor, next_ids: Tensor, total: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of (n, W) logits, at the n positions that predict something, against it; no smoothing."""
    loss = F.cross_entropy(logits.float(), next_ids, reduction="sum")
    return loss / (len(next_ids) if total is None else total)
