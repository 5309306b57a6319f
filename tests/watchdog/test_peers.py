from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from cl_dist.watchdog.peers import GRACE, Limits, Lookout, Pulse, PulseFiles, Sighting, Signature, describe
from tests.opens import opened

LIMITS = Limits(hang=10.0, silence=3.0)


def seen(age: float, waiting: bool = False, silent: float = 0.0, phase: str = "training task a, step 3") -> Sighting:
    return Sighting(Pulse(7, age, phase, waiting), silent)


@pytest.mark.parametrize(
    ("sighting", "stuck"),
    [
        (seen(11.0), True),
        (seen(9.0), False),
        (seen(0.1, silent=4.0), True),
        (Sighting(None, 4.0), True),
        (Sighting(None, 0.0), False),  # not read yet
    ],
)
def test_which_rank_makes_no_progress(sighting: Sighting, stuck: bool) -> None:
    assert LIMITS.is_stuck(sighting) == stuck


def test_a_silent_rank_is_named_before_one_that_is_stuck() -> None:
    text = describe({0: seen(30.0), 1: seen(0.2, silent=8.0)}, LIMITS)
    assert text.startswith("rank 1 gives no sign of life, last seen while training task a, step 3")


def test_a_rank_that_left_no_pulse_is_named() -> None:
    assert describe({0: seen(11.0), 1: Sighting(None, 8.0)}, LIMITS).startswith("rank 1 gives no sign of life (")


def test_many_silent_ranks_are_counted() -> None:
    text = describe({0: seen(11.0), **{rank: seen(0.1, silent=5.0) for rank in range(1, 13)}}, LIMITS)
    assert text.startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more give no sign of life")


def test_a_rank_outside_of_collectives_is_named_before_an_older_one_that_waits() -> None:
    text = describe({0: seen(12.0, waiting=True), 1: seen(11.0)}, LIMITS)
    assert text.startswith("rank 1 has made no progress for 11 s while training task a, step 3")


def test_of_several_ranks_outside_of_collectives_the_oldest_is_named() -> None:
    assert describe({0: seen(12.0), 1: seen(13.0), 2: seen(11.0)}, LIMITS).startswith("rank 1 ")


def test_if_all_ranks_wait_no_single_rank_is_blamed() -> None:
    text = describe({0: seen(12.0, waiting=True), 1: seen(14.0, waiting=True)}, LIMITS)
    assert text.startswith("all ranks wait for each other in a collective operation, rank 1 the longest")


def test_a_single_rank_is_stuck_by_itself() -> None:
    assert describe({0: seen(12.4)}, LIMITS) == "stuck while training task a, step 3"


class SharedStorage(PulseFiles):
    """All ranks check at the same time: none sees a signature before its next check."""

    def __init__(self, folder: Path, world: int) -> None:
        super().__init__(folder, world)
        self.visible: Signature | None = None

    def signed(self) -> Signature | None:
        super().signed()  # opens the file
        return self.visible


class Job:
    """Ranks that all wait, in one process."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.files = folder, SharedStorage(folder, world)
        self.ranks = [Lookout(self.files, rank) for rank in range(world)]
        self.checks = 0

    def check(self, living: Sequence[int]) -> int:
        """One check of the living ranks; returns how many files were opened."""
        self.checks += 1
        self.files.visible = PulseFiles.signed(self.files)
        with opened(self.folder) as files:
            for rank in living:
                self.files.write(rank, Pulse(self.checks, 600.0 + self.checks, "waiting", waiting=True))
                self.ranks[rank].check(float(self.checks), 60.0)
        return len(files)

    def on_duty(self, living: Sequence[int]) -> list[int]:
        return [rank for rank in living if self.ranks[rank].on_duty]


@pytest.mark.parametrize("world", [1, 2, 3, 16, 128, 1024])
def test_one_rank_reads_all_pulses_and_every_rank_opens_a_few_files(tmp_path: Path, world: int) -> None:
    job, living = Job(tmp_path, world), range(world)
    first = sum(job.check(living) for _ in range(4))  # several may take over, until they see each other's signature
    assert first <= 30 * world
    for _ in range(3):
        assert job.check(living) == 3 * world  # its pulse and the signature on each; the pulses and a signature on one
        assert len(job.on_duty(living)) == 1
    (reader,) = job.on_duty(living)
    seen = job.ranks[reader].sightings()
    assert sorted(seen) == [rank for rank in living if rank != reader]
    assert all(each.pulse is not None and each.silent == 0 for each in seen.values())


@pytest.mark.parametrize("alive", [1.0, 0.5, 0.01])
def test_the_end_of_the_rank_on_duty_leaves_the_job_watched(tmp_path: Path, alive: float) -> None:
    """Whichever other ranks end with it: the ranks that are left name all that are gone."""
    world = 256
    job = Job(tmp_path, world)
    for _ in range(4):
        job.check(range(world))
    (reader,) = job.on_duty(range(world))
    left = [rank for rank in range(world) if rank != reader][: max(1, int(alive * world))]
    opens = [job.check(left) for _ in range(GRACE + 12)]
    assert sum(opens[GRACE:]) <= 60 * world
    assert opens[-1] <= 3 * world
    (heir,) = job.on_duty(left)
    for _ in range(4):
        job.check(left)
    limits = Limits(hang=100.0, silence=3.5)
    silent = [rank for rank, seen in job.ranks[heir].sightings().items() if limits.is_silent(seen)]
    assert silent == [rank for rank in range(world) if rank not in set(left)]


def test_a_rank_that_works_again_leaves_duty_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, 64)
    for _ in range(4):
        job.check(range(64))
    (reader,) = job.on_duty(range(64))
    job.ranks[reader].rest()
    left = [rank for rank in range(64) if rank != reader]
    for _ in range(GRACE):
        job.check(left)
    assert job.on_duty(left), "the others still wait for a rank that has signed off"
    assert job.ranks[reader].sightings()[left[0]] == Sighting(None, 0.0)


def test_slow_storage_delays_neither_pulse_nor_signature(tmp_path: Path) -> None:
    """Each read takes an eighth of a second, and there is a second for a check: the rest waits for the next ones."""
    files = PulseFiles(tmp_path, 41)
    for rank in range(1, 41):
        files.write(rank, Pulse(1, 600.0, "waiting", waiting=True))
    ticks = itertools.count()
    lookout = Lookout(files, 0, clock=lambda: next(ticks) / 8)
    signatures = []
    while not lookout.on_duty:
        lookout.check(0.0, 1.0)
    for now in range(1, 8):
        with opened(tmp_path) as read:
            lookout.check(float(now), 1.0)
        assert len(read) == 2 + 8
        signatures.append(files.signed())
    assert len(set(signatures)) == 7
    seen = lookout.sightings()
    assert all(each.pulse is not None for each in seen.values())
    assert {each.silent for each in seen.values()} == {0.0, 5.0}, "silent up to the last look, not up to now"


def test_one_rank_gets_a_claim(tmp_path: Path) -> None:
    files = PulseFiles(tmp_path, 2)
    assert [files.claim(0), files.claim(0), files.claim(1)] == [True, False, True]
    files.clear()
    assert files.claim(0)
