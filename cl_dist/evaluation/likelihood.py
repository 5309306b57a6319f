"""Scores of the allowed labels of a classification task: the likelihood of each as the answer to a prompt.

The score of a label is the sum of its tokens' log-probabilities (nats, float32 sums of float32 log-softmax), including
the end of sequence token, so that a label has no advantage from being a prefix of another.

A decoder computes the prompt once for all labels. They are packed into one sequence, `[prompt][label 1][label 2]...`,
with an attention mask that lets a label see only the prompt and itself, and with positions that restart after the
prompt for every label. Prompts are padded on the left, so labels are in the same columns in all rows, and the output
head runs on those columns only.

An encoder-decoder computes everything that depends only on the prompt once for all labels: the encoder, the decoder's
start token and the keys and values of cross-attention. That is most of the work if prompts are longer than labels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from cl_dist.evaluation.inference import accepts, device_of, pad_side
from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import pad
from cl_dist.tasks.types import IGNORE

Tokens = Sequence[int]

MAX_LOGITS = 2**27
"""Maximum number of logits in one forward pass (512 MiB in float32); labels that do not fit are scored in groups."""
MAX_DECODER_LABELS = 8
"""Maximum number of labels that an encoder-decoder decodes at once; each needs a copy of a layer's keys and values."""

_AGREES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class PackedLabels:
    """B prompts, each followed by the same labels: P columns of prompt, then C columns of label tokens.

    A label's last token has no column, since it predicts nothing.
    """

    input_ids: torch.Tensor
    """(B, P + C), int64."""
    attention_mask: torch.Tensor
    """(B, P + C), int64: 0 on the padding left of a prompt, else 1."""
    position_ids: torch.Tensor
    """(B, P + C), int64: 0, 1, ... over the prompt; every label continues from the end of the prompt."""
    owner: torch.Tensor
    """(C,), int64: which label a column belongs to."""
    targets: torch.Tensor
    """(T,), int64: all the labels' tokens, the same for every prompt."""
    label: torch.Tensor
    """(T,), int64: which label a target belongs to."""
    previous: torch.Tensor
    """(T,), int64: which of the last 1 + C columns predicts a target: 0 ends the prompt, c + 1 is label column c."""


def pack(prompts: Sequence[Tokens], labels: Sequence[Tokens], pad_id: int, device: torch.device) -> PackedLabels:
    """Append all labels to each prompt; neither a prompt nor a label may be empty."""
    fed = [label[:-1] for label in labels]
    firsts = accumulate((len(tokens) for tokens in fed), initial=0)
    answers = list(chain.from_iterable(fed))
    input_ids, mask = pad_side([[*prompt, *answers] for prompt in prompts], pad_id, "left", device)
    prompt_positions = (mask.cumsum(1) - 1).clamp(min=0)[:, : input_ids.shape[1] - len(answers)]
    lengths = _integers((len(prompt) for prompt in prompts), device)
    offsets = _integers((offset for tokens in fed for offset in range(len(tokens))), device)
    return PackedLabels(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=torch.cat([prompt_positions, lengths[:, None] + offsets], dim=1),
        owner=_integers((number for number, tokens in enumerate(fed) for _ in tokens), device),
        targets=_integers(chain.from_iterable(labels), device),
        label=_integers((number for number, label in enumerate(labels) for _ in label), device),
        previous=_integers(
            (
                first + place if place else 0
                for first, label in zip(firsts, labels, strict=False)
                for place in range(len(label))
            ),
            device,
        ),
    )


def _integers(values: Iterable[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def visible_columns(packed: PackedLabels) -> torch.Tensor:
    """(B, P + C, P + C), bool: which columns (last axis) a column sees: the prompt and its own label, up to itself.

    Padding sees itself, because attention over nothing gives NaN.
    """
    width = packed.input_ids.shape[1]
    part = nn.functional.pad(packed.owner + 1, (width - len(packed.owner), 0))  # 0 is the prompt
    allowed = torch.tril((part[:, None] == part[None, :]) | (part[None, :] == 0))
    itself = torch.eye(width, dtype=torch.bool, device=part.device)
    return (allowed & packed.attention_mask[:, None, :].bool()) | itself


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, S, S) in `dtype`: 0 if visible, else the lowest finite number, as sdpa and eager attention expect."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def can_pack(model: nn.Module, columns: int) -> bool:
    """Whether the model's code allows labels to be packed into sequences of `columns` columns.

    It must accept positions and a ready-made mask, and every layer must attend to all columns. That excludes recurrent
    and chunked layers, and sequences longer than a sliding window or the model's positions (some masks are tables of
    that size). This looks at configuration and signatures only; `packing_agrees` tries it out.
    """
    config = base_model(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))  # the latter is GPT-Neo's
    in_window = all(columns <= window for window in windows if window is not None)
    sees_all = kinds <= {"full_attention", "sliding_attention"} and in_window
    longest = longest_inputs(model).source
    fits = longest is None or columns <= longest
    return sees_all and fits and accepts(model, "position_ids") and config._attn_implementation in ("sdpa", "eager")


def packing_agrees(model: nn.Module, prompt: Tokens, labels: Sequence[Tokens], pad_id: int) -> bool:
    """Whether packed scores of one prompt equal those of separate sequences, up to rounding in the model's dtype.

    Tested once per model, because some models accept a mask and positions but use them differently.
    """
    if model in _AGREES:
        return _AGREES[model]
    separate = causal_scores(model, [prompt], labels, pad_id, packed=False)
    try:
        packed = causal_scores(model, [prompt], labels, pad_id, packed=True)
    except (RuntimeError, ValueError, IndexError):  # the model's code expects another shape of mask
        agrees = False
    else:
        rounding = torch.finfo(_dtype(model)).eps ** 0.5
        agrees = bool(torch.all((packed - separate).abs() <= rounding * (1 + separate.abs())))
    _AGREES[model] = agrees
    return agrees


def causal_scores(
    model: nn.Module,
    prompts: Sequence[Tokens],
    labels: Sequence[Tokens],
    pad_id: int,
    packed: bool,
    batch_size: int = 1,
) -> torch.Tensor:
    """(prompts, labels), float32, on the CPU: scores by a decoder.

    With `packed`, each prompt is computed once; without, once per label, for models that cannot pack. The number of
    forward passes is the same on all ranks: it depends only on the labels and on `batch_size`, the largest number of
    prompts in any batch.
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
    """The labels in order, in groups of at most `columns` tokens; a longer label gets a group to itself."""
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
    """(prompts, labels), float32, on the CPU: scores by an encoder-decoder, which computes each prompt once.

    As in `causal_scores`, the number of forward passes is the same on all ranks: one for the start token and one per
    group of labels.
    """
    base = base_model(model)
    longest = max(len(label) for label in labels)
    rows = MAX_LOGITS // (max(batch_size, len(prompts)) * longest * base.config.vocab_size)
    at_once = min(max(rows, 1), MAX_DECODER_LABELS)
    started = _start_decoder(model, *pad_side(prompts, pad_id, "right", device_of(model)))
    groups = [labels[start : start + at_once] for start in range(0, len(labels), at_once)]
    return torch.cat([_decoded_scores(model, started, group, pad_id) for group in groups], dim=1).cpu()


def head_scores(model: nn.Module, prompts: Sequence[Tokens], label_ids: Sequence[int], pad_id: int) -> torch.Tensor:
    """(prompts, labels), float32, on the CPU: logits of a classification head for the task's own labels."""
    input_ids, mask = pad_side(prompts, pad_id, "right", device_of(model))
    logits: torch.Tensor = model(input_ids=input_ids, attention_mask=mask).logits
    return logits[:, list(label_ids)].float().cpu()


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, T), float32: log-probabilities of targets (N, T) under logits (N, T, vocabulary); 0 for IGNORE.

    The logits are aligned with the targets: those at position t predict target t.
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.view_as(targets)


@dataclass(frozen=True)
class _Started:
    """An encoder-decoder that has read B prompts of S columns and the decoder's start token."""

    encoded: Any
    """The encoder's output, in a class that the decoder accepts; `last_hidden_state` is (B, S, H)."""
    mask: torch.Tensor
    """(B, S), int64: 0 on padding."""
    logits: torch.Tensor
    """(B, 1, vocabulary): logits of a label's first token."""
    cache: EncoderDecoderCache
    """Keys and values of B rows. Decode with a copy (`_repeated`), because decoding appends to the cache."""


def _start_decoder(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> _Started:
    """Run the encoder and the decoder's start token, which all labels share."""
    base = base_model(model)
    encoded = base.get_encoder()(input_ids=input_ids, attention_mask=mask)
    output = model(
        encoder_outputs=encoded,
        attention_mask=mask,
        decoder_input_ids=input_ids.new_full((len(input_ids), 1), base.config.decoder_start_token_id),
        use_cache=True,
    )
    return _Started(encoded, mask, output.logits, output.past_key_values)


def _decoded_scores(model: nn.Module, started: _Started, labels: Sequence[Tokens], pad_id: int) -> torch.Tensor:
    """(B, labels): the start token predicts a label's first token, and each token the next one."""
    hidden = started.encoded.last_hidden_state
    count, rows = len(labels), len(hidden)
    targets = pad([list(label) for label in labels], IGNORE).repeat(rows, 1).to(hidden.device)
    logits = started.logits.repeat_interleave(count, dim=0)
    if targets.shape[1] > 1:
        rest = model(
            encoder_outputs=type(started.encoded)(last_hidden_state=hidden.repeat_interleave(count, dim=0)),
            attention_mask=started.mask.repeat_interleave(count, dim=0),
            decoder_input_ids=targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE, pad_id),
            past_key_values=_repeated(started.cache, count),
            use_cache=True,
        ).logits
        logits = torch.cat([logits, rest], dim=1)
    return log_probabilities(logits, targets).sum(1).view(rows, count)


def _repeated(cache: EncoderDecoderCache, times: int) -> EncoderDecoderCache:
    """A cache to decode with, with each row repeated `times` times; the given cache is not changed."""
    own = copy.deepcopy(cache.self_attention_cache)
    own.batch_repeat_interleave(times)
    layers: Any = cache.cross_attention_cache.layers
    cross = DynamicCache()
    cross.layers = [_RepeatedLayer(layer.keys, layer.values, times) for layer in layers]
    return EncoderDecoderCache(own, cross)


class _RepeatedLayer(DynamicLayer):
    """A layer's cross-attention cache that repeats its rows when they are read.

    Only one layer's copies are in memory at a time; those of all layers of a large model would not fit.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, times: int) -> None:
        self._keys, self._values, self._times = keys, values, times
        self.is_initialized = True

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]  # of a cache that is only read
        """(B * times, heads, S, width)."""
        return self._keys.repeat_interleave(self._times, dim=0)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]  # of a cache that is only read
        """(B * times, heads, S, width)."""
        return self._values.repeat_interleave(self._times, dim=0)

    def get_seq_length(self) -> int:
        """S, without repeating anything."""
        return self._keys.shape[-2]


def _tail_logits(model: nn.Module, packed: PackedLabels, mask: torch.Tensor) -> torch.Tensor:
    """(B, 1 + C, vocabulary), float32: logits of the prompt's last column and the label columns."""
    tail = 1 + len(packed.owner)
    options: dict[str, Any] = {"use_cache": False, "position_ids": packed.position_ids, "logits_to_keep": tail}
    taken = {name: value for name, value in options.items() if accepts(model, name)}
    logits: torch.Tensor = model(input_ids=packed.input_ids, attention_mask=mask, **taken).logits
    return logits[:, -tail:].float()


def _sums_by_label(logits: torch.Tensor, packed: PackedLabels) -> torch.Tensor:
    """(B, labels) from the tail's logits (B, 1 + C, vocabulary): the column before each token predicts it."""
    normaliser = logits.logsumexp(-1)
    log_probabilities = logits[:, packed.previous, packed.targets] - normaliser[:, packed.previous]
    sums = logits.new_zeros(len(logits), int(packed.label[-1]) + 1)
    return sums.index_add(1, packed.label, log_probabilities)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states: that of the embeddings."""
    embeddings: Any = base_model(model).get_input_embeddings()
    dtype: torch.dtype = embeddings.weight.dtype
    return dtype
