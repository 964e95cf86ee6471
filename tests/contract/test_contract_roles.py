"""Role switches on both backends: at an executor at work, with its cache, and asked for by a scaling policy."""

from collections.abc import Callable, Sequence

import pytest

from cluster import events as ev
from cluster.actions import DispatchTask, SubmitRequest, SwitchRole
from cluster.client import Client
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.policy import GroupLoad, RoleSwitch, ScalingPolicy
from cluster.recorder import Recorder
from cluster.request import Answer, KvSource, Request
from cluster.seam import Cluster
from cluster.streams import stream
from cluster.vocabulary import ExecutorState, FailureReason, Outcome, Role, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.transfer import KvTransfer
from policies.dispatch.least_outstanding import LeastOutstanding
from tests.builders import MODEL, make_arrival, make_spec
from tests.contract.backends import Driver

SHARED = tuple(range(1, 9))
"""Eight blocks that all prompts here begin with."""


def open_shared(driver: Driver, request_id: int, output: int = 5) -> Request:
    request = Request(request_id, 140, 100, MODEL, SHARED)
    driver.submit(SubmitRequest("je", request, Answer(output)))
    driver.wait(ev.RequestArrived, to="je", request=request)
    return request


@pytest.mark.parametrize("kv_transfer", ["by_request", "by_chunk"])
def test_an_executor_that_changed_sides_decodes_what_it_holds(
    make_driver: Callable[..., Driver], kv_transfer: KvTransfer
) -> None:
    """In the blocks where it is: for a copy there would be no room."""
    driver = make_driver(engine=EngineConfig(kv_blocks=7, kv_transfer=kv_transfer))
    driver.launch("te-0", Role.PREFILL)
    request = driver.open(0, prompt=100, output=5)
    held = driver.prefill("te-0", request, 0)
    driver.submit(SwitchRole("te-0", Role.DECODE))
    driver.wait(ev.RoleSwitched)
    driver.dispatch("te-0", request, 1, TaskKind.DECODE, generated=1, kv=held)
    assert driver.wait(ev.TaskFinished, task_id=1).generated == 5
    driver.wait(ev.LoadReport, to="cm", free_blocks=7, generated_tokens=5)


def test_a_decode_task_is_placed_ahead_where_its_prefill_runs(make_driver: Callable[..., Driver]) -> None:
    """The executor changes sides in the middle of a long prompt; the first token is known to it alone."""
    driver = make_driver(engine=EngineConfig(kv_blocks=40, token_budget=16, max_sequences=4, kv_transfer="by_chunk"))
    driver.launch("te-0", Role.PREFILL)
    request = driver.open(0, prompt=600, output=5)
    driver.dispatch("te-0", request, 0, TaskKind.PREFILL)
    begun = driver.wait(ev.PrefillStarted)
    driver.submit(SwitchRole("te-0", Role.DECODE))
    driver.wait(ev.RoleSwitched)
    driver.dispatch("te-0", request, 1, TaskKind.DECODE, generated=1, kv=KvSource("te-0", 0, begun.kv_runs))
    assert not driver.wait(ev.TaskFinished, task_id=0).stopped
    finished = driver.wait(ev.TaskFinished, task_id=1)
    assert (finished.generated, finished.tokens) == (5, 4)
    driver.wait(ev.LoadReport, to="cm", free_blocks=40, generated_tokens=5)


@pytest.mark.parametrize("role", [Role.DECODE, Role.COLOCATED])
def test_a_prefill_executor_changes_sides_with_its_cache(driver: Driver, role: Role) -> None:
    """What it held is still fetched, the old kind of task goes back, and the new kind hits the prefix it computed."""
    driver.launch("te-0", Role.PREFILL)
    driver.launch("te-1", Role.PREFILL)
    driver.launch("te-2", Role.DECODE)
    first = open_shared(driver, 0)
    held = driver.prefill("te-0", first, 0)
    driver.submit(SwitchRole("te-0", role))
    switched = driver.wait(ev.RoleSwitched)
    assert (switched.to, switched.executor, switched.spec) == ("cm", "te-0", make_spec(role))
    driver.dispatch("te-0", first, 1, TaskKind.PREFILL)
    assert driver.wait(ev.TaskFailed, task_id=1).reason is FailureReason.ROLE_SWITCHED
    driver.dispatch("te-2", first, 2, TaskKind.DECODE, generated=1, kv=held)
    assert driver.wait(ev.TaskFinished, task_id=2).generated == 5
    second = open_shared(driver, 1)
    if role is Role.DECODE:
        source = driver.prefill("te-1", second, 3)
        driver.dispatch("te-0", second, 4, TaskKind.DECODE, generated=1, kv=source)
    else:
        driver.dispatch("te-0", second, 4)
    finished = driver.wait(ev.TaskFinished, task_id=4)
    assert (finished.executor, finished.generated, finished.cached_tokens) == ("te-0", 5, 16 * len(SHARED))


def test_a_switch_lets_tasks_at_hand_finish(driver: Driver) -> None:
    """A colocated executor in the middle of its tasks, some of them waiting, prefills for others from now on."""
    driver.launch("te-0")
    for number in range(3):
        driver.dispatch("te-0", driver.open(number, output=60), number)
    driver.wait(ev.FirstToken, task_id=0)
    driver.submit(SwitchRole("te-0", Role.PREFILL))
    driver.wait(ev.RoleSwitched)
    for number in range(3):
        assert driver.wait(ev.TaskFinished, task_id=number).generated == 60
    driver.prefill("te-0", driver.open(9), 9)


class MoveOne(ScalingPolicy):
    """Asks, once something was served, that one executor decodes instead of prefilling; keeps the rest as it is."""

    period_s = 0.05

    def __init__(self) -> None:
        self.asked = 0

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        ready = {load.role: load.ready for load in loads}
        if ready != {Role.PREFILL: 2, Role.DECODE: 1} or self.asked:
            return ()
        self.asked += 1
        return (RoleSwitch(MODEL, Role.PREFILL, Role.DECODE),)

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return load.ready + load.pending


def test_a_scaling_policy_moves_an_executor(make_cluster: Callable[..., Cluster]) -> None:
    """The manager has it switched, announces its new role, and job executors send it tasks of the new kind."""
    groups = (GroupPlan(make_spec(Role.PREFILL), 2, 1, 3), GroupPlan(make_spec(Role.DECODE), 1, 1, 3))
    recorder, dispatched = Recorder(), []
    arrivals = [make_arrival(number, at_s=0.01 * number, output=8) for number in range(60)]
    control = ControlPlane(
        Client(arrivals, ("je-0",), stream(0, "client"), closed_loop=True),
        [JobExecutor("je-0", 0, LeastOutstanding())],
        ClusterManager(groups, MoveOne(), ("je-0",)),
        recorder,
    )
    announced: list[tuple[str, Role, ExecutorState]] = []
    with make_cluster(["client", "je-0", "cm"]) as cluster:
        while (event := cluster.next_event()) is not None:
            if isinstance(event, ev.ExecutorAnnounced):
                announced.append((event.executor, event.spec.role, event.state))
            for action in control.on_event(event):
                if isinstance(action, DispatchTask):
                    dispatched.append((action.executor, action.task.kind))
                cluster.submit(action)
    assert set(recorder.outcomes) == {Outcome.FINISHED}
    [(moved, *new)] = announced[3:]
    assert new == [Role.DECODE, ExecutorState.READY]
    kinds = {kind for name, kind in dispatched if name == moved}
    assert TaskKind.DECODE in kinds
    assert [what for _, name, what, _ in recorder.scaling if name == moved][-1] == "serves decode"
    assert sum(kind is TaskKind.DECODE for name, kind in dispatched if name == moved) >= 5
