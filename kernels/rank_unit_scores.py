"""Score of every rank of a LoRA module: the unit of KIF."""

from __future__ import annotations

import torch


@torch.no_grad()
def rank_unit_scores(
    a_smoothed: torch.Tensor, a_uncertainty: torch.Tensor, b_smoothed: torch.Tensor, b_uncertainty: torch.Tensor
) -> torch.Tensor:
    """Score ranks by the mean of the outer product of their two vectors of element scores (KIF, arXiv 2408.05200).

    Rank j has the column s_B[:, j] and the row s_A[j, :] of the element scores s = smoothed * uncertainty. The mean of
    their outer product is the product of their means, so that no outer product is built.

    Args:
        a_smoothed: `(r, in_features)`, floating: smoothed importance of `lora_A`.
        a_uncertainty: `(r, in_features)`, floating.
        b_smoothed: `(out_features, r)`, floating: the same of `lora_B`.
        b_uncertainty: `(out_features, r)`, floating.

    Returns:
        `(r,)`, float32, or float64 where a state is float64. Sums are in float64 and do not change from call to call.

    Raises:
        ValueError: Shapes that do not go together.
    """
    shapes = [tuple(tensor.shape) for tensor in (a_smoothed, a_uncertainty, b_smoothed, b_uncertainty)]
    a, b = shapes[0], shapes[2]
    if len(a) != 2 or len(b) != 2 or shapes[1] != a or shapes[3] != b or a[0] != b[1]:
        raise ValueError(f"states of A must be (r, in_features) and those of B (out_features, r), not {shapes}")
    mean_A = _score(a_smoothed, a_uncertainty).mean(dim=1, dtype=torch.float64)
    mean_B = _score(b_smoothed, b_uncertainty).mean(dim=0, dtype=torch.float64)
    return (mean_A * mean_B).to(torch.promote_types(a_smoothed.dtype, torch.float32))


def _score(smoothed: torch.Tensor, uncertainty: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(smoothed.dtype, torch.float32)
    return smoothed.to(wide) * uncertainty.to(wide)
