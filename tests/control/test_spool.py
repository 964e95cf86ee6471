"""Columns of integers that grow into a file, and order statistics that read them in parts."""

import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.spool
from cluster.recorder import Recorder
from cluster.spool import Spool, order_statistics

numbers = st.lists(st.integers(-(1 << 62), 1 << 62), max_size=30)


@given(parts=st.lists(numbers, max_size=8), kept=st.integers(1, 20))
def test_a_spool_gives_back_what_it_was_given(parts: list[list[int]], kept: int) -> None:
    """With a file and without, asked in between or not."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(cluster.spool, "KEPT", kept)
        spools = [Spool(), Spool(lambda: file)]
        everything: list[int] = []
        for place, part in enumerate(parts):
            everything += part
            for spool in spools:
                if place % 2:
                    spool.extend_bytes(np.array(part, np.int64).tobytes())
                else:
                    spool.extend(part)
                assert len(spool) == len(everything)
                assert spool.array().tolist() == everything


@given(
    parts=st.lists(st.lists(st.integers(0, 1 << 50), max_size=20), min_size=1, max_size=6),
    shares=st.lists(st.integers(0, 100), min_size=1, max_size=4),
)
def test_order_statistics_are_those_of_all_sorted(parts: list[list[int]], shares: list[int]) -> None:
    """However the numbers are cut into parts."""
    everything = sorted(number for part in parts for number in part)
    if not everything:
        return
    ranks = [share * (len(everything) - 1) // 100 for share in shares]
    pieces = [np.array(part, np.int64) for part in parts]
    found = order_statistics(lambda: iter(pieces), len(everything), ranks)
    assert found == [everything[rank] for rank in ranks]


def test_a_recorder_without_requests_has_empty_columns() -> None:
    """Nothing has happened yet."""
    recorder = Recorder()
    assert all(len(column) == 0 for column in recorder.requests.values())
    assert (recorder.outcomes, len(recorder.loads), len(recorder.gaps)) == ([], 0, 0)
