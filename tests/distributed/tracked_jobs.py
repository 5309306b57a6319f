"""Rank side of test_tracked_layers: families with layers that are no nn.Linear, or do not run over (batch, length)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.distributed import join
from cl_dist.engine.engine import TrainingEngine
from cl_dist.errors import BadInput, ClDistError
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.every_expert import run_every_expert
from cl_dist.models.layer_kinds import KINDS
from cl_dist.models.load import LoadedModel
from cl_dist.models.lora import add_lora, without_adapter
from cl_dist.models.training_mode import enable_activation_checkpointing
from tests.distributed.worlds import CLASSES, VOCABULARY, mean_loss, micro_batches, samples, whole
from tests.models.toy_kind import LowRank, LowRankKind
from tests.oracle_tracked import DenseTracked

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64}
ENCODER = {**SMALL, "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}  # fmt: skip


def _lowrank() -> LlamaForCausalLM:
    """With layers of a kind that cl_dist does not know."""
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    for layer in model.model.layers:
        layer.mlp.up_proj = LowRank(20, 12, rank=5)
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "lowrank": _lowrank,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=5, num_experts_per_tok=2)),
    "qwen3moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **DECODER, head_dim=10, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1
        )
    ),
    "qwen2moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **DECODER,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            decoder_sparse_step=1,
        )
    ),
    "gptoss": lambda: GptOssForCausalLM(
        GptOssConfig(**DECODER, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=16)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=VOCABULARY, hidden_size=20, ffn_dim=11, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=64, word_embed_proj_dim=20, dropout=0.0, pad_token_id=0, bos_token_id=1,
                  eos_token_id=2)
    ),
    "deberta": lambda: DebertaForSequenceClassification(DebertaConfig(**ENCODER)),
    "deberta-v3": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**ENCODER, share_att_key=True, position_buckets=4, norm_rel_ebd="layer_norm")
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=20, state_size=4, num_hidden_layers=2, pad_token_id=0,
                    bos_token_id=1, eos_token_id=2)
    ),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(vocab_size=VOCABULARY, d_model=20, d_kv=10, d_ff=12, num_layers=2, num_heads=2,
                                 num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
                                 num_experts=8, dropout_rate=0.0, router_jitter_noise=0.0, decoder_start_token_id=0,
                                 pad_token_id=0, eos_token_id=2)
    ),
    "nllb": lambda: NllbMoeForConditionalGeneration(
        NllbMoeConfig(vocab_size=VOCABULARY, d_model=20, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_experts=8,
                      encoder_sparse_step=2, decoder_sparse_step=2, dropout=0.0, attention_dropout=0.0,
                      activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, moe_token_dropout=0.0,
                      decoder_start_token_id=0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                      max_position_embeddings=64)
    ),
}  # fmt: skip
KINDS.insert(0, LowRankKind())
QUANTITIES = ("master", "exp_avg", "exp_avg_sq")
MODULE_EXPERTS = (("switch", 2), ("switch", 3), ("nllb", 3))
"""Experts that are modules of their own, and ZeRO's stage."""


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny model with weights large enough to tell its tokens apart."""
    torch.manual_seed(seed)
    model: Any = MODELS[name.removesuffix("-idle")]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    if name == "gptoss-idle":  # whose last expert never gets a token
        for layer in model.model.layers:
            layer.mlp.router.bias.data[-1] = -100.0
    model.tie_weights()
    if hasattr(model.config, "_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def everything(cases: list[dict[str, Any]], trials: list[str]) -> dict[str, Any]:
    """Train every case with cl_dist and densely; what else the tests ask about, in the same start."""
    join(timeout_seconds=120)
    dropping = build("opt")
    dropping.config.layerdrop = 0.5  # type: ignore[union-attr, assignment]
    short = MODELS["opt"]()
    short.model.decoder.embed_positions = torch.nn.Embedding(3, 20)  # type: ignore[union-attr, assignment]
    return {
        "cases": [Case(**case).run() for case in cases],
        "mamba": _refusal(build("mamba"), [_migu()]),
        "layerdrop": [_refusal(dropping, [_migu()], stage=0), _refusal(dropping, [])],
        "switch": _refusal(build("switch"), [_migu()], objective="seq2seq_lm"),
        "module experts": {f"{name}-{stage}": _module_experts(name, stage) for name, stage in MODULE_EXPERTS},
        "broken": _refusal(short, []),
        "unused": [_unused_layer(first_task) for first_task in ("masked", "dense")],
        "trials": {each: _trials(int(each[0]), each[2:]) for each in trials},
        "adapters": without_adapter(add_lora(build("mixtral"), LoraConfig(r=2), "causal_lm", 0)),  # type: ignore[arg-type]
        "no experts": without_adapter(add_lora(build("gpt2"), LoraConfig(r=2), "causal_lm", 0)),  # type: ignore[arg-type]
    }


def _migu() -> Migu:
    return Migu(MiguConfig(name="migu", first_task="masked"))


def _recipe(stage: int, dtype: str = "float32", accumulation: int = 1) -> Recipe:
    return Recipe(
        model=ModelConfig(name_or_path="odd"),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(
            micro_batch_size=2,
            gradient_accumulation=accumulation,
            learning_rate=1e-2,
            eps=1e-2,
            dtype=dtype,  # type: ignore[arg-type]
        ),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
    )


def _refusal(model: torch.nn.Module, methods: list[Migu], stage: int = 2, objective: str = "causal_lm") -> str:
    """What is said of a model that cannot be trained."""
    try:
        TrainingEngine(LoadedModel(model, None, objective), _recipe(stage), Composed(methods))  # type: ignore[arg-type]
    except BadInput as error:
        return str(error)
    return ""


def _module_experts(name: str, stage: int) -> float:
    """Largest difference from one process with transformers' own forward, after steps of one sample a rank.

    MIGU goes along without a mask: its trials must not take an expert's few tokens for something else.
    """
    model = build(name)
    dense = copy.deepcopy(model)
    run_every_expert(model)
    migu = Migu(MiguConfig(name="migu", untracked="dense"))
    engine = TrainingEngine(LoadedModel(model, None, "seq2seq_lm"), _recipe(stage), Composed([migu]))  # type: ignore[arg-type]
    assert not any(".experts." in layer for layer in migu._layers)
    engine.before_task(TaskPlace(0, "t", 2))
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for step in range(2):
        every = micro_batches("t5", samples("t5", world, seed=step), 1)
        targets = sum(batch.targets for batch in every)
        engine.train_step(step, [every[rank]], targets)
        for parameter in dense.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for batch in every:
            mean_loss(batch, "t5", targets)(dense).backward()
        torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.0)
        optimizer.step()
    end = whole(engine.shards, "master")
    engine.destroy()
    return max(float((end[name] - parameter.detach()).abs().max()) for name, parameter in dense.named_parameters())


def _unused_layer(first_task: str) -> str:
    """What is said of a layer that did run in the trial and does not in training."""
    model = build("qwen3moe")
    migu = Migu(MiguConfig(name="migu", first_task=first_task))  # type: ignore[arg-type]
    engine = TrainingEngine(LoadedModel(model, None, "causal_lm"), _recipe(2), Composed([migu]))  # type: ignore[arg-type]
    engine.before_task(TaskPlace(0, "t", 1))
    model.model.layers[1].mlp.forward = lambda hidden: hidden  # type: ignore[union-attr, index]
    try:
        engine.train_step(0, micro_batches("llama", samples("llama", 2), 2), 10)
    except ClDistError as error:
        return str(error)
    return ""


def _trials(stage: int, dtype: str) -> dict[str, bool]:
    """Whether more trials before and between the steps change anything at all."""
    ends = {}
    for extra in (False, True):
        torch.manual_seed(0)
        model = build("opt").to(getattr(torch, dtype))
        engine = TrainingEngine(LoadedModel(model, None, "causal_lm"), _recipe(stage, dtype, 2), Composed([_migu()]))  # type: ignore[arg-type]
        engine.before_task(TaskPlace(0, "t", 2))
        state, counters = torch.get_rng_state(), (engine._engine.global_steps, engine.shards.optimizer_step)
        for step in range(2):
            if extra:
                engine._try_out()
            rank = torch.distributed.get_rank()
            mine = micro_batches("llama", samples("llama", 8, seed=step)[4 * rank : 4 * rank + 4], 2)
            if step == 0:
                same = torch.equal(state, torch.get_rng_state())
                same &= counters == (engine._engine.global_steps, engine.shards.optimizer_step) == (0, 0)
            engine.train_step(step, mine, 20)
        ends[extra] = {quantity: whole(engine.shards, quantity) for quantity in QUANTITIES}
        engine.destroy()
    equal = all(torch.equal(ends[False][q][name], ends[True][q][name]) for q in QUANTITIES for name in ends[False][q])
    return {"generator and counters": same, "weights and moments": equal}


class Case:
    """One configuration, trained both ways."""

    def __init__(
        self, name: str, stage: int, accumulation: int = 1, mask: str = "gradient", steps: int = 3, skip: bool = True,
        recompute: bool = False, untracked: str = "error", padding: bool = False,
        deepspeed: dict[str, Any] | None = None, scope: str = "step",
    ) -> None:  # fmt: skip
        self.family = "roberta" if name.startswith("deberta") else "llama"  # whose samples and loss
        self.steps, self.accumulation = steps, accumulation
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.micro = 4 // self.world
        self.recipe = Recipe(
            model=ModelConfig(name_or_path="odd"),
            stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
            train=TrainConfig(
                micro_batch_size=self.micro, gradient_accumulation=accumulation, learning_rate=1e-2, eps=1e-2, clip=None
            ),
            zero=ZeroConfig(stage=stage, deepspeed=deepspeed or {}),  # type: ignore[arg-type]
            output_dir="unused",
        )  # fmt: skip
        self.config = MiguConfig(
            name="migu",
            mask=mask,
            first_task="masked",
            skip_rows=skip,
            untracked=untracked,
            count_padding=padding,
            mask_scope=scope,  # type: ignore[arg-type]
        )
        model = build(name)
        self.dense = DenseTracked(copy.deepcopy(model), self.config)
        if recompute:
            enable_activation_checkpointing(model)  # type: ignore[arg-type]
        self.migu = Migu(self.config)
        objective = "classification" if self.family == "roberta" else "causal_lm"
        self.engine = TrainingEngine(LoadedModel(model, None, objective), self.recipe, Composed([self.migu]))  # type: ignore[arg-type]

    def run(self) -> dict[str, Any]:
        """Train; compare weights and moments, and what moved in every step."""
        self.engine.before_task(TaskPlace(index=0, name="t", steps=self.steps))
        report: dict[str, Any] = {"flips": 0, "rows": 0, "frozen_moved": 0, "moved_wrong": 0, "stuck": 0, "groups": {}}
        for step in range(self.steps):
            frozen = self.config.mask == "update"
            quantities = QUANTITIES if frozen else ("master",) if step == 0 else ()
            before = {quantity: whole(self.engine.shards, quantity) for quantity in quantities}
            self._step(step, report)
            after = {quantity: whole(self.engine.shards, quantity) for quantity in quantities}
            if frozen:
                report["frozen_moved"] += self._moved_dropped(before, after)
            if step == 0:
                self._note_moved(before["master"], after["master"], report)
        self._compare(report)
        report["message"] = self.migu.start_message()
        self.engine.destroy()
        return report

    def _step(self, step: int, report: dict[str, Any]) -> None:
        per_rank = self.micro * self.accumulation
        batch = samples(self.family, per_rank * self.world, seed=step)
        chunks = [batch[r * per_rank : (r + 1) * per_rank] for r in range(self.world)]
        everyone = [micro_batches(self.family, chunk, self.micro) for chunk in chunks]
        targets = sum(b.targets for rank in everyone for b in rank)
        self.engine.train_step(step, everyone[self.rank], targets)
        every = [b for micro_batch in zip(*everyone, strict=True) for b in micro_batch]
        self.dense.step([(mean_loss(b, self.family, targets), b.token_masks["input"]) for b in every], self.migu.keep)
        for name, keep in self.dense.keep.items():
            report["flips"] += int((self.migu.keep[name] != keep.reshape(-1)).sum())
            report["rows"] += keep.numel()

    def _moved_dropped(self, before: dict[str, Any], after: dict[str, Any]) -> int:
        """Elements of dropped rows (weight or moment) that changed at all."""
        return sum(
            int((before[q][name] != after[q][name])[~self.dense.spread(name, keep)].sum())
            for q in QUANTITIES
            for name, keep in self.migu.keep.items()
        )

    def _note_moved(
        self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], report: dict[str, Any]
    ) -> None:
        """Which rows the first step has moved: of a weight that is masked exactly the kept ones."""
        for name, keep in self.migu.keep.items():
            moved = before[name] != after[name]
            kept = self.dense.spread(name, keep)
            report["moved_wrong"] += int((moved & ~kept).sum())
            if "bias" not in name:
                report["stuck"] += int((kept & ~moved).sum())
            if "experts" in name:
                report["groups"][name] = [[int(of.sum()), of.numel()] for of in keep.view(len(moved), -1)]
        blocks = ("layers.", ".h.", "encoder.layer.")
        names = (name for name, tensor in before.items() if tensor.dim() > 1 and any(part in name for part in blocks))
        report["unmasked"] = sorted(name for name in names if name not in self.migu.keep)

    def _compare(self, report: dict[str, Any]) -> None:
        end = whole(self.engine.shards, "master")
        dense = {n: p.detach() for n, p in self.dense.parameters.items()}
        report["error"] = max(float(((end[n] - dense[n]).abs() / dense[n].abs().clamp(min=1.0)).max()) for n in end)
        for moment in ("exp_avg", "exp_avg_sq"):
            held = whole(self.engine.shards, moment)
            truth = {n: self.dense.optimizer.state[p][moment] for n, p in self.dense.parameters.items()}
            scale = max(float(t.abs().max()) for t in truth.values())
            report[moment] = max(float((held[n] - truth[n]).abs().max()) for n in held) / scale
