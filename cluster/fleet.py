"""What a job executor knows of the executors it may use: its own bookkeeping, and load reports with an age.

Columns are arrays with one place per executor, so that a policy compares a thousand executors without a Python loop.
"""

from bisect import bisect
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cluster.events import ExecutorAnnounced, LoadReport
from cluster.request import Task
from cluster.vocabulary import Role, TaskKind

Column = npt.NDArray[np.int64]

ENTRY_ROLES = (Role.COLOCATED, Role.PREFILL)
"""Roles a new request may enter by."""


MOVED = ("outstanding", "queued_tokens", "kv_used", "reported_ns")
"""Columns that stay with an executor when it switches its role."""


def _by_launch(name: str) -> tuple[int, str]:
    """Names of equal length sort by number."""
    return len(name), name


class Group:
    """A TE group: ready executors of one model and role (DeepServe section 3).

    In order of launch, so that who of them was ready first makes no difference.

    `names` is a new list whenever it changes. Own bookkeeping, exact: `outstanding` tasks dispatched and not back;
    `queued_tokens` of prompt dispatched and not yet answered by a first token. From reports, late: `kv_used` and
    `kv_total` blocks, `reported_ns` when.
    """

    COLUMNS = ("outstanding", "queued_tokens", "kv_used", "kv_total", "max_sequences", "reported_ns")

    def __init__(self, model: str, role: Role) -> None:
        self.model = model
        self.role = role
        self.names: list[str] = []
        self.index: dict[str, int] = {}
        self.outstanding: Column = np.zeros(0, np.int64)
        self.queued_tokens: Column = np.zeros(0, np.int64)
        self.kv_used: Column = np.zeros(0, np.int64)
        self.kv_total: Column = np.zeros(0, np.int64)
        self.max_sequences: Column = np.zeros(0, np.int64)
        self.reported_ns: Column = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, kv_total: int, max_sequences: int) -> None:
        place = bisect(self.names, _by_launch(name), key=_by_launch)
        self.names = [*self.names[:place], name, *self.names[place:]]
        self._index()
        for column in self.COLUMNS:
            value = {"kv_total": kv_total, "max_sequences": max_sequences}.get(column, 0)
            setattr(self, column, np.insert(getattr(self, column), place, np.int64(value)))

    def remove(self, name: str) -> None:
        place = self.index[name]
        self.names = [*self.names[:place], *self.names[place + 1 :]]
        self._index()
        for column in self.COLUMNS:
            setattr(self, column, np.delete(getattr(self, column), place))

    def _index(self) -> None:
        self.index = {name: place for place, name in enumerate(self.names)}


class Fleet:
    """All groups a job executor may dispatch to."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, Role], Group] = {}
        self._group_of: dict[str, Group] = {}

    def group(self, model: str, role: Role) -> Group:
        """The TE group of a model and role; empty where there is none."""
        group = self._groups.get((model, role))
        if group is None:
            group = self._groups[model, role] = Group(model, role)
        return group

    def candidates(self, task: Task) -> list[Group]:
        """Non-empty groups this task may go to: decode executors for a decode task, else every entry role."""
        model = task.request.model
        roles = (Role.DECODE,) if task.kind is TaskKind.DECODE else ENTRY_ROLES
        return [group for role in roles if len(group := self.group(model, role))]

    def role_of(self, executor: str) -> Role | None:
        """The role of a ready executor, None if it is not ready."""
        group = self._group_of.get(executor)
        return None if group is None else group.role

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def announced(self, event: ExecutorAnnounced) -> None:
        """An executor is ready for tasks; one that has switched its role takes what is known of it along."""
        name, group = event.executor, self.group(event.spec.model, event.spec.role)
        before = self._group_of.get(name)
        known = {} if before is None else {column: getattr(before, column)[before.index[name]] for column in MOVED}
        if before is not None:
            before.remove(name)
        group.add(name, event.kv_blocks, event.max_sequences)
        for column, value in known.items():
            getattr(group, column)[group.index[name]] = value
        self._group_of[name] = group

    def remove(self, executor: str) -> bool:
        """An executor takes no more tasks. False where it was not in the list."""
        group = self._group_of.pop(executor, None)
        if group is not None:
            group.remove(executor)
        return group is not None

    def reported(self, event: LoadReport) -> None:
        """Take over a load report."""
        group = self._group_of.get(event.executor)
        if group is not None:
            place = group.index[event.executor]
            group.kv_used[place] = event.total_blocks - event.free_blocks
            group.reported_ns[place] = event.occurred

    def count(self, executor: str, tasks: int, queued_tokens: int) -> None:
        """Own bookkeeping: add to what is outstanding on an executor, if it is still in the list."""
        group = self._group_of.get(executor)
        if group is not None:
            place = group.index[executor]
            if tasks:
                group.outstanding[place] += tasks
            if queued_tokens:
                group.queued_tokens[place] += queued_tokens
