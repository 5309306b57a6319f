from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig

from cl_dist.config.load import load_recipe
from cl_dist.errors import BadInput
from cl_dist.planning.trace import ACTIVATIONS, GRADIENTS, Ledger, Storages, trace_step
from tests.planning.models import LLAMA2_7B, llama, planned

META = torch.device("meta")


def test_a_ledger_remembers_what_was_held_at_the_peak() -> None:
    ledger = Ledger()
    ledger.add("a", 10)
    ledger.add("b", 5)
    ledger.add("a", -10)
    ledger.briefly("c", 4)
    assert ledger.peak == {"a": 10, "b": 5}
    assert ledger.held["b"] == 5
    ledger.restart()
    assert sum(ledger.peak.values()) == 5


def test_each_piece_of_memory_counts_once_and_until_it_is_freed() -> None:
    ledger = Ledger()
    with Storages(ledger):
        first = torch.empty(100, device=META)
        view = first[10:].view(9, 10)
        assert ledger.held[ACTIVATIONS] == 400
        second = view * 2
        assert ledger.held[ACTIVATIONS] == 400 + 360
        del first
        assert ledger.held[ACTIVATIONS] == 760  # the view still holds it
        del view
        assert ledger.held[ACTIVATIONS] == 360
        del second
    assert ledger.held[ACTIVATIONS] == 0
    assert ledger.peak[ACTIVATIONS] == 760


def test_gradients_count_as_such_and_are_gone_afterwards() -> None:
    setup, shape = planned(stage=0)
    trace = trace_step(setup, shape)
    assert 0 < trace.peak[GRADIENTS] <= shape.nbytes
    assert all(parameter.grad is None for parameter in shape.model.parameters())
    assert trace_step(setup, shape) == trace


def test_activations_grow_with_layers_and_samples() -> None:
    def saved(layers: int, samples: int) -> int:
        setup, shape = planned(config=llama(num_hidden_layers=layers), micro_batch_size=samples, max_target_length=40)
        return trace_step(setup, shape).saved

    per_layer = saved(3, 2) - saved(2, 2)
    assert per_layer > 0
    assert saved(6, 2) - saved(3, 2) == 3 * per_layer
    per_sample = saved(2, 3) - saved(2, 2)
    assert saved(2, 4) - saved(2, 3) == per_sample


def test_fused_attention_saves_no_probability_for_each_pair_of_tokens() -> None:
    def per_layer(tokens: int) -> int:
        one, two = (
            planned(config=llama(num_hidden_layers=layers), max_length=tokens, device="cuda") for layers in (1, 2)
        )
        return trace_step(*two).saved - trace_step(*one).saved

    # Only the mask grows with the square of the tokens: one float32 for each pair, not one per head besides.
    square = per_layer(256) - 2 * per_layer(128)
    assert square == pytest.approx(4 * 2 * (256**2 - 2 * 128**2), abs=64)  # a few numbers for dropout


def test_checkpointing_keeps_only_the_blocks_inputs() -> None:
    plain = trace_step(*planned(config=llama(num_hidden_layers=8)))
    recomputed = trace_step(*planned(config=llama(num_hidden_layers=8), activation_checkpointing=True))
    assert recomputed.saved < plain.saved / 4
    deeper = trace_step(*planned(config=llama(num_hidden_layers=9), activation_checkpointing=True))
    assert deeper.saved - recomputed.saved == 2 * 32 * 64 * 4  # samples, tokens, width, bytes


def test_stage_2_releases_gradients_and_stage_0_keeps_them() -> None:
    kept = trace_step(*planned(stage=0, gradient_accumulation=2)).peak[GRADIENTS]
    zero = {"reduce_bucket_size": 10_000}
    setup, shape = planned(stage=2, world=4, gradient_accumulation=2, zero=zero)
    reduced = trace_step(setup, shape).peak.get(GRADIENTS, 0)
    assert reduced < kept == shape.nbytes


@pytest.mark.slow
def test_a_7b_model_takes_seconds() -> None:
    setup, shape = planned(stage=2, config=llama(vocab_size=32000, **LLAMA2_7B), dtype="bfloat16", max_length=512)
    trace = trace_step(setup, shape)
    # 34 s b h bytes for a layer's activations in 16 bits is what Korthikanti et al. (arXiv 2205.05198) derive for a
    # layer with dropout and a GELU; a Llama saves float32 copies in its norms, and two products in its MLP.
    derived = 34 * 512 * 2 * 4096 * 32
    assert derived < trace.saved < 2.5 * derived


def test_every_position_of_a_plain_text_has_logits() -> None:
    setup, shape = planned(1, 0, max_length=32, max_target_length=4)
    texts, _ = load_recipe("quickstart", ("stream.tasks=[{name: a, format: text, path: nowhere}]",))
    documents = replace(setup, recipe=replace(setup.recipe, stream=texts.stream))
    assert setup.predicted("causal_lm") == 2 * 4  # two samples with an answer each
    assert documents.predicted("causal_lm") == setup.predicted("masked_lm") == 31
    assert setup.predicted("seq2seq_lm") == 4
    more = trace_step(documents, shape).peak[ACTIVATIONS] - trace_step(setup, shape).peak[ACTIVATIONS]
    assert more >= 2 * (31 - 8) * 128 * 4  # samples, positions, vocabulary, bytes


def test_experts_need_no_numbers() -> None:
    """The products of a mixture, forward and backward, in both precisions."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    found = {}
    for dtype in ("float32", "bfloat16"):
        setup, shape = planned(stage=0, config=config, dtype=dtype)
        trace = trace_step(setup, shape)
        assert 0 < trace.peak[GRADIENTS] <= shape.nbytes
        assert all(parameter.grad is None for parameter in shape.model.parameters())
        found[dtype] = trace.saved
    assert found["bfloat16"] < found["float32"]


def test_a_model_that_needs_numbers_is_refused() -> None:
    setup, shape = planned(stage=0)
    shape.model.register_forward_pre_hook(lambda *_: torch.ones((), device=META).item())
    with pytest.raises(BadInput, match="cannot be planned, because a training pass over it does not work"):
        trace_step(setup, shape)
