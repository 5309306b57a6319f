"""Generated answers fit the model's positions, or the recipe is refused before training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cl_dist.config.schema import EvalConfig, ModelConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.answer_length import check_general_room, check_room
from cl_dist.evaluation.general import HarnessTasks
from cl_dist.evaluation.inference import generate
from cl_dist.evaluation.likelihood import can_pack
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Example, Task
from tests.zoo.families import POSITIONS, SPECIMENS

TRAIN = TrainConfig(max_length=POSITIONS, max_target_length=16)
LONG = Task("long", "generation", (), (Example("word " * 40, "yes"),))


def load(name: str, folder: Path) -> LoadedModel:
    config = ModelConfig(name_or_path=str(SPECIMENS[name].build(folder)))
    return load_model(config, 0, zero3_config=None, dtype=torch.float32, seed=1, cache_dir=folder)


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "MPT"])
def test_a_decoder_is_refused_exactly_where_generation_would_fail(name: str, tmp_path: Path) -> None:
    found = load(name, tmp_path)
    model = found.model.eval()
    encoder = Encoder(found.tokenizer, found.objective, TRAIN, ())
    prompt = encoder.prompt_ids(LONG.evaluation[0].prompt)
    allowed = POSITIONS - len(prompt) + 1
    check_room(model, TokenisedData(encoder), [LONG], EvalConfig(max_new_tokens=allowed))
    end = found.tokenizer.eos_token_id
    with torch.no_grad():  # so that no answer ends early
        model.get_input_embeddings().weight[end] = 0.0
        generate(model, found.tokenizer, [prompt], encoder.pad_id, allowed, synced=False)
        with pytest.raises((IndexError, RuntimeError)):
            generate(model, found.tokenizer, [prompt], encoder.pad_id, allowed + 1, synced=False)
    with pytest.raises(
        BadInput, match=rf"^eval\.max_new_tokens: {allowed + 1} tokens .* allowed: at most {allowed}, or"
    ):
        check_room(model, TokenisedData(encoder), [LONG], EvalConfig(max_new_tokens=allowed + 1))


def test_prompts_that_are_short_are_not_refused(tmp_path: Path) -> None:
    found = load("GPT-2", tmp_path)
    data = TokenisedData(Encoder(found.tokenizer, found.objective, TRAIN, ()))
    short = Task("short", "generation", (), (Example("word", "yes"),))
    check_room(found.model, data, [short], EvalConfig(max_new_tokens=50))
    with pytest.raises(BadInput, match=r"task 'long'"):
        check_room(found.model, data, [short, LONG], EvalConfig(max_new_tokens=50))


@pytest.mark.parametrize(("name", "longest"), [("BART", POSITIONS), ("T5", None)])
def test_an_encoder_decoder_needs_room_for_the_answer_alone(name: str, longest: int | None, tmp_path: Path) -> None:
    found = load(name, tmp_path)
    data = TokenisedData(Encoder(found.tokenizer, found.objective, TRAIN, ()))
    check_room(found.model, data, [LONG], EvalConfig(max_new_tokens=longest or 1000))
    if longest is not None:
        with pytest.raises(BadInput, match=rf"^eval\.max_new_tokens: {longest + 1} .* at most {longest}$"):
            check_room(found.model, data, [LONG], EvalConfig(max_new_tokens=longest + 1))


def test_a_harness_task_that_generates_past_the_last_position_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = load("GPT-2", tmp_path).model

    def tasks(kind: str, **settings: int) -> HarnessTasks:
        part = SimpleNamespace(OUTPUT_TYPE=kind, config=SimpleNamespace(generation_kwargs=settings))
        return HarnessTasks(None, {"own": {"tasks": {"own": part}, "groups": {}}})

    check_general_room(model, tasks("loglikelihood"))
    check_general_room(model, tasks("generate_until", max_gen_toks=POSITIONS - 1))
    for generating in (tasks("generate_until", max_gen_toks=POSITIONS), tasks("generate_until")):
        with pytest.raises(BadInput, match=r"^eval\.general\.tasks: own generates up to \d+ tokens, but .* has 64"):
            check_general_room(model, generating)


@pytest.mark.parametrize(("name", "longest"), [("GPT-2", POSITIONS), ("GPT-Neo", 16), ("Qwen3", 10_000)])
def test_labels_are_packed_within_positions_and_windows(name: str, longest: int, tmp_path: Path) -> None:
    model = load(name, tmp_path).model
    assert can_pack(model, longest)
    assert can_pack(model, longest + 1) == (name == "Qwen3")
