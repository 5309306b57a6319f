"""Structured sparse fine-tuning: rows and columns of a unit belong together in every family, or it is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cl_dist.errors import BadInput
from cl_dist.methods.protocol import TaskPlace
from cl_dist.methods.s2ft.config import S2ftConfig
from cl_dist.methods.s2ft.method import S2ft
from tests.methods.given.test_given import exported
from tests.recipes import write_recipe
from tests.zygote import Zygote

ALL = ("value", "output", "up", "gate", "down")
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 24, "pad_token_id": 0,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)),
    "grouped": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, dropout=0)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "gated-t5": lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}
FUSED = ("gpt2", "neox")


def prepared(model: nn.Module, **settings: Any) -> S2ft:
    method = S2ft(S2ftConfig(name="s2ft", **{"matrices": ALL, **settings}))
    method.prepare_model(model, seed=3)
    return method


def output(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 14).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**inputs, **decoder).logits


@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("family", MODELS)
def test_what_a_unit_computes_reaches_the_model_through_its_columns_alone(family: str, kind: str) -> None:
    """Without the columns of the chosen units, their rows make no difference; without others they do."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    share = {"heads": 0.0, "channels": 0.0, kind: 0.5}
    if kind == "heads" and family in FUSED:
        with pytest.raises(BadInput, match=r"method.heads: .* has no separate value and output matrices"):
            prepared(model, **share)
        return
    method = prepared(model, **share)
    chosen = method.choose(TaskPlace(0, "t", 1))
    parts = {part.part.weight: part for part in method._parts}
    weights = {name: model.get_parameter(name) for name in parts}
    shifted = {name: (index + 1) % parts[name].size for name, index in chosen.items()}  # other ones, but as many

    def without(columns: dict[str, torch.Tensor], moved: bool) -> torch.Tensor:
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, part in parts.items():
                if part.part.along == "columns":
                    weights[name].index_fill_(part.axis, columns[name], 0.0)
                elif moved:
                    weights[name].index_copy_(
                        part.axis, chosen[name], weights[name].index_select(part.axis, chosen[name]) + 1
                    )
            found = output(model)
            for name, weight in weights.items():
                weight.copy_(before[name])
        return found

    assert any(part.part.along == "rows" for part in parts.values())
    assert torch.equal(without(chosen, True), without(chosen, False))
    assert not torch.equal(without(shifted, True), without(shifted, False))


def test_nothing_but_the_units_is_trained() -> None:
    model = MODELS["bert"]()
    parts = prepared(model, channels=0.5, heads=0.5)._parts
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {part.part.weight.replace("weight", "kept") for part in parts}


def test_shares_are_spread_over_the_blocks_and_drawn_anew() -> None:
    """6 of 80 channels, 3 in each block; 3 of 8 heads, one in the first."""
    method = prepared(MODELS["llama"](), channels=0.08, heads=0.4)
    first, second = (method.choose(TaskPlace(task, "t", 1)) for task in (0, 1))
    counts = {name.removeprefix("model.layers."): len(index) for name, index in first.items()}
    assert [counts[f"{n}.mlp.{m}_proj.weight"] for n in (0, 1) for m in ("up", "gate", "down")] == [3] * 6
    assert [counts[f"{n}.self_attn.{m}_proj.weight"] for n in (0, 1) for m in "vo"] == [8, 8, 16, 16]
    assert first["model.layers.0.self_attn.v_proj.weight"].remainder(8).tolist() == list(range(8)), "a whole head"
    for block in (0, 1):
        up, gate, down = (first[f"model.layers.{block}.mlp.{m}_proj.weight"] for m in ("up", "gate", "down"))
        assert torch.equal(up, down)
        assert torch.equal(gate, down)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    again = prepared(MODELS["llama"](), channels=0.08, heads=0.4).choose(TaskPlace(0, "t", 1))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (MODELS["gpt2"], {"heads": 0.5}, "its blocks have transformer.h.*.attn.c_attn.weight"),
        (lambda: Phi3ForCausalLM(Phi3Config(**SIZES)), {}, "mlp.gate_up_proj.weight"),
        (lambda: MixtralForCausalLM(MixtralConfig(**SIZES)), {}, "s2ft cannot train a part of model.layers.*.mlp"),
        (MODELS["gpt2"], {"matrices": ("gate",)}, "method.matrices: the model has no gate matrix to train"),
        (MODELS["llama"], {"channels": 0.001}, "method.channels: 0.001 of the model's channels is none at all"),
    ],
)
def test_other_models_are_refused_by_name(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        prepared(model(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("heads=0.5, method.matrices=[down]", "trains no part of the heads that method.heads chooses"),
        ("channels=0", "method.channels: 0 with method.heads: 0 trains nothing"),
        ("matrices=[query]", "method.matrices"),
    ],
)
def test_settings_that_train_nothing_are_refused(zygote: Zygote, tmp_path: Path, settings: str, message: str) -> None:
    recipe = write_recipe(tmp_path, method={"name": "s2ft"})
    changes = [word for each in settings.split(", method.") for word in ("--set", f"method.{each}")]
    outcome = zygote.run(["run", str(recipe), *changes], tmp_path, world=1, timeout=120)
    assert outcome.codes == [2]
    assert message in outcome.output[0]


def test_a_run_moves_nothing_else(zygote: Zygote, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        method={"name": "s2ft", "channels": 0.1},
        zero={"stage": 3},
        stream={"tasks": [{"name": name, "format": "builtin"} for name in ("spring", "summer")],
                "max_train_samples": 24, "max_eval_samples": 4},
        eval={"before_training": False},
    )  # fmt: skip
    outcome = zygote.run(["run", str(recipe), "--debug"], tmp_path, world=2, timeout=600)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    before, after = exported(tmp_path / "run", "01-spring"), exported(tmp_path / "run", "02-summer")
    moved = {name: int((weight != before[name]).any(0).sum()) for name, weight in after.items()}
    channels = {name: weight.shape[1] for name, weight in after.items() if name.endswith("down_proj.weight")}
    assert {name for name, number in moved.items() if number} == set(channels)
    assert sum(moved.values()) == int(0.1 * sum(channels.values()))
