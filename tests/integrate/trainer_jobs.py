"""Rank side of test_trainer: tasks trained by our engine and by transformers' Trainer, straight through and resumed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType, GradientState
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import cl_dist
from cl_dist.engine.distributed import join
from cl_dist.sharding import gather_state_dict
from tests.distributed.worlds import micro_batches, odd_model, samples
from tests.integrate.jobs import CLIP, EPS, RATE, STEPS, TASKS, Case, _masks


def deepspeed_on_cpu() -> None:
    """Let accelerate start DeepSpeed on CPUs, with Gloo: on its own it does so on accelerators only."""
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def run_cases(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Train every case both ways, in one process group."""
    join(timeout_seconds=120)
    deepspeed_on_cpu()
    return [TrainerCase(Path(folder) / str(number), **case).run() for number, case in enumerate(cases)]


def alone(folder: str) -> dict[str, Any]:
    """Two tasks in a single process that no launcher has started: as a context, and as a callback with evaluations."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    found = []
    for evaluated in (False, True):
        model, callback = odd_model("llama"), cl_dist.ContinualCallback("migu", threshold=0.7)
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=2, num_train_epochs=1, learning_rate=RATE,
            optim="adamw_torch", report_to=[], disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
            eval_strategy="steps" if evaluated else "no", eval_steps=1,
        )  # fmt: skip
        [batch] = micro_batches("llama", samples("llama", 4), 4)
        rows = [{"input_ids": ids, "labels": ids} for ids in batch.inputs["input_ids"]]
        callbacks = [callback] if evaluated else []
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
        with nullcontext(callback.session) if evaluated else cl_dist.continual(trainer, method="migu") as session:
            for _ in range(2):
                trainer.train()
        masks = _masks(session.method)
        found.append(({name: param.detach() for name, param in model.named_parameters()}, masks, session.tasks_trained))
    (plain, masks, tasks), (evaluated_too, others, more) = found
    return {
        "same": all(torch.equal(plain[name], evaluated_too[name]) for name in plain),
        "masks": len(masks) > 0 and all(torch.equal(masks[name], others[name]) for name in masks),
        "tasks": [tasks, more],
    }


class Recorder(TrainerCallback):
    """Remembers every step's masks; placed behind `ContinualCallback`."""

    def __init__(self, method: Any) -> None:
        self.method, self.masks = method, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.masks.append(_masks(self.method))


class TrainerCase(Case):
    """A script with a Trainer.

    Args:
        folder: For checkpoints.
        resume: Also train the last task again from a checkpoint inside it, in a new Trainer.
    """

    def __init__(self, folder: Path, resume: bool = False, **case: Any) -> None:
        super().__init__(script="trainer", **case)
        self.folder, self.resume = folder, resume

    def _theirs(self) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        model = self._model()
        trained = [name for name, param in model.named_parameters() if param.requires_grad]
        trainer = self._trainer(model)
        with cl_dist.continual(trainer, method=self.method) as session:
            recorder = Recorder(session.method)
            trainer.add_callback(recorder)
            for task in range(TASKS):
                session.task(f"t{task}")
                self._train(trainer, task)
        weights = self._weights(model, trained)
        if self.resume:
            again = self._again(trained)
            assert all(torch.equal(weights[name], again[name]) for name in trained), "after a resume"
        return weights, recorder.masks

    def _again(self, trained: list[str]) -> dict[str, torch.Tensor]:
        model = self._model()
        trainer = self._trainer(model)
        with cl_dist.continual(trainer, method=self.method):
            last = TASKS - 1
            self._train(trainer, last, str(self.folder / str(last) / "checkpoint-1"))
        return self._weights(model, trained)

    def _trainer(self, model: torch.nn.Module) -> Trainer:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()
        deepspeed = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 10**6, "overlap_comm": False},
        }
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        arguments = TrainingArguments(
            output_dir=str(self.folder), deepspeed=deepspeed if self.stage else None, use_cpu=not self.stage,
            per_device_train_batch_size=2, gradient_accumulation_steps=self.accumulation, num_train_epochs=1,
            learning_rate=RATE, adam_epsilon=EPS, weight_decay=0.1, max_grad_norm=CLIP, optim="adamw_torch",
            lr_scheduler_type="constant", train_sampling_strategy="sequential", report_to=[], disable_tqdm=True,
            save_strategy="steps" if self.resume else "no", save_steps=1, remove_unused_columns=False,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=self._data(0), data_collator=self._collate)

    def _train(self, trainer: Trainer, task: int, checkpoint: str | None = None) -> None:
        trainer.args.output_dir = str(self.folder / str(task))
        trainer.train_dataset = self._data(task)
        trainer.train(resume_from_checkpoint=checkpoint)

    def _data(self, task: int) -> Dataset:
        """A task's samples in the order in which accelerate hands them out: a micro-batch of every rank in turn."""
        rows = []
        for step in range(STEPS):
            batch = samples(self.family, 2 * self.accumulation * self.world, seed=100 * task + step)
            for piece in range(self.accumulation):
                for rank in range(self.world):
                    first = 2 * (rank * self.accumulation + piece)
                    rows += [{"task": task, "step": step, "number": number} for number in (first, first + 1)]
            self._all = len(batch)
        return Dataset.from_list(rows)

    def _collate(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        batch = samples(self.family, self._all, seed=100 * rows[0]["task"] + rows[0]["step"])
        [made] = micro_batches(self.family, [batch[row["number"]] for row in rows], len(rows))
        return {**made.inputs, "labels": made.labels}

    def _weights(self, model: torch.nn.Module, trained: list[str]) -> dict[str, torch.Tensor]:
        """Whole weights on every rank."""
        found = [gather_state_dict(model, wanted=lambda name, _: name in trained)]
        torch.distributed.broadcast_object_list(found)
        return found[0]
