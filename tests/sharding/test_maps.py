"""The planned pieces are those of DeepSpeed, and together they cover every element once, for any number of ranks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cl_dist.kernels import RowLayout, mask_rows_
from cl_dist.methods.kif.units import Part, UnitMap, add_sums_
from cl_dist.sharding.maps import Piece, ShardMap, even_share
from tests.ranks import run_ranks
from tests.sharding.map_jobs import CASES

WORLDS = (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 100, 255, 256, 512, 1000, 1023, 1024)
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (5, 7),
    "one": (1,),
    "b": (33, 129),
    "experts": (3, 8, 6),
    "bias": (17,),
    "wide": (4, 1021),
}
LAYOUTS = {
    "a": RowLayout(1, 5, 7),
    "b": RowLayout(1, 129, 33, columns=True),
    "experts": RowLayout(3, 8, 6),
    "bias": RowLayout(1, 17, 1),
    "wide": RowLayout(1, 4, 1021),
}


def numels(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Two groups, as the optimiser has them."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    matrices = {name: size for name, size in sizes.items() if len(shapes[name]) > 1}
    return [matrices, {name: size for name, size in sizes.items() if name not in matrices}]


def by_parameter(shards: ShardMap) -> dict[str, list[Piece]]:
    """All ranks' pieces of each parameter, in rank order."""
    found: dict[str, list[Piece]] = {name: [] for name in shards.numels}
    for rank in range(shards.ranks):
        for name, piece in shards.owned(rank).items():
            found[name].append(piece)
    return found


def covers_once(shards: ShardMap) -> bool:
    """Whether the ranks' pieces follow each other without gap or overlap, inside their flat tensors."""
    for name, pieces in by_parameter(shards).items():
        ends = [0, *(piece.stop for piece in pieces)]
        if [piece.start for piece in pieces] != ends[:-1] or ends[-1] != shards.numels[name]:
            return False
    for rank in range(shards.ranks):
        taken: dict[int, int] = {}
        for piece in shards.owned(rank).values():
            if piece.numel < 1 or piece.offset < taken.get(piece.flat, 0):
                return False
            taken[piece.flat] = piece.offset + piece.numel
        if any(end > shards.flat_numels[flat] for flat, end in taken.items()):
            return False
    return True


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pieces_cover_every_element_once(stage: int, ranks: int) -> None:
    draw = random.Random(1000 * stage + ranks)
    groups = numels(SHAPES)
    more = [{f"{group}{number}": draw.randint(1, 4000) for number in range(12)} for group in "pq"]
    more[0]["empty"] = 0  # DeepSpeed leaves it out
    for each in (groups, more):
        shards = ShardMap(
            each, stage, ranks, parameter_alignment=draw.choice([1, 4, 8]), sub_group_size=draw.choice([50, 10**9])
        )
        assert covers_once(shards)
        assert "empty" not in shards.numels
        assert shards.padding >= 0
        assert ranks * sum(shards.flat_numels) == sum(shards.numels.values()) + shards.padding


@pytest.mark.parametrize(
    ("stage", "ranks", "settings", "flat_numels", "padding"),
    [
        (0, 2, {}, [6, 7], 0),
        (1, 2, {}, [8], 3),  # 13 elements up to the next multiple of 4
        (2, 3, {}, [6], 5),  # and of 6
        (1, 2, {"parameter_alignment": 4}, [8], 3),  # 8 + 7; the last parameter needs no padding of its own
        (1, 2, {"parameter_alignment": 16}, [12], 11),
        (3, 2, {}, [3 + 4], 1),
        (3, 3, {}, [2 + 3], 2),
        (3, 7, {}, [1 + 1], 1),  # 7 elements are cut evenly
        (3, 2, {"sub_group_size": 3}, [3, 4], 1),
        (3, 2, {"sub_group_size": 4}, [3 + 4], 1),
    ],
)
def test_there_is_no_more_padding_than_deepspeed_adds(
    stage: int, ranks: int, settings: dict[str, int], flat_numels: list[int], padding: int
) -> None:
    shards = ShardMap([{"a": 6, "b": 7}], stage, ranks, **settings)
    assert (shards.flat_numels, shards.padding) == (flat_numels, padding)


@pytest.mark.parametrize(("numel", "ranks"), [(0, 3), (2, 3), (12, 4), (13, 4), (1000, 7)])
def test_even_shares_cover_everything_and_differ_by_one(numel: int, ranks: int) -> None:
    shares = [even_share(numel, rank, ranks) for rank in range(ranks)]
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
    assert shares[-1][1] == numel
    sizes = {stop - start for start, stop in shares}
    assert max(sizes) - min(sizes) <= 1


def test_at_stage_0_every_rank_owns_everything() -> None:
    shards = ShardMap(numels(SHAPES), 0, 3)
    owned = shards.owned(2)
    assert {name: (piece.start, piece.numel) for name, piece in owned.items()} == {
        name: (0, numel) for name, numel in shards.numels.items()
    }
    assert shards.padding == 0


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", [1, 3])
def test_row_masks_on_shards_put_together_are_the_dense_ones(stage: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    dense = {name: torch.randn(SHAPES[name], generator=generator).flatten() for name in LAYOUTS}
    keep = {name: torch.rand(layout.total, generator=generator) < 0.3 for name, layout in LAYOUTS.items()}
    joined = {name: tensor.clone() for name, tensor in dense.items()}
    pieces = by_parameter(ShardMap(numels({name: SHAPES[name] for name in LAYOUTS}), stage, ranks))
    for name, layout in LAYOUTS.items():
        for piece in pieces[name]:
            mask_rows_(joined[name][piece.start : piece.stop], piece.start, layout, keep[name])
    for name, layout in LAYOUTS.items():
        assert torch.equal(joined[name], dense[name] * whole_mask(layout, keep[name]))


def whole_mask(layout: RowLayout, keep: torch.Tensor) -> torch.Tensor:
    """The mask of every element, by another way than segments."""
    rows = keep.view(layout.matrices, layout.rows, 1).expand(-1, -1, layout.length)
    return (rows.transpose(1, 2) if layout.columns else rows).reshape(-1)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_units_on_shards_put_together_are_the_dense_ones(stage: int, ranks: int) -> None:
    shards = ShardMap(numels(SHAPES), stage, ranks)
    pieces = by_parameter(shards)
    for units in ("matrix", "row"):
        unit_map = UnitMap.build(SHAPES, units, {"experts": LAYOUTS["experts"], "b": LAYOUTS["b"]})  # type: ignore[arg-type]
        for name, part in unit_map.parts.items():
            values = torch.arange(shards.numels[name], dtype=torch.float64) + 1
            together = torch.zeros(part.count, dtype=torch.float64)
            for piece in pieces[name]:
                add_sums_(together, values[piece.start : piece.stop], piece.start, part)
            assert torch.equal(together, by_slices(values, part))


def by_slices(values: torch.Tensor, part: Part) -> torch.Tensor:
    """Each slice's sum, taken from the whole tensor by `Part.slices`."""
    whole = values.view(part.shape)
    sums = [whole[tuple(slice(*bounds) for bounds in part.slices(number))].sum() for number in range(part.count)]
    return torch.stack(sums)


def assert_as_deepspeed(reports: list[dict[str, Any]]) -> None:
    """Every rank's report of every case is what the arithmetic says."""
    for name, case in CASES.items():
        for rank, report in enumerate(reports):
            found = report[name]
            bytes_each = 2 if case.get("dtype") == "bfloat16" else 4
            aligned = 16 // bytes_each if "parameter_alignment" in case.get("zero", {}) else 1
            sub_group = case.get("zero", {}).get("sub_group_size", 10**9)
            shards = ShardMap(found["groups"], case["stage"], len(reports), aligned, sub_group)
            assert {each: list(piece) for each, piece in shards.owned(rank).items()} == found["pieces"], name
            assert shards.flat_numels == found["sizes"], name


def test_two_ranks_are_cut_as_deepspeed_cuts_them(every_layout: list[dict[str, Any]]) -> None:
    assert_as_deepspeed([report["maps"] for report in every_layout])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_numbers_of_ranks_are_cut_as_deepspeed_cuts_them(ranks: int) -> None:
    assert_as_deepspeed(run_ranks("tests.sharding.map_jobs:run", ranks, timeout=300))
