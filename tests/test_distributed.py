"""Several processes train as one would on the big batch: losses, gradients, negatives, evaluation."""

import pytest
import torch
from conftest import random_batch, run_many, small_model

from blip2 import stage1_totals
from data import make_batch
from losses import all_gather, all_sum, fetch_rows, world

IDS = [1, 2, 3, 4, 5, 6, 7, 2]  # one photo twice


def part_of(batch, rows: range):
    """Some rows of a batch, padded to their own longest text."""
    ids = [batch.text_ids[row][batch.text_mask[row]].tolist() for row in rows]
    return make_batch(
        ids, 0, batch.image_ids[rows.start : rows.stop].tolist(), images=batch.images[rows.start : rows.stop]
    )


def losses_and_gradients(model, batches, totals, learned=("itc", "itm", "itg")):
    model.zero_grad()
    sums = {}
    for number, batch in enumerate(batches):
        losses = model.stage1_losses(batch, totals=totals, generator=torch.Generator().manual_seed(number))
        sum(losses[name] for name in learned).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(rank, processes, expected_losses, expected_grads):
    batch = random_batch(8, image_ids=IDS)
    share = 8 // processes
    mine = part_of(batch, range(rank * share, (rank + 1) * share))
    losses, grads = losses_and_gradients(small_model(), [mine], stage1_totals([mine]))
    for name, loss in losses.items():
        torch.distributed.all_reduce(loss)
        torch.testing.assert_close(loss, expected_losses[name])
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.distributed.all_reduce(grad)
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_the_losses_and_gradients_of_one_big_batch(processes):
    """Gathered features carry gradient, hard negatives come from everywhere, every loss is a mean over all rows."""
    batch = random_batch(8, image_ids=IDS)
    expected = losses_and_gradients(small_model(), [batch], stage1_totals([batch]))
    run_many(processes, compare, processes, *expected)


def test_accumulation_has_the_gradients_of_the_big_batch_for_itg_and_not_for_itc():
    """Words are words, but a text of another micro-batch is no negative: accumulation makes ITC easier, not larger."""
    batch = random_batch(8)
    whole, expected = losses_and_gradients(small_model(), [batch], stage1_totals([batch]), ["itg"])
    parts = [part_of(batch, range(4)), part_of(batch, range(4, 8))]
    totals = stage1_totals(parts)
    accumulated, grads = losses_and_gradients(small_model(), parts, totals, ["itg"])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(accumulated["itg"], whole["itg"])
    assert accumulated["itc"] < whole["itc"] - 0.3  # ln 4 against ln 8
    assert {name: int(count) for name, count in totals.items()} == {
        "itc": 8,
        "itm": 24,
        "itg": sum(len(part.label_rows) for part in parts),
    }


def losses_and_gradients_compared(model, batches):
    """As train.py does it with --itc-batch."""
    totals, generator = stage1_totals(batches, len(batches)), torch.Generator().manual_seed(0)
    sums = {}
    for batch, compared in zip(batches, model.compare(batches, totals, generator)):
        losses = model.stage1_losses(batch, totals=totals, compared=compared)
        sum(losses.values()).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_micro_batches(rank, processes, rows, expected_losses, expected_grads):
    batch = random_batch(8, image_ids=IDS)
    mine = [part_of(batch, range(n, n + rows)) for n in range(rank * rows, 8, rows * processes)]
    losses, grads = losses_and_gradients_compared(small_model(), mine)
    for name, loss in losses.items():
        torch.testing.assert_close(all_sum(loss), expected_losses[name])
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            all_sum(grad), expected_grads[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("processes", "rows"), [(1, 1), (1, 4), (2, 2)])
def test_micro_batches_that_are_compared_have_the_losses_and_gradients_of_the_big_batch(processes, rows):
    """--itc-batch: all three losses, for hard negatives come from all micro-batches too; and the temperature's."""
    batch = random_batch(8, image_ids=IDS)
    expected = losses_and_gradients(small_model(), [batch], stage1_totals([batch]))
    if processes == 1:
        compare_micro_batches(0, 1, rows, *expected)
    else:
        run_many(processes, compare_micro_batches, processes, rows, *expected)


def test_both_passes_of_a_comparison_drop_the_same():
    """With dropout, else the gradient would be of other features than those that were compared."""
    model, batches, seen = small_model(dropout=0.3).train(), [random_batch(3, 0), random_batch(3, 1)], []
    original = model.feats
    model.feats = lambda *args: seen.append(original(*args)) or seen[-1]
    losses_and_gradients_compared(model, batches)
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    assert not torch.allclose(first, original(model.image_kv(model.tokens_of(batches[0])), batches[0], None))


def fetch(rank, processes):
    torch.manual_seed(rank)
    x = torch.arange(4.0)[:, None] + 100 * rank + torch.zeros(4, 3)
    x.requires_grad_()
    wanted = torch.tensor([[0, 5, 4, 5], [3, 3, 7, 0]])[rank]
    fetched, index = fetch_rows(x, wanted)
    assert len(fetched) == (2, 2)[rank]  # each foreign row once
    rows = torch.cat((x, fetched))[index]
    assert torch.equal(rows, all_gather(x.detach())[wanted])
    rows.sum().backward()
    wanted_by_anyone = all_gather(wanted).bincount(minlength=8)[4 * rank : 4 * rank + 4]
    assert torch.equal(x.grad, wanted_by_anyone[:, None].expand(4, 3).float())


def test_only_the_rows_that_are_wanted_travel_and_their_gradients_travel_back():
    run_many(2, fetch, 2)


def test_one_process_needs_no_group():
    assert world() == (0, 1) and not torch.distributed.is_initialized()
    x = torch.randn(3, requires_grad=True)
    assert all_gather(x) is x
    small_model().stage1_losses(random_batch(3))
