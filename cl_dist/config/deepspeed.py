"""Raw DeepSpeed settings (`zero.deepspeed`): which ones work with this engine, and why each of the others is refused.

DeepSpeed ignores unknown sections and detects a wrong value only after the ranks have started. So these tables check
every setting with the recipe, without importing DeepSpeed. tests/config/test_deepspeed.py compares them with
DeepSpeed's own configuration classes, and tests/distributed/test_exactness.py runs every allowed setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cl_dist.config.words import did_you_mean, listed, shorten, show

SHARDED = (1, 2, 3)
"""ZeRO stages that shard anything."""
UNLIMITED = 2**63 - 1
"""DeepSpeed's default for "no limit"."""
LARGEST_BUFFER = 10**10
"""In elements: 40 GB in float32. DeepSpeed allocates `reduce_bucket_size` elements, whatever the size of the model."""


@dataclass(frozen=True)
class Allowed:
    """A setting that recipes may use."""

    words: str
    """Its allowed values, in words."""
    fits: Callable[[Any], bool]
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """Stages at which DeepSpeed reads it."""


def _truth(*stages: int) -> Allowed:
    return Allowed("true or false", lambda value: isinstance(value, bool), stages)


def _count(least: int, *stages: int, most: int = UNLIMITED, multiple: int = 1) -> Allowed:
    """A number of elements. Like DeepSpeed's documentation, recipes may write 5e8 for a whole number."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            return False
        return value % multiple == 0

    kind = "a whole number" if multiple == 1 else "an even number"
    return Allowed(f"{kind}, at least {least}, at most {most}", fits, stages)


def _words(*allowed: str) -> Allowed:
    return Allowed(", ".join(allowed), lambda value: isinstance(value, str) and value in allowed)


ALLOWED: dict[str, Allowed] = {
    "communication_data_type": _words("fp32", "bf16"),
    "data_types.grad_accum_dtype": _words("fp32"),
    "zero_optimization.contiguous_gradients": _truth(*SHARDED),
    "zero_optimization.reduce_scatter": _truth(*SHARDED),
    "zero_optimization.reduce_bucket_size": _count(1, *SHARDED, most=LARGEST_BUFFER),
    "zero_optimization.overlap_comm": _truth(*SHARDED),
    "zero_optimization.allgather_bucket_size": _count(2, 1, 2, multiple=2),
    "zero_optimization.use_multi_rank_bucket_allreduce": _truth(1, 2),
    "zero_optimization.ignore_unused_parameters": _truth(1, 2),
    "zero_optimization.parameter_alignment": _truth(1, 2),
    "zero_optimization.sub_group_size": _count(1, 3),
    "zero_optimization.stage3_prefetch_bucket_size": _count(0, 3),
    "zero_optimization.stage3_param_persistence_threshold": _count(0, 3),
    "zero_optimization.stage3_model_persistence_threshold": _count(0, 3),
    "zero_optimization.stage3_max_live_parameters": _count(0, 3),
    "zero_optimization.stage3_max_reuse_distance": _count(0, 3),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _truth(3),
    "zero_optimization.stage3_allgather_sequential": _truth(3),
    "zero_optimization.memory_efficient_linear": _truth(3),
    "zero_optimization.override_module_apply": _truth(3),
    "zero_optimization.enable_sanity_checks": _truth(3),
    "zero_optimization.offload_param.device": Allowed("none, cpu", lambda value: value in ("none", "cpu"), (3,)),
    "zero_optimization.offload_param.pin_memory": _truth(3),
}
"""By dotted key. They change how training runs but not its result, except `communication_data_type` and
`grad_accum_dtype`, which set the precision in which gradients are reduced and summed."""

MOST_SHOWN = 20
"""Most refused settings that one message names."""

SECTIONS = ("data_types", "zero_optimization", "zero_optimization.offload_param")

_SAVES = "cl_dist saves and loads states itself"
_READ_DATA = "cl_dist reads the data itself"
_REPORTS = "cl_dist silences DeepSpeed's reports; log.jsonl has every step, and `cl-dist bench` measures speed"
_PARALLEL = "cl_dist trains with data parallelism only"
_RECIPE_PRECISION = "train.dtype sets the precision"
_OFFLOAD = "zero.offload offloads the optimiser's state"
_NVME = "offloading to NVMe is not supported"
_FP16 = "it is for fp16, which cl_dist does not train in"
_QUANTISED = "it changes the result of training, and DeepSpeed has its operators for GPUs only"
_OWN_OPTIMIZER = "cl_dist brings its own optimiser"
_REMOVED = "DeepSpeed has removed it"

REFUSED: dict[str, str] = {
    "activation_checkpointing": "give train.activation_checkpointing",
    "aio": _NVME,
    "amp": _REMOVED,
    "autotuning": "cl-dist starts the ranks itself",
    "bfloat16": "give train.dtype",
    "check_overflow": _FP16,
    "checkpoint": _SAVES,
    "comet": _REPORTS,
    "comms_logger": _REPORTS,
    "compile": "compiled graphs skip the hooks that mask gradients",
    "compression_training": _REMOVED,
    "csv_monitor": _REPORTS,
    "curriculum_learning": _REMOVED,
    "data_efficiency": _READ_DATA,
    "data_types.buffer_dtype": _RECIPE_PRECISION,
    "data_types.keep_in_fp32_modules": _RECIPE_PRECISION,
    "data_types.param_dtype": _RECIPE_PRECISION,
    "dataloader_drop_last": _READ_DATA,
    "datastates_ckpt": _SAVES,
    "disable_allgather": "DeepSpeed never reads it",
    "disable_python_gc": "cl_dist rebuilds models between tasks, and garbage collection frees the old ones",
    "dump_state": _REPORTS,
    "eigenvalue": _REMOVED,
    "elasticity": "DeepSpeed has removed it; a run can resume on another number of ranks without it",
    "expert_parallel": _PARALLEL,
    "flops_profiler": _REPORTS,
    "gradient_allreduce_op": "the loss is scaled for averaging over ranks",
    "gradient_predivide_factor": _FP16,
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "cl_dist generates with the model itself",
    "log_level": _REPORTS,
    "managed_gradient_accumulation": "cl_dist accumulates gradients itself (train.gradient_accumulation)",
    "memory_breakdown": _REPORTS,
    "nebula": _REMOVED,
    "pipeline": _PARALLEL,
    "prescale_gradients": _FP16,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "steps_per_print": _REPORTS,
    "tensor_parallel": _PARALLEL,
    "tensorboard": _REPORTS,
    "timers": _REPORTS,
    "torch_autocast": _RECIPE_PRECISION,
    "use_data_before_expert_parallelism": _PARALLEL,
    "vocabulary_size": "it only changes a warning",
    "wall_clock_breakdown": _REPORTS,
    "wandb": _REPORTS,
    "weight_quantization": "it is for inference",
    "zero_allow_untested_optimizer": _OWN_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OWN_OPTIMIZER,
    "zero_optimization.allgather_partitions": "DeepSpeed never reads it",
    "zero_optimization.compute_grad_norm": "clipping and the check for NaN need the gradient norm",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": "it is now called offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "it is now called offload_param: {pin_memory: ...}",
    "zero_optimization.elastic_checkpoint": _SAVES,
    "zero_optimization.leaf_module": "DeepSpeed itself chooses the modules that are fetched as a whole",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.load_from_fp32_weights": _SAVES,
    "zero_optimization.log_trace_cache_warnings": _REPORTS,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.offload_param.buffer_count": _NVME,
    "zero_optimization.offload_param.buffer_size": _NVME,
    "zero_optimization.offload_param.max_in_cpu": _NVME,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "zero_optimization.pipeline_loading_checkpoint": _SAVES,
    "zero_optimization.round_robin_gradients": "it mixes up shards",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OWN_OPTIMIZER,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "cl_dist exports models itself",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "cl_dist exports models itself",
    "zero_optimization.stage3_module_granularity_threshold": "DeepSpeed's hooks for whole modules fail in this engine",
    "zero_optimization.zenflow": "it updates weights outside the masked step",
    "zero_optimization.zero_hpz_partition_size": "only a step updates its second copy of the weights, "
    "but methods and resumes change weights between steps",
    "zero_optimization.zero_quantized_gradients": _QUANTISED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_optimization.zero_quantized_weights": _QUANTISED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
}
"""Why a setting is refused, by dotted key."""

OWNED = {
    "train_batch_size": "train.micro_batch_size and train.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.clip",
    "optimizer": "train.learning_rate, train.weight_decay, train.beta1, train.beta2 and train.eps",
    "scheduler": "train.schedule and train.warmup_steps",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
}
"""Settings that cl_dist sets itself, and the recipe's keys that it takes the values from."""


def refuse_raw_settings(settings: Mapping[str, Any], stage: int) -> None:
    """Raise ValueError for raw settings that are unknown, refused, owned by the recipe, wrong, or not read at `stage`.

    The message has one line per setting, with its dotted key, so that a pasted configuration can be fixed in one go.
    """
    problems = list(_problems("", settings, stage))
    shown = problems[:MOST_SHOWN]
    if len(problems) > MOST_SHOWN:
        shown.append(f"deepspeed: {len(problems) - MOST_SHOWN} more settings are refused")
    if shown:
        # config.problems puts `zero.` in front of the first line only.
        raise ValueError("\nzero.".join(shown))


def read_at(stage: int, settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Those of a recipe's raw settings that DeepSpeed reads at a stage."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{section}.{name}" if section else name
        if key not in SECTIONS:
            if stage in ALLOWED[key].stages:
                found[name] = value
        elif inside := read_at(stage, value, key):
            found[name] = inside
    return found


def _problems(section: str, settings: Mapping[str, Any], stage: int) -> Iterator[str]:
    for name, value in settings.items():
        key = f"{section}.{name}" if section else name
        if key not in SECTIONS:
            problem = _problem(key, value, stage)
        elif isinstance(value, Mapping):
            yield from _problems(key, value, stage)
            continue
        else:
            problem = f"{show(value)} is not a mapping of settings"
        if problem is not None:
            yield f"deepspeed.{shorten(key)}: {problem}"


def _problem(key: str, value: Any, stage: int) -> str | None:
    """What is wrong with one setting; None if nothing is."""
    if key in OWNED:
        return f"set by cl_dist from {OWNED[key]}; remove it here"
    if key in REFUSED:
        return f"not supported: {REFUSED[key]}; remove it"
    setting = ALLOWED.get(key)
    if setting is None:
        return f"unknown key{_similar(key)}"
    if stage not in setting.stages:
        stages = listed(setting.stages, last="or")
        return f"read at stage {stages} only, but zero.stage is {stage}; remove it"
    if value == "auto":
        return "auto is a placeholder that only transformers' Trainer fills in; give a value, or remove it"
    return None if setting.fits(value) else f"{show(value)} is not allowed; allowed: {setting.words}"


def _similar(key: str) -> str:
    """A hint at what an unknown key may have meant, or all keys that are allowed in its section."""
    section, _, name = key.rpartition(".")
    known = [*ALLOWED, *REFUSED, *OWNED, *SECTIONS]
    neighbours = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    # The right name in the wrong section, or without DeepSpeed's prefix, is likelier than a typo.
    elsewhere = [other for other in known if other.rpartition(".")[2].removeprefix("stage3_") == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    allowed = [key.rpartition(".")[2] for key in (*SECTIONS, *ALLOWED) if key.rpartition(".")[0] == section]
    return did_you_mean(name, neighbours) or f"; allowed here: {', '.join(allowed)}"
