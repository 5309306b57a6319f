"""What the distributed tests train: tiny models of odd shapes, fixed batches, and whole tensors put together from
shards."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from cl_dist.config.schema import LoraConfig
from cl_dist.engine.engine import loss_sum
from cl_dist.models.lora import add_lora
from cl_dist.sharding import Shard, ShardView
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.objectives import OBJECTIVES as OBJECTIVE_CLASSES
from cl_dist.tasks.types import IGNORE, Encoded

VOCABULARY = 59
CLASSES = 5
OBJECTIVES = {"llama": "causal_lm", "t5": "seq2seq_lm", "roberta": "classification"}


def odd_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A model whose parameter sizes no world size divides evenly (33, 47, 59 are odd), without dropout."""
    torch.manual_seed(seed)
    if family == "llama":
        config: Any = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=33, intermediate_size=47, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, head_dim=10, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    if family == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=33, d_kv=11, d_ff=47, num_layers=2, num_heads=3, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=33, intermediate_size=47, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def odd_lora(family: str, seed: int = 0) -> torch.nn.Module:
    """The same with adapters of rank 3 on every linear layer, none of whose matrices is zero."""
    config = LoraConfig(r=3, alpha=6.0, dropout=0.0)
    model = add_lora(odd_model(family, seed), config, OBJECTIVES[family], seed)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def samples(family: str, count: int, seed: int = 0) -> list[Encoded]:
    """Random sequences of 4 to 11 tokens; the answer is the last third."""
    draw = random.Random(seed)
    return [_sample(family, index, draw) for index in range(count)]


def _sample(family: str, index: int, draw: random.Random) -> Encoded:
    ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(4, 12))]
    if family == "roberta":
        return Encoded(index, ids, [draw.randrange(CLASSES)])
    if family == "t5":
        return Encoded(index, ids, [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(2, 6))])
    prompt = 2 * len(ids) // 3
    return Encoded(index, ids, [IGNORE] * prompt + ids[prompt:])


def micro_batches(family: str, chunk: list[Encoded], size: int) -> list[Batch]:
    """Cut consecutive samples into micro-batches."""
    pieces = [chunk[i : i + size] for i in range(0, len(chunk), size)]
    return [collate(piece, OBJECTIVES[family], pad_id=0, decoder_start_id=0) for piece in pieces]


def mean_loss(batch: Batch, family: str, targets: int) -> Any:
    """A function from a model to its loss on `batch`: the sum over answer tokens divided by `targets`."""

    def loss(model: torch.nn.Module) -> torch.Tensor:
        logits = model(**batch.inputs).logits.float()
        labels = batch.labels
        if family == "llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = labels.reshape(-1) != IGNORE
        picked = torch.log_softmax(logits.reshape(-1, logits.shape[-1])[chosen], -1)
        return -picked.gather(1, labels.reshape(-1, 1)[chosen]).sum() / targets

    return loss


def whole(shards: ShardView, quantity: str) -> dict[str, torch.Tensor]:
    """Put `master`, `exp_avg` or `exp_avg_sq` together from all ranks' shards, by parameter name, in the parameter's
    shape."""
    held = {}
    for name in shards.names:
        shard = shards.master(name) if quantity == "master" else shards.moments(name).get(quantity)
        if shard is not None:
            held[name] = shard
    return together(held, shards)


def together(held: dict[str, Shard], shards: ShardView) -> dict[str, torch.Tensor]:
    """Whole tensors out of all ranks' shards; NaN where no rank has an element."""
    # As NumPy arrays: of tensors, each would be pickled as a file of its own.
    mine = {name: (shard.start, shard.data.detach().float().numpy()) for name, shard in held.items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    result = {name: torch.full((shards.numel(name),), float("nan")) for name in shards.names}
    for pieces in everyone:
        for name, (start, data) in pieces.items():
            result[name][start : start + data.size] = torch.from_numpy(data)
    return {name: flat.view(shards.shape(name)) for name, flat in result.items()}


def gradient_sums(
    model: torch.nn.Module, batches: list[Batch], family: str, targets: int, stage: int
) -> dict[str, torch.Tensor]:
    """Float32 sums, over micro-batches and ranks, of the gradients that each rank computes for its own `batches` as the
    engine does, but without DeepSpeed; by name of the trained parameter.

    At stage 3, every module's inputs go through an autograd node of their own, as under DeepSpeed's hooks. The
    gradients of a tensor that several modules read are then added up module by module, and in bfloat16 the grouping
    matters: a linear layer with an adapter adds those of its two branches before those of other layers are added.
    """
    if stage == 3:
        for module in model.modules():
            module.register_forward_pre_hook(_through_a_node)
    world = torch.distributed.get_world_size()
    scale = len(batches) * world / targets  # as in TrainingEngine
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    for batch in batches:
        model.zero_grad()
        logits, labels = OBJECTIVE_CLASSES[OBJECTIVES[family]].forward(model, batch, True)  # type: ignore[index]
        (loss_sum(logits, labels) * scale / len(batches)).backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                sums[name] += param.grad.float()
    for total in sums.values():
        torch.distributed.all_reduce(total)
        total /= world
    return sums


def _through_a_node(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.view_as(each) if isinstance(each, torch.Tensor) else each for each in inputs)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over that of `expected`, over all its tensors."""
    apart = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    return (apart / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5
