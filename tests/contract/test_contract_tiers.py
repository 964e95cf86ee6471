"""Lower tiers on both backends: what was swapped out is found again, and is told apart in what a task reports."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from cluster import events as ev
from cluster.actions import ReleaseKvContext, SubmitRequest
from cluster.request import Answer, Request
from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from tests.builders import MODEL, chain
from tests.contract.backends import Driver

BLOCKS = 10
PROMPT = BLOCKS * 16 + 5


def ask(driver: Driver, number: int, document: int, **more: object) -> ev.TaskFinished:
    """A request about a document, served to its end; then time for what is swapped out meanwhile."""
    request = Request(number, PROMPT, 3, MODEL, chain(document, *[0] * (BLOCKS - 1)))
    request = replace(request, **more)
    driver.submit(SubmitRequest("je", request, Answer(3)))
    driver.wait(ev.RequestArrived, request=request)
    driver.dispatch("te-0", request, number)
    finished = driver.wait(ev.TaskFinished, task_id=number)
    driver.end(number, finished.generated)
    driver.pause(0.05)
    return finished


@pytest.mark.parametrize(("tiers", "tier"), [((40, 0), "dram"), ((0, 40), "ssd")])
def test_documents_come_back_from_a_lower_tier(
    make_driver: Callable[..., Driver], tiers: tuple[int, int], tier: str
) -> None:
    """Of three documents HBM holds one: asked again, each comes from the tier, but for its last question."""
    config = TierConfig(*tiers, swap_low=0.9, swap_high=1.0, fetch="always")
    driver = make_driver(engine=EngineConfig(kv_blocks=14, tiers=config))
    driver.launch("te-0")
    for number in range(3):
        assert ask(driver, number, 1 + number).cached_tokens == 0
    for number in range(3, 6):
        finished = ask(driver, number, number - 2)
        assert finished.cached_tokens == BLOCKS * 16
        assert {"dram": finished.dram_tokens, "ssd": finished.ssd_tokens}[tier] == BLOCKS * 16
        assert finished.dram_tokens + finished.ssd_tokens == BLOCKS * 16


def test_by_cost_is_decided_on_every_backend(make_driver: Callable[..., Driver]) -> None:
    """The rule by cost needs nothing else said: each backend knows, or measures, what things take."""
    tiers = TierConfig(40, swap_low=0.9, swap_high=1.0)
    driver = make_driver(engine=EngineConfig(kv_blocks=14, tiers=tiers), step_s=0.02)
    driver.launch("te-0")
    ask(driver, 0, 1)
    assert ask(driver, 1, 1).tokens == 3


def test_a_context_with_an_id_stays_until_it_is_released(make_driver: Callable[..., Driver]) -> None:
    """Other documents push out everything but the one with an ID; released, it goes too."""
    driver = make_driver(engine=EngineConfig(kv_blocks=24))
    driver.launch("te-0")
    first = ask(driver, 0, 1, context_id="doc")
    assert first.cached_tokens == 0
    for number in range(1, 4):
        ask(driver, number, 1 + number)
    assert ask(driver, 4, 1, context_id="doc").cached_tokens == BLOCKS * 16
    key = Request(0, 1, 1, MODEL, context_id="doc").context
    assert key is not None
    driver.submit(ReleaseKvContext("te-0", key))
    for number in range(5, 9):
        ask(driver, number, number)
    assert ask(driver, 9, 1).cached_tokens == 0


def test_adapters_and_tenants_never_share(make_driver: Callable[..., Driver]) -> None:
    """The same tokens under another adapter or tenant have other identities, and are computed."""
    from cluster import identity

    driver = make_driver()
    driver.launch("te-0")
    tokens = list(range(PROMPT))
    for number, (adapter, tenant) in enumerate([("", ""), ("x", ""), ("", "x"), ("x", "y")]):
        ids = identity.from_tokens(tokens, identity.salt(MODEL, adapter, tenant))
        for again in (0, 1):
            found = ask(driver, 2 * number + again, 1, block_ids=ids, adapter=adapter, tenant=tenant)
            assert found.cached_tokens == again * BLOCKS * 16
