"""Responses in compact form, and the divergence from them."""

from __future__ import annotations

import pytest
import torch

from cl_dist.methods.lwf.responses import divergence_sum, join, respond

T = 2.0


def logits(seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(6, 11, generator=torch.Generator().manual_seed(seed))


def divergence(old: torch.Tensor, new: torch.Tensor) -> float:
    """KL(old || new) over all classes, in float64."""
    p, q = (torch.softmax(each.double() / T, dim=1) for each in (old, new))
    return float((p * (p / q).log()).sum())


@pytest.mark.parametrize("top_k", [None, 11, 50])
def test_all_classes_give_the_whole_divergence(top_k: int | None) -> None:
    ours = divergence_sum(logits(1), respond(logits(0), T, top_k), T)
    assert float(ours) == pytest.approx(divergence(logits(0), logits(1)), rel=1e-5)


def test_the_divergence_grows_with_the_number_of_classes() -> None:
    sums = [float(divergence_sum(logits(1), respond(logits(0), T, top_k), T)) for top_k in (1, 3, 6, 10)]
    assert sums == sorted(sums)
    # With ten of eleven the rest is one class too.
    assert sums[-1] == pytest.approx(divergence(logits(0), logits(1)), rel=1e-5)
    assert sums[0] < 0.9 * sums[-1]


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_model_itself_is_a_minimum(top_k: int | None) -> None:
    new = logits(0).requires_grad_()
    divergence_sum(new, respond(logits(0), T, top_k), T).backward()
    assert new.grad is not None
    assert float(new.grad.abs().max()) < 1e-6


def test_a_certain_model_gives_finite_numbers() -> None:
    certain = torch.full((2, 11), -200.0)
    certain[:, 3] = 200.0
    new = certain.roll(1, dims=1).requires_grad_()
    total = divergence_sum(new, respond(certain, 1.0, 2), 1.0)
    total.backward()
    assert new.grad is not None
    assert bool(total.isfinite())
    assert bool(new.grad.isfinite().all())


@pytest.mark.parametrize("top_k", [None, 4])
def test_cut_and_joined_responses_are_the_same(top_k: int | None) -> None:
    whole = respond(logits(0), T, top_k)
    pieces = whole.cut([2, 0, 3, 1])
    assert [len(piece.log_probs) for piece in pieces] == [2, 0, 3, 1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(join(pieces), whole, strict=True))
    # The pieces are copies: none keeps the others alive.
    assert pieces[3].log_probs.untyped_storage().nbytes() == pieces[3].log_probs.numel() * 4
    assert sum(tensor.nbytes for tensor in whole) == 6 * (4 * 11 if top_k is None else 8 * 4 + 4)
