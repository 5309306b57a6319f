"""Output magnitude of every row of a linear layer: the signal by which MIGU chooses."""

from __future__ import annotations

import torch


def row_magnitude(
    output: torch.Tensor, token_mask: torch.Tensor | None = None, *, per_token: bool = True
) -> torch.Tensor:
    """Sum a linear layer's absolute outputs over tokens (MIGU, arXiv 2406.17245, equations 3 and 4).

    Args:
        output: `(..., out_features)`, floating: the layer's output Y for all tokens of a micro-batch.
        token_mask: bool, of the leading shape of `output` (or broadcastable from its batch dimensions); tokens marked
            False are left out. None counts every token.
        per_token: Divide each token's absolute outputs by their sum before adding them up; a token whose outputs are
            all zero adds zero. False adds the absolute outputs as they are (the reference code's definition).

    Returns:
        `(out_features,)` float64. Double precision so that the order of summation, hence the number of ranks, does not
        decide which of two nearly equal rows is larger.
    """
    magnitude_TO = output.detach().reshape(-1, output.shape[-1]).to(torch.float64).abs_()
    if token_mask is not None:
        magnitude_TO = magnitude_TO[token_mask.reshape(-1)]
    if per_token:
        norm_T1 = magnitude_TO.sum(dim=1, keepdim=True)
        magnitude_TO = magnitude_TO / norm_T1.masked_fill_(norm_T1 == 0, 1.0)
    return magnitude_TO.sum(dim=0)
