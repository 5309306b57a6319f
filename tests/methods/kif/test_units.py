from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.errors import BadInput
from cl_dist.kernels import RowLayout
from cl_dist.methods.kif import units as module
from cl_dist.methods.kif.units import Part, UnitMap, add_sums_, spread

SHAPES = {
    "q.lora_A.default.weight": (3, 5),
    "q.lora_B.default.weight": (7, 3),
    "norm.weight": (5,),
    "head.weight": (2, 5),
    "one.weight": (1, 1),
}


def owner_table(units: UnitMap) -> dict[str, torch.Tensor]:
    """For every parameter the unit of each element, read off the slices of units.json."""
    table = {name: torch.full(SHAPES[name], -1) for name in SHAPES}
    for number, slices in enumerate(json.loads(units.as_text()).values()):
        for entry in slices:
            box = tuple(slice(start, stop) for start, stop in entry["slices"])
            assert (table[entry["parameter"]][box] == -1).all(), "two units own an element"
            table[entry["parameter"]][box] = number
    return table


@pytest.mark.parametrize(("kind", "count"), [("matrix", 5), ("rank", 3 + 3), ("row", 3 + 7 + 1 + 2 + 1)])
def test_every_element_has_one_unit(kind: str, count: int) -> None:
    units = UnitMap.build(SHAPES, kind)  # type: ignore[arg-type]
    assert len(units) == len(set(units.names)) == count
    table = owner_table(units)
    assert all((owners >= 0).all() for owners in table.values())
    for name, part in units.parts.items():
        flat = table[name].reshape(-1)
        found = torch.cat([slices for _, slices in part.chunks(0, flat.numel(), flat.device)]) + part.first
        assert torch.equal(found, flat), name


def test_a_rank_is_a_row_of_a_and_a_column_of_b() -> None:
    units = UnitMap.build(SHAPES, "rank").as_json()
    assert units["q.lora.default[1]"] == [
        {"parameter": "q.lora_B.default.weight", "slices": [[0, 7], [1, 2]]},
        {"parameter": "q.lora_A.default.weight", "slices": [[1, 2], [0, 5]]},
    ]
    assert units["norm.weight"] == [{"parameter": "norm.weight", "slices": [[0, 5]]}]


@pytest.mark.parametrize("names", [("w.weight",), ("q.lora_A.default.weight",)], ids=["no LoRA", "half of a pair"])
def test_rank_units_need_lora(names: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=r"method\.units: rank"):
        UnitMap.build(dict.fromkeys(names, (3, 5)), "rank")


def test_rows_are_output_rows_however_the_weight_is_stored() -> None:
    """GPT-2's Conv1D is `(in, out)`, Mixtral's experts are `(experts, out, in)`, GPT-OSS's `(experts, in, out)`."""
    shapes = {"conv": (5, 3), "mixtral": (2, 3, 5), "gptoss": (2, 5, 3), "gptoss_bias": (2, 3), "linear": (3, 5)}
    layouts = {
        "conv": RowLayout(1, 3, 5, columns=True),
        "mixtral": RowLayout(2, 3, 5),
        "gptoss": RowLayout(2, 3, 5, columns=True),
        "gptoss_bias": RowLayout(2, 3, 1),
    }
    rows = UnitMap.build(shapes, "row", layouts)
    counts = {name: part.count for name, part in rows.parts.items()}
    assert counts == {"conv": 3, "mixtral": 6, "gptoss": 6, "gptoss_bias": 2, "linear": 3}
    units = rows.as_json()
    assert units["conv[2]"] == [{"parameter": "conv", "slices": [[0, 5], [2, 3]]}]
    assert units["mixtral[1][2]"] == [{"parameter": "mixtral", "slices": [[1, 2], [2, 3], [0, 5]]}]
    assert units["gptoss[1][2]"] == [{"parameter": "gptoss", "slices": [[1, 2], [0, 5], [2, 3]]}]
    matrices = UnitMap.build(shapes, "matrix", layouts)
    assert [name for name in matrices.names if "mixtral" in name] == ["mixtral[0]", "mixtral[1]"]
    assert {"conv", "linear"} <= set(matrices.names), "one matrix is one unit"
    assert matrices.as_json()["gptoss[1]"] == [{"parameter": "gptoss", "slices": [[1, 2], [0, 5], [0, 3]]}]


def parts() -> st.SearchStrategy[Part]:
    shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    return shapes.flatmap(
        lambda shape: st.sets(st.sampled_from(range(len(shape)))).map(lambda axes: Part(0, shape, tuple(sorted(axes))))
    )


def slices_of(part: Part) -> torch.Tensor:
    """Slice number of every element, by indexing."""
    table = torch.full(part.shape, -1)
    for number in range(part.count):
        table[tuple(slice(start, stop) for start, stop in part.slices(number))] = number
    return table.reshape(-1)


@given(part=parts(), cuts=st.lists(st.integers(0, 216), max_size=4), chunk=st.integers(1, 9))
def test_pieces_of_any_ranks_add_up(part: Part, cuts: list[int], chunk: int) -> None:
    """However the flattened parameter is cut over ranks, and however small the chunks are."""
    numel = math.prod(part.shape)
    values = torch.arange(1.0, numel + 1)
    truth = torch.zeros(part.count, dtype=torch.float64).index_add_(0, slices_of(part), values.double())
    sums = torch.zeros(part.count, dtype=torch.float64)
    places = sorted({0, numel, *(min(cut, numel) for cut in cuts)})
    before, module.CHUNK = module.CHUNK, chunk
    try:
        for start, stop in pairwise(places):
            add_sums_(sums, values[start:stop], start, part)
    finally:
        module.CHUNK = before
    assert torch.equal(sums, truth)
    assert part.elements * part.count == numel


@given(part=parts(), start=st.integers(0, 216), length=st.integers(0, 216), chunk=st.integers(1, 9))
def test_every_element_gets_its_units_value(part: Part, start: int, length: int, chunk: int) -> None:
    numel = math.prod(part.shape)
    start = min(start, numel)
    stop = min(start + length, numel)
    values = torch.rand(part.count)
    before, module.CHUNK = module.CHUNK, chunk
    try:
        found = torch.full((stop - start,), math.nan)
        for offset, each in spread(values, part, start, stop):
            found[offset : offset + each.numel()] = each
    finally:
        module.CHUNK = before
    assert torch.equal(found, values[slices_of(part)[start:stop]])
