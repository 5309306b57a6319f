"""Rank side of tests/sharding: one tiny model under every layout of DeepSpeed's state, beside the same model whole."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters

from cl_dist.engine.distributed import join
from cl_dist.errors import ClDistError
from cl_dist.sharding import (
    RowFreezer,
    Shard,
    ShardView,
    SteppedGradients,
    gather_state_dict,
    release_before_forward,
    replica_checksums,
    whole_parameters,
)
from cl_dist.sharding import gathered as gathered_whole
from cl_dist.sharding.model import release_gathered
from tests.sharding import map_jobs

CLIP, RATE, DECAY, EPS = 0.05, 0.1, 0.1, 1e-3
ROWS = "body.0.weight"
"""The parameter whose odd rows the freezer keeps: 7 rows of 5, so that ranks cut it inside a row."""


class Tiny(torch.nn.Module):
    """Two trained layers of odd sizes, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = torch.nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mean square of the scaled outputs."""
        return ((self.body(self.frozen(x)) * self.scale) ** 2).mean()


def run(layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By name of a layout, what this rank saw of it."""
    join(timeout_seconds=120)
    reports: dict[str, Any] = {name: Look(**settings).report() for name, settings in layouts.items()}
    return {
        **reports,
        "refused": _refused(),
        "late copy": _late_copy(),
        "between passes": _between_passes(),
        "maps": map_jobs.look(),
    }


class Look:
    """One engine, stepped once, skipped once, and edited, with what is seen of its shards on the way."""

    def __init__(self, stage: int, dtype: str = "float32", more: dict[str, Any] | None = None) -> None:
        self.dtype = getattr(torch, dtype)
        self.dense = Tiny().to(self.dtype)
        self.engine = _engine(copy.deepcopy(self.dense), stage, dtype == "bfloat16", more or {})
        self.model = self.engine.module
        self.shards = ShardView(self.engine)
        self.found: dict[str, Any] = {"names": self.shards.names, "calls": []}
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.shards.on_boundary(
            self._before, lambda: self.found["calls"].append("after"), self._allowed,
            lambda: self.found["calls"].append("skipped"),
        )  # fmt: skip
        self.allow = True

    def report(self) -> dict[str, Any]:
        """Everything that the tests compare; what is named `error` is a difference from the whole model."""
        found = self.found
        found["step before"] = self.shards.optimizer_step
        self.shards.allocate_moments(step=4)
        found["step set"] = self.shards.optimizer_step
        self._one_step()
        self._one_skipped_step()
        self._edits()
        self._whole_model()
        self.engine.destroy()
        return found

    def _backward(self) -> None:
        x = torch.randn(4 * self.world, 5, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        self.dense.zero_grad()
        self.dense(x).backward()
        self.engine.backward(self.engine(x[4 * self.rank : 4 * (self.rank + 1)]))

    def _one_step(self) -> None:
        """Clipped, with the odd rows of one matrix frozen."""
        freezer = RowFreezer(self.shards)
        keep = torch.arange(7) % 2 == 0
        freezer.freeze({ROWS: keep})
        taken: dict[str, torch.Tensor] = {}
        moved = []

        def take(gradients: Any) -> None:
            for name, shard in gradients.items():
                taken[name] = self._difference(shard, self._clipped(name))
                master = self.shards.master(name)
                assert master is not None
                moved.append(not torch.equal(master.data, before[name].data))

        stepped = SteppedGradients(self.shards, take)
        dense = _DenseStep(self.shards)
        before = self._state()
        self.shards.set_learning_rate(RATE)
        self._backward()
        self.engine.step()
        after = self._state()
        odd = ~keep.repeat_interleave(5)
        pairs = [(before[key], after[key]) for key in before if key.endswith(ROWS)]
        found = self.found
        found["frozen moved"] = sum(int((a.data != b.data)[odd[a.start : a.stop]].sum()) for a, b in pairs)
        found["kept still"] = sum(int((a.data == b.data)[~odd[a.start : a.stop]].sum()) for a, b in pairs)
        found["taken error"], found["taken"] = max(map(float, taken.values()), default=0.0), sorted(taken)
        found["taken after the update"] = all(moved)
        found["step after"] = self.shards.optimizer_step
        found["frozen bits"] = dense.differences(odd)
        freezer.remove()
        freezer.remove()  # an engine that ends detaches its methods, which may have been detached already
        stepped.remove()
        dense.remove()

    def _before(self) -> None:
        """Between reduction and update: every view of the gradient."""
        found = self.found
        found["calls"].append("before")
        held = {name: self.shards.gradient(name) for name in self.shards.names}
        found["gradient error"] = max(float(self._difference(s, self._grad(n))) for n, s in held.items() if s)
        own = {name: self.shards.own_gradient(name) for name in self.shards.names}
        found["own spans"] = {name: [s.start, s.stop] for name, s in own.items() if s}
        found["own error"] = max((float(self._difference(s, self._grad(n))) for n, s in own.items() if s), default=0.0)
        sums = torch.tensor([sum(float(s.data.double().square().sum()) for s in own.values() if s)])
        whole = sum(float(self._grad(name).double().square().sum()) for name in self.shards.names)
        found["sum error"] = abs(float(self.shards.sum_over_ranks(sums)) - whole) / whole
        found["non-finite"] = [self.shards.non_finite_gradient()]
        # Doubling everything changes no clipped gradient, provided that clipping sees the new norm.
        for shard in own.values():
            if shard is not None:
                shard.data.mul_(2)
        self.shards.own_gradients_changed()
        found["edited"] = sorted(self.shards.edited)

    def _allowed(self) -> bool:
        self.found["calls"].append("allowed")
        if not self.allow:
            self.found["non-finite"].append(self.shards.non_finite_gradient())
            self.found["norm is finite"] = bool(self.shards.gradient_norm().isfinite())
        return self.allow

    def _one_skipped_step(self) -> None:
        """With a gradient of NaN, which reaches nothing."""
        before, self.allow = self._state(), False
        weights = self._weights()
        handle = dict(self.model.named_parameters())[ROWS].register_hook(lambda gradient: gradient * float("nan"))
        self._backward()
        handle.remove()
        self.engine.step()
        after = self._state()
        self.found["skip moved"] = [key for key in before if not torch.equal(before[key].data, after[key].data)]
        self.found["skip moved"] += [n for n, w in self._weights().items() if not torch.equal(w, weights[n])]
        self.found["step after skip"] = self.shards.optimizer_step

    def _edits(self) -> None:
        """What is written to masters and frozen shares arrives in every rank's model."""
        found = self.found
        found["spans"] = {n: [s.start, s.stop] for n in self.shards.names if (s := self.shards.master(n))}
        frozen = self.shards.frozen(["frozen.weight"])
        found["frozen spans"] = {name: [s.start, s.stop] for name, s in frozen.items()}
        for key, shard in {**{n: self.shards.master(n) for n in self.shards.names}, **frozen}.items():
            if shard is not None:
                shard.data.copy_(_numbers(key, shard.start, shard.stop))
        # Looked at before anything else gathers small parameters and partitions them again.
        self.shards.publish()
        found["after masters"] = self._checksums()
        self.shards.publish_frozen(["frozen.weight"])
        found["checksums"] = self._checksums()
        found["published"] = all(
            torch.equal(weight.flatten().float(), _numbers(name, 0, weight.numel()))
            for name, weight in self._weights().items()
        )
        self.shards.reset_optimizer()
        moments = [moment for name in self.shards.names for moment in self.shards.moments(name).values()]
        found["reset"] = not any(bool(moment.data.any()) for moment in moments) and self.shards.optimizer_step == 0

    def _whole_model(self) -> None:
        weights = self._weights()
        gathered = gather_state_dict(self.model)
        self.found["gathered"] = {name: _equals(tensor, weights, name) for name, tensor in gathered.items()}
        self.found["wanted"] = sorted(gather_state_dict(self.model, lambda name, param: param.requires_grad))
        both = [tensor.clone() for tensor in whole_parameters(self.model, ["frozen.weight", ROWS])]
        self.found["whole"] = torch.equal(both[0], weights["frozen.weight"]) and torch.equal(both[1], weights[ROWS])

    def _checksums(self) -> dict[str, int]:
        names, sums = replica_checksums(self.model)
        return dict(zip(names, sums.tolist(), strict=True))

    def _grad(self, name: str) -> torch.Tensor:
        grad = self.dense.get_parameter(name).grad
        assert grad is not None
        return grad.flatten().float()

    def _clipped(self, name: str) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm([self._grad(each) for each in self.shards.names])
        return self._grad(name) * min(1.0, CLIP / float(norm))

    def _difference(self, shard: Shard, flat: torch.Tensor) -> torch.Tensor:
        return (shard.data.float() - flat[shard.start : shard.stop]).abs().max() / flat.abs().max()

    def _state(self) -> dict[str, Shard]:
        """Copies of what this rank holds of masters and moments."""
        held = {f"master/{name}": self.shards.master(name) for name in self.shards.names}
        for name in self.shards.names:
            held.update({f"{key}/{name}": shard for key, shard in self.shards.moments(name).items()})
        copies = {key: Shard(shard.start, shard.data.clone()) for key, shard in held.items() if shard is not None}
        return copies | {key.removeprefix("master/"): s for key, s in copies.items() if key.startswith("master/")}

    def _weights(self) -> dict[str, torch.Tensor]:
        weights = {}
        for name, param in self.model.named_parameters():
            with GatheredParameters([param]):
                weights[name] = param.detach().clone()
        return weights


def _numbers(name: str, start: int, stop: int) -> torch.Tensor:
    """Numbers that differ between elements and between parameters, exact in bfloat16 too."""
    return torch.arange(start, stop, dtype=torch.float32) + len(name)


def _equals(tensor: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> bool:
    return torch.equal(tensor, weights[name]) if name in weights else bool((tensor == 2.0).all())


class _DenseStep:
    """Torch's own step on every tensor that the inner optimiser steps, followed by putting back the frozen rows."""

    def __init__(self, shards: ShardView) -> None:
        self._shards, inner = shards, shards.layout.inner
        self._before = {id(flat): self._tensors(flat) for flat in shards.layout.flat_tensors()}
        self._gradients: dict[int, torch.Tensor] = {}
        self._handle = inner.register_step_post_hook(self._take)

    def _tensors(self, flat: torch.Tensor) -> list[torch.Tensor]:
        state = self._shards.layout.inner.state[flat]
        return [tensor.detach().clone().view(-1) for tensor in (flat, state["exp_avg"], state["exp_avg_sq"])]

    def _take(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            self._gradients |= {id(flat): flat.grad.clone().view(-1) for flat in group["params"]}

    def differences(self, frozen: torch.Tensor) -> int:
        """Elements of masters and moments, padding included, that are not as after torch's step."""
        param = self._shards.params[ROWS]
        at, wrong = self._shards.layout.address(param), 0
        for flat in self._shards.layout.flat_tensors():
            before = self._before[id(flat)]
            after = [tensor.clone() for tensor in before]
            step = self._shards.layout.inner.state[flat]["step"]
            torch._fused_adamw_(
                [after[0]], [self._gradients[id(flat)]], [after[1]], [after[2]], [], [step], lr=RATE, beta1=0.9,
                beta2=0.999, weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
            if at is not None and at.flat is flat:
                for new, old in zip(after, before, strict=True):
                    piece, rows = slice(at.offset, at.offset + at.numel), frozen[at.start : at.start + at.numel]
                    new[piece] = torch.where(rows, old[piece], new[piece])
            wrong += sum(int((a != b).sum()) for a, b in zip(self._tensors(flat), after, strict=True))
        return wrong

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


def _engine(model: torch.nn.Module, stage: int, bfloat16: bool, more: dict[str, Any]) -> Any:
    trained = [param for param in model.parameters() if param.requires_grad]
    fused = more.pop("fused", True)
    section = {"stage": stage, **more.pop("zero_optimization", {})}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        **more,
    }
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=DECAY, eps=EPS, fused=fused)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _refused() -> list[str]:
    engine = _engine(Tiny(), 2, False, {"zero_optimization": {"round_robin_gradients": True}})
    try:
        ShardView(engine)
    except ClDistError as error:
        return [str(error)]
    finally:
        engine.destroy()
    return []


class _LateCopy:
    """In place of a GPU's event: the gradients arrive in the CPU's memory only once somebody waits for them."""

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self._buffers, self._values = buffers, [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.fill_(float("nan"))

    def synchronize(self) -> None:
        """Finish the copies."""
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)


def _late_copy() -> dict[str, bool]:
    """Whether `allowed` and `before` see the gradients of an offloaded optimiser whose copies are still under way."""
    engine = _engine(Tiny(), 2, False, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    shards, seen = ShardView(engine), {}

    def look(when: str) -> bool:
        seen[when] = bool(shards.gradient_norm().isfinite()) and shards.non_finite_gradient() is None
        return True

    def before() -> None:
        look("before")

    shards.on_boundary(before, lambda: None, lambda: look("allowed"))
    engine.backward(engine(torch.ones(4, 5)))
    copy_under_way = _LateCopy([group.grad for group in engine.optimizer.single_partition_of_fp32_groups])
    engine.optimizer._pending_offload_events["stream"] = copy_under_way
    engine.step()
    engine.destroy()
    return seen


def _between_passes() -> dict[str, Any]:
    """What stays gathered around forward passes without backward, in a model of which four layers may be gathered."""
    layers, width = 12, 32
    torch.manual_seed(4)
    body = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    dense = [layer.weight.detach().clone() for layer in body]
    matrix = width * width
    limits = {"max_live_parameters": 4, "max_reuse_distance": 4, "prefetch_bucket_size": 2}
    settings = {f"stage3_{name}": count * matrix for name, count in limits.items()}
    engine = _engine(body, 3, False, {"zero_optimization": {**settings, "stage3_param_persistence_threshold": 0}})
    release_before_forward(engine)

    def gathered(status: str = "AVAILABLE") -> int:
        return sum(param.ds_status.name == status for param in engine.module.parameters())

    at_start: list[int] = []
    engine.module.register_forward_pre_hook(lambda *_: at_start.append(gathered()))
    for group in engine.optimizer.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(3):  # until stage 3 knows the order of modules
        engine.backward(engine(torch.ones(2, width)).sum())
        engine.step()
    kept = []
    with torch.no_grad():
        for _ in range(3):
            engine(torch.ones(2, width))
            kept.append((gathered(), gathered("INFLIGHT")))
    with gathered_whole(engine):
        refused = []
        for release in (gather_state_dict, release_gathered, lambda model: list(whole_parameters(model, ["0.weight"]))):
            try:
                release(engine.module)
            except RuntimeError as error:
                refused.append(str(error))
        held = gathered()
    collected = gather_state_dict(engine.module)
    equal = all(torch.equal(collected[f"{number}.weight"], weight) for number, weight in enumerate(dense) if collected)
    return {
        "refused": refused,
        "held": held,
        "kept": kept,
        "at start": at_start,
        "after collecting": gathered(),
        "equal": equal,
    }
