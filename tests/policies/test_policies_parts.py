"""The parts policies are made of: prompt tree, heat map, prediction; and the scaling policies."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy import GroupLoad
from cluster.vocabulary import Role, to_ns
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.prompt_tree import PromptTree
from policies.prediction.bucket_mean import BucketMean
from policies.scaling.fixed import Fixed
from policies.scaling.target_utilisation import TargetUtilisation
from tests.builders import chain, make_request

NAMES = ["te-0", "te-1", "te-2", "te-3"]
paths = st.lists(st.integers(0, 2), max_size=6).map(tuple)
operations = st.lists(
    st.tuples(st.just("insert"), paths, st.sampled_from(NAMES))
    | st.tuples(st.just("match"), paths, st.lists(st.sampled_from(NAMES), unique=True).map(tuple))
    | st.tuples(st.just("forget"), st.just(()), st.sampled_from(NAMES)),
    max_size=40,
)


# -- prompt tree ----------------------------------------------------------------------------------------------------


@given(operations=operations)
def test_prompt_tree_equals_a_naive_one(operations: list[tuple[str, tuple[int, ...], Any]]) -> None:
    """Against sets of whole prefixes per executor: the same depth and the same holders, in the order asked."""
    tree, model = PromptTree(), {name: set() for name in NAMES}
    for what, path, argument in operations:
        if what == "insert":
            tree.insert(chain(*path), argument)
            model[argument] |= {path[:length] for length in range(1, len(path) + 1)}
        elif what == "forget":
            tree.forget(argument)
            model[argument].clear()
        else:
            depths = {
                name: max((n for n in range(1, len(path) + 1) if path[:n] in model[name]), default=0)
                for name in argument
            }
            best = max(depths.values(), default=0)
            holders = [name for name in argument if best and depths[name] == best]
            assert tree.longest_match(chain(*path), list(argument)) == (best, holders)


@given(inserts=st.lists(st.tuples(paths, st.sampled_from(NAMES)), max_size=30), bound=st.integers(1, 8))
def test_the_bound_keeps_prefixes_before_extensions(inserts: list[tuple[tuple[int, ...], str]], bound: int) -> None:
    """Never more blocks than the bound; a kept block has its prefix kept; the newest context keeps what fits."""
    tree = PromptTree(bound)
    every = {chain(*path) for path, _ in inserts}
    for path, name in inserts:
        ids = chain(*path)
        tree.insert(ids, name)
        assert len(tree) <= bound
        assert tree.longest_match(ids, [name])[0] == min(len(ids), bound)
    for ids in every:
        kept = [block in tree._holders for block in ids]
        assert kept == sorted(kept, reverse=True), "a block outlived its prefix"


def test_least_recently_presented_goes_first() -> None:
    """A context that is presented again outlives one that is not."""
    tree = PromptTree(4)
    tree.insert(chain(1, 1), "te-0")
    tree.insert(chain(2, 2), "te-0")
    tree.insert(chain(1, 1), "te-0")
    tree.insert(chain(3), "te-0")
    depths = [tree.longest_match(chain(*path), ["te-0"])[0] for path in ((1, 1), (2, 2), (3,))]
    assert depths == [2, 1, 1]


def test_prompt_tree_needs_room() -> None:
    """A tree of no blocks is refused with the value."""
    with pytest.raises(ValueError, match="max_blocks is 0"):
        PromptTree(0)


# -- heat map -------------------------------------------------------------------------------------------------------

GOOD = {"prefill_edges": [0, 100], "ratio_edges": [0, 1], "cells": [[1, 2], [3, 4]], "source": "test"}


def test_heat_map_is_read_from_its_file(tmp_path: Path) -> None:
    """A good file gives the map it describes."""
    (path := tmp_path / "map.json").write_text(json.dumps(GOOD))
    assert HeatMap.load(path) == HeatMap([0, 100], [0, 1], [[1, 2], [3, 4]], "test")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; make one with `deepflow heatmap`"),
        (b"", "truncated"),
        (b"{not json", "malformed"),
        (b'{"source": "\xff\xfe"}', "utf-8"),
        (b"[1, 2]", "Expected `object`"),
        (json.dumps({**GOOD, "source": 3}).encode(), "source"),
        (json.dumps({name: GOOD[name] for name in ("cells", "source")}).encode(), "prefill_edges"),
        (json.dumps({**GOOD, "cells": [[1, 2]]}).encode(), "cells must be 2 rows"),
        (json.dumps({**GOOD, "cells": [[1, 2], [3]]}).encode(), "cells must be 2 rows"),
        (json.dumps({**GOOD, "ratio_edges": [1, 0]}).encode(), "ratio_edges is"),
        (json.dumps({**GOOD, "prefill_edges": [], "cells": []}).encode(), "prefill_edges is"),
        (json.dumps({**GOOD, "prefill_edges": [5, 5]}).encode(), "prefill_edges is"),
    ],
)
def test_bad_heat_maps_name_their_file(tmp_path: Path, content: bytes | None, said: str) -> None:
    """Missing, malformed or of the wrong shape: one ValueError with the path and what is wrong."""
    path = tmp_path / "map.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"map\.json") as caught:
        HeatMap.load(path)
    assert said in str(caught.value)


def test_a_folder_is_no_heat_map(tmp_path: Path) -> None:
    """A path that cannot be read as a file is named too."""
    with pytest.raises(ValueError, match=tmp_path.name):
        HeatMap.load(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "output", "cell"),
    [(100, 99, 1), (100, 100, 2), (199, 0, 1), (200, 199, 3), (200, 200, 4), (1, 0, 1), (1, 10**9, 2), (10**9, 1, 3)],
)
def test_heat_map_bins_begin_at_their_edges(prompt: int, output: int, cell: float) -> None:
    """A value on an edge is in the bin above; values outside fall into the outer bins."""
    assert HeatMap([100, 200], [0.5, 1.0], [[1, 2], [3, 4]], "test").gain(prompt, output) == cell


# -- bucket mean ----------------------------------------------------------------------------------------------------


def test_bucket_mean_begins_with_its_prior() -> None:
    """Unseen prompt lengths get the prior, in the middle of its bucket, and never more than the limit."""
    predictor = BucketMean(prior_tokens=300)
    assert predictor.predict(make_request(0, 50, 1000)) == 320
    assert predictor.predict(make_request(0, 50, 310)) == 310


def test_bucket_mean_learns_by_prompt_length() -> None:
    """The first observation replaces the prior, and only for prompts of the same power of two."""
    predictor = BucketMean(prior_tokens=300)
    predictor.observe(make_request(0, 64, 9999), 1000)
    assert [predictor.predict(make_request(1, prompt, 9999)) for prompt in (63, 64, 127, 128)] == [320, 960, 960, 320]


@given(outputs=st.lists(st.integers(1, 4000), min_size=1, max_size=50))
def test_bucket_mean_is_the_mean_at_first(outputs: list[int]) -> None:
    """Up to 1 / weight observations it predicts their plain mean, to the middle of a bucket."""
    predictor = BucketMean(weight=0.02)
    for output in outputs:
        predictor.observe(make_request(0, 100, 9999), output)
    assert abs(predictor.predict(make_request(1, 100, 9999)) - sum(outputs) / len(outputs)) <= 64 + 1e-6


def test_bucket_mean_follows_a_change() -> None:
    """After many observations new ones still count: an old regime is forgotten."""
    predictor = BucketMean(weight=0.1)
    for output in [100] * 1000 + [3000] * 60:
        predictor.observe(make_request(0, 100, 9999), output)
    assert predictor.predict(make_request(1, 100, 9999)) > 2900


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"prior_tokens": 0}, "prior_tokens is 0"), ({"weight": 0}, "weight is 0"), ({"weight": 1.5}, "weight is 1.5")],
)
def test_bucket_mean_bad_parameters(parameters: dict[str, float], said: str) -> None:
    """Parameters out of range are refused with name and value."""
    with pytest.raises(ValueError, match=said):
        BucketMean(**parameters)  # type: ignore[arg-type]


# -- scaling --------------------------------------------------------------------------------------------------------


def group_load(
    ready: int, used: float = 0.0, kv: float = 0.0, pending: int = 0, parked: int = 0, **other: Any
) -> GroupLoad:
    """A group whose executors have 10 places and 100 blocks each; `used` and `kv` are shares of all of them."""
    values = {
        "model": "m",
        "role": Role.COLOCATED,
        "initial": 3,
        "ready": ready,
        "pending": pending,
        "draining": 0,
        "waiting": 0,
        "running": round(used * 10 * ready),
        "kv_used": round(kv * 100 * ready),
        "kv_total": 100 * ready,
        "max_sequences": 10 * ready,
        "parked": parked,
    }
    return GroupLoad(**{**values, **other})


def test_fixed_is_fixed() -> None:
    """The given number, or the start size, whatever the load."""
    assert [Fixed(5).desired(group_load(1, 9.0), 0), Fixed(0).desired(group_load(1), 0)] == [5, 0]
    assert Fixed().desired(group_load(1, 9.0), 0) == 3
    with pytest.raises(ValueError, match=r"scaling\.executors is -2"):
        Fixed(-2)


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (group_load(2, 1.0), 4),
        (group_load(2, 1.1), 5),
        (group_load(2, 0.0, 1.0), 4),
        (group_load(2, 0.8, 1.0), 4),
        (group_load(2, 0.0, waiting=15, running=5), 4),
        (group_load(2, 0.5, parked=10), 4),
    ],
)
def test_up_by_the_larger_utilisation(load: GroupLoad, wanted: int) -> None:
    """Sequences (those that wait and are parked too) or KV cache, whichever is more: at once, rounded up."""
    assert TargetUtilisation(target=0.5).desired(load, 0) == wanted


def test_starting_executors_count() -> None:
    """While the executors it asked for are starting, the same load asks for no more: no 2, 4, 8."""
    policy, pending = TargetUtilisation(target=0.5), 0
    for round_ in range(5):
        wanted = policy.desired(group_load(2, 1.0, pending=pending), to_ns(5.0 * round_))
        assert wanted == 4
        pending = wanted - 2


@given(
    ready=st.integers(1, 20),
    pending=st.integers(0, 20),
    running=st.integers(0, 400),
    used=st.integers(0, 2000),
    target=st.sampled_from([0.3, 0.5, 0.7, 1.0]),
    tolerance=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_the_wish_follows_the_rule(
    ready: int, pending: int, running: int, used: int, target: float, tolerance: float
) -> None:
    """ceil(ready x utilisation / target) within float error, left alone within the tolerance, never down at once."""
    load = group_load(ready, pending=pending)._replace(running=running, kv_used=used)
    wanted = TargetUtilisation(target, 5.0, tolerance, 60.0).desired(load, 0)
    utilisation = max(running / (10 * ready), used / (100 * ready))
    if abs(utilisation / target - 1) < tolerance - 1e-9:
        assert wanted == ready + pending
    elif abs(utilisation / target - 1) > tolerance + 1e-9:
        exact = ready * utilisation / target
        assert wanted in {max(ready + pending, math.ceil(exact + error)) for error in (-1e-6, 1e-6)}


@pytest.mark.parametrize(("used", "wanted"), [(0.54, 10), (0.55, 10), (0.56, 12), (0.45, 10)])
def test_within_the_tolerance_nothing_changes(used: float, wanted: int) -> None:
    """Up to a tenth beside the target the group keeps its size."""
    policy = TargetUtilisation(target=0.5, tolerance=0.1000001, down_delay_s=0.0)
    assert policy.desired(group_load(10, used), 0) == wanted


def test_down_only_after_the_delay() -> None:
    """A wish for fewer must last; a single look at a busy group begins the delay again."""
    policy = TargetUtilisation(target=0.5, down_delay_s=60.0)
    idle, busy = group_load(4, 0.1), group_load(4, 0.5)
    story = [(0, idle, 4), (59, idle, 4), (60, idle, 1), (65, busy, 4), (70, idle, 4), (129, idle, 4), (130, idle, 1)]
    for at_s, load, wanted in story:
        assert policy.desired(load, to_ns(at_s)) == wanted, at_s


def test_groups_have_delays_of_their_own() -> None:
    """A busy prefill group does not keep the decode group from shrinking."""
    policy = TargetUtilisation(target=0.5, down_delay_s=60.0)
    for at_s, wanted in ((0, 4), (60, 1)):
        assert policy.desired(group_load(4, 0.1, role=Role.DECODE), to_ns(at_s)) == wanted
        assert policy.desired(group_load(4, 0.5, role=Role.PREFILL), to_ns(at_s)) == 4


def test_a_wish_does_not_outlive_the_group() -> None:
    """A group that had nobody ready in between begins its delay again."""
    policy = TargetUtilisation(target=0.5, down_delay_s=60.0)
    for at_s, load, wanted in (
        (0, group_load(4, 0.1), 4),
        (30, group_load(0, pending=4), 4),
        (100, group_load(4, 0.1), 4),
        (160, group_load(4, 0.1), 1),
    ):
        assert policy.desired(load, to_ns(at_s)) == wanted, at_s


def test_from_zero_when_requests_are_parked() -> None:
    """An empty group grows when requests wait for any executor, by one, and not again while that one starts."""
    policy = TargetUtilisation()
    assert policy.desired(group_load(0), 0) == 0
    assert policy.desired(group_load(0, parked=7), 0) == 1
    assert policy.desired(group_load(0, parked=7, pending=1), 0) == 1
    assert policy.desired(group_load(0, pending=3), 0) == 3


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"target": 0.0}, r"scaling\.target is 0\.0"),
        ({"target": 1.5}, r"scaling\.target is 1\.5"),
        ({"tolerance": -0.1}, r"scaling\.tolerance is -0\.1"),
        ({"down_delay_s": -1.0}, r"scaling\.down_delay_s is -1\.0"),
    ],
)
def test_target_utilisation_bad_parameters(parameters: dict[str, float], said: str) -> None:
    """Parameters out of range are refused with name and value."""
    with pytest.raises(ValueError, match=said):
        TargetUtilisation(**parameters)
