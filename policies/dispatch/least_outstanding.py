"""Least outstanding: the executor with the fewest tasks under way."""

import numpy as np

from cluster.fleet import Fleet
from cluster.policy import DispatchPolicy
from cluster.request import Task
from cluster.vocabulary import Role


class LeastOutstanding(DispatchPolicy):
    """Argmin of outstanding tasks, by the job executor's own count; ties in a group are broken in turn."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, Role], int] = {}

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        groups = fleet.candidates(task)
        if not groups:
            return None
        group = min(groups, key=lambda group: int(group.outstanding.min()))
        least = np.flatnonzero(group.outstanding == group.outstanding.min())
        key = (group.model, group.role)
        turn = self._turns[key] = self._turns.get(key, 0) + 1
        return group.names[int(least[turn % len(least)])]
