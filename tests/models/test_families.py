"""Model families beyond the built-in ones: attention, adapters, configurations in two parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_dist.config.schema import LoraConfig, ModelConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.models.check import check_positions
from cl_dist.models.export import export_model
from cl_dist.models.load import LoadedModel, check_length, load_model
from cl_dist.models.lora import add_lora, without_adapter
from cl_dist.models.structure import base_model, block_prefixes, head_prefixes, unread_parameters
from cl_dist.models.training_mode import switch_cache_off
from tests.models.conftest import SEED
from tests.zoo.families import SPECIMENS


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some of the zoo's models on disk; read-only."""
    names = ("Gemma 2", "Gemma 3, multimodal", "Mamba", "GPT-2", "OPT", "BERT", "BART", "GPT-Neo", "Laguna")
    return {name: SPECIMENS[name].build(tmp_path_factory.mktemp("zoo")) for name in names}


def loaded(folder: Path, labels: int = 3, **settings: object) -> LoadedModel:
    config = ModelConfig(name_or_path=str(folder), **settings)  # type: ignore[arg-type]
    return load_model(config, labels, zero3_config=None, dtype=torch.float32, seed=SEED, cache_dir=folder)


def adapted(zoo: dict[str, Path], name: str, *targets: str, objective: str = "auto") -> nn.Module:
    found = loaded(zoo[name], objective=objective)
    lora = LoraConfig(r=2, target_modules=targets or "all-linear")
    return add_lora(base_model(found.model), lora, found.objective, SEED, found.drawn)


def test_auto_falls_back_to_eager_without_sdpa_and_reports_it(
    zoo: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cl_dist"):
        assert loaded(zoo["GPT-2"]).model.config._attn_implementation == "sdpa"
        assert not caplog.messages
        assert loaded(zoo["Gemma 2"]).model.config._attn_implementation == "eager"
    assert caplog.messages == ["model.attention: Gemma2ForCausalLM has no sdpa, so auto uses eager"]


@pytest.mark.parametrize("name", ["Gemma 2", "Mamba", "GPT-Neo"])
def test_sdpa_is_refused_in_our_words_if_the_model_has_none(zoo: dict[str, Path], name: str) -> None:
    with pytest.raises(BadInput, match=r"^model\.attention: .*, a \w+, has no sdpa; allowed are auto and eager$"):
        loaded(zoo[name], attention="sdpa")
    assert loaded(zoo[name], attention="eager").model.config._attn_implementation == "eager"


def test_the_towers_of_a_multimodal_model_are_not_trained(zoo: dict[str, Path]) -> None:
    model = loaded(zoo["Gemma 3, multimodal"]).model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == unread_parameters(model)
    assert {name.split(".")[1] for name in frozen} == {"vision_tower", "multi_modal_projector"}
    trained = {name for name, parameter in model.named_parameters()} - frozen
    assert any(".embed_tokens." in name for name in trained)
    with_adapters = adapted(zoo, "Gemma 3, multimodal")
    adapters = [name for name, _ in with_adapters.named_parameters() if ".lora_" in name]
    assert adapters
    assert all(".language_model." in name for name in adapters)
    assert not unread_parameters(loaded(zoo["GPT-2"]).model)


def test_the_head_is_found_although_the_body_has_another_name(zoo: dict[str, Path]) -> None:
    """Llama 4 keeps its text model in `model`, although its class names `language_model` as the prefix."""
    model = loaded(zoo["OPT"]).model
    model.base_model_prefix = "language_model"
    assert head_prefixes(model) == ("lm_head",)
    assert block_prefixes(model) == ("model.decoder.layers.",)


def test_layers_that_adapters_cannot_reach_are_left_out_or_refused(zoo: dict[str, Path]) -> None:
    model = adapted(zoo, "Mamba")
    assert {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_" in name} == {
        "in_proj"
    }
    left_out = without_adapter(model) or ""
    assert left_out.startswith("model.lora.target_modules: all-linear leaves out ")
    for name in ("x_proj", "dt_proj", "out_proj"):
        assert f"mixer.{name}.weight" in left_out
    assert "in_proj" not in left_out
    with pytest.raises(BadInput, match=r"^model\.lora\.target_modules: .*dt_proj of MambaForCausalLM cannot have"):
        adapted(zoo, "Mamba", "dt_proj")


def test_a_linear_layer_with_another_forward_is_left_out(zoo: dict[str, Path]) -> None:
    """A router may subclass `nn.Linear` but return something else than its output."""

    class Router(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).softmax(-1)

    found = loaded(zoo["OPT"])
    model = base_model(found.model)
    model.model.decoder.layers[0].fc1 = Router(32, 48)
    added = add_lora(model, LoraConfig(r=2), "causal_lm", SEED)
    names = [name for name, _ in added.named_parameters() if ".lora_" in name]
    assert any(".layers.1.fc1." in name for name in names)
    assert not any(".layers.0.fc1." in name for name in names)


def test_a_layer_trained_in_full_gets_no_adapter(zoo: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"^model\.lora\.target_modules: classifier is new and already trained in full"):
        adapted(zoo, "BERT", "classifier")
    names = [name for name, parameter in adapted(zoo, "BERT").named_parameters() if parameter.requires_grad]
    pooler = [name for name in names if ".pooler." in name]
    assert pooler == [
        f"base_model.model.bert.pooler.dense.modules_to_save.default.{part}" for part in ("weight", "bias")
    ]


def test_what_peft_refuses_is_one_sentence(zoo: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_dist.models.lora.PAST_FORWARD", {})
    with pytest.raises(BadInput, match=r"^model\.lora\.target_modules: MambaForCausalLM cannot have these adapters"):
        adapted(zoo, "Mamba", "out_proj")


def test_adapters_that_peft_could_not_reload_are_refused(zoo: dict[str, Path]) -> None:
    """The libraries rename Laguna's shared experts on loading, after which an adapter's names no longer match."""
    with pytest.raises(
        BadInput, match=r"peft could not reload adapters on shared_experts\.down_proj, .* of laguna, because"
    ):
        adapted(zoo, "Laguna")
    adapted(zoo, "Laguna", "q_proj", "v_proj")


def test_an_export_keeps_the_original_cache_setting(zoo: dict[str, Path], tmp_path: Path) -> None:
    for name in ("GPT-2", "Gemma 3, multimodal"):
        found = loaded(zoo[name])
        before = json.loads(found.model.config.to_json_string())
        switch_cache_off(found.model)
        assert found.model.config.get_text_config().use_cache is False
        export_model(found.model, found.tokenizer, tmp_path / name, dict(found.model.named_parameters()))
        assert found.model.config.get_text_config().use_cache is False
        written = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert written.get("use_cache") == before.get("use_cache")
        assert written.get("text_config", {}).get("use_cache") == before.get("text_config", {}).get("use_cache")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "OPT",
            {"max_length": 65, "max_target_length": 8},
            r"train\.max_length: 65 .* has 64 positions; .* at most 64",
        ),
        ("BART", {"max_length": 65}, r"train\.max_length: 65 is too long"),
        (
            "BART",
            {"max_length": 64, "max_target_length": 65},
            r"train\.max_target_length: 65 .* decoder has 64 positions",
        ),
    ],
)
def test_lengths_beyond_the_last_position_are_refused_before_and_after_loading(
    zoo: dict[str, Path], name: str, settings: dict[str, int], message: str
) -> None:
    train = TrainConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=message):
        check_positions(ModelConfig(name_or_path=str(zoo[name])), train)
    with pytest.raises(BadInput, match=message):
        check_length(loaded(zoo[name]), train.max_length, train.max_target_length)
    fitting = TrainConfig(max_length=64, max_target_length=32)
    check_positions(ModelConfig(name_or_path=str(zoo[name])), fitting)
    check_length(loaded(zoo[name]), fitting.max_length, fitting.max_target_length)


def test_a_decoder_without_a_first_token_is_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    for file in zoo["BART"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": None}), encoding="utf-8")
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"decoder_start_token_id": 2}), encoding="utf-8")
    assert loaded(tmp_path).model.config.decoder_start_token_id == 2
    generation.write_text("{}", encoding="utf-8")
    with pytest.raises(
        BadInput, match=r"says what its decoder reads first; set decoder_start_token_id in config\.json"
    ):
        loaded(tmp_path)
