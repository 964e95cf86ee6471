"""Engines that guess tokens and verify them, on both backends: of a task the same is heard, at other times."""

from collections.abc import Callable

import pytest

from cluster import events as ev
from cluster.vocabulary import Role, TaskKind
from flowserve.core.config import EngineConfig
from tests.contract.backends import Driver


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    """A driver of a cluster whose engines verify three guesses a step, of which more than half are right."""
    return make_driver(engine=EngineConfig(2000, max_sequences=100, speculative_tokens=3), acceptance=0.7)


@pytest.mark.parametrize(("output", "limit", "tokens"), [(1, 5, 1), (5, 1, 1), (2, 2, 2), (9, 4, 4), (40, 90, 40)])
def test_outputs_end_at_the_stop_or_the_limit(driver: Driver, output: int, limit: int, tokens: int) -> None:
    """Among guesses too, a request ends with its true last token, or at the client's limit."""
    driver.launch("te-0")
    finished = driver.serve("te-0", 0, 0, output=output, limit=limit)
    assert (finished.generated, finished.tokens, finished.stopped) == (tokens, tokens, True)
    assert len(finished.token_gaps_ns) == tokens - 1
    if tokens > 20:
        assert sum(gap == 0 for gap in finished.token_gaps_ns) > 5  # tokens that came together


def test_many_tasks_at_once(driver: Driver) -> None:
    """Tasks of many lengths dispatched at once all end, each with its own count."""
    driver.launch("te-0")
    for number in range(30):
        driver.dispatch("te-0", driver.open(number, prompt=1 + 37 * number, output=1 + 7 * number % 23), number)
    for number in range(30):
        finished = driver.wait(ev.TaskFinished, task_id=number)
        assert (finished.request_id, finished.generated, finished.tokens) == (number, *[1 + 7 * number % 23] * 2)


def test_prefill_and_decode_apart(driver: Driver) -> None:
    """The decode side guesses from the second token on."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, prompt=1000, output=30)
    source = driver.prefill("p", request, 0)
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=source)
    decoded = driver.wait(ev.TaskFinished, task_id=1)
    assert (decoded.generated, decoded.tokens) == (30, 29)
    assert 0 in decoded.token_gaps_ns


def test_aborting_a_task_in_flight(driver: Driver) -> None:
    """An aborted task is answered with its tokens so far, and its blocks are free."""
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=5000), 0)
    driver.wait(ev.FirstToken, task_id=0)
    driver.abort("te-0", 0)
    aborted = driver.wait(ev.TaskAborted)
    assert 1 <= aborted.generated < 5000
    report = driver.wait(ev.LoadReport, to="cm", running=0, waiting=0)
    assert report.free_blocks == report.total_blocks
