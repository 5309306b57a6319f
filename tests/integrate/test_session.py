from __future__ import annotations

from typing import Any

import pytest

from tests.integrate.jobs import STEPS, TASKS
from tests.ranks import run_ranks

MIGU = [{"name": "migu", "threshold": 0.7}]
FROZEN = [{"name": "migu", "threshold": 0.7, "mask": "update"}]
KIF = [{"name": "kif"}]
BOTH = [{"name": "kif"}, {"name": "migu", "threshold": 0.5}]
LISA = [{"name": "lisa", "blocks": 1, "interval": 1}]
GMT = [{"name": "gmt"}]
CASES: dict[str, dict[str, Any]] = {
    "ddp, rows skipped in backward": {"script": "ddp", "method": MIGU, "recompute": True},
    "ddp, accumulation": {"script": "ddp", "method": FROZEN, "accumulation": 2, "family": "t5"},
    "ddp, fusion, resumed": {"script": "ddp", "method": BOTH, "family": "roberta", "saved": True},
    "ddp, elements": {"script": "ddp", "method": [{"name": "mofo"}]},
    "ddp, fusion of adapters": {"script": "ddp", "method": KIF, "lora": True},
    "ddp, elements of the gradient": {"script": "ddp", "method": GMT, "accumulation": 2},
    "ddp, resting blocks": {"script": "ddp", "method": LISA, "accumulation": 2},
    "ddp, resting blocks, unused": {"script": "ddp", "method": LISA, "unused": True, "recompute": True, "saved": True},
    "accelerate, fusion": {"script": "accelerate", "method": BOTH, "accumulation": 2},
    "FSDP2, rows skipped in backward": {"script": "fsdp2", "method": MIGU},
    "FSDP2, fusion": {"script": "fsdp2", "method": BOTH, "accumulation": 2, "family": "roberta"},
    "FSDP2, frozen rows": {"script": "fsdp2", "method": FROZEN, "family": "t5"},
    "FSDP2, frozen rows, fused AdamW": {"script": "fsdp2", "method": FROZEN, "fused": True},
    "FSDP2, resting blocks": {"script": "fsdp2", "method": LISA, "family": "t5"},
    "ZeRO 0, rows skipped in backward": {"script": "deepspeed", "method": MIGU},
    "ZeRO 1, fusion": {"script": "deepspeed", "method": BOTH, "stage": 1, "accumulation": 2},
    "ZeRO 2, accumulation": {"script": "deepspeed", "method": FROZEN, "stage": 2, "accumulation": 2, "family": "t5"},
    "ZeRO 2, fusion of adapters": {"script": "deepspeed", "method": KIF, "stage": 2, "lora": True},
    "ZeRO 1, resting blocks": {"script": "deepspeed", "method": LISA, "stage": 1, "accumulation": 2},
    "ZeRO 2, elements of the gradient": {"script": "deepspeed", "method": GMT, "stage": 2},
    "ZeRO 3, resting blocks": {"script": "deepspeed", "method": LISA, "stage": 3, "recompute": True},
    "ZeRO 3, fusion": {"script": "deepspeed", "method": BOTH, "stage": 3, "family": "roberta"},
}
ULP = 2.0**-23


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Of rank 0; both ranks have whole weights."""
    found = run_ranks("tests.integrate.jobs:run_cases", world=2, arguments={"cases": list(CASES.values())})
    return dict(zip(CASES, found[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_script_ends_with_the_weights_of_our_own_engine(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["moved"] > 1e-3
    assert found["error"] <= TASKS * STEPS * ULP


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["method"] in (MIGU, FROZEN, BOTH)])
def test_a_script_keeps_the_rows_that_our_own_engine_keeps(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["masked"] == (TASKS - 1) * STEPS  # the first task is dense
    assert found["dropped"] > 0
    assert found["flips"] == 0


def test_a_single_process_lets_the_same_blocks_rest() -> None:
    """A plain loop, whose optimiser leaves out parameters without a gradient, and their step counts."""
    cases = [{"script": "plain", "method": LISA}]
    [[found]] = run_ranks("tests.integrate.jobs:run_cases", world=1, arguments={"cases": cases})
    assert found["moved"] > 1e-3
    assert found["error"] <= TASKS * STEPS * ULP
