"""What a job is to the job executor that runs it."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from cluster.work import Call, FineTuning, Operation


class CallStep(NamedTuple):
    """An LLM call to make: step `step` of the request."""

    call: Call
    step: int


class Job(ABC):
    """One job of a request: rounds of LLM calls and tasks. Plain state, so that a run can be stored at any moment."""

    kind: ClassVar[str]
    """What the job is called in results."""

    @abstractmethod
    def next(self) -> list[CallStep | Operation]:
        """What to do now, all side by side. Asked at the start, and whenever all of the last round is done; nothing:
        the job is over.
        """

    @property
    def tokens(self) -> int:
        """Tokens processed in the rounds handed out so far, beside those of calls."""
        return 0

    @property
    def steps(self) -> int:
        """Training steps in the rounds handed out so far."""
        return 0


class OneRound(Job):
    """All that it does is one round."""

    def __init__(self, work: FineTuning) -> None:
        self._work = work
        self._started = False

    def next(self) -> list[CallStep | Operation]:
        if self._started:
            return []
        self._started = True
        return self.round()

    @abstractmethod
    def round(self) -> list[CallStep | Operation]:
        """What it does, all side by side."""
