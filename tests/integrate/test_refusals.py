from __future__ import annotations

import pytest

from tests.integrate.refusal_jobs import CASES
from tests.ranks import run_ranks

EXPECTED = {
    "compiled": "the model is compiled (torch.compile)",
    "data_parallel": "the model is a DataParallel",
    "other_model": "the model is a Linear",
    "no_optimizer": "a LlamaForCausalLM has no optimiser",
    "other_optimizer": "the optimiser is a SGD",
    "third_moment": "the optimiser has amsgrad",
    "half_parameters": "model.embed_tokens.weight is trained in bfloat16",
    "own_hook": "a hook on lm_head.weight edits its gradient",
    "step_in_backward": "a hook on lm_head.weight edits its gradient or steps in backward",
    "scaled_loss": "a GradScaler steps the optimiser",
    "half_autocast": "under autocast in float16",
    "closure": "optimizer.step gets a closure",
    "more_passes": "a further pass came after the step's gradients were complete (1 backward passes)",
    "gradients_left": "the last step's gradients are still there",
    "clipped_too_early": "gradients were edited (clipped?) after 1 of 2 backward passes",
    "foreign_gradients": "gradients that no training pass of the model made",
    "passes_without_gradients": "runs the model in training mode without gradients",
    "unknown_padding": "neither labels nor decoder_attention_mask",
    "not_finite": "is not finite in this step, and no weight has changed",
    "between_steps": "task 1 ends between a backward pass and optimizer.step()",
    "two_sessions": "another session is attached to this model",
    "needs_the_stream": "method ewc measures the model on chosen samples of the stream",
    "needs_a_background": "method sparse_memory measures the model on chosen samples of the stream",
    "needs_an_early_start": "method hft has to change the model before its optimiser exists",
    "needs_samples": "method kif trains on samples of other tasks too",
    "unknown_setting": "method.treshold: unknown key; did you mean threshold?",
    "settings_beside_a_list": "threshold: not read, because the methods are given with their settings",
}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What every script was told."""
    [found] = run_ranks("tests.integrate.refusal_jobs:messages", world=1)
    return found


def test_every_case_is_expected() -> None:
    assert {case.__name__ for case in CASES} == set(EXPECTED)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_script_is_told_what_a_method_cannot_allow(said: dict[str, str], case: str) -> None:
    assert EXPECTED[case] in said[case]
    assert "\n" not in said[case]
    assert "allowed" in said[case] or case in ("not_finite", "unknown_setting")
