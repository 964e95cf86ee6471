"""The life of an executor on both backends: launch, load reports, drain, retire, death."""

from collections.abc import Callable

import msgspec
import pytest

from cluster import events as ev
from cluster.actions import DrainExecutor, LaunchExecutor, RetireExecutor
from cluster.vocabulary import WORKERS, FailureReason, Role, Stage, TaskKind
from flowserve.core.config import EngineConfig
from tests.builders import make_spec
from tests.contract.backends import SLOTS, Driver, kill


@pytest.mark.parametrize("role", list(Role))
def test_a_launch_goes_through_five_stages(make_driver: Callable[..., Driver], role: Role) -> None:
    """A launch is answered by the five stages in order, then by ExecutorReady with spec and limits of the engine."""
    driver = make_driver(engine=EngineConfig(kv_blocks=123, block_tokens=32, token_budget=64, max_sequences=7))
    driver.pause(0.001)
    launched = driver.now
    driver.submit(LaunchExecutor("te-0", make_spec(role)))
    ready = driver.wait(ev.ExecutorReady)
    assert (ready.to, ready.executor, ready.spec) == ("cm", "te-0", make_spec(role))
    limits = (0, 0, SLOTS) if role in WORKERS else (123, 32, 7)
    assert (ready.kv_blocks, ready.block_tokens, ready.max_sequences) == limits
    stages = driver.of(ev.StageFinished)
    assert [event.stage for event in stages] == list(Stage)
    assert {(event.to, event.executor) for event in stages} == {("cm", "te-0")}
    occurred = [event.occurred for event in stages]
    assert occurred == sorted(occurred)
    assert occurred[-1] <= ready.occurred
    assert all(event.took_ns >= 0 for event in stages)
    assert sum(event.took_ns for event in stages) <= ready.occurred - launched
    assert stages[-1].occurred == occurred[-1] >= launched


def test_load_reports_reach_everyone_who_decides(driver: Driver) -> None:
    """The cluster manager and the job executor hear the same reports; the client hears none."""
    driver.launch("te-0")
    driver.serve("te-0", 0, 0)
    driver.wait(ev.LoadReport, to="cm", running=0, generated_tokens=10)
    driver.wait(ev.LoadReport, to="je", running=0, generated_tokens=10)
    said = {
        actor: [msgspec.structs.replace(event, to="", time=0) for event in driver.of(ev.LoadReport, to=actor)]
        for actor in ("client", "je", "cm")
    }
    assert said["client"] == []
    assert said["je"] == said["cm"] != []


def test_load_reports_are_sent_on_change(driver: Driver) -> None:
    """Reports follow the load while it changes, end with an idle executor, and stop when nothing changes."""
    total = driver.launch("te-0").kv_blocks
    driver.dispatch("te-0", driver.open(0, prompt=160, output=200), 0)
    driver.wait(ev.TaskFinished)
    last = driver.wait(ev.LoadReport, to="cm", generated_tokens=200)
    assert (last.running, last.waiting, last.waiting_tokens) == (0, 0, 0)
    assert last.free_blocks == last.total_blocks == total
    assert last.cached_blocks > 0
    driver.wait(ev.LoadReport, to="je", generated_tokens=200)
    assert [event for event in driver.pause(0.3) if isinstance(event, ev.LoadReport)] == []
    reports = driver.of(ev.LoadReport, to="cm")
    assert any(report.running == 1 and report.free_blocks < total for report in reports)
    tokens = [report.generated_tokens for report in reports]
    assert tokens == sorted(tokens)
    driver.end(0, 200)
    driver.serve("te-0", 1, 1)
    assert driver.wait(ev.LoadReport, to="cm", generated_tokens=210).running == 0


def test_progress_counts_tokens(driver: Driver) -> None:
    """TaskProgress tells the job executor how far each task is, never more than there will be."""
    driver.launch("te-0")
    driver.dispatch("te-0", driver.open(0, output=300), 0)
    driver.wait(ev.TaskFinished)
    progress = driver.of(ev.TaskProgress)
    assert {event.to for event in progress} == {"je"}
    counts = [dict(event.generated)[0] for event in progress]
    assert counts == sorted(counts)
    assert counts
    assert counts[-1] <= 300


def test_draining_finishes_and_refuses(driver: Driver) -> None:
    """A draining executor refuses new tasks, finishes those it has, and says once that it is drained."""
    driver.launch("te-0")
    first, second = driver.open(0, output=100), driver.open(1)
    driver.dispatch("te-0", first, 0)
    driver.wait(ev.FirstToken, task_id=0)
    driver.submit(DrainExecutor("te-0"))
    driver.dispatch("te-0", second, 1)
    refused = driver.wait(ev.TaskFailed, task_id=1)
    assert (refused.to, refused.executor, refused.reason) == ("je", "te-0", FailureReason.NOT_SERVING)
    assert refused.generated == 0
    finished = driver.wait(ev.TaskFinished, task_id=0)
    drained = driver.wait(ev.ExecutorDrained)
    assert (drained.to, drained.executor) == ("cm", "te-0")
    assert drained.occurred >= finished.occurred
    driver.dispatch("te-0", second, 2)
    driver.wait(ev.TaskFailed, task_id=2, reason=FailureReason.NOT_SERVING)
    driver.pause(0.1)
    assert len(driver.of(ev.ExecutorDrained)) == 1


def test_an_idle_executor_drains_at_once(driver: Driver) -> None:
    """An executor without tasks is drained as soon as it is asked to, and can then be retired."""
    driver.launch("te-0")
    driver.submit(DrainExecutor("te-0"))
    driver.wait(ev.ExecutorDrained, executor="te-0")
    driver.submit(RetireExecutor("te-0"))
    retired = driver.wait(ev.ExecutorRetired)
    assert (retired.to, retired.executor) == ("cm", "te-0")
    driver.pause(0.2)
    assert driver.of(ev.ExecutorFailed, ev.TaskFailed) == []
    assert len(driver.of(ev.ExecutorRetired)) == 1


def test_draining_waits_for_held_kv_cache(driver: Driver) -> None:
    """An executor that holds a prefilled KV cache for somebody is not drained until that is fetched or released."""
    driver.launch("p", Role.PREFILL)
    driver.launch("d", Role.DECODE)
    fetched, released = driver.open(0), driver.open(1)
    first, second = driver.prefill("p", fetched, 0), driver.prefill("p", released, 1)
    driver.submit(DrainExecutor("p"))
    driver.pause(0.2)
    assert driver.of(ev.ExecutorDrained) == []
    driver.dispatch("d", fetched, 2, TaskKind.DECODE, generated=1, kv=first)
    driver.wait(ev.TaskFinished, task_id=2)
    driver.pause(0.2)
    assert driver.of(ev.ExecutorDrained) == []
    driver.abort("p", second.task_id)
    driver.wait(ev.ExecutorDrained, executor="p")


def test_retiring_gives_tasks_back(driver: Driver) -> None:
    """Tasks of an executor that is retired come back as failed, with the tokens they had, before it is gone."""
    driver.launch("te-0")
    for number in range(3):
        driver.dispatch("te-0", driver.open(number, output=5000), number)
    for number in range(3):
        driver.wait(ev.FirstToken, task_id=number)
    driver.submit(RetireExecutor("te-0"))
    driver.wait(ev.ExecutorRetired, executor="te-0")
    failed = driver.of(ev.TaskFailed)
    assert sorted(event.task_id for event in failed) == [0, 1, 2]
    assert {(event.to, event.executor, event.reason) for event in failed} == {
        ("je", "te-0", FailureReason.EXECUTOR_LOST)
    }
    assert all(1 <= event.generated < 5000 for event in failed)
    driver.dispatch("te-0", driver.open(3), 3)
    driver.wait(ev.TaskFailed, task_id=3, reason=FailureReason.EXECUTOR_LOST)
    driver.pause(0.2)
    assert driver.of(ev.ExecutorFailed) == []
    assert len(driver.of(ev.TaskFailed)) == 4
    assert driver.of(ev.TaskFinished) == []


def test_retiring_in_the_middle_of_a_launch(driver: Driver) -> None:
    """An executor can be retired before it is ready; it never becomes ready then."""
    driver.submit(LaunchExecutor("te-0", make_spec()), RetireExecutor("te-0"))
    driver.wait(ev.ExecutorRetired, executor="te-0")
    driver.pause(0.5)
    assert driver.of(ev.ExecutorReady, ev.ExecutorFailed) == []


def test_a_dying_executor_gives_tasks_back(driver: Driver) -> None:
    """Each task of an executor that dies comes back as failed, with its tokens so far, before the executor does."""
    driver.launch("te-0")
    driver.launch("te-1")
    for number in range(3):
        driver.dispatch("te-0", driver.open(number, output=5000), number)
    driver.dispatch("te-1", driver.open(3, output=150), 3)
    for number in range(3):
        driver.wait(ev.FirstToken, task_id=number)
    kill(driver.cluster, "te-0")
    dead = driver.wait(ev.ExecutorFailed)
    assert (dead.to, dead.executor) == ("cm", "te-0")
    assert "killed" in dead.reason
    failed = driver.of(ev.TaskFailed)
    assert sorted(event.task_id for event in failed) == [0, 1, 2]
    assert {(event.to, event.executor, event.reason) for event in failed} == {
        ("je", "te-0", FailureReason.EXECUTOR_LOST)
    }
    assert all(1 <= event.generated < 5000 for event in failed)
    assert driver.wait(ev.TaskFinished, task_id=3).generated == 150
    driver.pause(0.2)
    assert len(driver.of(ev.ExecutorFailed)) == 1
    assert len(driver.of(ev.TaskFailed)) == 3


def test_a_retry_goes_on_where_the_dead_executor_stopped(driver: Driver) -> None:
    """A task that continues a lost one yields the rest of the tokens, and no second first token."""
    driver.launch("te-0")
    driver.launch("te-1")
    request = driver.open(0, output=400)
    driver.dispatch("te-0", request, 0)
    driver.wait(ev.FirstToken, task_id=0)
    kill(driver.cluster, "te-0")
    there = driver.wait(ev.TaskFailed, task_id=0).generated
    assert 1 <= there < 400
    driver.dispatch("te-1", request, 1, generated=there)
    finished = driver.wait(ev.TaskFinished, task_id=1)
    assert (finished.generated, finished.tokens, finished.stopped) == (400, 400 - there, True)
    assert len(driver.of(ev.FirstToken)) == 1


def test_retiring_what_is_not_there(driver: Driver) -> None:
    """An executor that died while it was to be retired has failed, and is not reported as retired too."""
    driver.launch("te-0")
    kill(driver.cluster, "te-0")
    driver.wait(ev.ExecutorFailed, executor="te-0")
    driver.submit(RetireExecutor("te-0"), RetireExecutor("never there"))
    driver.pause(0.1)
    assert driver.of(ev.ExecutorRetired) == []


def test_dying_in_the_middle_of_a_launch(driver: Driver) -> None:
    """An executor that dies before it is ready has failed, and does not become ready."""
    driver.submit(LaunchExecutor("te-0", make_spec()))
    driver.pause(0.0005)
    kill(driver.cluster, "te-0")
    driver.wait(ev.ExecutorFailed, executor="te-0")
    driver.pause(0.3)
    assert driver.of(ev.ExecutorReady) == []
