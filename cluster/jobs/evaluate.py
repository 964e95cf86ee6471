"""Evaluation of what was trained: LLM calls, all at once, on the executors that serve."""

from cluster.jobs.job import CallStep, Job
from cluster.work import FineTuning, Operation


class Evaluate(Job):
    """The calls of the request. Over at once where it has none."""

    kind = "evaluate"

    def __init__(self, work: FineTuning) -> None:
        self._work = work
        self._started = False

    def next(self) -> list[CallStep | Operation]:
        if self._started:
            return []
        self._started = True
        return [CallStep(call, step) for step, call in enumerate(self._work.evaluation)]
