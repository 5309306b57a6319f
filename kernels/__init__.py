"""Row-masking operations, usable by themselves: one file per operation, nothing imported from the rest of cl_dist."""

from cl_dist.kernels.apply_row_mask import apply_row_mask_
from cl_dist.kernels.row_magnitude import row_magnitude
from cl_dist.kernels.rows import RowSegment, row_segments
from cl_dist.kernels.topk_row_mask import kept_rows, topk_row_mask

__all__ = ["RowSegment", "apply_row_mask_", "kept_rows", "row_magnitude", "row_segments", "topk_row_mask"]
