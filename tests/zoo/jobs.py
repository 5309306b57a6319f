"""What a rank runs for the zoo: it takes one model after another through the real parts of a run."""

from __future__ import annotations

import json
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from cl_dist.assembly import System, build_system
from cl_dist.config.schema import EvalConfig, LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig
from cl_dist.engine.distributed import join, quiet_libraries
from cl_dist.errors import BadInput
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.export import export_model
from cl_dist.models.load import AUTO_CLASSES
from cl_dist.models.lora import in_adapter
from cl_dist.models.position_settings import configured_positions
from cl_dist.models.positions import longest_inputs
from cl_dist.sharding import gather_state_dict
from tests.zoo.families import POSITIONS, SPECIMENS, Specimen

TRAININGS = ("full, migu", "full, kif", "lora, migu", "lora, kif")
WORKS = "works"
REFUSED = "refused: "
BROKEN = "broken: "
"""How a training ends: it works, it is refused with this message before the first step, or anything else."""

ROUNDING = 1e-5
"""Largest difference between logits of the same weights, relative to the largest logit: the order in which some
operations add up depends on the alignment of tensors in memory.
"""

FAR = 3 * POSITIONS
"""An input length in tokens that exceeds every position table of the zoo."""


def tour(names: list[str]) -> dict[str, dict[str, Any]]:
    """For each model: how each of the `TRAININGS` ended, its attention, and its longest inputs, both as the project
    predicts and as experiments show.
    """
    join(timeout_seconds=120)
    quiet_libraries(torch.distributed.get_rank())
    return {name: visit(SPECIMENS[name]) for name in names}


def visit(specimen: Specimen) -> dict[str, Any]:
    """Everything about one model."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        base = specimen.build(Path(scratch, "base"))
        found: dict[str, Any] = _positions(specimen, base)
        for training in TRAININGS:
            found[training] = _outcome(specimen, training, base, Path(scratch, training), found)
    return found


def _positions(specimen: Specimen, base: Path) -> dict[str, Any]:
    """Longest prompt and answer according to the loaded model, to config.json, and to experiments."""
    model = specimen.auto_class.from_pretrained(base).eval()
    predicted = longest_inputs(model)
    configured = configured_positions(json.loads((base / "config.json").read_text(encoding="utf-8")))
    answers = specimen.family == "encoder-decoder"
    tried = [_longest(model, answers, "prompt"), _longest(model, answers, "answer") if answers else None]
    return {
        "predicted": [predicted.source, predicted.target],
        "configured": [configured.source, configured.target],
        "tried": tried,
    }


def _longest(model: nn.Module, answers: bool, of: str) -> int | None:
    """The longest prompt or answer that the model's own code accepts; None if unlimited."""

    def takes(length: int) -> bool:
        prompt = {"input_ids": torch.full((1, length if of == "prompt" else 4), 99)}
        answer = {"decoder_input_ids": torch.full((1, length if of == "answer" else 4), 99)} if answers else {}
        try:
            with torch.no_grad():
                model(**prompt, **answer, attention_mask=torch.ones_like(prompt["input_ids"]))
        except (IndexError, RuntimeError):
            return False
        return True

    return None if takes(FAR) else max(length for length in range(1, FAR) if takes(length))


def _outcome(specimen: Specimen, training: str, base: Path, folder: Path, found: dict[str, Any]) -> str:
    torch.manual_seed(0)
    system = None
    try:
        system = build_system(_recipe(specimen, training, base, folder), base)
        found["attention"] = system.engine.model.config._attn_implementation
        return _trained(specimen, system, base, folder)
    except BadInput as error:
        if system is None:
            return REFUSED + str(error).replace(str(base), "MODEL")
        return f"{BROKEN}refused after the engine was built: {error}"
    except Exception as error:
        return f"{BROKEN}{type(error).__name__}: {error} {traceback.format_exc()[-900:]}"
    finally:
        if system is not None:
            system.engine.destroy()


def _recipe(specimen: Specimen, training: str, base: Path, folder: Path) -> Recipe:
    """Two tasks of two steps."""
    weights, method = training.split(", ")
    tasks = ("prose",) if specimen.objective == "masked_lm" else ("spring", "summer")
    return Recipe(
        model=ModelConfig(
            name_or_path=str(base),
            objective=specimen.objective,
            lora=LoraConfig(r=2, alpha=4.0) if weights == "lora" else None,
        ),
        stream=StreamConfig(
            tasks=tuple(TaskConfig(name=name, format="builtin") for name in tasks),
            max_train_samples=8,
            max_eval_samples=4,
        ),
        method=(MiguConfig(name="migu") if method == "migu" else KifConfig(name="kif"),),
        train=TrainConfig(
            micro_batch_size=4,
            learning_rate=5e-3,
            max_length=POSITIONS - 8,
            max_target_length=12,
            max_steps_per_task=2,
        ),
        eval=EvalConfig(batch_size=4),
        output_dir=str(folder),
    )


def _trained(specimen: Specimen, system: System, base: Path, folder: Path) -> str:
    """Train on the tasks, score them, export, and compare with what plain transformers and peft load."""
    model = system.engine.model
    before = gather_state_dict(model)
    for index in range(len(system.tasks)):
        _train(system, index)
    system.evaluator.evaluate(system.tasks)
    after = gather_state_dict(model)
    if all(torch.equal(after[name], before[name]) for name in after):
        return f"{BROKEN}no weight has changed"
    wanted = after if system.recipe.model.lora is None else gather_state_dict(model, in_adapter)
    export_model(model, system.loaded.tokenizer, folder, wanted)  # type: ignore[arg-type]
    inputs = _inputs(system, specimen)
    expected = _logits(model, inputs)
    for seed in (1, 2):  # a tensor missing from the files would be drawn at random, so differently each time
        torch.manual_seed(seed)
        loaded = _reloaded(specimen, system, base, folder)
        if other := _different(model, loaded):
            return f"{BROKEN}{len(other)} tensors differ after loading, the first is {other[0]}"
        difference = float((_logits(loaded, inputs) - expected).abs().max())
        if difference > ROUNDING * float(expected.abs().max()):
            return f"{BROKEN}the logits of the loaded model differ by {difference:g}"
    return WORKS


def _different(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Names of the tensors that are not bitwise equal to those of the run."""
    ours = model.state_dict()
    theirs = {name: tensor for name, tensor in loaded.state_dict().items() if ".original_module." not in name}
    return [name for name, tensor in theirs.items() if name not in ours or not torch.equal(tensor, ours[name])]


def _train(system: System, index: int) -> None:
    engine, name = system.engine, system.tasks[index].name
    engine.prepare_task(index)
    trainer = system.trainer(index)
    place = TaskPlace(index, name, trainer.steps, trainer.cycles, trainer.probe)
    engine.before_task(place)
    for step in range(trainer.steps):
        trainer.step(step)
    engine.method.after_task(place)


def _inputs(system: System, specimen: Specimen) -> dict[str, Tensor]:
    """Two padded texts of the stream; an encoder-decoder also reads the beginning of an answer."""
    texts = [example.prompt or example.answer for example in system.tasks[-1].evaluation[:2]]
    batch = system.loaded.tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=POSITIONS // 2
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return inputs | ({"decoder_input_ids": batch["input_ids"][:, :3]} if specimen.family == "encoder-decoder" else {})


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def _reloaded(specimen: Specimen, system: System, base: Path, folder: Path) -> nn.Module:
    """The export, loaded with plain transformers and peft."""
    auto_class = AUTO_CLASSES[specimen.objective]
    if system.recipe.model.lora is None:
        whole: nn.Module = auto_class.from_pretrained(folder, dtype=torch.float32)
        return whole
    labels = {"num_labels": len(system.tasks[0].labels)} if specimen.objective == "classification" else {}
    plain = auto_class.from_pretrained(base, dtype=torch.float32, **labels)
    return PeftModel.from_pretrained(plain, folder)
