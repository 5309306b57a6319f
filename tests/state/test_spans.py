from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.errors import ClDistError
from cl_dist.state import integrity
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable
from cl_dist.state.spans import Span, SpanIndex, SpanReader, verified_share, write_spans
from tests.opens import opened

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
SIZES = st.integers(0, 40)


def random_tensor(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern of the dtype, including NaN."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (size,), generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=generator).view(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A split of [0, size) into one to six consecutive spans, some of them empty."""
    inner = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
    return list(itertools.pairwise([0, *inner, size]))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), sizes=st.lists(SIZES, min_size=1, max_size=3))
def test_any_split_reads_back_under_any_other_split(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    dense = {f"layer.{i}.weight": random_tensor(size, dtype, seed=i) for i, size in enumerate(sizes)}
    written = {name: data.draw(cuts(tensor.numel())) for name, tensor in dense.items()}
    ranks = max(len(spans) for spans in written.values())
    for rank in range(ranks):
        own = {name: spans[rank] for name, spans in written.items() if rank < len(spans)}
        write_spans(folder, rank, {"master": {n: Span(a, dense[n][a:b]) for n, (a, b) in own.items()}})

    whole = SpanReader(folder, ranks)
    whole.verify()
    world = data.draw(st.integers(1, 8))
    for reader in (whole, SpanReader(folder, index=exchanged(folder, ranks, world))):
        assert reader.parameters("master") == sorted(dense)
        for name, tensor in dense.items():
            for start, stop in data.draw(cuts(tensor.numel())):
                assert same_bits(reader.read("master", name, start, stop), tensor[start:stop])


def exchanged(folder: Path, writers: int, world: int) -> SpanIndex:
    """What `world` ranks know after each of them has read its share of the indexes."""
    shares = [SpanIndex.of(verified_share(folder, writers, rank, world)) for rank in range(world)]
    return SpanIndex.merged(shares)


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_a_rank_opens_as_few_files_as_it_needs(tmp_path: Path, ranks: int) -> None:
    """As many ranks read as have written: each opens its own two files, the second one to verify and to read it."""
    values = torch.arange(2.0 * ranks)
    for rank in range(ranks):
        write_spans(tmp_path, rank, {"master": {"w": Span(2 * rank, values[2 * rank : 2 * rank + 2])}})
    index = exchanged(tmp_path, ranks, ranks)
    rank = ranks // 2
    with opened(tmp_path) as files:
        verified_share(tmp_path, ranks, rank, ranks)
        found = SpanReader(tmp_path, index=index).read("master", "w", 2 * rank, 2 * rank + 2)
    assert found.tolist() == [2 * rank, 2 * rank + 1]
    name = f"rank-{rank:05d}"
    assert files == [f"{name}.json", f"{name}.safetensors", f"{name}.safetensors"]


@pytest.mark.parametrize(("world", "rank", "read"), [(2, 1, [1, 3]), (3, 0, [0, 3]), (8, 6, [])])
def test_other_ranks_share_the_files(tmp_path: Path, world: int, rank: int, read: list[int]) -> None:
    for writer in range(5):
        write_spans(tmp_path, writer, {"master": {"w": Span(writer, torch.zeros(1))}})
    assert [part.writer for part in verified_share(tmp_path, 4, rank, world)] == read
    flip_byte(tmp_path / "rank-00003.safetensors", -1)
    if 3 in read:
        with pytest.raises(CheckpointDamaged, match="rank-00003"):
            verified_share(tmp_path, 4, rank, world)


def two_ranks(folder: Path) -> None:
    """Ranks 0 and 1 hold [0, 6) and [4, 10) of a parameter: they overlap in two elements."""
    values = torch.arange(10.0)
    write_spans(folder, 0, {"master": {"w": Span(0, values[:6])}, "migu.mask": {"w": Span(0, values[:6] > 2)}})
    write_spans(folder, 1, {"master": {"w": Span(4, values[4:])}})


def test_overlapping_spans_are_read_once(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    assert SpanReader(tmp_path).read("master", "w", 3, 9).tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_quantities_are_kept_apart(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    reader = SpanReader(tmp_path)
    assert reader.read("migu.mask", "w", 1, 5).tolist() == [False, False, True, True]
    assert reader.parameters("exp_avg") == []


def test_views_of_one_buffer_are_written(tmp_path: Path) -> None:
    buffer = torch.arange(20.0)
    write_spans(tmp_path, 0, {"master": {"a": Span(0, buffer[3:8]), "b": Span(2, buffer[8:20])}})
    assert SpanReader(tmp_path).read("master", "b", 2, 4).tolist() == [8.0, 9.0]


def test_a_rank_may_hold_nothing(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    write_spans(tmp_path, 2, {})
    assert SpanReader(tmp_path, ranks=3).read("master", "w", 9, 10).tolist() == [9.0]


@pytest.mark.parametrize(
    ("quantity", "parameter", "start", "stop", "message"),
    [
        ("master", "w", 5, 11, "master of w: no rank has stored element 10"),
        ("migu.mask", "w", 0, 10, "migu.mask of w: no rank has stored element 6"),
        ("master", "v", 0, 1, "master of v is not stored"),
        ("exp_avg", "w", 0, 1, "exp_avg of w is not stored"),
    ],
)
def test_what_is_not_stored_is_an_error(
    tmp_path: Path, quantity: str, parameter: str, start: int, stop: int, message: str
) -> None:
    two_ranks(tmp_path)
    with pytest.raises(CheckpointDamaged, match=message):
        SpanReader(tmp_path).read(quantity, parameter, start, stop)


def test_ranks_must_agree_on_the_dtype(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    write_spans(tmp_path, 2, {"master": {"w": Span(10, torch.zeros(2, dtype=torch.bfloat16))}})
    with pytest.raises(CheckpointDamaged, match="master of w is stored as bfloat16, float32"):
        SpanReader(tmp_path).read("master", "w", 0, 12)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / "rank-00001.safetensors"), r"rank-00001\.safetensors is damaged: \d+ bytes"),
        (lambda folder: truncate(folder / "rank-00000.json"), r"rank-00000\.json is damaged"),
        (lambda folder: (folder / "rank-00001.safetensors").unlink(), r"rank-00001\.safetensors is missing"),
        (lambda folder: (folder / "rank-00001.json").unlink(), r"rank-00001\.json is missing"),
        (lambda folder: flip_byte(folder / "rank-00001.safetensors", -3), r"rank-00001\.safetensors is damaged"),
        (lambda folder: flip_byte(folder / "rank-00001.safetensors", 20), r"rank-00001\.safetensors is damaged"),
        (lambda folder: flip_byte(folder / "rank-00000.json", 130), r"rank-00000\.json is damaged"),
    ],
    ids=["tensors cut", "index cut", "tensors gone", "index gone", "tensor flipped", "header flipped", "index flipped"],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    two_ranks(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointDamaged, match=message):
        SpanReader(tmp_path, ranks=2).verify()


def test_every_flipped_bit_of_the_index_is_noticed(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    path = tmp_path / "rank-00000.json"
    original = path.read_bytes()
    undamaged = SpanReader(tmp_path).read("master", "w", 0, 10)
    for position in range(0, len(original), 3):
        flip_byte(path, position)
        try:
            assert torch.equal(SpanReader(tmp_path).read("master", "w", 0, 10), undamaged)  # white space only
            assert original[position : position + 1].isspace()
        except CheckpointDamaged:
            pass
        path.write_bytes(original)


def test_a_damaged_header_is_told_without_verify(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    flip_byte(tmp_path / "rank-00001.safetensors", 0)
    with pytest.raises(CheckpointDamaged, match=r"rank-00001\.safetensors is damaged"):
        SpanReader(tmp_path).read("master", "w", 0, 10)


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    flip_byte(tmp_path / "rank-00001.safetensors", -1)
    reader = SpanReader(tmp_path)
    reader.verify(part=0, parts=2)
    with pytest.raises(CheckpointDamaged, match="rank-00001"):
        reader.verify(part=1, parts=2)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_PAUSES", ())
    two_ranks(tmp_path)
    path = tmp_path / "rank-00001.safetensors"
    reader = SpanReader(tmp_path)
    path.unlink()
    path.symlink_to(path)  # fails with ELOOP
    for attempt in (lambda: SpanReader(tmp_path), reader.verify, lambda: reader.read("master", "w", 0, 10)):
        with pytest.raises(StateUnusable, match=r"rank-00001\.safetensors cannot be read: .*; nothing was deleted"):
            attempt()


def test_a_folder_without_state_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=r"holds no rank-\*\.json"):
        SpanReader(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_dist.state.spans.FORMAT_VERSION", 2)
    two_ranks(tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        StateUnusable, match="has format 2, written by another release of cl_dist; this one reads 1; nothing"
    ):
        SpanReader(tmp_path)


def test_damage_is_a_failure_of_the_run_not_of_the_input() -> None:
    assert issubclass(CheckpointDamaged, ClDistError)
    assert CheckpointDamaged.exit_code == 1


@pytest.mark.parametrize(("start", "data"), [(-1, torch.zeros(2)), (0, torch.zeros(2, 2))])
def test_a_span_is_flat(start: int, data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        Span(start, data)


def test_a_quantity_has_no_slash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not contain '/'"):
        write_spans(tmp_path, 0, {"a/b": {"w": Span(0, torch.zeros(1))}})
