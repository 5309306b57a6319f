"""The tables of raw DeepSpeed settings against DeepSpeed's own configuration."""

from __future__ import annotations

from collections.abc import KeysView
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cl_dist.config.deepspeed import ALLOWED, OWNED, REFUSED, SECTIONS, refuse_raw_settings
from cl_dist.config.load import load_recipe
from cl_dist.errors import BadInput

TABLES = {*ALLOWED, *REFUSED, *OWNED, *SECTIONS}
VALUES = [None, True, False, -1, 0, 1, 2, 3, 500, 10**9, 10**10 + 1, 2**63, 5e8, 0.5, float("inf"), float("nan"), "",
          "x", "auto", "fp32", "bf16", "fp16", "cpu", "none", "nvme", "true", "1", [], [1], {}, {"a": 1}]  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b: value` as mappings."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


class Recorder(dict[str, Any]):
    """A configuration that remembers what was looked for in it."""

    asked: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def __copy__(self) -> Recorder:
        return Recorder(self)


def test_every_section_that_deepspeed_reads_is_in_a_table() -> None:
    from deepspeed.runtime import config

    config.DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    assert len(Recorder.asked) > 50
    sections = {key.partition(".")[0] for key in TABLES}
    assert Recorder.asked | set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= sections


def test_every_key_of_deepspeeds_typed_sections_is_in_a_table() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    known = {key.split(".")[1] for key in TABLES if key.startswith("zero_optimization.")}
    assert names | set(_REMOVED_ZERO_CONFIG_KEYS) == known
    inside = {key.split(".")[2] for key in TABLES if key.startswith("zero_optimization.offload_param.")}
    assert set(DeepSpeedZeroOffloadParamConfig.model_fields) == inside


@pytest.mark.parametrize("key", [key for key in ALLOWED if key.startswith("zero_optimization.")])
def test_deepspeed_reads_every_allowed_value_as_written(key: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage = ALLOWED[key].stages[-1]
    taken = [value for value in VALUES if accepts(key, value, stage)]
    assert taken
    for value in taken:
        settings = nested(key.removeprefix("zero_optimization."), value)
        read = DeepSpeedZeroConfig(stage=stage, **settings).model_dump(by_alias=True)
        for part in key.split(".")[1:]:
            read = read[part]
        assert read == value


def accepts(key: str, value: Any, stage: int) -> bool:
    try:
        refuse_raw_settings(nested(key, value), stage)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("key", [*REFUSED, *OWNED])
@pytest.mark.parametrize("value", [None, True, {}, {"enabled": True}])
def test_a_refused_setting_is_refused_by_name_whatever_its_value(key: str, value: Any) -> None:
    for stage in (0, 1, 2, 3):
        with pytest.raises(ValueError, match=rf"^deepspeed\.{key}: (not supported|set by cl_dist from)"):
            refuse_raw_settings(nested(key, value), stage)


@pytest.mark.parametrize("key", ALLOWED)
def test_a_setting_is_refused_at_stages_that_do_not_read_it(key: str) -> None:
    good = next(value for value in VALUES if accepts(key, value, ALLOWED[key].stages[0]))
    assert [stage for stage in range(4) if accepts(key, good, stage)] == list(ALLOWED[key].stages)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "zero_optimisation={reduce_bucket_size: 1}",
            "zero_optimisation: unknown key; did you mean zero_optimization?",
        ),
        ("reduce_bucket_size=1", "reduce_bucket_size: unknown key; did you mean zero_optimization.reduce_bucket_size?"),
        ("zero_optimization.prefetch_bucket_size=1", "did you mean zero_optimization.stage3_prefetch_bucket_size?"),
        (
            "zero_optimization.reduce_bucket_size=abc",
            '_size: "abc" is not allowed; allowed: a whole number, at least 1',
        ),
        ("zero_optimization.reduce_bucket_size=0", "reduce_bucket_size: 0 is not allowed; allowed: a whole number, at"),
        (
            "zero_optimization.allgather_bucket_size=3",
            "bucket_size: 3 is not allowed; allowed: an even number, at least",
        ),
        ("zero_optimization.overlap_comm='true'", 'overlap_comm: "true" is not allowed; allowed: true or false'),
        ("zero_optimization.stage3_max_live_parameters=1", "read at stage 3 only, but zero.stage is 2; remove it"),
        ("torch_autocast={enabled: true}", "torch_autocast: not supported: train.dtype sets the precision; remove it"),
        ("tensor_parallel={autotp_size: 2}", "tensor_parallel: not supported: cl_dist trains with data parallelism on"),
        ("zero_optimization.zenflow={topk_ratio: 0.1}", "zenflow: not supported: it updates weights outside the maske"),
        ("zero_optimization.offload_param=null", "offload_param: null is not a mapping of settings"),
        ("communication_data_type=fp16", 'communication_data_type: "fp16" is not allowed; allowed: fp32, bf16'),
        ("zzz=1", "zzz: unknown key; allowed here: data_types, zero_optimization, communication_data_type"),
    ],
)
def test_a_wrong_raw_setting_is_reported_with_its_dotted_key(setting: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe("quickstart", [f"zero.deepspeed.{setting}"])
    assert str(refusal.value).startswith("zero.deepspeed.")
    assert message in str(refusal.value)


def test_bfloat16_gradients_cannot_be_summed_in_float32_at_stage_0() -> None:
    changes = ["zero.deepspeed.data_types.grad_accum_dtype=fp32", "train.dtype=bfloat16", "zero.stage=0"]
    with pytest.raises(BadInput, match=r"^zero.deepspeed.data_types.grad_accum_dtype: at stage 0 with train.dtype bf"):
        load_recipe("quickstart", changes)
    for good in ("train.dtype=float32", "zero.stage=1"):
        load_recipe("quickstart", [*changes, good])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.dtype=bfloat16", "train.grad_dtype=float32", "zero.stage=0"],
         "train.grad_dtype: at stage 0 with train.dtype bfloat16, DeepSpeed always sums gradients in bfloat16; give z"),
        (["train.grad_dtype=bfloat16"], "train.grad_dtype: bfloat16 needs train.dtype bfloat16"),
        (["train.dtype=bfloat16", "train.grad_dtype=float32", "zero.deepspeed.communication_data_type=bf16"],
         "zero.deepspeed.communication_data_type: set by train.grad_dtype, which is float32; give only one of them"),
        (["train.dtype=bfloat16", "train.grad_dtype=bfloat16", "zero.deepspeed.data_types.grad_accum_dtype=fp32"],
         "zero.deepspeed.data_types.grad_accum_dtype: set by train.grad_dtype, which is bfloat16; give only one"),
    ],
)  # fmt: skip
def test_a_precision_of_gradients_that_contradicts_the_recipe(changes: list[str], message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe("quickstart", changes)
    assert str(refusal.value).startswith(message)


def test_a_precision_of_gradients_that_fits() -> None:
    for good in (["train.grad_dtype=float32"], ["train.dtype=bfloat16", "train.grad_dtype=bfloat16", "zero.stage=0"]):
        load_recipe("quickstart", good)


def test_the_page_lists_every_setting_as_it_is_checked() -> None:
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    for row in [*allowed_rows(), *refused_rows()]:
        assert row in page.splitlines()
    assert page.count("\n| `") == len(ALLOWED) + len(REFUSED)


def allowed_rows() -> list[str]:
    """`| setting | values | stages |`."""
    return [
        f"| `{key}` | {setting.words} | {', '.join(map(str, setting.stages))} |" for key, setting in ALLOWED.items()
    ]


def refused_rows() -> list[str]:
    """`| setting | why not |`."""
    return [f"| `{key}` | {why} |" for key, why in REFUSED.items()]


PASTED = """\
zero:
  stage: 3
  deepspeed:
    bf16: {enabled: auto}
    optimizer: {type: AdamW, params: {lr: auto}}
    zero_optimization:
      stage: 3
      offload_optimizer: {device: cpu, pin_memory: true}
      overlap_comm: true
      reduce_bucket_size: auto
      sub_group_size: 1e9
    gradient_accumulation_steps: auto
    steps_per_print: 2000
"""


def test_one_message_reports_all_problems_of_a_pasted_configuration(tmp_path: Path) -> None:
    file = tmp_path / "pasted.yaml"
    file.write_text(f"model: {{name_or_path: a/b}}\nstream: {{order: 1}}\n{PASTED}", encoding="utf-8")
    with pytest.raises(BadInput) as refusal:
        load_recipe(str(file))
    lines = str(refusal.value).splitlines()
    assert [line.partition(":")[0].removeprefix("zero.deepspeed.") for line in lines] == [
        "bf16",
        "optimizer",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer",
        "zero_optimization.reduce_bucket_size",
        "gradient_accumulation_steps",
        "steps_per_print",
    ]
    assert "auto is a placeholder" in lines[4]


def test_a_message_names_a_limited_number_of_refused_settings() -> None:
    with pytest.raises(ValueError, match="unknown key") as refusal:
        refuse_raw_settings({f"x{number}": 1 for number in range(5000)}, 2)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "zero.deepspeed: 4980 more settings are refused"
