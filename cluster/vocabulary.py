"""Words that every part of the testbed shares: roles, stages, kinds, outcomes, and the unit of time."""

from enum import StrEnum

import msgspec

NS_PER_S = 1_000_000_000
BLOCK_TOKENS = 16
"""Tokens per identity block. Engines cache in multiples of it (Ascend: 128)."""


def to_ns(value_s: float) -> int:
    """Seconds, as people write them, to the integer nanoseconds used inside."""
    return round(value_s * NS_PER_S)


def to_s(value_ns: int) -> float:
    """Integer nanoseconds to seconds, for tables and prints."""
    return value_ns / NS_PER_S


class Role(StrEnum):
    """What a task executor does. Of those that serve it is state of the executor, not a kind of process; workers on
    CPUs or NPUs (`cpu`, `training`) run work other than serving.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    CPU = "cpu"
    TRAINING = "training"


class TaskKind(StrEnum):
    """Operations of a serving job: `SERVE` on a colocated executor, else `PREFILL` then `DECODE`."""

    SERVE = "serve"
    PREFILL = "prefill"
    DECODE = "decode"


SERVES = {Role.COLOCATED: TaskKind.SERVE, Role.PREFILL: TaskKind.PREFILL, Role.DECODE: TaskKind.DECODE}
"""The kind of serving task that an executor of each role runs."""

WORKERS = (Role.CPU, Role.TRAINING)
"""Roles of executors that do not serve. Their group's model is called like the role: they belong to no model."""


class Stage(StrEnum):
    """The five steps of scaling one executor up (DeepServe table 2), in order."""

    SCALER_PRE = "scaler_pre"
    TE_PRE_LOAD = "te_pre_load"
    TE_LOAD = "te_load"
    TE_POST_LOAD = "te_post_load"
    SCALER_POST = "scaler_post"


class ExecutorState(StrEnum):
    """What job executors are told of an executor: whether it takes tasks, finishes what it has, or is gone."""

    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class Outcome(StrEnum):
    """How a request ends. Every accepted request ends in exactly one of these."""

    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class FailureReason(StrEnum):
    """Why an executor gave a task back. All but the last three are worth another try elsewhere."""

    EXECUTOR_LOST = "executor lost"
    NOT_SERVING = "executor is draining or not ready"
    ROLE_SWITCHED = "the executor serves another role now"
    KV_LOST = "the prefilled KV cache is gone"
    TOO_LONG = "prompt and output limit do not fit the executor's KV cache"
    INVALID = "the executor cannot run this kind of task"
    ENGINE_ERROR = "the engine failed on this task"

    @property
    def retriable(self) -> bool:
        return self not in (FailureReason.TOO_LONG, FailureReason.INVALID, FailureReason.ENGINE_ERROR)


class ExecutorSpec(msgspec.Struct, frozen=True):
    """What to launch: model, role, how many NPUs it takes and of which kind (empty: the cluster's usual one)."""

    model: str
    role: Role
    npus: int = 1
    hardware: str = ""
