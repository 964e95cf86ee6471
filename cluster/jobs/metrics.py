"""What is said of jobs other than serving in a run's summary; beside `cluster.metrics`, which defines all of serving.

* `job_KIND_*`: jobs of a kind; `jct`: from a job's start to its end, of those that finished. For fine-tuning, whose
  jobs follow each other, `work_fine_tuning_jct`: from the request's arrival to the end of its last job.
* `tool_wait`: from the model's call to the tool's start; `worker_wait_ROLE`: the same of all tasks of such workers.
* `train_tokens_per_s`: tokens of finished training jobs over their time from start to end, waiting and saving included.
  `train_step_s`: time that their tasks ran, restoring and saving included, per step.
* `call_e2e`: of a job's LLM call, from being made to its answer. Calls are also rows among the requests.
* `npu_seconds_ROLE`: NPUs times seconds held by executors of that role; `npu_seconds_busy_KIND`: while tasks ran, or
  were lost.

Times in seconds; of the whole run, without a window.
"""

from array import array
from collections.abc import Iterator

import numpy as np

from cluster.jobs.record import JobRecorder, JobRow
from cluster.recorder import Recorder
from cluster.vocabulary import NS_PER_S, Outcome, Role


def summarise_jobs(recorder: JobRecorder, requests: Recorder) -> dict[str, float]:
    """All metrics of jobs by name; empty where a run had none. `requests`: the recorder of the same run's serving."""
    summary: dict[str, float] = {}
    for kind in dict.fromkeys(row.kind for row in recorder.rows):
        rows = [row for row in recorder.rows if row.kind == kind]
        done = [row for row in rows if row.outcome == Outcome.FINISHED]
        summary[f"job_{kind}"] = len(rows)
        summary[f"job_{kind}_finished"] = len(done)
        summary |= _percentiles(f"job_{kind}_jct", [_end(row) - row.started_ns for row in done])
        if busy := sum(row.npu_ns for row in rows):
            summary[f"npu_seconds_busy_{kind}"] = busy / NS_PER_S
        if kind == "train":
            summary |= dict(_training(done))
    summary |= _percentiles("work_fine_tuning_jct", list(_tuned(recorder.rows)))
    if recorder.rows:
        summary |= {f"npu_seconds_{role}": held for role in Role if (held := requests.npu_seconds(role=role))}
        summary["job_failed_tasks"] = sum(row.failed_tasks for row in recorder.rows)
    if recorder.tool_waits:
        summary |= _percentiles("tool_wait", recorder.tool_waits)
    for role, waits in recorder.waits.items():
        if waits:
            summary |= _percentiles(f"worker_wait_{role}", waits)
    if recorder.call_ns:
        summary |= _percentiles("call_e2e", recorder.call_ns)
    return summary


def _tuned(rows: list[JobRow]) -> Iterator[int]:
    """From arrival to the end, in ns, of fine-tuning requests that finished."""
    jobs: dict[int, list[JobRow]] = {}
    for row in rows:
        jobs.setdefault(row.request_id, []).append(row)
    for of_one in jobs.values():
        if "train" in {row.kind for row in of_one} and all(row.outcome == Outcome.FINISHED for row in of_one):
            yield _end(of_one[-1]) - of_one[0].arrived_ns


def _training(done: list[JobRow]) -> Iterator[tuple[str, float]]:
    took = sum(_end(row) - row.started_ns for row in done)
    if took:
        yield "train_tokens_per_s", sum(row.tokens for row in done) * NS_PER_S / took
        yield "train_step_s", sum(row.ran_ns for row in done) / NS_PER_S / sum(row.steps for row in done)


def _end(row: JobRow) -> int:
    assert row.ended_ns is not None
    return row.ended_ns


def _percentiles(name: str, values: "list[int] | array[int]") -> dict[str, float]:
    seconds = np.asarray(values, np.float64) / NS_PER_S
    if not len(seconds):
        return {}
    found = {f"{name}_p{share}_s": float(np.percentile(seconds, share)) for share in (50, 99)}
    return found | {f"{name}_mean_s": float(seconds.mean())}
