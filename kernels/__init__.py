"""Row and importance operations, usable by themselves: one file each, importing nothing from the rest of cl_dist."""

from cl_dist.kernels.adamw_rows import AdamWSettings, AdamWState, RowPiece, adamw_rows_
from cl_dist.kernels.apply_row_mask import apply_row_mask_, mask_rows_
from cl_dist.kernels.importance_update import importance_update_
from cl_dist.kernels.masked_weight_grad import kept_weight_grad, masked_weight_grad, weight_grad_way, weight_grad_ways
from cl_dist.kernels.row_magnitude import MagnitudeTotal, row_magnitude
from cl_dist.kernels.rows import RowLayout, RowMask, RowMasks, RowSegment, row_segments
from cl_dist.kernels.topk_row_mask import flat_row_masks, kept_rows, topk_row_mask, topk_row_masks

__all__ = [
    "AdamWSettings",
    "AdamWState",
    "MagnitudeTotal",
    "RowLayout",
    "RowMask",
    "RowMasks",
    "RowPiece",
    "RowSegment",
    "adamw_rows_",
    "apply_row_mask_",
    "flat_row_masks",
    "importance_update_",
    "kept_rows",
    "kept_weight_grad",
    "mask_rows_",
    "masked_weight_grad",
    "row_magnitude",
    "row_segments",
    "topk_row_mask",
    "topk_row_masks",
    "weight_grad_way",
    "weight_grad_ways",
]
