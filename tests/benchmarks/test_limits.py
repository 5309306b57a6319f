from __future__ import annotations

import pytest
import torch

from cl_dist.benchmarks import limits
from cl_dist.benchmarks.harness import Times

CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [limits.reading, limits.updating])
@pytest.mark.parametrize("wanted", [1, 12 << 10, 120_001])
def test_a_limit_moves_about_the_requested_number_of_bytes(limit: object, wanted: int) -> None:
    contestant, moved = limit(wanted, CPU)  # type: ignore[operator]
    contestant.run()
    assert moved == pytest.approx(max(wanted, limits.LEAST_MOVED), abs=12)


def test_a_limit_moves_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_MOVED", 1 << 16)
    assert limits.reading(1 << 40, CPU)[1] == 1 << 16


def test_the_product_counts_multiplications_and_additions() -> None:
    contestant, operations = limits.product(torch.float32, CPU, size=8)
    contestant.run()
    assert operations == 1024


def test_shares_are_relative_to_the_limit_in_the_same_round() -> None:
    times = Times({"a": [2.0, 8.0], "read": [1.0, 2.0]})
    assert limits.of_limit(times, "a", "read", 10, 10).as_dict() == {"median": 0.375, "minimum": 0.25, "maximum": 0.5}
    # Twice the work in the same time is twice the rate.
    assert limits.of_limit(times, "a", "read", 20, 10).median == 0.75


def test_memory_rates() -> None:
    rates = limits.memory_rates(Times({"a": [2.0], "read": [1.0]}), ["a"], "read", 4 * 10**9, 6 * 10**9)
    assert rates["gigabytes_per_second"] == {"a": 2.0, "read": 6.0}
    assert rates["of_limit"]["a"]["median"] == pytest.approx(1 / 3)


def test_the_machine_is_described() -> None:
    about = limits.machine(CPU)
    assert about["threads"] == torch.get_num_threads()
    assert about["cores"] >= 1
    assert about["torch"] == torch.__version__
    assert about["cpu"]
