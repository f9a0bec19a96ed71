"""Exercise 11, a resume that is exact to the bit: what has to be saved?

The run below is a whole training loop: a model with dropout, AdamW, a learning rate that changes, a sampler that
shuffles each epoch. Stop it after any step, go on in a new process, and every later loss must be equal to the last bit.

Where to look: every attribute of `Run` that a step changes, and one thing that is not an attribute of anything.
"""

import io

import pytest
import torch
from torch import nn

from course.adapters import resume_run, save_run

pytestmark = [pytest.mark.exercise, pytest.mark.exercise_11]

DATA = torch.randn(12, 5, generator=torch.Generator().manual_seed(99))


class Run:
    """Trains a small autoencoder; three steps of four samples are an epoch."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.shuffle = torch.Generator().manual_seed(seed)  # of the order of the samples
        self.order: list[int] = []  # the samples of this epoch that are still to come

    def step(self) -> float:
        """One step -> its loss."""
        if not self.order:
            self.order = torch.randperm(len(DATA), generator=self.shuffle).tolist()
        batch, self.order = DATA[self.order[:4]], self.order[4:]
        loss = (self.model(batch) - batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


def from_file(state: dict) -> dict:
    """The state after a round trip through a file that may hold tensors and plain Python only: no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3, 4, 7])
def test_every_later_loss_is_equal_to_the_last_bit(stopped_after):
    """In the middle of an epoch (1, 2, 4, 7), between two (3), and before the first step (0)."""
    run = Run(seed=0)
    for _ in range(stopped_after):
        run.step()
    state = from_file(save_run(run))
    expected = [run.step() for _ in range(8)]

    new = Run(seed=1)  # another process: other weights, other random numbers
    resume_run(new, state)
    got = [new.step() for _ in range(8)]
    wrong = [i for i, (a, b) in enumerate(zip(got, expected)) if a != b]
    assert not wrong, f"the first step that differs is number {wrong[0]} after the resume: {got} instead of {expected}"
    for name, parameter in new.model.state_dict().items():
        assert torch.equal(parameter, run.model.state_dict()[name]), f"{name} ends with other values"
    assert new.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"], "another learning rate"


def test_saving_changes_nothing():
    """A run that saves after each step is the run that never saves."""
    one, losses = Run(seed=0), []
    for _ in range(5):
        losses.append(one.step())
    other = Run(seed=0)
    for expected in losses:
        save_run(other)
        assert other.step() == expected
