"""Checks that the installed DeepSpeed has the private attributes that this package reads.

Gradient shards, master weights and moments live in private attributes of DeepSpeed. This file lists them once. Start-up
refuses a release that lacks one; otherwise training would run on with a mask that silently does nothing.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

DEEPSPEED_VERSION = "0.19.8"

# By file of the deepspeed package: strings that its source must contain. A definition is listed with its `def`, so that
# a mere call of it does not count.
_ATTRIBUTES = {
    "runtime/engine.py": ("_take_model_step", "def clip_fp32_gradients", "self.allreduce_no_retain(dense_bucket,"),
    "runtime/zero/stage_1_and_2.py": (
        "single_partition_of_fp32_groups",
        "norm_for_param_grads",
        "_hp_mapping",
        "def update_lp_params",
        "def get_param_id",
        "def _wait_for_offload_copies",
        "def average_tensor",
        "def allreduce_and_scatter",
        "def allreduce_no_retain",
        "def gradient_reduction_w_predivide",
        "bucket.params.append((i, param.param_idx_in_group, param_id))",
        "self.average_tensor(",
        "self.allreduce_and_scatter(",
        "self.allreduce_no_retain(",
        "self.gradient_reduction_w_predivide(tensor, communication_data_type)",
        "all_gather_dp_groups(groups_flat=",
    ),
    "runtime/zero/stage3.py": (
        "fp32_partitioned_groups_flat",
        "grad_position",
        "def _get_fp32_grad_state_partition",
        "self.__avg_scatter_grads(",
        "reduce_scatter_coalesced(full_grads_for_rank, process_group)",
        "def _reassign_or_swap_out_partitioned_parameters",
        "persistent_parameters",
        "def _partition_all_parameters",
        "parameter_offload",
        "norm_for_param_grads",
    ),
    "runtime/zero/parameter_offload.py": (
        "pre_bwd_fn",
        "post_bwd_fn",
        "applied_pre_backward_ref_cnt",
        "module.ds_inflight_param_registry",
        "fwd_pre_hook",
        "forward_hooks",
        "backward_hooks",
    ),
    "runtime/zero/partition_parameters.py": ("_external_params",),
    "runtime/bf16_optimizer.py": ("_hp_grad", "def update_lp_params", "all_gather_dp_groups(groups_flat="),
    "runtime/fp16/unfused_optimizer.py": ("fp32_groups", "fp16_groups"),
    "utils/tensor_fragment.py": ("lp_fragment_address", "hp_fragment_address", "def get_lp_grad_fragment"),
}


def check_deepspeed() -> list[str]:
    """Return one sentence per mismatch; an empty list means that the installed DeepSpeed can be used.

    Reads the installed source files instead of importing DeepSpeed, which takes seconds.
    """
    spec = util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return ["deepspeed is not installed (pip install cl-dist installs the required release)"]
    problems = []
    version = metadata.version("deepspeed").split("+")[0]
    if version != DEEPSPEED_VERSION:
        problems.append(
            f"deepspeed {version} is installed; this release of cl_dist reads the shards of {DEEPSPEED_VERSION}"
        )
    return problems + _missing_attributes(Path(spec.origin).parent)


def _missing_attributes(root: Path) -> list[str]:
    problems = []
    for name, attributes in _ATTRIBUTES.items():
        file = root / name
        source = file.read_text(encoding="utf-8") if file.exists() else ""
        missing = [attribute for attribute in attributes if attribute not in source]
        if missing:
            problems.append(f"deepspeed/{name} lacks {', '.join(missing)}, which cl_dist.sharding reads")
    return problems
