"""Decodes pictures and checks their size, their colours, and that they depend on nothing but their data."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from cl_dist.report import pictures
from cl_dist.report.drawing import BLUE, DIVERGING, DPI, FORMATS, INK, NO_VALUE, ORANGE, PALE, SEQUENTIAL, WIDE, Picture
from cl_dist.report.pictures import moving_mean
from cl_dist.report.units import UnitResults, UnitTable, correlation

NAMES = [f"task{number}-of-a-name-that-is-long" for number in range(15)]


def results(tasks: int, layers: int, units_each: int = 4, independent: bool = False) -> UnitResults:
    """Random shares for a model with this many layers."""
    draws = np.random.default_rng(0)
    names = [f"m.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in ("q", "k", "up")]
    units = {f"{n}[{i}]": [{"parameter": n, "slices": [[i, i + 1]]}] for n in names for i in range(units_each)}
    values = [draws.random((tasks, len(units))) for _ in range(3)]
    return UnitResults(UnitTable.from_json(units), *values, shares_are_independent=independent)


def matrix(tasks: int, rows: int | None = None) -> list[list[float | None]]:
    draws = np.random.default_rng(1)
    return draws.random((tasks + 1 if rows is None else rows, tasks)).tolist()


def opened(picture: Picture) -> NDArray[np.int64]:
    """`(height, width)` colours as 0xRRGGBB, as rendered to PNG."""
    image = np.rint(matplotlib.image.imread(io.BytesIO(picture.render()["png"]), format="png")[..., :3] * 255).astype(
        np.int64
    )
    return image @ np.array([1 << 16, 1 << 8, 1])


def colours(picture: Picture) -> int:
    """Number of different colours."""
    return len(np.unique(opened(picture)))


def count(picture: Picture, colour: str) -> int:
    """Pixels that have exactly this colour."""
    return int((opened(picture) == int(colour[1:], 16)).sum())


def area(picture: Picture, colour: str) -> int:
    """Pixels that have this colour, as do all eight around them: fills, without the blurred edges of lines and letters,
    which may have any shade of grey.
    """
    shown = opened(picture) == int(colour[1:], 16)
    windows = np.lib.stride_tricks.sliding_window_view(shown, (3, 3))
    return int(windows.all(axis=(2, 3)).sum())


def white(picture: Picture) -> float:
    """Share of the pixels that are white or nearly so."""
    image = opened(picture)
    return float(np.logical_and.reduce([(image >> shift & 0xFF) > 0xF0 for shift in (0, 8, 16)]).mean())


DRAWN: dict[str, Callable[[int], Picture]] = {
    "accuracy_matrix": lambda tasks: pictures.accuracy_matrix(NAMES[:tasks], matrix(tasks)),
    "scores": lambda tasks: pictures.scores(NAMES[:tasks], matrix(tasks)),
    "loss": lambda tasks: pictures.loss(
        NAMES[:tasks], {name: {step: 1 / step for step in range(1, 80)} for name in NAMES[:tasks]}
    ),
    "unit_importance": lambda tasks: pictures.unit_importance(NAMES[:tasks], results(tasks, 2)),
    "unit_importance_by_module": lambda tasks: pictures.unit_importance(NAMES[:tasks], results(tasks, 30, 40)),
    "task_correlation": lambda tasks: pictures.task_correlation(
        NAMES[:tasks], correlation(results(tasks, 2).importance)
    ),
    "fusion": lambda tasks: pictures.fusion(NAMES[:tasks], results(tasks, 30)),
    "fusion_of_both_shares": lambda tasks: pictures.fusion(NAMES[:tasks], results(tasks, 30, independent=True)),
}


@pytest.mark.parametrize("tasks", [4, 15])
@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_is_drawn(name: str, tasks: int) -> None:
    image = opened(DRAWN[name](tasks))
    height, width = image.shape
    assert 400 <= width <= (WIDE + 1) * DPI
    assert 200 <= height <= 13 * DPI
    assert len(np.unique(image)) > 20
    assert (image != 0xFFFFFF).mean() > 0.02


@pytest.mark.parametrize("name", ["accuracy_matrix", "loss", "fusion"])
def test_a_picture_depends_only_on_its_data(name: str) -> None:
    first = DRAWN[name](4).render(FORMATS)
    assert list(first) == ["png", "svg", "pdf"]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 10}):
        again = DRAWN[name](4)
        assert again.render(FORMATS) == first
        assert again.render(["svg"]) == {"svg": first["svg"]}  # whichever other formats are drawn
    assert b"matplotlib" not in first["png"].lower()
    assert b"tIME" not in first["png"]
    assert b"CreationDate" not in first["pdf"]
    assert b"dc:date" not in first["svg"]


def test_text_stays_text_in_vectors() -> None:
    names = ["a $x$ b", "<i>&", "\u6570\u636e \U0001f600"]  # neither a formula nor markup, and no boxes
    svg = pictures.accuracy_matrix(names, matrix(3)).render(["svg"])["svg"].decode()
    for shown in ("a $x$ b", "&lt;i&gt;&amp;", names[2]):
        assert f">{shown}</text>" in svg
    assert INK in svg


@pytest.mark.parametrize("name", ["accuracy_matrix", "scores", "loss", "unit_importance"])
def test_one_task_is_enough(name: str) -> None:
    assert opened(DRAWN[name](1)).shape[1] >= 400


class TestScores:
    """The accuracy matrix and its lines."""

    def test_only_the_untouched_model(self) -> None:
        for draw in (pictures.accuracy_matrix, pictures.scores):
            assert colours(draw(NAMES[:3], matrix(3, rows=1))) > 20

    def test_nothing_was_evaluated(self) -> None:
        empty: list[list[float | None]] = [[None, None]] * 3
        assert area(pictures.accuracy_matrix(["a", "b"], empty), NO_VALUE[SEQUENTIAL]) > 10_000
        assert count(pictures.scores(["a", "b"], empty), BLUE) == 0

    def test_missing_scores_are_visible(self) -> None:
        full, gap = matrix(3), matrix(3)
        gap[1][2] = None
        shown = [area(pictures.accuracy_matrix(NAMES[:3], each), NO_VALUE[SEQUENTIAL]) for each in (full, gap)]
        assert shown[0] == 0
        assert shown[1] > 1000

    def test_log_likelihoods_are_negative(self) -> None:
        png = pictures.scores(["prose"], [[-6.05], [-5.1]])
        assert count(png, BLUE) > 50
        assert count(png, ORANGE) > 50
        assert colours(pictures.accuracy_matrix(["prose"], [[-6.05], [-5.1]])) > 20

    def test_each_kind_of_score_has_its_own_scale(self) -> None:
        """A log-likelihood beside an accuracy would flatten it, and is not drawn into its panel."""
        names, rows = ["a", "prose"], [[0.0, -6.0], [1.0, -6.0], [0.5, -3.0]]
        kinds = {"a": "exact_match", "prose": "log_likelihood"}
        together, apart = pictures.scores(names, rows), pictures.scores(names, rows, kinds)
        assert count(together, PALE) > 50
        assert count(apart, PALE) == 0
        assert pictures.scores(names, rows, dict.fromkeys(names, "rouge_l")).render() == together.render()

    def test_the_matrix_shades_each_kind_on_its_own_scale(self) -> None:
        """On the scale of the log-likelihoods, all accuracies would look alike."""
        names, kinds = ["a", "prose"], {"a": "exact_match", "prose": "log_likelihood"}
        high = [[0.0, -6.0], [1.0, -3.0]]
        red, green, blue, _ = matplotlib.colormaps[SEQUENTIAL](1.0, bytes=True)
        best = f"#{red:02x}{green:02x}{blue:02x}"
        # In a picture with one scale, only the accuracy of 1 has the colour of the best.
        apart, together = (area(pictures.accuracy_matrix(names, high, given), best) for given in (kinds, None))
        assert 1.6 < apart / together < 2.4
        svg = pictures.accuracy_matrix(names, high, kinds).render(["svg"])["svg"].decode()
        assert "score, on the scale of its own metric" in svg
        same = dict.fromkeys(names, "exact_match")
        assert pictures.accuracy_matrix(names, high, same).render() == pictures.accuracy_matrix(names, high).render()
        # One known score only, or none, is no scale.
        assert colours(pictures.accuracy_matrix(names, [[None, -6.0], [None, -6.0]], kinds)) > 20

    def test_each_trained_task_has_a_mark(self) -> None:
        # Frames are drawn with edges of one width: twice the frames, about twice the orange.
        framed = [count(pictures.accuracy_matrix(NAMES[:4], matrix(4, rows=rows)), ORANGE) for rows in (1, 3, 5)]
        assert framed[0] == 0
        assert 1.5 < framed[2] / framed[1] < 2.5


class TestLoss:
    """The training loss."""

    def test_the_moving_mean_by_hand(self) -> None:
        values = np.array([1.0, 2.0, math.nan, 4.0, 9.0])
        assert moving_mean(values, 3).tolist() == pytest.approx([1.5, 1.5, 3.0, 6.5, 6.5])
        assert np.isnan(moving_mean(np.array([math.nan, math.nan, math.nan, 1.0]), 3)[0])

    def test_lines_separate_the_tasks(self) -> None:
        losses = {name: dict.fromkeys(range(1, 11), 1.0) for name in ("a", "b", "c")}
        two, three = (count(pictures.loss(names, losses), "#767676") for names in (("a", "b"), ("a", "b", "c")))
        assert 0 < two < three < 3 * two

    def test_gaps_single_steps_and_nan_losses(self) -> None:
        losses = {"a": {1: 2.0}, "b": {1: 1.0, 3: math.nan, 9: 0.5}, "untrained": {}}
        assert count(pictures.loss(["a", "b", "untrained"], losses), BLUE) > 5
        assert count(pictures.loss(["a"], {"a": {1: math.nan}}), BLUE) == 0


class TestUnits:
    """Importance, correlation and fusion."""

    def test_a_nan_score_is_visible(self) -> None:
        units = results(4, 2)
        assert area(pictures.unit_importance(NAMES[:4], units), NO_VALUE[SEQUENTIAL]) == 0
        units.importance[2, 3] = np.nan
        assert area(pictures.unit_importance(NAMES[:4], units), NO_VALUE[SEQUENTIAL]) > 1000

    def test_an_undefined_correlation_is_visible(self) -> None:
        values = results(4, 2).importance
        values[1] = 0.0
        assert area(pictures.task_correlation(NAMES[:4], correlation(values)), NO_VALUE[DIVERGING]) > 2000

    def test_equal_shares_are_white(self) -> None:
        units = results(3, 4)
        assert white(pictures.fusion(NAMES[:3], units)) < 0.7
        units.share_new[:] = 0.5
        assert white(pictures.fusion(NAMES[:3], units)) > 0.9

    def test_fusion_omits_only_the_first_task(self) -> None:
        units = results(3, 4)
        before = pictures.fusion(NAMES[:3], units).render()
        units.share_new[0] = 0.0
        assert pictures.fusion(NAMES[:3], units).render() == before
        units.share_new[1] = 0.0
        assert pictures.fusion(NAMES[:3], units).render() != before

    def test_both_shares_take_two_panels(self) -> None:
        one, two = (opened(pictures.fusion(NAMES[:4], results(4, 4, independent=both))) for both in (False, True))
        assert two.shape[0] == 2 * one.shape[0]
