"""How long a step takes: arithmetic, memory traffic, communication, transfers. Everything here is predicted.

- A product of tokens and a weight of n elements takes 2n FLOP a token forward, the same again for the gradient of its
  input, and the same again for the gradient of the weight where it is trained (Kaplan et al. 2020, arXiv 2001.08361,
  section 2.1). Attention's two products over S tokens take 4 S d FLOP a token and layer for d features, twice that
  backward; the mask of padded batches keeps kernels from skipping the upper triangle.
- Checkpointed activations are computed twice (Chen et al. 2016, arXiv 1604.06174).
- AdamW reads master, gradient and both moments and writes all but the gradient: 28 bytes an element. Low precision adds
  the gradient's conversion (2 read, 4 written) and the copy of the master (2).
- A collective takes the bytes that a ring puts on each link (`Collective.on_the_link`) over the slowest link of the
  ring. Between nodes that is the node's whole network, since NCCL runs one ring over each adapter. A message takes time
  for each hop: as many as there are other ranks in a ring, fewer in the trees that NCCL uses for all-reduces of few
  bytes (Sanders et al. 2009, doi 10.1016/j.parco.2009.09.001).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from cl_dist.config.objectives import FACTS
from cl_dist.methods.cost import ADAMW_BYTES, Collective, Cost
from cl_dist.models.structure import base_model, head_prefixes, is_below
from cl_dist.planning.devices import EFFICIENCY, Device
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.wire import GATHERED_WEIGHTS, UPDATED_WEIGHTS, Wire

OPERATIONS_PER_PRODUCT = 5
"""Launched forward for each product, with the norms, rotations, activations and sums around it (a block of Llama has 7
products and about 35 operations in PyTorch's eager mode); twice as many backward."""
LOW_PRECISION_BYTES = 8


@dataclass(frozen=True)
class Product:
    """A weight that tokens are multiplied with."""

    name: str
    numel: int
    """Elements that one token meets; of a mixture, those of the experts that it is routed to."""
    trainable: bool
    place: str
    """Which tokens it runs over: `input`, `target` (an encoder-decoder's answer) or `head` (predicted positions)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step on a rank, by part. What overlaps is counted once."""

    forward: float
    backward: float
    recomputed: float
    """Activations that are computed again."""
    methods: float
    """What the methods read and write beside the model's own work."""
    optimizer: float
    communication: float
    """What is left of it after the part that hides behind forward and backward."""
    hidden: float
    """The part of communication that hides."""
    transfers: float
    """Gradients and weights over PCIe, if optimiser or weights are offloaded."""
    tokens: int
    """Tokens of a step on all ranks."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        work = self.forward + self.backward + self.recomputed + self.methods
        return work + self.optimizer + self.communication + self.transfers

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Arithmetic:
    """The products of a model."""

    shape: ModelShape

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """All weights that tokens are multiplied with. Embedding tables are looked up, not multiplied."""
        return tuple(_products(self.shape))

    @cached_property
    def attention_width(self) -> int:
        """Sum over all layers of the features of queries, for attention's own products."""
        config = base_model(self.shape.model).config.get_text_config()
        width = int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0))
        heads, each = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
        layers = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "num_layers", 0))
        return layers * (heads * each if heads and each else width)

    def forward_flop(self, setup: Setup) -> float:
        """FLOP of a micro-batch's forward pass."""
        products = sum(2.0 * each.numel * self._tokens(setup, each.place) for each in self.products)
        return products + self._attention_flop(setup)

    def backward_flop(self, setup: Setup, cost: Cost) -> float:
        """FLOP of a micro-batch's backward pass: gradients of inputs, and of weights that are trained, less what the
        methods skip.
        """
        inputs = self.forward_flop(setup) + self._attention_flop(setup)
        weights = sum(
            2.0 * each.numel * self._tokens(setup, each.place) * (1.0 - cost.skipped.get(each.name, 0.0))
            for each in self.products
            if each.trainable
        )
        return inputs + weights

    def _attention_flop(self, setup: Setup) -> float:
        """Attention's own two products; a decoder beside an encoder attends to the answer so far and to the input."""
        own = 4.0 * setup.tokens * self.attention_width * self._tokens(setup, "input")
        config = base_model(self.shape.model).config
        if not config.is_encoder_decoder:
            return own
        answer, layers = setup.predicted(self.shape.objective), int(config.num_hidden_layers)
        deep = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers
        width = self.attention_width * deep / layers
        return own + 4.0 * (answer + setup.tokens) * width * self._tokens(setup, "target")

    def _tokens(self, setup: Setup, place: str) -> int:
        """Tokens of a micro-batch that run through a product."""
        micro, predicted = setup.recipe.train.micro_batch_size, setup.predicted(self.shape.objective)
        if place == "input":
            return micro * setup.tokens
        if place == "target":
            return micro * predicted
        # A decoder's head runs over each position that predicts an answer of any sample, for every sample.
        return micro * min(setup.tokens, predicted)


def _products(shape: ModelShape) -> Iterator[Product]:
    model, config = shape.model, base_model(shape.model).config
    heads = head_prefixes(model)
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or not parameter.numel():
                continue
            numel = parameter.numel()
            if experts and (parameter.dim() == 3 or ".experts." in f"{name}."):
                numel = numel * min(chosen, experts) // experts
            full = f"{name}.{own}" if name else own
            if is_below(name, heads):
                place = "target" if config.is_encoder_decoder else "head"
            else:
                place = "target" if config.is_encoder_decoder and _reads_the_answer(name) else "input"
            yield Product(full, numel, parameter.requires_grad, place)


def _reads_the_answer(name: str) -> bool:
    """Whether a layer of an encoder-decoder runs over the answer: all of the decoder but the keys and values that it
    makes of the encoder's output.
    """
    parts = set(name.split("."))
    crosses = parts & {"EncDecAttention", "encoder_attn"} and parts & {"k", "v", "k_proj", "v_proj"}
    return "decoder" in parts and not crosses


def predict_step(setup: Setup, device: Device, wire: Wire, rank: RankView, arithmetic: Arithmetic) -> StepTime:
    """The time of one optimiser step.

    Args:
        setup: The recipe and its ranks, perhaps with samples of another length than `rank`'s.
        device: What each rank trains on.
        wire: The step's collectives.
        rank: What a rank owns, and what the methods add.
        arithmetic: The model's products.

    Raises:
        BadInput: The device lacks the recipe's precision.
    """
    train, share = setup.recipe.train, _ranks_on_device(setup, device)
    shape, cost = arithmetic.shape, rank.methods
    peak = device.peak(train.dtype, train.tf32) * EFFICIENCY.arithmetic / share
    memory = device.bandwidth * EFFICIENCY.memory / share
    micro_batches, passes = train.gradient_accumulation, train.gradient_accumulation * (1 + cost.passes)

    # Each pass reads the weights, and launches its operations; with few tokens that takes longer than the arithmetic.
    launches = len(arithmetic.products) * OPERATIONS_PER_PRODUCT * EFFICIENCY.launch
    forward = max(arithmetic.forward_flop(setup) / peak, shape.nbytes / memory, launches)
    backward = max(arithmetic.backward_flop(setup, cost) / peak, 2 * shape.nbytes / memory, 2 * launches)
    recomputed = forward if train.activation_checkpointing else 0.0
    tokens = train.micro_batch_size * setup.tokens
    on_gpu = device.kind == "cuda"
    offloads = on_gpu and setup.recipe.zero.offload

    hidden, exposed = _communication(setup, device, wire, passes * (forward + backward + recomputed))
    return StepTime(
        forward=passes * forward,
        backward=passes * backward,
        recomputed=passes * recomputed,
        methods=micro_batches * cost.token_traffic * tokens / memory,
        optimizer=_optimizer_bytes(setup, rank) / (_host_bandwidth(setup, device) if offloads else memory),
        communication=exposed,
        hidden=hidden,
        transfers=(_moved_bytes(setup, wire, rank, shape, passes) if on_gpu else 0) / (device.pcie * EFFICIENCY.pcie),
        tokens=tokens * micro_batches * setup.world,
    )


def _optimizer_bytes(setup: Setup, rank: RankView) -> int:
    """Bytes that a rank reads and writes in AdamW and in what the methods do beside it."""
    low = LOW_PRECISION_BYTES if setup.itemsize < 4 else 0
    return (ADAMW_BYTES + low) * rank.owned + rank.methods.traffic


def _host_bandwidth(setup: Setup, device: Device) -> float:
    """Bytes per second of the node's CPU memory that an optimiser on the CPU has for itself."""
    return device.host_bandwidth * EFFICIENCY.host / setup.ranks_per_node


def _moved_bytes(setup: Setup, wire: Wire, rank: RankView, shape: ModelShape, passes: int) -> float:
    """Bytes over PCIe in a step: with offload, gradients go down and weights come up."""
    moved = 2.0 * rank.owned * setup.itemsize if setup.recipe.zero.offload else 0.0
    if setup.weights_on_host:
        # Every gather begins with this rank's piece; a single rank copies all of them in each pass.
        gathered = sum(each.bytes for each in wire.step if each.what == GATHERED_WEIGHTS)
        alone = passes * (3 if setup.recipe.train.activation_checkpointing else 2) * shape.nbytes
        moved += gathered / setup.world if setup.world > 1 else alone
    return moved


def _ranks_on_device(setup: Setup, device: Device) -> int:
    """How many ranks share the entry's figures: those of a node share its CPU, but each has a GPU of its own."""
    return setup.ranks_per_node if device.kind == "cpu" else 1


def _communication(setup: Setup, device: Device, wire: Wire, work: float) -> tuple[float, float]:
    """(hidden, exposed) seconds. DeepSpeed overlaps gradients, and stage 3's weights, if `overlap_comm` says so; by
    default it does at stage 3. What the methods add, and the weights that stages 1 and 2 gather after the step, wait.
    """
    overlaps = setup.stage > 0 and setup.deepspeed["zero_optimization"].get("overlap_comm", setup.stage == 3)
    hides = waits = 0.0
    for each in (*wire.step, *wire.methods_step):
        seconds = collective_seconds(each, setup, device)
        if overlaps and each not in wire.methods_step and each.what != UPDATED_WEIGHTS:
            hides += seconds
        else:
            waits += seconds
    hidden = min(hides * EFFICIENCY.overlap, work)
    return hidden, waits + hides - hidden


def collective_seconds(collective: Collective, setup: Setup, device: Device) -> float:
    """Seconds of a collective's calls, alone on the links."""
    if setup.world == 1:
        return 0.0
    slowest = device.link
    if setup.nodes > 1:  # what leaves a node comes from its devices over PCIe; few of them cannot fill its network
        slowest = min(device.link, device.network, setup.ranks_per_node * device.pcie)
    sent = collective.on_the_link(setup.world)
    # A piece passes all ranks of a ring; an all-reduce of few bytes goes up and down a tree instead.
    hops = 2 * math.ceil(math.log2(setup.world)) if collective.kind == "all_reduce" else setup.world - 1
    delay = EFFICIENCY.latency + hops * EFFICIENCY.hop
    return sent / (slowest * EFFICIENCY.link) + collective.calls * delay


def with_length(setup: Setup, shape: ModelShape, length: float, answer: float) -> Setup:
    """The same run with samples of another length, in tokens."""
    train = setup.recipe.train
    tokens = max(2, min(train.max_length, round(length)))
    target = max(1, min(train.max_target_length, round(answer)))
    facts = FACTS[shape.objective]
    if facts.masked or (answer >= length and not facts.answer_apart):  # plain text
        target = tokens - 1
    elif not facts.answer_apart:  # positions at which any sample of the micro-batch has an answer
        target = min(tokens - 1, target * train.micro_batch_size)
    return replace(setup, length=tokens, answer=target)
