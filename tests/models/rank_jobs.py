"""What the ranks of tests/models run: tests.ranks calls these functions in separate processes, and they return JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from cl_dist.benchmarks.memory import growth
from cl_dist.config.schema import LoraConfig, ModelConfig
from cl_dist.engine.distributed import join
from cl_dist.errors import BadInput
from cl_dist.models.export import export_model
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.training_mode import enable_activation_checkpointing

LABELS = 3
SEED = 5
LEARNING_RATE = 0.1
STEPS = 2  # LoRA's A has no gradient in the first step, where B is zero


def zero3_config(dtype: str) -> dict[str, Any]:
    """DeepSpeed settings that shard every parameter, however small."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 20_000,
            "stage3_prefetch_bucket_size": 10_000,
        },
    }


def load(case: dict[str, Any], cache_dir: str, zero3: bool) -> LoadedModel:
    """The model of a case, with adapters if the case has `lora`; whole or sharded."""
    dtype = case.get("dtype", "float32")
    config = ModelConfig(name_or_path=case["name"], objective=case.get("objective", "auto"))
    loaded = load_model(
        config,
        LABELS,
        zero3_config=zero3_config(dtype) if zero3 else None,
        dtype=getattr(torch, dtype),
        seed=SEED,
        cache_dir=Path(cache_dir),
    )
    if not case.get("lora"):
        return loaded
    adapted = add_lora(loaded.model, LoraConfig(r=3), loaded.objective, SEED)
    return LoadedModel(adapted, loaded.tokenizer, loaded.objective)  # type: ignore[arg-type]


def checksums(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter, gathered one at a time if sharded (collective)."""
    return {name: digest(tensor) for name, tensor in whole_weights(model).items()}


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values, as float32 (exact for bfloat16)."""
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Unsharded copies of all parameters, by name (collective)."""
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def sharded(cases: list[dict[str, Any]], cache_dir: str) -> list[dict[str, Any]]:
    """For each case: the unsharded parameters, all digests, and the difference between its steps and dense ones."""
    join(timeout_seconds=120)
    return [_sharded_case(case, cache_dir) for case in cases]


def _sharded_case(case: dict[str, Any], cache_dir: str) -> dict[str, Any]:
    made: list[LoadedModel] = []
    peak_growth = growth(lambda: made.append(load(case, cache_dir, zero3=True)), torch.device("cpu"))
    loaded = made.pop()
    model = loaded.model
    assert not is_deepspeed_zero3_enabled(), "the setting must not outlive the loading"
    whole = [name for name, p in model.named_parameters() if not _is_sharded(p) and ".lora_" not in name]
    sums = checksums(model)
    found: dict[str, Any] = {
        "whole": whole,
        "digests": sums,
        "buffers": {name: digest(buffer) for name, buffer in model.named_buffers()},
        "growth": peak_growth,
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }
    if case.get("steps"):
        found |= _compare_steps(case, cache_dir, loaded)
    if "export" in case:
        _export(loaded, case["export"])
    return found


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages the parameter and this rank holds only a shard."""
    return hasattr(parameter, "ds_tensor") and parameter.numel() == 0


def _compare_steps(case: dict[str, Any], cache_dir: str, loaded: LoadedModel) -> dict[str, Any]:
    """Take SGD steps with DeepSpeed and with plain PyTorch; return the largest difference and the largest change."""
    dense = load(case, cache_dir, zero3=False)
    if case.get("checkpointing"):
        enable_activation_checkpointing(loaded.model)
    before = whole_weights(dense.model)
    engine = _engine(loaded.model, zero3_config("float32"))
    unsharded = [name for name, p in engine.module.named_parameters() if not _is_sharded(p)]
    for _ in range(STEPS):
        engine.backward(_loss(engine, loaded))
        engine.step()
        _dense_step(dense)
    after, expected = whole_weights(engine.module), whole_weights(dense.model)
    engine.destroy()
    return {
        "difference": max(float((after[name] - expected[name]).abs().max()) for name in expected),
        "moved": max(float((expected[name] - before[name]).abs().max()) for name in expected),
        "whole_in_engine": unsharded,
    }


def _engine(model: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _dense_step(loaded: LoadedModel) -> None:
    _loss(loaded.model, loaded).backward()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(LEARNING_RATE * parameter.grad)
                parameter.grad = None


def _loss(model: nn.Module, loaded: LoadedModel) -> Tensor:
    """The loss that the model itself computes on a fixed batch, the same on every rank."""
    inputs = loaded.tokenizer(["What is this?", "Some other text of its own."], return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if loaded.objective == "classification":
        labels = torch.tensor([2, 0])
    model.train()
    result: Tensor = model(**inputs, labels=labels).loss
    return result


def _export(loaded: LoadedModel, folder: str) -> None:
    """Gather the weights on all ranks; rank 0 writes them."""
    weights = whole_weights(loaded.model)
    if torch.distributed.get_rank() == 0:
        export_model(loaded.model, loaded.tokenizer, Path(folder), weights)
    torch.distributed.barrier()


def convert_gguf(folder: str, gguf_file: str, cache_dir: str) -> str:
    """The error message that every rank gets for a GGUF file that cannot be converted."""
    torch.distributed.init_process_group("gloo")
    model = ModelConfig(name_or_path=folder, gguf_file=gguf_file)
    try:
        load_model(model, 0, zero3_config=None, dtype=torch.float32, seed=SEED, cache_dir=Path(cache_dir))
    except BadInput as error:
        return str(error)
    return "loaded"
