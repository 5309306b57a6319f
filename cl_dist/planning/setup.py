"""Where and how a planned run trains: its recipe, and the ranks that it will have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from cl_dist.config.deepspeed import read_at
from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import Recipe
from cl_dist.engine.settings import deepspeed_config

DEFAULT_BUCKET = 5 * 10**8
"""DeepSpeed's, in elements."""


@dataclass(frozen=True)
class Setup:
    """A recipe on a number of ranks. Everything else follows from the recipe."""

    recipe: Recipe
    nodes: int = 1
    ranks_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cuda"
    """What a rank trains on."""
    length: int | None = None
    """Tokens of the longest micro-batch; None: `train.max_length`, the worst case."""
    answer: int | None = None
    """Positions of a micro-batch whose logits a decoder needs, or target tokens of an encoder-decoder; None: the worst
    case (`predicted`)."""
    labels: int = 2
    """Classes of a classifier."""
    samples: int | None = None
    """Training samples of the whole stream, for the size of the tokenised data; None: not known."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def tokens(self) -> int:
        """Tokens per sample of the longest micro-batch."""
        return self.length or self.recipe.train.max_length

    def predicted(self, objective: ObjectiveName) -> int:
        """What `answer` says, or the worst case: answers of `train.max_target_length`, for a decoder at a different
        place in every sample of the micro-batch. All positions of a plain text or of a masked language model.
        """
        facts, train = FACTS[objective], self.recipe.train
        if self.answer or facts.answer_apart:
            return self.answer or train.max_target_length
        if facts.masked or any(task.reader.only_documents for task in self.recipe.stream.tasks):
            return self.tokens - 1
        return min(self.tokens - 1, train.micro_batch_size * train.max_target_length)

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.recipe.zero.stage

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that the model computes with."""
        return 2 if self.recipe.train.dtype == "bfloat16" else 4

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration on that device."""
        return deepspeed_config(self.recipe, gpu=self.device == "cuda")

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of an element of the accumulated, reduced gradient."""
        wanted = self.deepspeed.get("data_types", {}).get("grad_accum_dtype")
        return 4 if wanted == "fp32" else self.itemsize

    @property
    def communication_itemsize(self) -> int:
        """Bytes of an element of the gradient on the network."""
        sizes = {"fp32": 4, "bf16": 2}
        return sizes.get(self.deepspeed.get("communication_data_type", ""), self.itemsize)

    @property
    def whole_float32_gradients(self) -> bool:
        """Whether DeepSpeed uses `BF16_Optimizer`, which keeps whole float32 gradients on every rank: at stage 1 in
        bfloat16 with float32 accumulation, without offload (`_do_optimizer_sanity_check` in engine.py).
        """
        return self.stage == 1 and self.gradient_itemsize > self.itemsize and not self.recipe.zero.offload

    @property
    def weights_on_host(self) -> bool:
        """Whether stage 3 keeps its pieces of the weights in CPU memory."""
        offload: dict[str, Any] = self.deepspeed["zero_optimization"].get("offload_param", {})
        return offload.get("device") == "cpu"

    @property
    def bucket(self) -> int:
        """Elements of the bucket in which gradients are reduced."""
        return int(self.deepspeed["zero_optimization"].get("reduce_bucket_size", DEFAULT_BUCKET))

    def varied(
        self,
        *,
        stage: Literal[0, 1, 2, 3] | None = None,
        micro_batch: int | None = None,
        accumulation: int | None = None,
        offload: bool | None = None,
        checkpointing: bool | None = None,
    ) -> Setup:
        """The same run with other settings. Raw DeepSpeed settings that the new stage does not read are dropped.

        Raises:
            ValueError: The settings exclude each other.
        """
        train, zero = self.recipe.train, self.recipe.zero
        new_train = replace(
            train,
            micro_batch_size=train.micro_batch_size if micro_batch is None else micro_batch,
            gradient_accumulation=train.gradient_accumulation if accumulation is None else accumulation,
            activation_checkpointing=train.activation_checkpointing if checkpointing is None else checkpointing,
        )
        new_stage = zero.stage if stage is None else stage
        new_zero = replace(
            zero,
            stage=new_stage,
            offload=(zero.offload if offload is None else offload) and new_stage > 0,
            deepspeed=read_at(new_stage, zero.deepspeed),
        )
        return replace(self, recipe=replace(self.recipe, train=new_train, zero=new_zero))
