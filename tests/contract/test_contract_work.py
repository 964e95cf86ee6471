"""The seam's contract for work other than serving: workers, their tasks, calls of jobs. Same tests, both clusters."""

from cluster import events as ev
from cluster.actions import (
    AbortTask,
    DispatchWork,
    DrainExecutor,
    EndCall,
    EndWork,
    RetireExecutor,
    SubmitCall,
    SubmitWork,
)
from cluster.request import Request
from cluster.vocabulary import FailureReason, Outcome, Role, TaskKind, to_ns
from cluster.work import FIRST_CALL, WORK, Preprocess, RunTool, WorkArrival, WorkTask
from tests.builders import MODEL, make_agent
from tests.contract.backends import Driver, kill


def submit(driver: Driver, arrival: WorkArrival) -> None:
    driver.submit(SubmitWork(WORK, arrival.request, arrival.answer))
    driver.wait(ev.WorkArrived, to=WORK, request=arrival.request)


def tool(driver: Driver, executor: str, task_id: int, step: int = 0, request_id: int = 0) -> None:
    driver.submit(DispatchWork(WORK, executor, WorkTask(task_id, request_id, RunTool("tool", step))))


def test_tools_take_their_time_and_a_slot(driver: Driver) -> None:
    """Two slots: two tools run side by side, the third begins when one of them is done; each says when it began."""
    submit(driver, make_agent(0, [0.05, 0.1, 0.03]))
    driver.launch("te-0", Role.CPU)
    for number in range(3):
        tool(driver, "te-0", number, number)
    ends = {number: driver.wait(ev.WorkFinished, to=WORK, task_id=number) for number in range(3)}
    took = {number: end.occurred - end.started for number, end in ends.items()}
    assert [took[number] >= to_ns(seconds) for number, seconds in enumerate((0.05, 0.1, 0.03))] == [True] * 3
    assert ends[2].started >= ends[0].occurred > ends[1].started
    assert ends[1].occurred > ends[0].occurred
    driver.submit(EndWork(0, Outcome.FINISHED))
    driver.wait(ev.WorkEnded, to="client", request_id=0, outcome=Outcome.FINISHED)


def test_other_operations_take_what_the_backend_says(driver: Driver) -> None:
    """Preprocessing of 50,000 tokens takes 50 ms here; a worker of another role gives the task back."""
    submit(driver, make_agent(0, [0.1]))
    driver.launch("te-0", Role.CPU)
    driver.launch("te-1", Role.TRAINING)
    for executor, task_id in (("te-0", 1), ("te-1", 2)):
        driver.submit(DispatchWork(WORK, executor, WorkTask(task_id, 0, Preprocess(50_000))))
    done = driver.wait(ev.WorkFinished, task_id=1)
    assert done.occurred - done.started >= to_ns(0.05)
    assert driver.wait(ev.WorkFailed, task_id=2).reason is FailureReason.INVALID


def test_tasks_can_be_aborted(driver: Driver) -> None:
    """Running and waiting ones are let go of, once; what has been let go of does not finish."""
    submit(driver, make_agent(0, [30.0, 30.0, 30.0]))
    driver.launch("te-0", Role.CPU)
    for number in range(3):
        tool(driver, "te-0", number, number)
    for number in (0, 2):
        driver.submit(AbortTask("te-0", number))
        driver.wait(ev.WorkAborted, task_id=number, executor="te-0")
    driver.submit(AbortTask("te-0", 0))
    driver.pause(0.05)
    assert not driver.of(ev.WorkFinished) and len(driver.of(ev.WorkAborted)) == 2


def test_a_worker_that_dies_gives_its_tasks_back_first(driver: Driver) -> None:
    """Each task comes back as failed before the worker does; to one that is gone, at once."""
    submit(driver, make_agent(0, [30.0, 30.0]))
    driver.launch("te-0", Role.CPU)
    tool(driver, "te-0", 0, 0)
    driver.pause(0.02)
    kill(driver.cluster, "te-0")
    driver.wait(ev.ExecutorFailed, executor="te-0")
    (failed,) = driver.of(ev.WorkFailed, task_id=0)
    assert failed.reason is FailureReason.EXECUTOR_LOST
    tool(driver, "te-0", 1, 1)
    assert driver.wait(ev.WorkFailed, task_id=1).reason is FailureReason.EXECUTOR_LOST


def test_a_draining_worker_finishes_what_it_has(driver: Driver) -> None:
    """It takes no more, says when it is drained, and can be retired."""
    submit(driver, make_agent(0, [0.1, 0.1]))
    driver.launch("te-0", Role.CPU)
    tool(driver, "te-0", 0, 0)
    driver.submit(DrainExecutor("te-0"))
    tool(driver, "te-0", 1, 1)
    assert driver.wait(ev.WorkFailed, task_id=1).reason is FailureReason.NOT_SERVING
    driver.wait(ev.ExecutorDrained, executor="te-0")
    assert driver.of(ev.WorkFinished, task_id=0)
    driver.submit(RetireExecutor("te-0"))
    driver.wait(ev.ExecutorRetired, executor="te-0")


def test_a_call_gets_the_answer_of_its_step(driver: Driver) -> None:
    """The job executor that takes the call hears no length; the engine knows it; the caller hears of the end."""
    submit(driver, make_agent(0, [(40, 7)], [0.1], [(60, 3)]))
    driver.launch("te-0")
    for step, prompt, output in ((0, 40, 7), (2, 60, 3)):
        number = FIRST_CALL + step
        request = Request(number, prompt, 100, MODEL)
        driver.submit(SubmitCall("je", WORK, request, 0, step))
        arrived = driver.wait(ev.CallArrived, to="je", caller=WORK)
        assert arrived.request == request
        driver.dispatch("te-0", request, 10 + step, TaskKind.SERVE)
        finished = driver.wait(ev.TaskFinished, task_id=10 + step)
        assert (finished.generated, finished.stopped) == (output, True)
        driver.submit(EndCall(WORK, number, Outcome.FINISHED, output))
        driver.wait(ev.CallEnded, to=WORK, request_id=number, generated=output)


def test_load_reports_of_workers_reach_the_cluster_manager(driver: Driver) -> None:
    """How many tasks run and wait, and no KV cache."""
    submit(driver, make_agent(0, [0.5, 0.5, 0.5]))
    driver.launch("te-0", Role.CPU)
    for number in range(3):
        tool(driver, "te-0", number, number)
    report = driver.wait(ev.LoadReport, to="cm", executor="te-0", running=2)
    assert (report.total_blocks, report.waiting) in {(0, 0), (0, 1)}
