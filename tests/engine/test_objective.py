"""The loss, and which positions its logits are needed at."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.engine.objective import loss_sum, predicting_positions
from cl_dist.tasks.types import IGNORE


@given(rows=st.integers(1, 4), length=st.integers(2, 9), seed=st.integers(0, 100))
def test_chosen_positions_give_the_loss_of_all_positions(rows: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.7] = IGNORE
    expected = torch.zeros(())
    for row in range(rows):
        for position in range(1, length):
            if labels[row, position] != IGNORE:
                expected = expected - torch.log_softmax(logits[row, position - 1].float(), -1)[labels[row, position]]
    chosen = predicting_positions(labels)
    assert len(chosen) >= 1
    torch.testing.assert_close(loss_sum(logits[:, chosen], labels[:, chosen + 1]), expected)


def test_a_batch_of_fillers_costs_one_position_and_nothing_else() -> None:
    labels = torch.full((2, 6), IGNORE)
    chosen = predicting_positions(labels)
    assert chosen.tolist() == [0]
    assert loss_sum(torch.randn(2, 1, 5), labels[:, chosen + 1]).item() == 0.0
