from __future__ import annotations

from contextlib import suppress

from cl_dist.heartbeat import beat, last_beat, opaque


def test_opaque_work_is_a_part_of_its_phase() -> None:
    beat("saving")
    number = last_beat().number
    with suppress(OSError), opaque():
        assert last_beat()[2:] == ("saving", True)
        raise OSError
    assert last_beat()[2:] == ("saving", False)
    assert last_beat().number == number + 2


def test_inside_an_opaque_phase_it_changes_nothing() -> None:
    beat("loading", opaque=True)
    with opaque():
        pass
    assert last_beat()[2:] == ("loading", True)
