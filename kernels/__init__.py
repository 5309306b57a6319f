"""Row and importance operations, usable by themselves: one file each, importing nothing from the rest of cl_dist."""

from cl_dist.kernels.apply_row_mask import apply_row_mask_, mask_rows_
from cl_dist.kernels.importance_update import importance_update_
from cl_dist.kernels.masked_weight_grad import masked_weight_grad, weight_grad_way, weight_grad_ways
from cl_dist.kernels.row_magnitude import row_magnitude
from cl_dist.kernels.rows import RowLayout, RowMask, RowSegment, row_segments
from cl_dist.kernels.topk_row_mask import kept_rows, topk_row_mask, topk_row_masks

__all__ = [
    "RowLayout",
    "RowMask",
    "RowSegment",
    "apply_row_mask_",
    "importance_update_",
    "kept_rows",
    "mask_rows_",
    "masked_weight_grad",
    "row_magnitude",
    "row_segments",
    "topk_row_mask",
    "topk_row_masks",
    "weight_grad_way",
    "weight_grad_ways",
]
