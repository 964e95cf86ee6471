"""Training: steps in a row, from one saved state to the next."""

from cluster.jobs.job import CallStep, Job
from cluster.work import FineTuning, Operation
from cluster.work import Train as Steps


class Train(Job):
    """One task after the other, each up to the next saved state: what is lost with a worker is its task at hand."""

    kind = "train"

    def __init__(self, work: FineTuning, model: str) -> None:
        self._work = work
        self._model = model
        self._steps = 0

    def next(self) -> list[CallStep | Operation]:
        work, left = self._work, self._work.num_steps - self._steps
        steps = min(left, work.checkpoint_steps or left)
        if not steps:
            return []
        self._steps += steps
        return [Steps(self._model, steps, work.sequence_tokens, work.batch_sequences, work.trainable)]

    @property
    def tokens(self) -> int:
        return self._steps * self._work.step_tokens

    @property
    def steps(self) -> int:
        return self._steps
