from __future__ import annotations

import dataclasses

import pytest

from cl_dist.config import schema
from cl_dist.config.fields import Setting, explain, info_of, settings_of
from cl_dist.config.ranges import Choices
from cl_dist.config.schema import Recipe
from cl_dist.methods.catalogue import built_in
from cl_dist.tasks.formats.catalogue import builtin_formats
from cl_dist.tasks.formats.format import Format, StreamSettings, defaults_of

SETTINGS = list(settings_of(Recipe))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_has_a_help_text_and_allowed_values(setting: Setting) -> None:
    assert len(setting.help) > 10
    assert setting.help.endswith((".", "`."))
    assert setting.allowed
    assert setting.key in explain()


def test_no_component_of_the_schema_is_left_out() -> None:
    components = {cls for cls in vars(schema).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    components -= {Choices, Format, StreamSettings}  # what they are made of
    components |= set(built_in().values())
    reached = {setting.component for setting in SETTINGS} | set(built_in().values()) | {Recipe, None}
    assert components <= reached
    # What a format has of its own stands beside the common settings, in the place of the field that holds it.
    of_tasks = {name for cls in builtin_formats().values() for name in defaults_of(cls)}
    of_streams = {name for cls in builtin_formats().values() for name in defaults_of(cls.STREAM or StreamSettings)}
    common = sum(len(info_of(cls)) for cls in components) - len(["reader", "shared"])
    assert len(SETTINGS) == common + len(of_tasks) + len(of_streams)


def test_a_formats_setting_names_its_formats() -> None:
    assert (
        "stream.tasks[].input_field\n    a string (default: input)\n"
        "    Formats auto, huggingface and jsonl: Field of a record that contains the prompt.\n" in explain()
    )
    found = "found from `path`: a file, a folder, a saved or published data set"
    stored = f" How the data is stored. `auto`: {found}; `builtin`: generated; `cl_benchmark`: "
    assert stored in " ".join(explain().split())
    assert "stream.name_tasks\n    true or false (default: false)\n    Format cl_benchmark: Start prompts" in explain()


@pytest.mark.parametrize(
    ("key", "allowed", "default"),
    [
        ("model.name_or_path", "a string", None),
        ("model.lora.target_modules", "a list of strings, or all-linear", "all-linear"),
        ("train.max_steps_per_task", "a whole number, at least 1, or null", "null"),
        ("train.learning_rate", "a number, above 0", "0.0001"),
        ("train.seed", "a whole number, at least 0, below 2147483648", "42"),
        ("zero.stage", "0, 1, 2, 3", "2"),
        ("method(migu).threshold", "a number, at least 0, below 1", "0.7"),
        ("method(kif).orthogonal", "auto, or a number, at least 0", "auto"),
        ("method(tasl).threshold", "a number, at least 0, at most 100", "20.0"),
        ("method[]", "a list of mappings", "sequential"),
        ("stream.tasks[]", "a list of mappings", ""),
        ("stream.tasks[].name", "a string, at least 1 character, at most 100 characters", None),
        ("eval", "a mapping of settings", ""),
    ],
)
def test_what_is_allowed_in_words(key: str, allowed: str, default: str | None) -> None:
    setting = next(setting for setting in SETTINGS if setting.key == key)
    assert (setting.allowed, setting.default) == (allowed, default)


def test_the_text_of_one_setting() -> None:
    assert (
        "zero.offload\n    true or false (default: false)\n"
        "    Keep the optimiser's state in CPU memory (stages 1 to 3).\n" in explain()
    )
