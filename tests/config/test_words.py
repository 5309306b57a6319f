from __future__ import annotations

from typing import Any

import pytest

from cl_dist.config.words import listed


@pytest.mark.parametrize(
    ("items", "options", "expected"),
    [
        ([], {}, ""),
        ([], {"last": "or"}, ""),
        (["a"], {"last": "or"}, "a"),
        ([1, 2], {"last": "or"}, "1 or 2"),
        (["a", "b", "c"], {}, "a, b, c"),
        (["a", "b", "c"], {"last": "and"}, "a, b and c"),
        (["a", "b", "c"], {"most": 3, "last": "and"}, "a, b and c"),
        (range(9), {"most": 2, "last": "or"}, "0, 1 and 7 more"),
        (iter("abc"), {"most": 1}, "a and 2 more"),
        (["x: 1, not 2", "y", "z"], {"most": 1, "separator": "; "}, "x: 1, not 2; and 2 more"),
        (["x", "y"], {"most": 2, "separator": "; "}, "x; y"),
    ],
)
def test_a_list_in_one_line(items: Any, options: dict[str, Any], expected: str) -> None:
    assert listed(items, **options) == expected
