from __future__ import annotations

import pytest

from cl_dist.methods.replay import past_samples
from cl_dist.tasks.types import Encoded

TASKS = [[Encoded(index, [task], [task]) for index in range(count)] for task, count in enumerate((50, 7, 100))]


@pytest.mark.parametrize(
    ("ratio", "counts"), [(0.0, [0, 0, 0]), (0.02, [1, 1, 2]), (0.5, [25, 4, 50]), (1.0, [50, 7, 100])]
)
def test_a_share_of_every_past_task(ratio: float, counts: list[int]) -> None:
    drawn = list(past_samples(TASKS, ratio, seed=1))
    assert [sum(sample.input_ids == [task] for sample in drawn) for task in range(3)] == counts
    assert len({(sample.input_ids[0], sample.index) for sample in drawn}) == len(drawn), "a sample twice"


def test_later_tasks_see_the_same_memory() -> None:
    early, late = (list(past_samples(TASKS[:count], 0.1, seed=1)) for count in (1, 3))
    assert late[: len(early)] == early
    assert list(past_samples(TASKS, 0.1, seed=2)) != late
