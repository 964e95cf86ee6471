"""Every metric on runs small enough to be worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cluster import events as ev
from cluster.actions import LaunchExecutor
from cluster.client import Client
from cluster.metrics import RequestTable, Slo, Window, percentile, summarise
from cluster.recorder import Recorder
from cluster.vocabulary import FailureReason, Outcome, Stage, to_ns
from tests.builders import load_report, make_arrival, make_request, make_spec, run_sim


class Book:
    """Writes the events of a run by hand, times in seconds."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._due: dict[int, int] = {}

    def hear(self, event: ev.Event, *actions: LaunchExecutor) -> None:
        self.recorder.record(event, actions, cast(Client, SimpleNamespace(due=self._due)))

    def arrived(self, number: int, at: float, prompt: int = 10, due: float | None = None) -> None:
        self._due[number] = to_ns(at if due is None else due)
        time = to_ns(at)
        self.hear(ev.RequestArrived(to="je-0", time=time, occurred=time, request=make_request(number, prompt)))

    def first(self, number: int, at: float, heard: float | None = None) -> None:
        time = to_ns(at if heard is None else heard)
        self.hear(
            ev.FirstToken(to="je-0", time=time, occurred=to_ns(at), request_id=number, task_id=number, executor="te-0")
        )

    def task(self, number: int, *times: float, stopped: bool = True, executor: str = "te-0", **more: int) -> None:
        """A task that produced tokens at these times."""
        stamps = [to_ns(time) for time in times]
        self.hear(
            ev.TaskFinished(
                to="je-0",
                time=stamps[-1],
                occurred=stamps[-1],
                request_id=number,
                task_id=number,
                executor=executor,
                generated=len(times),
                stopped=stopped,
                tokens=len(times),
                last_token_ns=stamps[-1],
                token_times=ev.pack_times(stamps),
                **more,
            )
        )

    def failed(self, number: int, at: float, generated: int) -> None:
        self.hear(
            ev.TaskFailed(
                to="je-0",
                time=to_ns(at),
                occurred=to_ns(at),
                request_id=number,
                task_id=number,
                executor="te-0",
                reason=FailureReason.EXECUTOR_LOST,
                generated=generated,
            )
        )

    def ended(
        self, number: int, at: float, generated: int, outcome: Outcome = Outcome.FINISHED, reason: str = ""
    ) -> None:
        self.hear(
            ev.RequestEnded(
                to="client",
                time=to_ns(at),
                occurred=to_ns(at),
                request_id=number,
                outcome=outcome,
                generated=generated,
                reason=reason,
            )
        )

    def served(self, number: int, arrival: float, *times: float) -> None:
        """A whole request on one executor, with its tokens at these times."""
        self.arrived(number, arrival)
        self.first(number, times[0])
        self.task(number, *times)
        self.ended(number, times[-1], len(times))

    def table(self, window: Window | None = None) -> RequestTable:
        return RequestTable(self.recorder, window or Window())

    def summary(self, slo: Slo | None = None, window: Window | None = None) -> dict[str, float]:
        return summarise(self.recorder, slo or Slo(), window)


def launch(book: Book, name: str, at: float, npus: int = 1) -> None:
    time = to_ns(at)
    book.hear(
        ev.TimerFired(to="cm", time=time, occurred=time, name="scale"), LaunchExecutor(name, make_spec(npus=npus))
    )


# -- latencies ------------------------------------------------------------------------------------------------------


def test_latencies_of_one_request() -> None:
    """TTFT from arrival, e2e to the last token, TPOT between them, ITL the gaps."""
    book = Book()
    book.served(0, 1.0, 1.5, 1.6, 2.1)
    summary = book.summary()
    assert summary["ttft_mean_s"] == pytest.approx(0.5)
    assert summary["e2e_mean_s"] == pytest.approx(1.1)
    assert summary["tpot_mean_s"] == pytest.approx(0.3)
    assert sorted(book.recorder.gaps) == [to_ns(0.1), to_ns(0.5)]
    assert summary["itl_p50_s"] == pytest.approx(0.3)


def test_times_are_those_of_production() -> None:
    """When a token was heard of makes no difference, when it was there does."""
    book = Book()
    book.arrived(0, 1.0)
    book.first(0, at=1.5, heard=1.9)
    book.task(0, 1.5, 1.7)
    book.ended(0, 2.5, 2)
    assert book.table().ttft.tolist() == pytest.approx([0.5])
    assert book.table().e2e.tolist() == pytest.approx([0.7])


def test_the_handover_is_a_gap() -> None:
    """Between the prefill's token and the first of the decode task lies one more inter-token latency."""
    book = Book()
    book.arrived(0, 0.0)
    book.first(0, 1.0)
    book.task(0, 1.0, stopped=False, executor="te-0")
    book.task(0, 1.75, 1.85, executor="te-1")
    book.ended(0, 1.85, 3)
    assert list(book.recorder.gaps) == [to_ns(0.75), to_ns(0.1)]
    assert book.recorder.executors == ["te-0"]


def test_a_retry_adds_no_gap_that_nobody_measured() -> None:
    """When the last token of a lost executor came is not known: only gaps within tasks are pooled after a loss."""
    book = Book()
    book.arrived(0, 0.0)
    book.first(0, 1.0)
    book.failed(0, 3.0, generated=2)
    book.task(0, 5.0, 5.5)
    book.ended(0, 5.5, 4)
    assert list(book.recorder.gaps) == [to_ns(0.5)]
    assert book.table().ttft.tolist() == [1.0]
    assert book.table().e2e.tolist() == [5.5]
    assert book.table().tpot.tolist() == [1.5]
    assert book.summary()["failed_tasks"] == 1


def test_percentiles_skip_those_without_a_value() -> None:
    """TPOT has no value for one token, TTFT none without a first token; nobody at all gives NaN."""
    book = Book()
    book.served(0, 0.0, 1.0)
    book.served(1, 0.0, 2.0, 4.0)
    book.arrived(2, 0.0)
    book.ended(2, 3.0, 0, Outcome.REFUSED)
    summary = book.summary()
    assert np.isnan(book.table().tpot).tolist() == [True, False, True]
    assert summary["tpot_p99_s"] == pytest.approx(2.0)
    assert summary["ttft_p50_s"] == pytest.approx(1.5)
    assert summary["ttft_mean_s"] == pytest.approx(1.5)
    assert math.isnan(percentile(np.array([np.nan]), 50))
    assert math.isnan(Book().summary()["ttft_p50_s"])


def test_percentiles_of_many() -> None:
    """The 50th, 90th and 99th percentile, interpolated."""
    book = Book()
    for number in range(101):
        book.served(number, 0.0, 0.1 * number + 0.1)
    summary = book.summary()
    for share, expected in ((50, 5.1), (90, 9.1), (99, 10.0)):
        assert summary[f"ttft_p{share}_s"] == pytest.approx(expected)


# -- objectives -----------------------------------------------------------------------------------------------------


def test_one_token_meets_any_tpot() -> None:
    """A request of one token has no TPOT; the objective counts as met."""
    book = Book()
    book.served(0, 0.0, 1.0)
    assert book.summary(Slo(tpot_s=0.001))["slo_attainment"] == 1.0
    assert book.summary(Slo(tpot_s=0.001, ttft_s=0.5))["slo_attainment"] == 0.0


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), [True, True, True]),
        (Slo(ttft_s=1.0), [True, True, False]),
        (Slo(ttft_s=0.999), [True, False, False]),
        (Slo(tpot_s=0.5), [True, True, True]),
        (Slo(tpot_s=0.2), [False, True, True]),
        (Slo(e2e_s=1.5), [True, True, False]),
        (Slo(ttft_s=1.0, tpot_s=0.2), [False, True, False]),
    ],
)
def test_every_objective_must_be_met(slo: Slo, met: list[bool]) -> None:
    """Each objective has its limit, which itself is still met; all together decide."""
    book = Book()
    book.served(0, 0.0, 0.5, 1.0)
    book.served(1, 0.0, 1.0, 1.1)
    book.served(2, 0.0, 3.0, 3.1)
    assert book.table().met(slo).tolist() == met
    assert book.summary(slo)["slo_attainment"] == pytest.approx(sum(met) / 3)


def test_dropping_work_does_not_help() -> None:
    """Refused, failed, cancelled and unfinished requests count as missed, even without any objective."""
    book = Book()
    book.served(0, 0.0, 0.1, 0.2)
    for number, outcome in enumerate((Outcome.REFUSED, Outcome.FAILED, Outcome.CANCELLED), 1):
        book.arrived(number, 0.0)
        book.first(number, 0.1)
        book.ended(number, 0.2, 1, outcome, "because")
    book.arrived(4, 0.0)
    book.recorder.censor()
    for slo in (Slo(), Slo(ttft_s=1.0, tpot_s=1.0, e2e_s=1.0)):
        summary = book.summary(slo)
        assert summary["slo_attainment"] == pytest.approx(1 / 5)
        assert summary["goodput_rps"] == pytest.approx(1 / 0.2)
    counts = {str(outcome): summary[str(outcome)] for outcome in Outcome}
    assert counts == {"finished": 1, "refused": 1, "failed": 1, "cancelled": 1}
    assert summary["unfinished"] == 1
    assert summary["requests"] == 5


def test_rates() -> None:
    """Requests and tokens over the time from the first arrival to the last token."""
    book = Book()
    book.served(0, 10.0, 11.0, 12.0)
    book.served(1, 12.0, 13.0, 13.5, 14.0)
    summary = book.summary(Slo(ttft_s=1.0, e2e_s=1.99))
    assert summary["span_s"] == pytest.approx(4.0)
    assert summary["throughput_rps"] == pytest.approx(0.5)
    assert summary["throughput_tokens_per_s"] == pytest.approx(5 / 4)
    assert summary["goodput_rps"] == 0.0
    assert book.summary(Slo(ttft_s=1.0))["goodput_rps"] == pytest.approx(0.5)


@pytest.mark.parametrize("field", ["ttft_s", "tpot_s", "e2e_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_objectives_are_named(field: str, value: float) -> None:
    """An objective that nothing can meet is refused with its name."""
    with pytest.raises(ValueError, match=f"slo.{field} is"):
        Slo(**{field: value})


# -- which requests count -------------------------------------------------------------------------------------------


def test_warm_up_and_cool_down_are_trimmed_by_arrival() -> None:
    """From warmup after the first arrival to cooldown before the last, both ends included."""
    book = Book()
    for number in range(11):
        book.served(number, 100.0 + number, 100.5 + number, 101.0 + number)
    for window, kept in (
        (Window(), range(11)),
        (Window(warmup_s=2.0), range(2, 11)),
        (Window(cooldown_s=3.5), range(7)),
        (Window(warmup_s=2.5, cooldown_s=5.0), range(3, 6)),
        (Window(warmup_s=8.0, cooldown_s=8.0), range(0)),
    ):
        table = book.table(window)
        assert table.columns["request_id"].tolist() == list(kept)
        assert len(table) == len(table.outcome) == len(kept)
        assert book.summary(window=window)["requests"] == len(kept)
    with pytest.raises(ValueError, match="warmup_s is -1"):
        Window(warmup_s=-1.0)


def test_gaps_are_trimmed_with_their_requests() -> None:
    """Inter-token latencies are those of the requests that count, also where requests end in another order."""
    book = Book()
    book.arrived(0, 0.0)
    book.first(0, 1.0)
    book.served(1, 5.0, 6.0, 6.25, 6.75)
    book.task(0, 1.0, 9.0)
    book.ended(0, 9.0, 2)
    book.arrived(2, 10.0)
    book.first(2, 11.0)
    book.recorder.censor()
    assert sorted(book.table().itl.tolist()) == pytest.approx([0.25, 0.5, 8.0])
    assert sorted(book.table(Window(warmup_s=1.0)).itl.tolist()) == pytest.approx([0.25, 0.5])
    assert book.summary(window=Window(warmup_s=1.0))["itl_p50_s"] == pytest.approx(0.375)
    assert math.isnan(book.summary(window=Window(warmup_s=6.0))["itl_p50_s"])


def test_what_has_not_ended_is_censored() -> None:
    """At the end of a run open requests are recorded once, as unfinished, with what is known of them."""
    book = Book()
    book.arrived(0, 0.0)
    book.arrived(1, 1.0)
    book.first(1, 2.0)
    book.recorder.censor()
    book.recorder.censor()
    table = book.table()
    assert table.outcome.tolist() == ["unfinished", "unfinished"]
    assert np.isnan(table.ttft).tolist() == [True, False]
    assert np.isnan(table.e2e).all()
    assert book.recorder.reasons == ["the run ended first"] * 2


def test_a_client_that_is_late_is_reported() -> None:
    """Lag is how much later a request arrived than it was due; latencies count from the arrival."""
    book = Book()
    book.arrived(0, 1.25, due=1.0)
    book.first(0, 1.5)
    book.task(0, 1.5)
    book.ended(0, 1.5, 1)
    book.served(1, 2.0, 2.1)
    summary = book.summary()
    assert summary["lag_max_s"] == pytest.approx(0.25)
    assert book.table().ttft.tolist() == pytest.approx([0.25, 0.1])


def test_counts_of_a_request_add_up_over_its_tasks() -> None:
    """Preemptions are summed, cached tokens are those of the best prefix; the share is over all prompts."""
    book = Book()
    book.arrived(0, 0.0, prompt=100)
    book.first(0, 1.0)
    book.task(0, 1.0, stopped=False, cached_tokens=48, dram_tokens=32, ssd_tokens=16, preemptions=1)
    book.task(0, 2.0, 3.0, cached_tokens=16, ssd_tokens=16, preemptions=2)
    book.ended(0, 3.0, 3)
    book.served(1, 0.0, 1.0)
    summary = book.summary()
    assert summary["preemptions"] == 3
    assert summary["cached_token_share"] == pytest.approx(48 / 110)
    assert summary["dram_token_share"] == pytest.approx(32 / 110)
    assert summary["ssd_token_share"] == pytest.approx(16 / 110)


# -- NPU seconds ----------------------------------------------------------------------------------------------------


def test_npu_seconds_are_paid_from_launch_to_the_end() -> None:
    """Starting, idle and draining time is paid; what still runs is paid to the end of the run; dead NPUs are not."""
    book = Book()
    launch(book, "te-0", 0.0)
    launch(book, "te-1", 2.0, npus=4)
    launch(book, "te-2", 3.0)
    time = to_ns(5.0)
    book.hear(ev.StageFinished(to="cm", time=time, occurred=time, executor="te-1", stage=Stage.TE_LOAD, took_ns=time))
    time = to_ns(6.0)
    book.hear(ev.ExecutorFailed(to="cm", time=time, occurred=time, executor="te-2", reason="killed"))
    time = to_ns(7.0)
    book.hear(ev.ExecutorDrained(to="cm", time=time, occurred=time, executor="te-1"))
    time = to_ns(7.5)
    book.hear(ev.ExecutorRetired(to="cm", time=time, occurred=time, executor="te-1"))
    book.served(0, 0.0, 10.0)
    assert book.recorder.npu_seconds() == pytest.approx(10.0 + 4 * 5.5 + 3.0)
    assert book.summary()["npu_seconds"] == pytest.approx(35.0)
    assert [(what, name) for _, name, what, _ in book.recorder.scaling] == [
        ("launch", "te-0"),
        ("launch", "te-1"),
        ("launch", "te-2"),
        ("te_load", "te-1"),
        ("failed", "te-2"),
        ("drained", "te-1"),
        ("retired", "te-1"),
    ]


def test_load_reports_are_recorded_once() -> None:
    """Job executors hear the same reports as the cluster manager: one of each is kept."""
    book = Book()
    book.hear(load_report("te-0", 5, to="je-0"))
    book.hear(load_report("te-0", 5, to="cm"))
    assert [load.executor for load in book.recorder.loads] == ["te-0"]


# -- from whole runs ------------------------------------------------------------------------------------------------


def test_gaps_of_a_run_are_those_between_all_tokens() -> None:
    """The pooled gaps of an undisturbed run add up to the time from first to last token of every request."""
    run = run_sim([make_arrival(n, at_s=0.03 * n, output=5 + n) for n in range(20)])
    rows: dict[int, dict[str, Any]] = run.rows
    assert len(run.recorder.gaps) == sum(row["output_tokens"] - 1 for row in rows.values())
    assert sum(run.recorder.gaps) == sum(row["last_token_ns"] - row["first_token_ns"] for row in rows.values())
