"""Tasks on both backends: colocated, prefill and decode, aborts, refusals."""

from collections.abc import Callable

import pytest

from cluster import events as ev
from cluster.actions import CancelRequest, LaunchExecutor
from cluster.request import KvSource
from cluster.vocabulary import FailureReason, Outcome, Role, TaskKind
from flowserve.core.config import EngineConfig
from tests.builders import make_spec
from tests.contract.backends import BACKENDS, Driver, kill

pytestmark = pytest.mark.parametrize("make_cluster", list(BACKENDS), indirect=True)


def test_a_task_from_dispatch_to_end(driver: Driver) -> None:
    """A colocated task gives one FirstToken and one TaskFinished with count, gaps and times that fit together."""
    driver.launch("te-0")
    finished = driver.serve("te-0", 0, 0, prompt=40, output=10)
    (first,) = driver.of(ev.FirstToken)
    assert (first.to, first.request_id, first.task_id, first.executor) == ("je", 0, 0, "te-0")
    assert (finished.to, finished.request_id, finished.executor) == ("je", 0, "te-0")
    assert (finished.generated, finished.tokens, finished.stopped) == (10, 10, True)
    assert (finished.cached_tokens, finished.preemptions) == (0, 0)
    assert len(finished.token_gaps_ns) == 9
    assert all(gap > 0 for gap in finished.token_gaps_ns)
    assert finished.last_token_ns - sum(finished.token_gaps_ns) == first.occurred
    assert finished.last_token_ns == finished.occurred
    driver.pause(0.1)
    assert len(driver.of(ev.TaskFinished)) == 1


@pytest.mark.parametrize(("output", "limit", "tokens"), [(1, 5, 1), (5, 1, 1), (2, 2, 2), (9, 4, 4)])
def test_outputs_end_at_the_stop_or_the_limit(driver: Driver, output: int, limit: int, tokens: int) -> None:
    """A request ends with its true last token, or at the client's limit where that comes first."""
    driver.launch("te-0")
    finished = driver.serve("te-0", 0, 0, output=output, limit=limit)
    assert (finished.generated, finished.tokens, finished.stopped) == (tokens, tokens, True)
    assert len(finished.token_gaps_ns) == tokens - 1


def test_many_tasks_at_once(driver: Driver) -> None:
    """Tasks of many lengths dispatched at once all end, each with its own count."""
    driver.launch("te-0")
    for number in range(30):
        driver.dispatch("te-0", driver.open(number, prompt=1 + 37 * number, output=1 + 7 * number % 23), number)
    for number in range(30):
        finished = driver.wait(ev.TaskFinished, task_id=number)
        assert (finished.request_id, finished.generated, finished.tokens) == (number, *[1 + 7 * number % 23] * 2)
    assert sorted(event.task_id for event in driver.of(ev.FirstToken)) == list(range(30))


def test_prefill_and_decode_apart(driver: Driver) -> None:
    """A prefill task holds its KV cache, the decode task fetches it elsewhere and yields the other tokens."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, prompt=1000, output=12)
    driver.dispatch("p", request, 0, TaskKind.PREFILL)
    prefilled = driver.wait(ev.TaskFinished, task_id=0)
    assert (prefilled.executor, prefilled.generated, prefilled.tokens) == ("p", 1, 1)
    assert not prefilled.stopped
    assert prefilled.token_gaps_ns == ()
    held = driver.wait(ev.LoadReport, to="cm", executor="p", generated_tokens=1)
    assert (held.running, held.free_blocks < held.total_blocks) == (0, True)
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=KvSource("p", 0))
    decoded = driver.wait(ev.TaskFinished, task_id=1)
    assert (decoded.executor, decoded.generated, decoded.tokens, decoded.stopped) == ("d", 12, 11, True)
    assert len(decoded.token_gaps_ns) == 10
    assert decoded.last_token_ns - sum(decoded.token_gaps_ns) > prefilled.last_token_ns
    (first,) = driver.of(ev.FirstToken)
    assert (first.executor, first.task_id) == ("p", 0)
    free = driver.wait(ev.LoadReport, to="cm", executor="p", free_blocks=held.total_blocks, generated_tokens=1)
    assert free.occurred >= held.occurred


EARLY = EngineConfig(kv_blocks=2000, token_budget=256, kv_transfer="by_chunk")
"""Sends KV cache while it is computed: prompts of 1000 tokens in four chunks."""


@pytest.mark.parametrize("limit", [12, 50])
def test_a_decode_task_placed_while_the_prefill_is_under_way(make_driver: Callable[..., Driver], limit: int) -> None:
    """The prefill executor says when its KV cache can be asked for; decoding goes on behind its first token."""
    driver = make_driver(engine=EARLY)
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, prompt=1000, output=12, limit=limit)
    driver.dispatch("p", request, 0, TaskKind.PREFILL)
    started = driver.wait(ev.PrefillStarted)
    assert (started.to, started.request_id, started.task_id, started.executor) == ("je", 0, 0, "p")
    assert sum(started.kv_runs) == 63
    assert not driver.of(ev.FirstToken)
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=KvSource("p", 0, started.kv_runs))
    prefilled = driver.wait(ev.TaskFinished, task_id=0)
    assert (prefilled.generated, prefilled.tokens, prefilled.stopped) == (1, 1, False)
    decoded = driver.wait(ev.TaskFinished, task_id=1)
    assert (decoded.executor, decoded.generated, decoded.tokens, decoded.stopped) == ("d", 12, 11, True)
    assert decoded.last_token_ns - sum(decoded.token_gaps_ns) > prefilled.last_token_ns
    assert len(driver.of(ev.FirstToken)) == 1
    driver.wait(ev.LoadReport, to="cm", executor="p", free_blocks=2000, generated_tokens=1)


def test_a_decode_task_placed_early_may_be_let_go(make_driver: Callable[..., Driver]) -> None:
    """Before or after its prefill is: each is answered once, nothing is kept, and the next request is served."""
    driver = make_driver(engine=EARLY, step_s=0.02)
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    for number, order in enumerate((("p", "d"), ("d", "p"))):
        tasks = {"p": 10 * number, "d": 10 * number + 1}
        request = driver.open(number, prompt=1000, output=12)
        driver.dispatch("p", request, tasks["p"], TaskKind.PREFILL)
        driver.wait(ev.PrefillStarted)
        driver.dispatch("d", request, tasks["d"], TaskKind.DECODE, generated=1, kv=KvSource("p", tasks["p"]))
        driver.pause(0.03)
        for name in order:
            driver.abort(name, tasks[name])
            driver.wait(ev.TaskAborted, task_id=tasks[name])
        driver.end(number, outcome=Outcome.CANCELLED)
    for number, order in enumerate((("p", "d"), ("d", "p"))):
        assert len(driver.of(ev.TaskAborted, request_id=number)) == len(order)
    request = driver.open(5, prompt=1000, output=12)
    source = driver.prefill("p", request, 50)
    driver.dispatch("d", request, 51, TaskKind.DECODE, generated=1, kv=source)
    assert driver.wait(ev.TaskFinished, task_id=51).generated == 12


def test_a_prefill_executor_that_dies_early(make_driver: Callable[..., Driver]) -> None:
    """Both tasks come back, as lost, and the decode executor is as good as new."""
    driver = make_driver(engine=EARLY, step_s=0.02)
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, prompt=1000, output=12)
    driver.dispatch("p", request, 0, TaskKind.PREFILL)
    driver.wait(ev.PrefillStarted)
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=KvSource("p", 0))
    driver.pause(0.03)
    kill(driver.cluster, "p")
    assert driver.wait(ev.TaskFailed, task_id=0).reason is FailureReason.EXECUTOR_LOST
    assert driver.wait(ev.TaskFailed, task_id=1).reason is FailureReason.KV_LOST
    driver.wait(ev.LoadReport, to="cm", executor="d", free_blocks=2000)


def test_a_decode_task_alone_on_idle_executors(driver: Driver) -> None:
    """The fetched KV cache is used as soon as it is there, though no other message comes to wake the executor."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    for number in range(4):
        request = driver.open(number, output=2)
        source = driver.prefill("p", request, 2 * number)
        driver.pause(0.2)  # every report is sent, nothing is due
        driver.dispatch("d", request, 2 * number + 1, TaskKind.DECODE, generated=1, kv=source)
        driver.wait(ev.TaskFinished, task_id=2 * number + 1)


def test_a_prefill_may_be_the_whole_request(driver: Driver) -> None:
    """A request of one token ends with its prefill: nothing is held."""
    driver.launch("p", Role.PREFILL)
    request = driver.open(0, output=1, limit=50)
    driver.dispatch("p", request, 0, TaskKind.PREFILL)
    finished = driver.wait(ev.TaskFinished)
    assert (finished.stopped, finished.generated) == (True, 1)
    report = driver.wait(ev.LoadReport, to="cm", generated_tokens=1)
    assert report.free_blocks == report.total_blocks


def test_aborting_a_task_in_flight(driver: Driver) -> None:
    """An aborted task is answered by TaskAborted with its tokens so far; its blocks are free, others go on."""
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=5000), 0)
    driver.dispatch("te-0", driver.open(1, output=100), 1)
    driver.wait(ev.FirstToken, task_id=0)
    driver.abort("te-0", 0)
    aborted = driver.wait(ev.TaskAborted)
    assert (aborted.to, aborted.request_id, aborted.task_id, aborted.executor) == ("je", 0, 0, "te-0")
    assert 1 <= aborted.generated < 5000
    assert driver.wait(ev.TaskFinished).task_id == 1
    report = driver.wait(ev.LoadReport, to="cm", running=0)
    assert report.free_blocks == report.total_blocks
    driver.end(0, aborted.generated, Outcome.CANCELLED)


def test_aborting_what_is_over(driver: Driver) -> None:
    """Aborting an unknown or finished task, or on an executor that is not there, changes nothing."""
    driver.launch("te-0")
    driver.serve("te-0", 0, 0)
    driver.abort("te-0", 0)
    driver.abort("te-0", 99)
    driver.abort("nobody", 0)
    driver.pause(0.1)
    assert driver.of(ev.TaskAborted, ev.TaskFailed) == []
    assert driver.serve("te-0", 1, 1).generated == 10


def test_aborting_a_waiting_task(make_driver: Callable[..., Driver]) -> None:
    """A task that waits for a place in the batch can be aborted; the one in the batch goes on."""
    driver = make_driver(engine=EngineConfig(kv_blocks=2000, max_sequences=1))
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=200), 0)
    driver.wait(ev.FirstToken, task_id=0)
    driver.dispatch("te-0", driver.open(1), 1)
    driver.abort("te-0", 1)
    assert driver.wait(ev.TaskAborted, task_id=1).generated == 0
    assert driver.wait(ev.TaskFinished, task_id=0).generated == 200
    assert len(driver.of(ev.FirstToken)) == 1


def test_releasing_a_held_prefill(driver: Driver) -> None:
    """Aborting a finished prefill frees its KV cache: a decode task that wants it later fails, and can be prefilled."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, output=5)
    source = driver.prefill("p", request, 0)
    driver.abort("p", 0)
    report = driver.wait(ev.LoadReport, to="cm", executor="p", free_blocks=2000, generated_tokens=1)
    assert report.total_blocks == 2000
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=source)
    lost = driver.wait(ev.TaskFailed, task_id=1)
    assert (lost.executor, lost.reason, lost.generated) == ("d", FailureReason.KV_LOST, 1)
    assert driver.of(ev.TaskAborted) == []
    driver.dispatch("p", request, 2, TaskKind.PREFILL, generated=1)
    again = driver.wait(ev.TaskFinished, task_id=2)
    assert (again.generated, again.tokens, again.stopped) == (2, 1, False)
    driver.dispatch("d", request, 3, TaskKind.DECODE, generated=2, kv=KvSource("p", 2))
    assert driver.wait(ev.TaskFinished, task_id=3).generated == 5
    assert len(driver.of(ev.FirstToken)) == 1


@pytest.mark.parametrize("how", ["killed", "never there"])
def test_a_decode_task_whose_source_is_gone(driver: Driver, how: str) -> None:
    """A decode task whose KV cache lies on an executor that is not there fails as KV_LOST and does not hang."""
    driver.launch("d", Role.DECODE)
    request, source, there = driver.open(0), KvSource("p", 0), 0
    if how == "killed":
        driver.launch("p", Role.PREFILL)
        driver.prefill("p", request, 0)
        kill(driver.cluster, "p")
        driver.wait(ev.ExecutorFailed, executor="p")
        there = 1
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=there, kv=source)
    lost = driver.wait(ev.TaskFailed, task_id=1)
    assert (lost.reason, lost.generated) == (FailureReason.KV_LOST, there)
    report = driver.wait(ev.LoadReport, to="cm", executor="d", running=0, waiting=0)
    assert report.free_blocks == report.total_blocks


def test_one_held_prefill_serves_once(driver: Driver) -> None:
    """A KV cache that was fetched is released: a second decode task cannot have it."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    request = driver.open(0, output=3)
    source = driver.prefill("p", request, 0)
    driver.dispatch("d", request, 1, TaskKind.DECODE, generated=1, kv=source)
    driver.wait(ev.TaskFinished, task_id=1)
    driver.end(0, 3)
    other = driver.open(1, output=3)
    driver.dispatch("d", other, 2, TaskKind.DECODE, generated=0, kv=source)
    driver.wait(ev.TaskFailed, task_id=2, reason=FailureReason.KV_LOST)


@pytest.mark.parametrize("state", ["unknown", "launching"])
def test_dispatching_to_an_executor_that_does_not_serve(driver: Driver, state: str) -> None:
    """A task for an executor that is not there, or not ready yet, comes back as lost."""
    request = driver.open(0)
    if state == "launching":
        driver.submit(LaunchExecutor("te-0", make_spec()))
    driver.dispatch("te-0", request, 0)
    failed = driver.wait(ev.TaskFailed)
    assert (failed.to, failed.request_id, failed.task_id, failed.executor) == ("je", 0, 0, "te-0")
    assert (failed.reason, failed.generated) == (FailureReason.EXECUTOR_LOST, 0)


@pytest.mark.parametrize(
    ("role", "kind", "source"),
    [
        (Role.COLOCATED, TaskKind.PREFILL, None),
        (Role.COLOCATED, TaskKind.DECODE, KvSource("p", 5)),
        (Role.PREFILL, TaskKind.SERVE, None),
        (Role.DECODE, TaskKind.SERVE, None),
        (Role.DECODE, TaskKind.DECODE, None),
        (Role.COLOCATED, TaskKind.SERVE, KvSource("p", 5)),
    ],
)
def test_the_wrong_kind_of_task_is_refused(driver: Driver, role: Role, kind: TaskKind, source: KvSource | None) -> None:
    """A task that the executor's role does not run comes back as INVALID, and harms nothing."""
    driver.launch("te-0", role)
    driver.dispatch("te-0", driver.open(0), 0, kind, kv=source)
    failed = driver.wait(ev.TaskFailed)
    assert (failed.task_id, failed.reason, failed.generated) == (0, FailureReason.INVALID, 0)
    report = driver.wait(ev.LoadReport, to="cm")
    assert (report.running, report.waiting) == (0, 0)


def test_what_can_never_fit_is_refused(make_driver: Callable[..., Driver]) -> None:
    """A prompt longer than the KV cache, or one whose output outgrows it, fails as TOO_LONG; others are served."""
    driver = make_driver(engine=EngineConfig(kv_blocks=10, token_budget=512))
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, prompt=161), 0)
    failed = driver.wait(ev.TaskFailed, task_id=0)
    assert (failed.reason, failed.generated) == (FailureReason.TOO_LONG, 0)
    driver.dispatch("te-0", driver.open(1, prompt=100, output=500), 1)
    grown = driver.wait(ev.TaskFailed, task_id=1)
    assert grown.reason is FailureReason.TOO_LONG
    assert 1 <= grown.generated <= 61
    assert driver.serve("te-0", 2, 2, prompt=100, output=20).generated == 20


def test_a_cancelled_request_reaches_its_job_executor(driver: Driver) -> None:
    """CancelRequest is heard by the job executor, which decides what becomes of the task."""
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=5000), 0)
    driver.wait(ev.FirstToken)
    driver.submit(CancelRequest("je", 0))
    cancelled = driver.wait(ev.CancelRequested)
    assert (cancelled.to, cancelled.request_id) == ("je", 0)
    driver.abort("te-0", 0)
    generated = driver.wait(ev.TaskAborted).generated
    assert driver.end(0, generated, Outcome.CANCELLED).outcome is Outcome.CANCELLED


def test_a_batch_that_outgrows_the_cache_is_preempted(make_driver: Callable[..., Driver]) -> None:
    """Where sequences do not fit together, one is preempted and computed again: no token is lost or repeated."""
    driver = make_driver(engine=EngineConfig(kv_blocks=12, max_sequences=4, token_budget=64))
    driver.launch("te-0")
    for number in range(3):
        driver.dispatch("te-0", driver.open(number, prompt=48, output=60), number)
    ends = [driver.wait(ev.TaskFinished, task_id=number) for number in range(3)]
    assert [(end.generated, end.tokens) for end in ends] == [(60, 60)] * 3
    assert sum(end.preemptions for end in ends) > 0
    assert len(driver.of(ev.FirstToken)) == 3
