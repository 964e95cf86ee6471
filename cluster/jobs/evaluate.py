"""Evaluation of what was trained: LLM calls, all at once, on the executors that serve."""

from cluster.jobs.job import CallStep, OneRound
from cluster.work import Operation


class Evaluate(OneRound):
    """The calls of the request. Over at once where it has none."""

    kind = "evaluate"

    def round(self) -> list[CallStep | Operation]:
        return [CallStep(call, step) for step, call in enumerate(self._work.evaluation)]
