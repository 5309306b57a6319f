"""Which cases of a module the tests that were chosen need: the others are not computed."""

from __future__ import annotations

import pytest


def chosen_cases(request: pytest.FixtureRequest, world: int) -> list[int]:
    """Numbers of the cases that this module's tests at `world` ranks will look at, the first one always among them."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    parameters = [call.params for call in calls if call is not None]
    return sorted({0, *(each["case"] for each in parameters if each.get("world") == world and "case" in each)})
