"""Loads the recipe's model and its tokenizer; under ZeRO-3 the model is built and filled shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import logging as hf_logging

from cl_dist.config.objectives import FACTS, Family, ObjectiveName
from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import show
from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.bfloat16 import mend_products
from cl_dist.models.builtin import builtin_config, byte_tokenizer
from cl_dist.models.check import (
    check_model_config,
    local_folder,
    no_sdpa,
    refuse_long,
    resolve_objective,
    unsupported_architecture,
)
from cl_dist.models.every_expert import run_every_expert
from cl_dist.models.gguf import converted_gguf
from cl_dist.models.hub import explain, hub_problem
from cl_dist.models.initialise import initialise_
from cl_dist.models.positions import longest_inputs
from cl_dist.models.stored_weights import one_tensor_at_a_time
from cl_dist.models.structure import base_model, head_prefixes, is_below, unread_parameters
from cl_dist.tasks.template import ChatTemplate

logger = logging.getLogger(__name__)

AUTO_CLASSES: dict[ObjectiveName, Any] = {
    name: getattr(transformers, facts.auto_class) for name, facts in FACTS.items()
}


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready for adapters and an engine."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    """The resolved training objective, never `auto`."""
    drawn: frozenset[str] = frozenset()
    """Names of the parameters drawn at random because no file contains them: a new head, or the pooler below it."""


def load_model(
    model: ModelConfig,
    label_count: int,
    *,
    zero3_config: dict[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
    cache_dir: Path,
    chat: bool = False,
) -> LoadedModel:
    """Build or load the model with parameters in `dtype` (float32 or bfloat16), on the CPU or, under ZeRO-3, sharded.

    Weights that do not come from a file (a built-in model, a new head) are a function of `seed` and their names.

    Args:
        model: The recipe's model settings.
        label_count: Number of classes of a classifier.
        zero3_config: DeepSpeed configuration to shard the weights from the start; None: load them whole. With it the
            call is collective, and the configuration's precision must be `dtype`.
        dtype: Precision of the parameters.
        seed: Seed of the weights drawn at random.
        cache_dir: Where a GGUF file is converted to, once.
        chat: Whether the tokenizer's chat template will be used.

    Raises:
        BadInput: Something is missing or does not fit; wherever possible, before any weights are read.
    """
    if dtype == torch.bfloat16:
        mend_products()
    # Configuration and tokenizer show most mistakes, and are small.
    folder, config, tokenizer, objective = _small_parts(model, cache_dir)
    if chat:
        ChatTemplate(tokenizer)
    _fit_to_task(config, tokenizer, objective, label_count, model.name_or_path)

    with _quiet(), _failures_as_bad_input(model), _sharded_from_the_start(zero3_config):
        built, drawn = _build(model, folder, config, objective, dtype, seed)
    if FACTS[objective].answer_apart:
        _set_first_token(built, model.name_or_path)
    if model.attention == "auto" and (chosen := built.config._attn_implementation) != "sdpa":
        logger.warning("model.attention: %s has no sdpa, so auto uses %s", type(built).__name__, chosen)
    _prepare(built)

    # Whatever is exported later must not point to a cache or a temporary folder.
    built.name_or_path = built.config._name_or_path = model.name_or_path
    tokenizer.name_or_path = model.name_or_path
    return LoadedModel(built, tokenizer, objective, drawn)


def load_tokenizer(model: ModelConfig, cache_dir: Path) -> tuple[PreTrainedTokenizerBase, ObjectiveName]:
    """The model's tokenizer and its resolved objective, without its weights. Raises BadInput as `load_model` does."""
    _, _, tokenizer, objective = _small_parts(model, cache_dir)
    return tokenizer, objective


def _small_parts(
    model: ModelConfig, cache_dir: Path
) -> tuple[str | None, PreTrainedConfig, PreTrainedTokenizerBase, ObjectiveName]:
    """What transformers loads from, configuration, tokenizer and objective."""
    check_model_config(model)
    with _quiet(), _failures_as_bad_input(model):
        folder = _source(model, cache_dir)
        config = _configuration(model, folder)
        with _blaming_the_tokenizer(model):
            tokenizer = _tokenizer(model, folder, config)
    objective = resolve_objective(model.objective, family_of(config, model.name_or_path), model.name_or_path)
    return folder, config, tokenizer, objective


def model_on_meta(
    model: ModelConfig, label_count: int, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedModel, ObjectiveName]:
    """The model of `load_model` on the meta device, without numbers, and its objective. Reads no weights or tokenizer.

    Args:
        model: The recipe's model settings.
        label_count: Number of classes of a classifier.
        dtype: Precision of the parameters.
        config: The model's configuration; None: read the one that `model` names.

    Raises:
        BadInput: The configuration is missing or unusable.
    """
    with _quiet(), _failures_as_bad_input(model):
        if config is None:
            config = _configuration_alone(model)
        objective = resolve_objective(model.objective, family_of(config, model.name_or_path), model.name_or_path)
        if FACTS[objective].needs_labels:
            config.num_labels = label_count
        with torch.device("meta"):
            built = AUTO_CLASSES[objective].from_config(config, dtype=dtype, attn_implementation=_attention(model))
    _prepare(built)
    built.name_or_path = built.config._name_or_path = model.name_or_path
    return built, objective


def _configuration_alone(model: ModelConfig) -> PreTrainedConfig:
    """The configuration without any weights; a GGUF file has it in its header."""
    if model.gguf_file is not None:
        check_model_config(model)
    if model.name_or_path in BUILTIN_FAMILIES:
        return builtin_config(model.name_or_path)
    source = local_folder(model.name_or_path) or model.name_or_path
    return AutoConfig.from_pretrained(str(source), trust_remote_code=model.trust_remote_code, gguf_file=model.gguf_file)


def _prepare(built: PreTrainedModel) -> None:
    """What every model gets, wherever its weights come from."""
    run_every_expert(built)
    # A tower for pictures learns nothing from text.
    unread = unread_parameters(built)
    for name, parameter in built.named_parameters():
        if name in unread:
            parameter.requires_grad_(False)


def check_length(loaded: LoadedModel, max_length: int, max_target_length: int | None = None) -> None:
    """Raise BadInput if inputs of `max_length` tokens, or an encoder-decoder's answers of `max_target_length`, exceed
    the model's positions (`positions.longest_inputs`).
    """
    name = str(base_model(loaded.model).name_or_path)
    refuse_long(longest_inputs(loaded.model), name, max_length, max_target_length)


def family_of(config: PreTrainedConfig, name: str) -> Family:
    """The model family of a configuration; BadInput if it belongs to none."""
    kind = type(config)
    # BERT and its relatives become decoders when their configuration says so.
    is_decoder = bool(getattr(config, "is_decoder", False))
    if config.is_encoder_decoder and kind in AutoModelForSeq2SeqLM._model_mapping:
        return "encoder-decoder"
    if not config.is_encoder_decoder and kind in AutoModelForMaskedLM._model_mapping and not is_decoder:
        return "encoder"
    if not config.is_encoder_decoder and kind in AutoModelForCausalLM._model_mapping:
        return "decoder"
    raise unsupported_architecture(name, ", ".join(config.architectures or [config.model_type]))


def _source(model: ModelConfig, cache_dir: Path) -> str | None:
    """What transformers loads from, a folder or a Hugging Face id; None for a built-in model."""
    if model.name_or_path in BUILTIN_FAMILIES:
        return None
    folder = local_folder(model.name_or_path)
    source = model.name_or_path if folder is None else str(folder)
    return source if model.gguf_file is None else str(converted_gguf(source, model.gguf_file, cache_dir))


def _configuration(model: ModelConfig, source: str | None) -> PreTrainedConfig:
    if source is None:
        return builtin_config(model.name_or_path)
    return AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)


def _attention(model: ModelConfig) -> str | None:
    """The attention implementation to ask transformers for; None: sdpa if the family has it, else eager."""
    return None if model.attention == "auto" else model.attention


def _tokenizer(model: ModelConfig, source: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, set to pad on the right. Without a padding token it pads with the end token."""
    if source is None:
        return byte_tokenizer(BUILTIN_FAMILIES[model.name_or_path])
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise BadInput(
            f"model.name_or_path: model_max_length of the tokenizer of {source} is {show(longest)}, not a number"
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fit_to_task(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName, label_count: int, name: str
) -> None:
    """Set labels and padding id in `config`; BadInput if tokenizer, model and objective do not fit together."""
    facts = FACTS[objective]
    if facts.needs_labels:
        if label_count < 1:
            raise BadInput(f"model.objective: {name} needs tasks with labels to become a classifier")
        config.num_labels = label_count

    text = _text_config(config, name)
    for each in (config, text):
        if getattr(each, "pad_token_id", None) is None:
            each.pad_token_id = tokenizer.pad_token_id

    for token in ("pad", *facts.needs_tokens):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise BadInput(f"model.name_or_path: the tokenizer of {name} has no {token} token, which {objective} needs")
    entries = getattr(text, "vocab_size", None)
    if entries is not None and len(tokenizer) > entries:
        raise BadInput(
            f"model.name_or_path: the tokenizer of {name} has {len(tokenizer)} entries, but its model has only "
            f"{entries} embeddings"
        )


def _text_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The text part of a multimodal model's configuration; for any other model, the configuration itself."""
    try:
        text: PreTrainedConfig = config.get_text_config()
    except ValueError as error:  # several text models
        raise BadInput(
            f"model.name_or_path: {name} is a {config.model_type}, which has more than one text model; allowed are "
            "models with one"
        ) from error
    if not isinstance(text, PreTrainedConfig):
        raise BadInput(f"model.name_or_path: text_config of {name} is {show(text)}; allowed: a mapping of settings")
    return text


def _set_first_token(model: PreTrainedModel, name: str) -> None:
    """Set the first token that the decoder reads; some checkpoints only name it in their generation config."""
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = getattr(model.generation_config, "decoder_start_token_id", None)
    if model.config.decoder_start_token_id is None:
        raise BadInput(
            f"model.name_or_path: neither config.json nor generation_config.json of {name} says what its decoder reads "
            "first; set decoder_start_token_id in config.json"
        )


def _build(
    model: ModelConfig,
    source: str | None,
    config: PreTrainedConfig,
    objective: ObjectiveName,
    dtype: torch.dtype,
    seed: int,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the names of the parameters drawn at random because the files lack them."""
    auto_class = AUTO_CLASSES[objective]
    # Refuse sdpa early if the model family has none. A model that brings its own code shows that when it is built.
    model_class = auto_class._model_mapping.get(type(config), None)
    if model.attention == "sdpa" and model_class is not None and not model_class._supports_sdpa:
        raise no_sdpa(model, model_class.__name__)
    attention = _attention(model)
    if source is None:
        built = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
        initialise_(built, seed)
        return built, frozenset()
    built, report = auto_class.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )
    # A pretrained encoder may get a new head, and a pooler below it. Any other tensor must come from the files.
    missing = set(report["missing_keys"])
    new = head_prefixes(built) if FACTS[objective].new_head else ()
    if lost := sorted(key for key in missing if not is_below(key, new) and ".pooler." not in key):
        raise BadInput(
            f"model.name_or_path: the weights of {model.name_or_path} lack {len(lost)} tensors of the model, the first "
            f"is {lost[0]}"
        )
    initialise_(built, seed, only=missing)
    return built, frozenset(missing)


@contextmanager
def _sharded_from_the_start(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Inside the block, transformers builds every module under `deepspeed.zero.Init`, and reads weights one at a time.

    transformers holds only a weak reference to the configuration, so deleting it here ends this mode. If it stayed on,
    later generation and resizing would treat all models of the process as sharded.
    """
    keep = None if zero3_config is None else HfDeepSpeedConfig(zero3_config)
    try:
        with nullcontext() if keep is None else one_tensor_at_a_time():
            yield
    finally:
        del keep


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' progress bars, which every rank would draw."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _failures_as_bad_input(model: ModelConfig) -> Iterator[None]:
    """Turn what the libraries raise for a missing, damaged or unknown model into one sentence."""
    try:
        yield
    except ClDistError:  # a signal that asks to stop among them
        raise
    except Exception as error:  # tokenizers raises Exception itself
        if "scaled_dot_product_attention" in str(error):
            raise no_sdpa(model, "model with its own code") from error
        if local_folder(model.name_or_path) is None and (problem := hub_problem(error)) is not None:
            raise BadInput(f"model.name_or_path: {model.name_or_path} {explain(problem, model)}") from error
        raise BadInput(f"model.name_or_path: {model.name_or_path} cannot be loaded: {_reason(error)}") from error


@contextmanager
def _blaming_the_tokenizer(model: ModelConfig) -> Iterator[None]:
    """Say that it is the tokenizer of a local folder that cannot be read."""
    try:
        yield
    except ClDistError:
        raise
    except Exception as error:
        reason = _reason(error)
        if local_folder(model.name_or_path) is None or "trust_remote_code" in reason:
            raise
        raise BadInput(
            f"model.name_or_path: the tokenizer in {model.name_or_path} cannot be read: {reason}; take the tokenizer "
            "files of the model that it belongs to"
        ) from error


def _reason(error: Exception) -> str:
    """The gist of a library's error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it brings its own Python code, which runs only with model.trust_remote_code: true"
    return text if len(text) <= 400 else text[:400] + " ..."
