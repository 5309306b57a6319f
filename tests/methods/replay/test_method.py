from __future__ import annotations

from collections import Counter

import pytest

from cl_dist.methods.replay.config import ReplayConfig
from cl_dist.methods.replay.method import Replay, reservoir
from cl_dist.methods.shared.samples import past_samples
from cl_dist.tasks.types import Encoded

TASKS = [[Encoded(index, [task], [task]) for index in range(count)] for task, count in enumerate((50, 7, 100))]


def places(samples: list[Encoded]) -> list[tuple[int, int]]:
    """Task and number of each sample."""
    return [(sample.input_ids[0], sample.index) for sample in samples]


class TestQuota:
    @pytest.mark.parametrize(
        ("ratio", "counts"), [(0.0, [0, 0, 0]), (0.02, [1, 1, 2]), (0.5, [25, 4, 50]), (1.0, [50, 7, 100])]
    )
    def test_a_share_of_every_past_task(self, ratio: float, counts: list[int]) -> None:
        drawn = list(past_samples(TASKS, ratio, seed=1))
        assert [sum(sample.input_ids == [task] for sample in drawn) for task in range(3)] == counts
        assert len(set(places(drawn))) == len(drawn), "a sample twice"

    def test_later_tasks_see_the_same_memory(self) -> None:
        early, late = (list(past_samples(TASKS[:count], 0.1, seed=1)) for count in (1, 3))
        assert late[: len(early)] == early
        assert list(past_samples(TASKS, 0.1, seed=2)) != late


class TestReservoir:
    def test_it_holds_all_samples_until_it_is_full(self) -> None:
        assert reservoir([], 10, seed=1) == []
        assert reservoir(TASKS[:2], 57, seed=1) == [*TASKS[0], *TASKS[1]]
        assert len(reservoir(TASKS, 57, seed=1)) == 57

    def test_it_follows_from_the_seed_and_continues_from_task_to_task(self) -> None:
        early, late = reservoir(TASKS[:2], 20, seed=1), reservoir(TASKS, 20, seed=1)
        assert late == reservoir(TASKS, 20, seed=1)
        assert late != reservoir(TASKS, 20, seed=2)
        assert len(set(places(late))) == 20, "a sample twice"
        # Samples that the last task has not displaced keep their positions.
        stayed = [position for position, sample in enumerate(late) if sample.input_ids != [2]]
        assert stayed
        assert [late[position] for position in stayed] == [early[position] for position in stayed]

    def test_every_sample_is_kept_with_the_same_probability(self) -> None:
        """Over many seeds, each of 60 samples is in a memory of 12 one time in five, even the first and the last."""
        streams = [[Encoded(index, [task], [task]) for index in range(20)] for task in range(3)]
        seeds = 4000
        kept = Counter(place for seed in range(seeds) for place in places(reservoir(streams, 12, seed)))
        assert len(kept) == 60
        expected, deviation = seeds / 5, (seeds * 0.2 * 0.8) ** 0.5
        # The largest of 60 normal deviations exceeds five of them once in 30,000 such tests.
        assert max(abs(count - expected) for count in kept.values()) < 5 * deviation


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (ReplayConfig(name="replay", ratio=0.1), [0, 5, 6]),
        (ReplayConfig(name="replay", policy="reservoir", memory_size=30), [0, 30, 30]),
    ],
)
def test_a_task_gets_what_the_policy_keeps_of_those_before_it(config: ReplayConfig, counts: list[int]) -> None:
    method = Replay(config)
    method._seed = 1
    memories = [method.training_data(index, TASKS) for index in range(3)]
    assert [len(memory) for memory in memories] == counts
    assert all(sample.input_ids[0] < index for index, memory in enumerate(memories) for sample in memory)
