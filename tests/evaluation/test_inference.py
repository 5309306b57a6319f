"""Padding, and batched generation compared with transformers' own, one prompt at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from cl_dist.evaluation.inference import generate, pad_side
from tests.evaluation.tiny import EOS, PAD, llama, t5, word_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]]
NEW_TOKENS = 8


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def one_by_one(model: Any, tokenizer: PreTrainedTokenizerFast, first_new: int | None) -> list[str]:
    """Greedy texts by the model's own generate; `first_new` is where new tokens start, None for after the prompt."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        sequence = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )[0]
        start = len(prompt) if first_new is None else first_new
        texts += tokenizer.batch_decode([sequence[start:]], skip_special_tokens=True)
    return texts


def texts_of(model: Any, tokenizer: PreTrainedTokenizerFast, new_tokens: int = NEW_TOKENS) -> list[str]:
    """The text generated from the prompts."""
    found = generate(model, tokenizer, PROMPTS, PAD, new_tokens, synced=False)
    return [tokenizer.decode(each.ids, skip_special_tokens=True) for each in found]


def test_llama(tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    texts = texts_of(model, tokenizer)
    assert texts == one_by_one(model, tokenizer, None)
    assert len({len(text.split()) for text in texts}) > 1, "one sequence at least should end early"


def test_llama_with_adapters(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = texts_of(llama(), tokenizer)
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.eval()
    texts = texts_of(model, tokenizer)
    assert texts == one_by_one(model, tokenizer, None)
    assert texts != plain


def test_t5(tokenizer: PreTrainedTokenizerFast) -> None:
    model = t5()
    assert texts_of(model, tokenizer) == one_by_one(model, tokenizer, 1)


def test_start_of_the_decoder_is_not_part_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 5
    texts = texts_of(model, tokenizer)
    assert texts == one_by_one(model, tokenizer, 1)
    assert max(len(text.split()) for text in texts) <= NEW_TOKENS


def test_settings_of_the_model_play_no_part(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    expected = texts_of(model, tokenizer)
    settings = model.generation_config
    settings.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, min_new_tokens=7, max_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts_of(model, tokenizer) == expected
    assert model.generation_config is settings
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_limit_of_new_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = texts_of(llama(), tokenizer, 3)
    assert max(len(text.split()) for text in texts) == 3


@pytest.mark.parametrize("build", [llama, t5])
def test_ends_with_the_last_sequence(build: Callable[[], Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model = build()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 3  # likely ends
    ends: dict[int, int] = {}
    for word in range(2, 22):
        sequence = model.generate(torch.tensor([[5, word]]), do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        new = sequence[1 if model.config.is_encoder_decoder else 2 :]
        if EOS in new:
            ends[word] = new.index(EOS) + 1
    assert ends, "one sequence at least should end early"
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    generate(model, tokenizer, [[5, word] for word in ends], PAD, 10 * NEW_TOKENS, synced=False)
    assert len(forwards) == max(ends.values())


@pytest.mark.parametrize("build", [llama, t5])
def test_what_the_limit_has_cut_is_known(build: Callable[[], Any], tokenizer: PreTrainedTokenizerFast) -> None:
    found = generate(build(), tokenizer, PROMPTS, PAD, NEW_TOKENS, synced=False)
    assert [each.cut for each in found] == [EOS not in each.ids for each in found]
    assert [each.cut for each in found] == [len(each.ids) == NEW_TOKENS and each.ids[-1] != EOS for each in found]


def test_other_tokens_end_an_answer_too(tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama()
    whole = generate(model, tokenizer, PROMPTS, PAD, NEW_TOKENS, synced=False)
    stop = next(each.ids[1] for each in whole if len(each.ids) > 2)
    stopped = generate(model, tokenizer, PROMPTS, PAD, NEW_TOKENS, synced=False, stops=[EOS, stop])
    for before, after in zip(whole, stopped, strict=True):
        end = before.ids.index(stop) + 1 if stop in before.ids else len(before.ids)
        assert after.ids == before.ids[:end]
        assert after.cut == (before.cut and stop not in before.ids)


def test_pad_side() -> None:
    ids, mask = pad_side([[1, 2, 3], [4]], 9, "left", torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_side([[1, 2, 3], [4]], 9, "right", torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
