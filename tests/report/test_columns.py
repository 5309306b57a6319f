from __future__ import annotations

import numpy as np
import pytest

from cl_dist.report.columns import (
    MAX_BLOCKS,
    MAX_NAMED,
    MAX_UNITS,
    OUTSIDE,
    columns_of_modules,
    columns_of_units,
    without_common_start,
)
from cl_dist.report.units import UnitTable


def table(*parameters: str, units_each: int = 1) -> UnitTable:
    """`units_each` units of one element for every parameter."""
    names = ((name, number) for name in parameters for number in range(units_each))
    return UnitTable.from_json({f"{n}[{i}]": [{"parameter": n, "slices": [[i, i + 1]]}] for n, i in names})


def test_modules_are_grouped_by_kind_and_sorted_by_layer() -> None:
    units = table(
        "model.embed.weight",
        *(f"model.layers.{layer}.{kind}.weight" for layer in (0, 1, 10, 2) for kind in ("attn.q", "mlp.up")),
        "model.norm.weight",
    )
    columns = columns_of_modules(units)
    assert columns.blocks == (("attn.q", 4), ("mlp.up", 4), ("embed", 1), ("norm", 1))
    by_column = dict(zip(columns.of_piece.tolist(), units.modules, strict=True))
    assert [by_column[column].removeprefix("model.") for column in range(columns.count)] == [
        *(f"layers.{layer}.attn.q" for layer in (0, 1, 2, 10)),
        *(f"layers.{layer}.mlp.up" for layer in (0, 1, 2, 10)),
        "embed",
        "norm",
    ]


def test_modules_outside_the_layers_of_a_deep_model_share_a_label() -> None:
    layers = (f"model.layers.{layer}.{kind}.weight" for layer in range(MAX_NAMED // 2) for kind in ("norm", "up"))
    columns = columns_of_modules(table("model.embed.weight", *layers, "model.norm.weight"))
    assert columns.blocks == (("norm", MAX_NAMED // 2), ("up", MAX_NAMED // 2), (OUTSIDE, 2))


def test_a_kind_and_a_module_outside_the_layers_may_share_a_name() -> None:
    columns = columns_of_modules(table("m.layers.0.norm.weight", "m.layers.1.norm.weight", "m.norm.weight"))
    assert columns.blocks == (("norm", 2), ("norm", 1))
    assert columns_of_modules(table("embed.weight", "head.weight")).blocks == (("embed", 1), ("head", 1))


def test_two_stacks_have_different_labels() -> None:
    units = table(
        *(f"t5.{stack}.block.{layer}.layer.0.q.weight" for stack in ("encoder", "decoder") for layer in (0, 1))
    )
    assert columns_of_modules(units).blocks == (("encoder layer.q", 2), ("decoder layer.q", 2))


def test_experts_of_a_layer_share_a_column() -> None:
    units = table(*(f"m.layers.{layer}.experts.{expert}.up.weight" for layer in (0, 1) for expert in range(8)))
    columns = columns_of_modules(units)
    assert columns.blocks == (("experts.up", 2),)
    assert columns.of_piece.tolist() == [0] * 8 + [1] * 8
    values = np.array([[*np.linspace(0, 1, 8), *np.zeros(8)]])
    assert units.mean(values, columns.of_piece, 2).tolist() == [[pytest.approx(0.5), 0.0]]


def test_a_module_that_is_a_number_is_labelled_by_its_parent() -> None:
    assert columns_of_modules(table("classifier.0.weight", "classifier.3.weight")).blocks == (("classifier", 2),)


def test_a_few_units_get_a_column_each() -> None:
    units = table("m.layers.0.q.weight", "m.layers.1.q.weight", units_each=3)
    columns = columns_of_units(units)
    assert columns.blocks == (("0 q", 3), ("1 q", 3))
    assert columns.of_piece.tolist() == [0, 1, 2, 3, 4, 5]


def test_units_of_one_module_are_adjacent() -> None:
    slices = {
        name: [{"parameter": f"{name[0]}.{name[1:]}", "slices": [[0, 1]]}] for name in ("ax", "bx", "cx", "ay", "by")
    }
    columns = columns_of_units(UnitTable.from_json(slices))
    assert columns.blocks == (("a", 2), ("b", 2), ("c", 1))
    assert columns.of_piece.tolist() == [0, 2, 4, 1, 3]


@pytest.mark.parametrize(("modules", "units_each"), [(2, MAX_UNITS), (MAX_BLOCKS + 1, 2), (4, 1)])
def test_many_units_are_averaged_by_module(modules: int, units_each: int) -> None:
    units = table(*(f"m.layers.{layer}.q.weight" for layer in range(modules)), units_each=units_each)
    assert columns_of_units(units).blocks == (("q", modules),)


def test_labels_are_short_and_unambiguous() -> None:
    layers = [f"t5.encoder.block.{layer}.layer.{part}.SelfAttention.q.weight" for layer in (0, 1) for part in (0, 1)]
    columns = columns_of_units(table(*layers[::2], units_each=2))
    assert columns.blocks == (("0 SelfAttention.q", 2), ("1 SelfAttention.q", 2))
    stacks = table(
        *(f"t5.{stack}.block.0.layer.0.SelfAttention.q.weight" for stack in ("encoder", "decoder")), units_each=2
    )
    assert columns_of_units(stacks).blocks == (("encoder 0 SelfAttention.q", 2), ("decoder 0 SelfAttention.q", 2))
    long = [f"{layer}.layer.{part}.SelfAttention.q" for layer in (0, 1) for part in (0, 1)]
    assert [label for label, _ in columns_of_units(table(*layers, units_each=2)).blocks] == long
    alike = table(*(f"m.layers.0.{kind}.attention.q.weight" for kind in ("self", "cross")))
    assert columns_of_modules(alike).blocks == (("self.attention.q", 1), ("cross.attention.q", 1))


def test_the_common_start_of_all_names_is_dropped() -> None:
    assert without_common_start(["a.b.c", "a.b.d", "a.b.c.e"]) == ["c", "d", "c.e"]
    assert without_common_start(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert without_common_start(["only.one"]) == ["one"]
    assert without_common_start(["a", "b"]) == ["a", "b"]
