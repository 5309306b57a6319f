"""The script that measures a loop inside `cl_dist.continual` against our own engine."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
def test_both_take_the_same_steps() -> None:
    arguments = {"stage": 2, "rounds": 2, "layers": 1, "tokens": 16}
    found, _ = run_ranks("tests.integrate.jobs:overhead", world=2, arguments=arguments)
    assert len(found["own"]) == len(found["loop"]) == 2
    assert min(*found["own"], *found["loop"]) > 0
    assert found["difference"] == 0
