"""Measures cases of the plan's accuracy on ranks."""

from __future__ import annotations

from typing import Any

from cl_dist.benchmarks.plan_accuracy import Case, measure, most
from cl_dist.engine.distributed import join, quiet_libraries


def measured(cases: list[dict[str, Any]], hidden: int, tokens: int) -> list[dict[str, Any]]:
    """What the ranks count in each case."""
    rank = join(120).rank
    quiet_libraries(rank)
    return [most(measure(Case(**case), hidden, tokens)) for case in cases]
