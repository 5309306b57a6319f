"""What a rank does for the zoo: one family after the other through the real parts of a run."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from cl_dist.assembly import System, build_system
from cl_dist.config.methods import KifConfig, MiguConfig
from cl_dist.config.schema import EvalConfig, LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.quiet import quiet_libraries
from cl_dist.errors import BadInput
from cl_dist.methods.base import TaskPlace
from cl_dist.models.export import export_model
from cl_dist.models.load import AUTO_CLASSES
from cl_dist.models.lora import in_adapter
from cl_dist.models.positions import longest_inputs
from cl_dist.sharding import gather_state_dict
from tests.zoo.families import POSITIONS, SPECIMENS, Specimen

TRAININGS = ("full, migu", "full, kif", "lora, migu", "lora, kif")
WORKS = "yes"
LATE = "late"


def tour(names: list[str]) -> dict[str, dict[str, Any]]:
    """Per family: how each training ended, its longest inputs and its attention."""
    join(timeout_seconds=120)
    quiet_libraries(torch.distributed.get_rank())
    return {name: _visit(SPECIMENS[name]) for name in names}


def _visit(specimen: Specimen) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        base = specimen.build(Path(scratch, "base"))
        found: dict[str, Any] = {}
        for training in TRAININGS:
            found[training] = _outcome(specimen, training, base, Path(scratch, training), found)
    return found


def _outcome(specimen: Specimen, training: str, base: Path, folder: Path, found: dict[str, Any]) -> str:
    """`yes`, `no: ` and why it is refused, or `late: ` and what came after training had begun."""
    torch.manual_seed(0)
    try:
        system = build_system(_recipe(training, base, folder), base)
    except BadInput as error:
        return f"no: {error}".replace(str(base), "MODEL")
    except Exception as error:
        return f"{LATE}: {type(error).__name__}: {error} {traceback.format_exc()[-600:]}"
    try:
        found["attention"] = system.engine.model.config._attn_implementation
        longest = longest_inputs(system.engine.model)
        found["positions"] = [longest.source, longest.target]
        return _trained(specimen, system, base, folder)
    except Exception as error:
        return f"{LATE}: {type(error).__name__}: {error} {traceback.format_exc()[-900:]}"
    finally:
        system.engine.destroy()


def _recipe(training: str, base: Path, folder: Path) -> Recipe:
    """Two tasks of two steps."""
    weights, method = training.split(", ")
    return Recipe(
        model=ModelConfig(name_or_path=str(base), lora=LoraConfig(r=2, alpha=4.0) if weights == "lora" else None),
        stream=StreamConfig(
            tasks=(TaskConfig(name="spring", format="builtin"), TaskConfig(name="summer", format="builtin")),
            max_train_samples=8,
            max_eval_samples=4,
        ),
        method=(MiguConfig(name="migu") if method == "migu" else KifConfig(name="kif"),),
        train=TrainConfig(micro_batch_size=4, learning_rate=5e-3, max_length=POSITIONS - 8, max_target_length=12),
        eval=EvalConfig(batch_size=4),
        output_dir=str(folder),
    )


def _trained(specimen: Specimen, system: System, base: Path, folder: Path) -> str:
    """Train both tasks, score them, export, and compare what plain transformers and peft load."""
    before = gather_state_dict(system.engine.model)
    for index, task in enumerate(system.tasks):
        system.engine.prepare_task(index)
        trainer = system.trainer(index)
        place = TaskPlace(index, task.name, trainer.steps, trainer.cycles, trainer.probe)
        system.engine.before_task(place)
        for step in range(trainer.steps):
            trainer.step(step)
        system.engine.after_task(place)
    system.evaluator.evaluate(system.tasks)
    after = gather_state_dict(system.engine.model)
    if all(torch.equal(after[name], before[name]) for name in after):
        return f"{LATE}: nothing was learnt"
    adapter = system.recipe.model.lora is not None
    wanted = gather_state_dict(system.engine.model, in_adapter) if adapter else after
    export_model(system.engine.model, system.loaded.tokenizer, folder, wanted)  # type: ignore[arg-type]
    inputs = _inputs(system, specimen)
    expected = _logits(system.engine.model, inputs)
    worst = max(_difference(expected, _reloaded(specimen, system, base, folder, seed), inputs) for seed in (1, 2))
    return WORKS if worst == 0.0 else f"{LATE}: what is loaded differs by {worst:g}"


def _inputs(system: System, specimen: Specimen) -> dict[str, Tensor]:
    """Two prompts of the stream, padded; an encoder-decoder reads the beginning of an answer, too."""
    prompts = [task.evaluation[0].prompt for task in system.tasks]
    batch = system.loaded.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return inputs | ({"decoder_input_ids": batch["input_ids"][:, :3]} if specimen.family == "encoder-decoder" else {})


def _logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def _reloaded(specimen: Specimen, system: System, base: Path, folder: Path, seed: int) -> torch.nn.Module:
    """The export as others load it: what a file lacks they draw at random."""
    torch.manual_seed(seed)
    auto_class = AUTO_CLASSES[specimen.objective]
    if system.recipe.model.lora is None:
        return auto_class.from_pretrained(folder, dtype=torch.float32)  # type: ignore[no-any-return]
    labels = {"num_labels": 4} if specimen.objective == "classification" else {}
    plain = auto_class.from_pretrained(base, dtype=torch.float32, **labels)
    return PeftModel.from_pretrained(plain, folder)


def _difference(expected: Tensor, model: torch.nn.Module, inputs: dict[str, Tensor]) -> float:
    return float((_logits(model, inputs) - expected).abs().max())
