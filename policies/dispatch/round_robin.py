"""Round robin: each executor of the group in its turn."""

from cluster.fleet import Fleet, Group
from cluster.policy import DispatchPolicy
from cluster.request import Task


class RoundRobin(DispatchPolicy):
    """Takes turns over all executors a task may go to, blind to load, length and cache."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, bool], int] = {}

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        groups = fleet.candidates(task)
        if not groups:
            return None
        key = (task.request.model, task.kv is not None)
        turn = self._turns.get(key, 0)
        self._turns[key] = turn + 1
        return _at(groups, turn % sum(map(len, groups)))


def _at(groups: list[Group], place: int) -> str:
    for group in groups:
        if place < len(group):
            return group.names[place]
        place -= len(group)
    raise AssertionError("place is below the number of executors")
