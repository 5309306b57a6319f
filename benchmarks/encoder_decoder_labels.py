#!/usr/bin/env python3
"""Label scoring with an encoder-decoder: cross-attention's keys and values once per prompt versus once per label.

Usage:
    OMP_NUM_THREADS=1 python benchmarks/encoder_decoder_labels.py [--pairs 9] [--tokens 256] [--labels 14]

A T5 with 6 + 6 layers and random weights scores one batch both ways and generates 6 tokens greedily, in turns. Ratios
are between the times of the same turn, in CPU seconds of this process. "Once a label" repeats the encoder's output for
every label.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from cl_dist.evaluation.likelihood import MAX_DECODER_LABELS, log_probabilities, seq2seq_scores
from cl_dist.tasks.collate import pad
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import IGNORE

VOCABULARY, PAD, EOS = 4096, 0, 1
BATCH, LABEL_TOKENS = 8, 3


def main() -> None:
    """Measure, and print the median, smallest and largest ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--labels", type=int, default=14)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = make_model()
    prompts = torch.randint(2, VOCABULARY, (BATCH, options.tokens)).tolist()
    labels = [[*torch.randint(2, VOCABULARY, (LABEL_TOKENS,)).tolist(), EOS] for _ in range(options.labels)]
    with torch.no_grad():
        report(model, prompts, labels, options.pairs)


def make_model() -> Any:
    """The model to measure."""
    widths: dict[str, Any] = {
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 1024,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "num_heads": 8,
    }
    tokens: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **widths, **tokens)).eval()


def report(model: Any, prompts: list[list[int]], labels: list[list[int]], pairs: int) -> None:
    """Time all variants in turns."""
    settings = GenerationConfig(
        max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD
    )
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "once a label": lambda: repeated_scores(model, prompts, labels),
        "generation of 6 tokens": lambda: model.generate(torch.tensor(prompts), generation_config=settings),
        "once a prompt": lambda: seq2seq_scores(model, prompts, labels, PAD, BATCH),
    }
    difference = (ways["once a label"]() - ways["once a prompt"]()).abs().max()
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(pairs)]
    print(f"largest difference of a score: {difference:.1e}")
    for name in list(ways)[:2]:
        ratios = sorted(turn[name] / turn["once a prompt"] for turn in turns)
        print(f"{name} / once a prompt: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def seconds(way: Callable[[], torch.Tensor]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    way()
    return time.process_time() - start


def repeated_scores(model: Any, prompts: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """`(prompts, labels)` scores, projecting the encoder's output again for every label."""
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    scores = []
    for start in range(0, len(labels), MAX_DECODER_LABELS):
        group = labels[start : start + MAX_DECODER_LABELS]
        targets = pad(group, IGNORE).repeat(len(ids), 1)
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden.repeat_interleave(len(group), dim=0)),
            attention_mask=mask.repeat_interleave(len(group), dim=0),
            use_cache=False,
            **OBJECTIVES["seq2seq_lm"].decoder_inputs(targets, PAD, PAD),
        ).logits
        scores.append(log_probabilities(logits, targets).sum(1).view(len(ids), len(group)))
    return torch.cat(scores, dim=1)


if __name__ == "__main__":
    main()
