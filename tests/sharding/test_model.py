"""Whole weights from any layout; checksums that notice every change; a model without a former engine's hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.sharding import model as sharded
from cl_dist.sharding.model import gather_state_dict, remove_leftovers, replica_checksums

NAMES = ["body.0.bias", "body.0.weight", "body.2.bias", "body.2.weight"]

Ranks = list[dict[str, Any]]


def test_rank_0_collects_weights_and_buffers(ranks: Ranks) -> None:
    assert ranks[0]["gathered"] == dict.fromkeys(["frozen.weight", *NAMES, "scale"], True)
    assert ranks[1]["gathered"] == {}


def test_only_what_is_wanted_is_collected(ranks: Ranks) -> None:
    assert [rank["wanted"] for rank in ranks] == [NAMES, []]


def test_named_parameters_are_whole_on_every_rank(ranks: Ranks) -> None:
    assert all(rank["whole"] for rank in ranks)


def test_nothing_stays_gathered_from_pass_to_pass(every_layout: Ranks) -> None:
    for rank in every_layout:
        found = rank["between passes"]
        # Stage 3 keeps layers for a backward pass that does not come, and prefetches for it.
        assert all(available > 0 for available, _ in found["kept"])
        assert any(in_flight > 0 for _, in_flight in found["kept"])
        assert set(found["at start"]) == {0}
        assert found["after collecting"] == 0
        assert found["equal"]
        assert len(found["refused"]) == 3
        assert all("held whole" in message for message in found["refused"])
        assert found["held"] == 12, "what was refused released weights"


def test_replicas_have_equal_checksums(ranks: Ranks) -> None:
    assert ranks[0]["checksums"] == ranks[1]["checksums"]
    expected = [] if ranks[0]["layout"].endswith("without small ones") else ["frozen.weight", *NAMES]
    assert sorted(ranks[0]["checksums"]) == sorted(expected)
    assert 0 not in ranks[0]["checksums"].values(), "a small parameter is not gathered"
    for rank in ranks:
        changed = {name for name, found in rank["after masters"].items() if found != rank["checksums"][name]}
        assert changed <= {"frozen.weight"}


@given(at=st.integers(0, 8), bit=st.integers(0, 15), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_changed_bit_changes_the_checksum(at: int, bit: int, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 3, bias=False, dtype=dtype)
    (before,) = replica_checksums(layer)[1].tolist()
    integers = layer.weight.data.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).view(-1)
    integers[at] ^= -(1 << 15) if bit == 15 else 1 << bit
    (after,) = replica_checksums(layer)[1].tolist()
    assert before != after


def test_swapped_elements_change_the_checksum_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_CHUNK", 4)
    layer = torch.nn.Linear(9, 1, bias=False)
    layer.weight.data.copy_(torch.arange(9.0))
    (before,) = replica_checksums(layer)[1].tolist()
    layer.weight.data[0, [1, 8]] = layer.weight.data[0, [8, 1]]
    (after,) = replica_checksums(layer)[1].tolist()
    assert before != after


def test_without_a_process_group_weights_are_collected_too() -> None:
    layer = torch.nn.BatchNorm1d(2)
    layer.register_buffer("forgotten", torch.ones(1), persistent=False)
    found = gather_state_dict(layer)
    assert found.keys() == layer.state_dict().keys()
    assert found["weight"].data_ptr() != layer.weight.data_ptr()


def test_a_former_engines_hooks_are_removed() -> None:
    """That a rebuilt engine then trains as it should is shown in tests/distributed/test_rebuild.py."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].pre_bwd_fn = model[0].post_bwd_fn = print
    model[0].applied_pre_backward_ref_cnt = 3
    model[0]._external_params = {1: model[0].weight}
    model.kept = 1
    remove_leftovers(model)
    assert not {"pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"} & model[0].__dict__.keys()
    assert model[0]._external_params == {}
    assert model.kept == 1
