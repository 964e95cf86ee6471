"""Executors that change sides at work: what is held where it is decoded, and that nobody waits for ever."""

import pytest

from cluster import events as ev
from cluster.actions import SwitchRole
from cluster.vocabulary import Role, TaskKind, to_ns
from flowserve.core.config import EngineConfig
from flowserve.core.transfer import KvTransfer
from tests.contract.backends import Driver, sim_cluster

STEP_S = 0.002


def crosswise(driver: Driver, prompt: int) -> None:
    """Two executors that hold a prompt each and have changed sides; each is to decode what the other one holds, behind
    a prompt of three blocks that it took before.
    """
    sides = ("te-0", "te-1")
    for executor in sides:
        driver.launch(executor, Role.PREFILL)
    requests = [driver.open(number, prompt=prompt, output=5) for number in range(2)]
    held = [driver.prefill(sides[number], requests[number], number) for number in range(2)]
    for number in range(2):
        driver.dispatch(sides[number], driver.open(10 + number, output=5), 10 + number, TaskKind.PREFILL)
        driver.submit(SwitchRole(sides[number], Role.DECODE))
        driver.wait(ev.RoleSwitched)
    for number in range(2):
        driver.dispatch(sides[1 - number], requests[number], 20 + number, TaskKind.DECODE, 1, held[number])


def test_decode_tasks_go_ahead_of_prompts_that_wait_for_each_others_blocks() -> None:
    """Each executor has room for the other's request, whose end makes room for its own prompt."""
    with sim_cluster(engine=EngineConfig(4, 16, 64, 4, watermark=0.0)) as cluster:
        driver = Driver(cluster)
        crosswise(driver, prompt=20)
        for task_id in (20, 21, 10, 11):
            assert driver.wait(ev.TaskFinished, task_id=task_id).executor == f"te-{(task_id + (task_id >= 20)) % 2}"


@pytest.mark.parametrize("kv_transfer", ["by_request", "by_chunk"])
def test_a_handover_in_place_costs_a_step_and_no_byte(kv_transfer: KvTransfer) -> None:
    """A prompt of 800 kB: on another executor its copy takes a step's time and more, where it is held nothing."""
    waits, moved = {}, {}
    for executor in ("te-0", "te-1"):
        with sim_cluster(engine=EngineConfig(100, 16, 1024, 8, kv_transfer=kv_transfer), step_s=STEP_S) as cluster:
            driver = Driver(cluster)
            driver.launch("te-0", Role.PREFILL)
            driver.launch("te-1", Role.DECODE)
            request = driver.open(0, prompt=800, output=5)
            held = driver.prefill("te-0", request, 0)
            driver.submit(SwitchRole("te-0", Role.DECODE))
            driver.wait(ev.RoleSwitched)
            asked = driver.now
            driver.dispatch(executor, request, 1, TaskKind.DECODE, generated=1, kv=held)
            finished = driver.wait(ev.TaskFinished, task_id=1)
            waits[executor] = finished.last_token_ns - sum(finished.token_gaps_ns) - asked
            moved[executor] = sum(span.num_bytes for span in cluster.transfers)
    assert moved == {"te-0": 0, "te-1": 800_000}
    messages = to_ns(0.0001) + (to_ns(0.00005) if kv_transfer == "by_chunk" else 0)
    assert to_ns(STEP_S) < waits["te-0"] <= to_ns(STEP_S) + messages
    assert waits["te-1"] > 1.4 * waits["te-0"]
