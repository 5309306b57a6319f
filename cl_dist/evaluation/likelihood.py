"""Scores of the allowed labels of a classification task: how likely the model finds each as the answer to a prompt.

The score of a label is the sum of its tokens' log-probabilities (nats, float32 sums of float32 log-softmax), the end of
sequence token included, so that no label is preferred for being the start of another.

A decoder computes the prompt once for all labels: they are packed into one sequence, `[prompt][label 1][label 2]...`,
under an attention mask by which a label sees the prompt and itself, and with positions that start anew after the prompt
for every label. Prompts are padded on the left, so all rows have their labels in the same columns and the output head
runs on those columns only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from cl_dist.evaluation.batches import pad_side
from cl_dist.evaluation.wrapped import accepts, device_of
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import pad, shift_right
from cl_dist.tasks.types import IGNORE

Tokens = Sequence[int]

MAX_LOGITS = 2**27
"""Most logits in one forward, in elements (512 MiB in float32); more labels than fit go through in groups."""
MAX_DECODER_LABELS = 8
"""Most labels that an encoder-decoder decodes in one forward: each needs its own copy of the encoder's output."""

_AGREES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class PackedLabels:
    """B prompts, each followed by the same labels: P columns of prompt, then one for each of the C label tokens."""

    input_ids: torch.Tensor
    """(B, P + C), int64."""
    attention_mask: torch.Tensor
    """(B, P + C), int64: 0 on the padding left of a prompt, else 1."""
    position_ids: torch.Tensor
    """(B, P + C), int64: 0, 1, ... over the prompt, going on from its end in every label."""
    owner: torch.Tensor
    """(C,), int64: which label a column belongs to."""
    previous: torch.Tensor
    """(C,), int64: which of the 1 + C last columns predicts this one: 0 ends the prompt, c + 1 is label column c."""

    @property
    def label_tokens(self) -> torch.Tensor:
        """(C,), int64: the labels' tokens, the same for every prompt."""
        return self.input_ids[0, -len(self.owner) :]


def pack(prompts: Sequence[Tokens], labels: Sequence[Tokens], pad_id: int, device: torch.device) -> PackedLabels:
    """Put all labels after each prompt; neither a prompt nor a label may be empty."""
    answers = [token for label in labels for token in label]
    input_ids, mask = pad_side([[*prompt, *answers] for prompt in prompts], pad_id, "left", device)
    offsets = torch.tensor([offset for label in labels for offset in range(len(label))], device=device)
    owner = torch.tensor([number for number, label in enumerate(labels) for _ in label], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_positions = (mask.cumsum(1) - 1).clamp(min=0)[:, : -len(owner)]
    columns = torch.arange(len(owner), device=device)
    return PackedLabels(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=torch.cat([prompt_positions, lengths[:, None] + offsets], dim=1),
        owner=owner,
        previous=torch.where(offsets == 0, torch.zeros_like(columns), columns),
    )


def visible_columns(packed: PackedLabels) -> torch.Tensor:
    """(B, P + C, P + C), bool: which column (last axis) a column sees: the prompt and its own label, up to itself.

    Padding sees itself, since a row without anything to attend to gives NaN.
    """
    width = packed.input_ids.shape[1]
    part = nn.functional.pad(packed.owner + 1, (width - len(packed.owner), 0))  # 0 is the prompt
    allowed = torch.tril((part[:, None] == part[None, :]) | (part[None, :] == 0))
    itself = torch.eye(width, dtype=torch.bool, device=part.device)
    return (allowed & packed.attention_mask[:, None, :].bool()) | itself


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, S, S) in `dtype`: 0 where visible, the lowest finite number elsewhere (what both attentions of
    transformers take).
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def can_pack(model: nn.Module, columns: int) -> bool:
    """Whether the model's code lets labels be packed into sequences of so many columns.

    It must take positions and a ready-made mask, and every layer must attend to all columns: not so in a recurrent or a
    chunked layer, nor where the columns exceed a sliding window. What the code says is not proof; see `packing_agrees`.
    """
    config = base_model(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    sees_all = kinds <= {"full_attention", "sliding_attention"} and (window is None or columns <= window)
    return sees_all and accepts(model, "position_ids") and config._attn_implementation in ("sdpa", "eager")


def packing_agrees(model: nn.Module, prompt: Tokens, labels: Sequence[Tokens], pad_id: int) -> bool:
    """Whether packed scores of one prompt equal those of separate sequences, up to rounding in the model's dtype.

    Tried once for a model: some models take a mask and positions and do something else with them.
    """
    if model not in _AGREES:
        packed = causal_scores(model, [prompt], labels, pad_id, packed=True)
        separate = causal_scores(model, [prompt], labels, pad_id, packed=False)
        rounding = torch.finfo(_dtype(model)).eps ** 0.5
        _AGREES[model] = bool(torch.all((packed - separate).abs() <= rounding * (1 + separate.abs())))
    return _AGREES[model]


def causal_scores(
    model: nn.Module,
    prompts: Sequence[Tokens],
    labels: Sequence[Tokens],
    pad_id: int,
    packed: bool,
    batch_size: int = 1,
) -> torch.Tensor:
    """(prompts, labels), float32, on the CPU: scores by a decoder.

    `packed` computes each prompt once; without it every label goes through with the prompt again, for models that
    cannot pack. The number of forwards depends on the labels and on `batch_size`, the most prompts of any batch, only:
    it is the same on all ranks.
    """
    columns = MAX_LOGITS // (max(batch_size, len(prompts)) * base_model(model).config.get_text_config().vocab_size)
    groups = label_groups(labels, columns) if packed else [[label] for label in labels]
    scores = []
    for group in groups:
        layout = pack(prompts, group, pad_id, device_of(model))
        mask = additive_mask(visible_columns(layout), _dtype(model)) if packed else layout.attention_mask
        scores.append(_sums_by_label(_tail_logits(model, layout, mask), layout))
    return torch.cat(scores, dim=1).cpu()


def label_groups(labels: Sequence[Tokens], columns: int) -> list[list[Tokens]]:
    """The labels in order, in groups of at most so many tokens; a longer label is a group of its own."""
    groups: list[list[Tokens]] = []
    room = 0
    for label in labels:
        if len(label) > room:
            groups.append([])
            room = columns
        groups[-1].append(label)
        room -= len(label)
    return groups


def seq2seq_scores(
    model: nn.Module, prompts: Sequence[Tokens], labels: Sequence[Tokens], pad_id: int, batch_size: int = 1
) -> torch.Tensor:
    """(prompts, labels), float32, on the CPU: scores by an encoder-decoder, which encodes each prompt once."""
    base = base_model(model)
    longest = max(len(label) for label in labels)
    rows = MAX_LOGITS // (max(batch_size, len(prompts)) * longest * base.config.vocab_size)
    at_once = min(max(rows, 1), MAX_DECODER_LABELS)
    input_ids, mask = pad_side(prompts, pad_id, "right", device_of(model))
    hidden = base.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
    groups = [labels[start : start + at_once] for start in range(0, len(labels), at_once)]
    return torch.cat([_decoded_scores(model, hidden, mask, group, pad_id) for group in groups], dim=1).cpu()


def head_scores(model: nn.Module, prompts: Sequence[Tokens], label_ids: Sequence[int], pad_id: int) -> torch.Tensor:
    """(prompts, labels), float32, on the CPU: logits of a classification head, only those of the task's own labels."""
    input_ids, mask = pad_side(prompts, pad_id, "right", device_of(model))
    logits: torch.Tensor = model(input_ids=input_ids, attention_mask=mask).logits
    return logits[:, list(label_ids)].float().cpu()


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, T), float32: of targets (N, T) by the logits (N, T, vocabulary) at their own places; 0 where IGNORE."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.view_as(targets)


def _decoded_scores(
    model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, labels: Sequence[Tokens], pad_id: int
) -> torch.Tensor:
    """(B, labels) from the encoder's output `hidden` (B, S, H) and its mask (B, S)."""
    count, start = len(labels), base_model(model).config.decoder_start_token_id
    targets = pad([list(label) for label in labels], IGNORE).repeat(len(hidden), 1).to(hidden.device)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden.repeat_interleave(count, dim=0)),
        attention_mask=mask.repeat_interleave(count, dim=0),
        decoder_input_ids=shift_right(targets, pad_id, start),
        use_cache=False,
    ).logits
    return log_probabilities(logits, targets).sum(1).view(len(hidden), count)


def _tail_logits(model: nn.Module, packed: PackedLabels, mask: torch.Tensor) -> torch.Tensor:
    """(B, 1 + C, vocabulary), float32: logits of the prompt's last column and of the label columns."""
    tail = 1 + len(packed.owner)
    options: dict[str, Any] = {"use_cache": False, "position_ids": packed.position_ids, "logits_to_keep": tail}
    taken = {name: value for name, value in options.items() if accepts(model, name)}
    logits: torch.Tensor = model(input_ids=packed.input_ids, attention_mask=mask, **taken).logits
    return logits[:, -tail:].float()


def _sums_by_label(logits: torch.Tensor, packed: PackedLabels) -> torch.Tensor:
    """(B, labels) from the tail's logits (B, 1 + C, vocabulary): each token is predicted by the column before it."""
    normaliser = logits.logsumexp(-1)
    log_probabilities = logits[:, packed.previous, packed.label_tokens] - normaliser[:, packed.previous]
    sums = logits.new_zeros(len(logits), int(packed.owner[-1]) + 1)
    return sums.index_add(1, packed.owner, log_probabilities)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states: that of the embeddings."""
    embeddings: Any = base_model(model).get_input_embeddings()
    dtype: torch.dtype = embeddings.weight.dtype
    return dtype
