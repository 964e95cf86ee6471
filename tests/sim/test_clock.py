"""Simulated time: alarms in SimPy's own queue."""

import pickle
from collections.abc import Generator
from functools import partial

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st
from simpy.core import EmptySchedule
from simpy.events import NORMAL, URGENT, EventPriority

from sim.clock import Clock
from tests.builders import run_out

happened: list[int] = []


def note(number: int) -> None:
    happened.append(number)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 2), st.booleans()), max_size=30))
def test_order_is_that_of_simpy(asked: list[tuple[int, int, bool]]) -> None:
    """By time, then priority, then insertion: alarms among themselves and beside SimPy's events."""
    clock, log = Clock(), list[tuple[int, int]]()
    for number, (delay, priority, is_event) in enumerate(asked):
        if is_event:
            event = simpy.Event(clock.env)
            event._ok, event._value = True, None
            event.callbacks.append(lambda _, number=number: log.append((clock.now, number)))
            clock.env.schedule(event, EventPriority(priority), delay)
        else:
            clock.alarm(delay, lambda number=number: log.append((clock.now, number)), EventPriority(priority))
    run_out(clock)
    ordered = sorted((delay, priority, number) for number, (delay, priority, _) in enumerate(asked))
    assert log == [(delay, number) for delay, _, number in ordered]


def test_a_process_of_simpy_runs_beside_alarms() -> None:
    """Its timeouts count from the clock's time, also where it begins in the middle of an alarm."""
    clock, log = Clock(), list[tuple[str, int]]()

    def process() -> Generator[simpy.Event, None, None]:
        for _ in range(2):
            yield clock.env.timeout(4)
            log.append(("process", clock.now))

    clock.alarm(3, lambda: clock.env.process(process()))
    clock.alarm(8, lambda: log.append(("alarm", clock.now)))
    run_out(clock)
    assert log == [("process", 7), ("alarm", 8), ("process", 11)]


def test_what_is_cancelled_does_not_happen() -> None:
    """Its time passes all the same."""
    happened.clear()
    clock = Clock()
    alarm = clock.alarm(5, partial(note, 1))
    alarm.cancel()
    run_out(clock)
    assert (happened, clock.now) == ([], 5)
    with pytest.raises(EmptySchedule):
        clock.step()


def test_running_up_to_a_time() -> None:
    """What is ahead of everything else at that time happens too, the rest of it does not."""
    happened.clear()
    clock = Clock()
    for number, (delay, priority) in enumerate(((4, NORMAL), (5, NORMAL), (5, EventPriority(URGENT - 1)), (6, NORMAL))):
        clock.alarm(delay, partial(note, number), priority)
    clock.run_until(5)
    assert (happened, clock.now, clock.is_due(), clock.next_ns) == ([0, 2], 5, True, 5)
    run_out(clock)
    assert happened == [0, 2, 1, 3]


@pytest.mark.pure
def test_a_pickled_clock_goes_on() -> None:
    """With its time, what is due, and the order of what is added."""
    happened.clear()
    clock = Clock()
    clock.alarm(1, partial(note, 0))
    clock.alarm(3, partial(note, 1))
    clock.step()
    again = pickle.loads(pickle.dumps(clock))
    again.alarm(2, partial(note, 2))
    run_out(again)
    assert (happened, again.now) == ([0, 1, 2], 3)
