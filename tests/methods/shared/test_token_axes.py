"""What the two trial batches reveal about a layer's calls, and which outputs count afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cl_dist.engine.trial import trial_batches
from cl_dist.errors import ClDistError
from cl_dist.methods.shared.token_axes import Call, Trial, calls_of, counted

FIRST, SECOND = (
    {kind: mask.clone() for kind, mask in batch.token_masks.items()}
    for batch in trial_batches(
        LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, decoder_start_token_id=0)),
        "seq2seq_lm",
    )
)  # fmt: skip
(B1, L1), (B2, L2) = FIRST["input"].shape, SECOND["input"].shape
(_, T1), (_, T2) = FIRST["target"].shape, SECOND["target"].shape
R1, R2 = int(FIRST["input"].sum()), int(SECOND["input"].sum())


def reading(first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> tuple[Call, ...] | str:
    shapes = ([torch.Size(shape) for shape in each] for each in (first, second))
    return calls_of([Trial(list(each), masks) for each, masks in zip(shapes, (FIRST, SECOND), strict=True)])


def test_the_trial_batches_leave_one_reading() -> None:
    for masks in (FIRST, SECOND):
        batch = masks["input"].shape[0]
        numbers = {batch}
        for mask in masks.values():
            numbers |= {mask.shape[1], mask.numel(), int(mask.sum())}
        assert len(numbers) == 1 + 3 * 2 - (masks is SECOND), "two of a batch's sizes are the same"
    assert {B1, L1, T1, B1 * L1, R1}.isdisjoint({B2, B2 * L2, R2})


@pytest.mark.parametrize(
    ("first", "second", "call"),
    [
        ((B1, L1), (B2, L2), Call("tokens")),
        ((B1, T1), (B2, T2), Call("tokens", "target")),
        ((L1, B1), (L2, B2), Call("tokens", "input", (1, 0))),
        ((B1, 1, L1), (B2, 1, L2), Call("tokens", "input", (0, 2))),
        ((B1, L1, 4), (B2, L2, 4), Call("tokens")),
        ((B1 * L1,), (B2 * L2,), Call("flat")),
        ((B1 * T1,), (B2 * T2,), Call("flat", "target")),
        ((1, B1 * L1), (1, B2 * L2), Call("flat")),
        ((B1,), (B2,), Call("samples")),
        ((1, 8), (1, 8), Call("table")),
        ((16,), (16,), Call("table")),
        ((1, 2 * L1), (1, 2 * L2), Call("table")),  # of as many positions as the batch is long
    ],
)
def test_the_trials_identify_each_call(first: tuple[int, ...], second: tuple[int, ...], call: Call) -> None:
    assert reading([first], [second]) == (call,)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ([], [], "its forward does not run"),
        ([(B1, L1)], [(B2, L2), (B2, L2)], "it does not run equally often"),
        ([(R1,)], [(R2,)], "are not the batch's tokens"),  # packed
        ([(1, R1)], [(1, R2)], "are not the batch's tokens"),
        ([(B1 * L1,)], [(B2 * L2 - 1,)], "are not the batch's tokens"),  # an expert that got every token of one batch
        ([(B1, 8)], [(B2, 8)], "are not the batch's tokens"),  # padded by the model
    ],
)
def test_outputs_that_fit_no_tokens_have_a_reason(
    first: list[tuple[int, ...]], second: list[tuple[int, ...]], reason: str
) -> None:
    assert reason in reading(first, second)


MASK = {"input": torch.tensor([[True, True, False], [True, False, False]])}


def test_the_call_decides_where_shapes_do_not() -> None:
    """Two samples of two tokens: the same shape either way round."""
    lopsided = {"input": torch.tensor([[True, True], [False, False]])}
    assert counted(Call("tokens"), torch.Size((2, 2)), lopsided, "l").tolist() == [[True, True], [False, False]]
    turned = counted(Call("tokens", "input", (1, 0)), torch.Size((2, 2)), lopsided, "l")
    assert turned.tolist() == [[True, False], [True, False]]


def test_which_outputs_count() -> None:
    real = [True, True, False, True, False, False]
    assert counted(Call("flat"), torch.Size((6,)), MASK, "l").tolist() == real
    assert counted(Call("samples"), torch.Size((2,)), MASK, "l").tolist() == [True, True]
    three = counted(Call("tokens", "input", (0, 2)), torch.Size((2, 4, 3)), MASK, "l")
    assert torch.equal(three.expand(2, 4, 3), MASK["input"][:, None].expand(2, 4, 3))


@pytest.mark.parametrize(
    ("call", "shape"), [(Call("tokens"), (3, 2)), (Call("tokens"), (6,)), (Call("flat"), (5,)), (Call("samples"), (3,))]
)
def test_a_shape_that_differs_from_the_trials_is_an_error_that_names_the_layer(
    call: Call, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ClDistError, match=r"layer fc1: outputs of shape .* do not fit a batch of \(2, 3\) tokens"):
        counted(call, torch.Size(shape), MASK, "fc1")
