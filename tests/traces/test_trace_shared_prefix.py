"""The made-up workload of prompts that begin alike."""

from collections import Counter

import pytest

from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S
from traces.shared_prefix import SharedPrefixTrace


def test_prompts_begin_with_one_of_the_prefixes() -> None:
    """The first blocks are a family's, the rest nobody else's; popular families are asked for more."""
    trace = SharedPrefixTrace("m", rate=50.0, duration_s=20.0, families=5, prefix_tokens=64, own_tokens=40)
    arrivals = list(trace)
    assert arrivals == list(trace)
    assert 850 < len(arrivals) < 1150
    assert max(arrival.at_ns for arrival in arrivals) < 20 * NS_PER_S
    prefixes, own = Counter(), set()
    for arrival in arrivals:
        ids, prompt = arrival.request.block_ids, arrival.request.prompt_tokens
        assert 64 < prompt < 64 + 80
        assert ids is not None
        assert len(ids) == prompt // BLOCK_TOKENS
        prefixes[ids[:4]] += 1
        assert own.isdisjoint(ids[4:])
        own.update(ids[4:])
    assert len(prefixes) == 5
    (_, most), *_, (_, least) = prefixes.most_common()
    assert most > 3 * least


@pytest.mark.parametrize(("field", "value"), [("prefix_tokens", 20), ("rate", 0.0), ("families", 0)])
def test_numbers_out_of_range_are_refused(field: str, value: float) -> None:
    """By name and value."""
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        SharedPrefixTrace("m", **{field: value})
