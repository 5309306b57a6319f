"""Damaged data files in every format are either read or refused as bad input in one sentence. Nothing else happens."""

from __future__ import annotations

import logging
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cl_dist.errors import BadInput
from tests.tasks.damaged import NAMES, TASK, WRITERS, make_damaged
from tests.tasks.data import load_one

OWN = tuple(kind for kind, (data_format, _) in WRITERS.items() if data_format != "huggingface")
LIBRARY = tuple(kind for kind in WRITERS if kind not in OWN)
RANDOMS = st.randoms(use_true_random=False)


def read_or_refuse(rng: random.Random, kinds: tuple[str, ...]) -> str:
    """Whether a damaged data set was `read` or `refused`; any other end is an error."""
    with tempfile.TemporaryDirectory() as folder:
        kind, way = make_damaged(rng, Path(folder, "data"), kinds)
        try:
            task = load_one(Path(folder), NAMES.get(kind, TASK), format=WRITERS[kind][0], path="data")
        except BadInput as error:
            check_sentence(str(error))
            return "refused"
    assert task.train, way
    assert task.evaluation, way
    for example in (*task.train, *task.evaluation):
        assert example.answer.strip() == example.answer != "", way
        f"{example.prompt}{example.answer}".encode()
    return "read"


def check_sentence(message: str) -> None:
    """One line that can be written to any file."""
    message.encode("utf-8")
    assert message
    assert "\n" not in message


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Warnings of other splits by the hundred say nothing here, and the library's cache is not the user's."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@seed(13)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(RANDOMS)
def test_damaged_files_are_refused_or_read(rng: random.Random) -> None:
    read_or_refuse(rng, OWN)


@seed(13)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(RANDOMS)
def test_damaged_files_that_the_library_reads(rng: random.Random) -> None:
    read_or_refuse(rng, LIBRARY)


def test_both_ends_occur() -> None:
    """A generator whose files are all fine, or all refused, would show nothing."""
    ends = [read_or_refuse(random.Random(number), OWN) for number in range(60)]
    assert 5 < ends.count("read") < 55


@pytest.mark.slow
def test_many_more_damaged_files() -> None:
    for number in range(3_000):
        read_or_refuse(random.Random(number), tuple(WRITERS))
