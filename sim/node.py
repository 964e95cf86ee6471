"""What stands behind a simulated executor, what messages to it take, and faults to inject."""

from collections.abc import Callable, Sequence

import msgspec

from cluster.acceptance import Acceptance
from cluster.latency import LatencyModel
from cluster.vocabulary import Stage
from cluster.work import OperationTime
from flowserve.core.config import EngineConfig
from sim.coldstart import Load
from sim.contention import Contention
from sim.noise import Noise
from sim.topology import HostShape


class Delays(msgspec.Struct, frozen=True):
    """How long messages take, in seconds: to executors, back from them, and what a decision costs its actor.

    `token_s`: what a tokenizer takes per token of a prompt, before a job executor hears of the request; `tokenizers`:
    how many work side by side, the other prompts wait.
    """

    dispatch_s: float = 0.0
    event_s: float = 0.0
    decision_s: float = 0.0
    peer_s: float = 0.0
    token_s: float = 0.0
    tokenizers: int = 1

    def __post_init__(self) -> None:
        if self.tokenizers < 1:
            raise ValueError(f"delays.tokenizers is {self.tokenizers}: allowed are 1 and more")
        for field in self.__struct_fields__:
            if getattr(self, field) < 0:
                raise ValueError(f"delays.{field} is {getattr(self, field)}: allowed are seconds from 0 up")


class Node(msgspec.Struct, frozen=True):
    """What stands behind one kind of executor: engine limits, latency model, start-up stages, and the kind of its host.

    `kv_segments`: pieces of memory that one run of consecutive blocks is scattered over, see `pieces_per_run`;
    `layers`: of the model, see `pieces_by_layer`.
    `contention`: as in `Hardware`; with it every step is an event of its own. `host_step_s`: as there. `acceptance`: of
    guesses, where it speculates. `load`: weights to be moved in the stage TE_LOAD, beside the time of the stage itself.
    `noise`: of step times. `kv_host_s`: as in `Hardware`.
    """

    engine: EngineConfig
    latency: Callable[[], LatencyModel]
    stages: Sequence[tuple[Stage, int]]
    kv_bytes_per_token: int
    kv_segments: int
    host: HostShape
    contention: Contention = Contention()
    host_step_s: float = 0.0
    acceptance: Acceptance = Acceptance()
    load: Load | None = None
    noise: Noise | None = None
    kv_host_s: float = 0.0
    layers: int = 1

    def __post_init__(self) -> None:
        if (self.load is not None or self.engine.tiers.blocks) and self.host.pcie is None:
            raise ValueError("the executor loads weights or has tiers below HBM, but its host has no PCIe: give it one")
        if self.engine.tiers.ssd_blocks and self.host.ssd is None:
            raise ValueError(f"the engine has {self.engine.tiers.ssd_blocks} blocks on SSD, but its host has no disk")

    @property
    def block_bytes(self) -> int:
        return self.engine.block_tokens * self.kv_bytes_per_token

    @property
    def dram_bytes(self) -> int:
        """Of its cache's tier in host memory."""
        return self.engine.tiers.dram_blocks * self.block_bytes


class WorkNode(msgspec.Struct, frozen=True):
    """What stands behind one kind of worker: how many tasks run side by side, how long each takes, start-up stages.

    `host`: where its NPUs are; None for workers on CPUs, which sit elsewhere.
    """

    slots: int
    time: OperationTime
    stages: Sequence[tuple[Stage, int]] = ()
    host: HostShape | None = None

    @property
    def load(self) -> None:
        """No weights are moved at its start: every training task restores what it needs."""

    @property
    def dram_bytes(self) -> int:
        return 0


class Failure(msgspec.Struct, frozen=True):
    """Kill an executor at a time: a fault to inject."""

    at_s: float
    executor: str

    def __post_init__(self) -> None:
        if self.at_s < 0:
            raise ValueError(f"failure of {self.executor} at {self.at_s} s: allowed are seconds from 0 up")
