"""What a policy is: the interfaces that `policies/` and anyone's own module implement.

A policy is a plain synchronous object. It sees what its actor may know, gets the time passed in, and draws random
numbers only from a generator it was given; so the same object runs on either backend and every run can be replayed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from cluster.events import FirstToken, TaskFinished
from cluster.fleet import Fleet
from cluster.request import Request, Task
from cluster.vocabulary import Role


class DispatchPolicy(ABC):
    """Chooses the executor for each task of one job executor."""

    @abstractmethod
    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        """The executor for `task`, out of `fleet.candidates(task)`; None to let it wait for a change in the fleet.

        Choosing a prefill executor for a new request disaggregates it: its decode task is placed when the prefill
        is done or, where KV cache is sent while it is computed, when the prefill has begun (and otherwise again when it
        is done). A placement is final; `place` is called again only after the task failed there.
        """

    def dispatched(self, task: Task, executor: str) -> None:
        """The task went to this executor."""

    def first_token(self, request: Request, event: FirstToken) -> None:
        """An executor has computed the prompt of `request`, and caches it."""

    def finished(self, request: Request, event: TaskFinished) -> None:
        """An executor is done with a task of `request`."""

    def executor_gone(self, executor: str) -> None:
        """An executor takes no more tasks, and what it cached is gone."""


class GroupLoad(NamedTuple):
    """What the cluster manager knows of one TE group when it decides on its size.

    `initial`: how many it starts with. `ready`, `pending` (launching) and `draining` executors; `waiting` and `running`
    sequences, `kv_used` and `kv_total` blocks and `max_sequences` summed over the latest reports of the ready ones;
    `parked`: requests that wait at job executors for want of any executor.
    """

    model: str
    role: Role
    initial: int
    ready: int
    pending: int
    draining: int
    waiting: int
    running: int
    kv_used: int
    kv_total: int
    max_sequences: int
    parked: int


class RoleSwitch(NamedTuple):
    """One executor of a model is to serve `target` instead of `source`."""

    model: str
    source: Role
    target: Role


class ScalingPolicy(ABC):
    """Decides how many executors each TE group should have, and which should change sides."""

    period_s: float | None = None
    """How often the cluster manager asks; None: only when the list of executors changes."""

    @abstractmethod
    def desired(self, load: GroupLoad, now_ns: int) -> int:
        """How many executors the group should have, ready and pending together."""

    def switches(self, loads: Sequence[GroupLoad], now_ns: int) -> Sequence[RoleSwitch]:
        """Role switches to make, asked ahead of `desired`, which sees the groups as they are after them.

        `loads`: of all groups where the period is over, of one model's where only its demand or its executors changed.

        Each takes one ready executor, the least loaded, with its cache; one that would leave a group with fewer or more
        than its plan allows, or for which there is no group, is not made.
        """
        return ()
