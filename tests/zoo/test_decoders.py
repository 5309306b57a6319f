"""The decoders of the zoo, in full and with LoRA, under MIGU and KIF."""

from __future__ import annotations

import pytest

from tests.zoo.visits import Found, check_model, check_positions, part, visit

MODELS = part("decoder")


@pytest.fixture(scope="module")
def found() -> Found:
    """The outcomes of all models, by name."""
    return visit(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_it_works_or_is_refused_in_time(found: Found, name: str) -> None:
    check_model(name, found[name])


@pytest.mark.parametrize("name", MODELS)
def test_its_longest_input_is_known(found: Found, name: str) -> None:
    check_positions(found[name])
