"""What ZeRO does to the model itself: gather its weights whole, compare its replicas, take out stage 3's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch

from cl_dist.heartbeat import beat

_CHUNK = 1 << 22
"""Elements whose checksum is computed at a time, which bounds the temporary int64 tensors."""
_GATHERED_TOGETHER = 1 << 26
"""Elements that are gathered in one collective, which bounds its buffers."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_held_whole: WeakSet[torch.nn.Module] = WeakSet()
"""Models inside `gathered`."""
_HOOKS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")
"""Attributes that stage 3 sets on every module."""


def gather_state_dict(
    model: torch.nn.Module, wanted: Callable[[str, torch.nn.Parameter], bool] | None = None
) -> dict[str, torch.Tensor]:
    """Collect the model's weights in CPU memory on rank 0 (collective; the other ranks get an empty dict).

    Args:
        model: Any module, whether or not ZeRO-3 has sharded its parameters.
        wanted: Selects parameters by name and value; buffers are then left out. None collects everything.

    Returns:
        Copies under the names of `model.state_dict()`, in the model's dtype. A tied weight appears once, under its
        first name.
    """
    from deepspeed.runtime.zero import GatheredParameters

    first = torch.distributed.get_rank() == 0 if torch.distributed.is_initialized() else True
    weights: dict[str, torch.Tensor] = {}
    release_gathered(model)
    for name, param in model.named_parameters():
        if wanted is not None and not wanted(name, param):
            continue
        with GatheredParameters([param]):
            if first:
                weights[name] = param.detach().to("cpu", copy=True)
        beat()  # a large model takes longer than the watchdog's patience
    if first and wanted is None:
        persistent = model.state_dict().keys()
        buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
        weights.update({name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers})
    return weights


def whole_parameters(model: torch.nn.Module, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Yield each named parameter, whole on every rank until the next one (collective: all ranks must exhaust it).

    The tensors are views in the model's dtype; copy what must outlive the iteration.
    """
    from deepspeed.runtime.zero import GatheredParameters

    release_gathered(model)
    for name in names:
        param = model.get_parameter(name)
        with GatheredParameters([param]):
            yield param.detach()


def sharded_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that this rank does not hold whole now: what `gathered` would need."""
    return sum(param.ds_numel * param.element_size() for param in _sharded(model))


def _sharded(model: torch.nn.Module) -> list[Any]:
    return [param for param in model.parameters() if getattr(param, "ds_status", None) is not None and not _here(param)]


def _here(param: Any) -> bool:
    return bool(param.ds_status.name == "AVAILABLE")


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Hold all weights of a stage 3 engine whole on every rank inside the block (collective at its start).

    Forward passes inside then need no other rank, so ranks may run different numbers of them. Afterwards every
    parameter is as sharded as before, and the optimiser's state has not been touched. Inside, nothing else may gather
    or release weights: `gather_state_dict`, `whole_parameters` and `release_gathered` raise RuntimeError.
    """
    from deepspeed.runtime.zero import GatheredParameters

    offload, module = engine.optimizer.parameter_offload, engine.module
    # An earlier pass may have prefetched weights that it did not need in the end; wait for them and release them.
    release_gathered(module)
    with ExitStack() as stack:
        for group in _groups(_sharded(module)):
            stack.enter_context(GatheredParameters(group))
            beat()
        stack.enter_context(_without_hooks(offload))
        _held_whole.add(module)
        stack.callback(_held_whole.discard, module)
        yield


def _groups(params: Iterable[Any]) -> Iterator[list[Any]]:
    """Parameters in order, as many at a time as fit into a buffer."""
    group: list[Any] = []
    for param in params:
        if group and sum(each.ds_numel for each in group) + param.ds_numel > _GATHERED_TOGETHER:
            yield group
            group = []
        group.append(param)
    if group:
        yield group


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Take stage 3's own hooks out of the modules: they gather before a layer runs, and release after it.

    All hooks are back in their old order afterwards; other hooks work throughout.
    """
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    owners = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
    before = {key: dict(hooks) for key, hooks in owners.items()}
    own = {handle.id for handle in handles}
    for hooks in owners.values():
        for number in own.intersection(hooks):
            del hooks[number]
    try:
        yield
    finally:
        for key, hooks in owners.items():
            now = dict(hooks)
            hooks.clear()
            hooks.update({number: hook for number, hook in before[key].items() if number in own or number in now})
            hooks.update(now)


def release_gathered(model: torch.nn.Module) -> None:
    """Release what stage 3 still holds gathered after a forward pass without a backward pass, and await its prefetches.

    Stage 3 learns the order of modules from training steps. At the end of any forward pass it therefore keeps the last
    layers for backward (`stage3_max_reuse_distance`, by default 2 GB in bfloat16) and prefetches what backward would
    need. The next forward pass does not count these when it limits what it gathers, so both would add up.

    Args:
        model: The module inside the engine, while no pass is under way; at other stages nothing happens.
    """
    if model in _held_whole:
        raise RuntimeError("all weights are held whole here (sharding.gathered), and the forward passes need them so")
    in_flight = getattr(model, "ds_inflight_param_registry", None)
    if in_flight is None:
        return
    for handle in in_flight.values():
        handle.wait()
    in_flight.clear()
    params: Iterable[Any] = model.parameters()
    for param in params:
        status = getattr(param, "ds_status", None)
        if status is not None and status.name == "AVAILABLE" and not (param.ds_persist or param.ds_active_sub_modules):
            param.partition()


def release_before_forward(engine: Any) -> None:
    """Call `release_gathered` before every forward pass of a stage 3 engine, from now on.

    The hook is one of DeepSpeed's own, so that it goes when the engine is destroyed.
    """
    if (offload := getattr(engine.optimizer, "parameter_offload", None)) is not None:
        hook = engine.module.register_forward_pre_hook(lambda module, _: release_gathered(module), prepend=True)
        offload.forward_hooks.append(hook)


def replica_checksums(model: torch.nn.Module) -> tuple[list[str], torch.Tensor]:
    """Checksum the bits of every parameter that all ranks hold whole.

    Under stages 0 to 2 these are all parameters. Under stage 3 they are the ones too small to shard
    (`stage3_param_persistence_threshold`), possibly none; every other parameter exists only once.

    Args:
        model: The module inside the engine, between two steps.

    Returns:
        The names, and `(names,)` int64: equal weights have equal checksums, and changing one element always changes
        the checksum.
    """
    replicas = {name: param for name, param in model.named_parameters() if getattr(param, "ds_persist", True)}
    sums = [_checksum(param.detach().reshape(-1)) for param in replicas.values()]
    device = next(model.parameters()).device
    return list(replicas), torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _checksum(flat: torch.Tensor) -> torch.Tensor:
    """Sum the elements' bits modulo 2^64, each weighted by an odd number that grows with its position.

    An odd factor has an inverse modulo 2^64, so a change of one element cannot vanish.
    """
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        piece = bits[start : start + _CHUNK].long()
        factors = torch.arange(start, start + piece.numel(), device=flat.device).mul_(2).add_(1)
        total += (piece * factors).sum()
    return total


def remove_leftovers(model: torch.nn.Module) -> None:
    """Remove what a destroyed stage 3 engine leaves in the modules, so that the next engine installs its own hooks.

    The hooks fetch a module's parameters during backward and belong to one engine. A new engine that finds them in
    place keeps them, and backward then follows the old engine's order of modules. Parameters that one module borrows
    from another are rediscovered in the next forward pass.
    """
    for module in model.modules():
        for name in _HOOKS:
            module.__dict__.pop(name, None)
        getattr(module, "_external_params", {}).clear()
