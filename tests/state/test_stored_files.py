"""A run of an earlier release resumes with its own defaults. tests/cli/test_damaged.py has damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.state.preflight import changed_settings
from cl_dist.state.stored_files import as_plain, kept_defaults, stored_recipe


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config.yaml of an earlier release for quickstart, whose max_target_length is 8."""
    data = yaml.safe_load(dump_recipe(load_recipe("quickstart")[0]))
    data["model"]["attention"] = "sdpa"
    data["eval"]["max_new_tokens"] = 50
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "config.yaml"


def differences(config: Path, *changes: str) -> list[str]:
    recipe: Recipe = load_recipe("quickstart", changes, kept_defaults(config))[0]
    return changed_settings(as_plain(stored_recipe(config)), as_plain(recipe), digested=False)


def test_defaults_that_have_changed_since_are_the_runs(config: Path) -> None:
    without = as_plain(load_recipe("quickstart")[0])
    assert len(changed_settings(as_plain(stored_recipe(config)), without, digested=False)) == 2
    assert differences(config) == []


def test_what_is_given_counts(config: Path) -> None:
    assert differences(config, "model.attention=eager") == ["model.attention: 'sdpa' in the run, 'eager' now"]
    assert differences(config, "eval.max_new_tokens=50") == []


def test_without_a_run_nothing_is_kept(tmp_path: Path) -> None:
    assert kept_defaults(tmp_path / "config.yaml") == {}


def test_a_default_does_not_hide_a_component_that_is_none() -> None:
    with pytest.raises(BadInput, match="eval"):
        load_recipe("quickstart", ["eval=nonsense"], {"eval.max_new_tokens": 50})
