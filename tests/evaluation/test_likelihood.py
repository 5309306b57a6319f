"""Label scores compared with a loop over prompts and labels, without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from cl_dist.evaluation import likelihood
from cl_dist.evaluation.likelihood import (
    can_pack,
    causal_scores,
    head_scores,
    label_groups,
    pack,
    packing_agrees,
    seq2seq_scores,
    visible_columns,
)
from cl_dist.models.structure import base_model
from tests.evaluation.tiny import (
    EOS,
    PAD,
    VOCABULARY,
    bart,
    bloom,
    full_logits_llama,
    gpt2,
    llama,
    mistral,
    roberta,
    t5,
)

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]]
LABELS = [[31, EOS], [32, 33, 34, EOS], [31, 35, EOS], [36, 37, 38, 39, 40, EOS]]
CPU = torch.device("cpu")


def causal_oracle(model: Any, prompts: Sequence[list[int]], labels: Sequence[list[int]]) -> torch.Tensor:
    """Scores from one plain forward pass per prompt and label."""
    rows = []
    for prompt in prompts:
        row = []
        for label in labels:
            logits = model(input_ids=torch.tensor([prompt + label])).logits[0].log_softmax(-1)
            row.append(sum(logits[len(prompt) + place - 1, token] for place, token in enumerate(label)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama(attention: str, packed: bool) -> None:
    model = llama(attention)
    assert model.config._attn_implementation == attention
    assert can_pack(model, columns=40)
    scores = causal_scores(model, PROMPTS, LABELS, PAD, packed)
    assert_close(scores, causal_oracle(model, PROMPTS, LABELS), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("build", [gpt2, full_logits_llama, lambda: mistral(window=40)])
def test_other_decoders_that_pack(build: Callable[[], Any]) -> None:
    model = build()
    assert can_pack(model, columns=40)
    assert_close(
        causal_scores(model, PROMPTS, LABELS, PAD, True), causal_oracle(model, PROMPTS, LABELS), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("build", [bloom, lambda: mistral(window=4)])
def test_decoders_that_do_not_pack(build: Callable[[], Any]) -> None:
    model = build()
    assert not can_pack(model, columns=40)
    assert_close(
        causal_scores(model, PROMPTS, LABELS, PAD, False), causal_oracle(model, PROMPTS, LABELS), rtol=1e-5, atol=2e-5
    )


def test_packing_check_finds_a_model_that_mixes_labels() -> None:
    sound, mixing = llama(), mistral(window=4)
    assert packing_agrees(sound, PROMPTS[0], LABELS[:2], PAD)
    assert not packing_agrees(mixing, PROMPTS[0], LABELS[:2], PAD)


@pytest.mark.parametrize("logits", [1, VOCABULARY * 4 * 7])
def test_labels_in_groups_score_the_same(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    whole = causal_scores(model, PROMPTS, LABELS, PAD, packed=True)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", logits)
    assert_close(causal_scores(model, PROMPTS, LABELS, PAD, packed=True), whole, rtol=1e-5, atol=2e-5)


def count_forwards(model: Any) -> list[int]:
    """A list that grows with every forward pass of the model."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_one_forward_for_all_labels() -> None:
    model = llama()
    calls = count_forwards(model)
    causal_scores(model, PROMPTS, LABELS, PAD, packed=True)
    assert len(calls) == 1


def test_short_batches_take_as_many_forwards_as_full_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "MAX_LOGITS", VOCABULARY * 4 * 7)
    for model, score in ((llama(), causal_scores), (t5(), seq2seq_scores)):
        calls = count_forwards(model)
        arguments = {"packed": True} if score is causal_scores else {}
        score(model, PROMPTS, LABELS, PAD, batch_size=4, **arguments)
        full = len(calls)
        score(model, PROMPTS[:1], LABELS, PAD, batch_size=4, **arguments)
        assert full > 1
        assert len(calls) == 2 * full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_give_nan(attention: str, dtype: torch.dtype) -> None:
    scores = causal_scores(llama(attention).to(dtype), PROMPTS, LABELS, PAD, packed=True)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def adapted_t5() -> Any:
    """A T5 with adapters that change its answers, also on the projections of cross-attention."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    return get_peft_model(t5(), config).eval()


@pytest.mark.parametrize("build", [t5, adapted_t5, bart])
def test_encoder_decoders(build: Callable[[], Any]) -> None:
    model = build()
    rows = [
        [-model(input_ids=torch.tensor([prompt]), labels=torch.tensor([label])).loss * len(label) for label in LABELS]
        for prompt in PROMPTS
    ]
    expected = torch.stack([torch.stack(row) for row in rows])
    assert_close(seq2seq_scores(model, PROMPTS, LABELS, PAD), expected, rtol=1e-5, atol=2e-5)


def test_t5_labels_of_one_token() -> None:
    model = t5()
    logits = model(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=torch.tensor([[PAD]])).logits
    scores = seq2seq_scores(model, PROMPTS[:1], [[EOS], [31]], PAD)
    assert_close(scores, logits[0].log_softmax(-1)[:, [EOS, 31]], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("build", [t5, adapted_t5])
def test_cross_attention_projects_each_prompt_once(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "MAX_DECODER_LABELS", 3)
    model, rows = build(), []
    base: Any = base_model(model)
    base.decoder.block[1].layer[1].EncDecAttention.k.register_forward_hook(
        lambda _module, inputs, _output: rows.append(len(inputs[0]))
    )
    seq2seq_scores(model, PROMPTS, LABELS, PAD)
    assert rows == [len(PROMPTS)]


def test_t5_labels_in_groups_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = t5()
    whole = seq2seq_scores(model, PROMPTS, LABELS, PAD)
    monkeypatch.setattr(likelihood, "MAX_DECODER_LABELS", 3)
    assert_close(seq2seq_scores(model, PROMPTS, LABELS, PAD), whole, rtol=1e-5, atol=2e-5)


def test_roberta_takes_only_the_tasks_labels() -> None:
    model = roberta(labels=5)
    expected = torch.cat([model(input_ids=torch.tensor([prompt])).logits for prompt in PROMPTS])[:, [3, 1]]
    assert_close(head_scores(model, PROMPTS, [3, 1], PAD), expected, rtol=1e-5, atol=1e-5)


TOKENS = st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=5)


@given(st.lists(TOKENS, min_size=1, max_size=4), st.lists(TOKENS, min_size=1, max_size=4))
def test_layout(prompts: list[list[int]], labels: list[list[int]]) -> None:
    """The column that predicts a token sees the prompt and the label so far, in order, at the right positions."""
    packed = pack(prompts, labels, PAD, CPU)
    visible = visible_columns(packed)
    width = packed.input_ids.shape[1]
    tail = 1 + sum(len(label) - 1 for label in labels)
    assert width == max(map(len, prompts)) + tail - 1
    for row, prompt in enumerate(prompts):
        for number, label in enumerate(labels):
            for place, column in enumerate(packed.previous[packed.label == number].tolist()):
                seen = visible[row, width - tail + column].nonzero().flatten()
                assert packed.input_ids[row, seen].tolist() == prompt + label[:place]
                assert packed.position_ids[row, seen].tolist() == list(range(len(prompt) + place))
    assert packed.targets.tolist() == [token for label in labels for token in label]
    assert visible.any(-1).all()


@given(st.lists(TOKENS, min_size=1, max_size=12), st.integers(0, 12))
def test_label_groups(labels: list[list[int]], columns: int) -> None:
    groups = label_groups(labels, columns)
    assert [label for group in groups for label in group] == labels
    assert all(len(group) == 1 or sum(map(len, group)) <= columns for group in groups)
