"""Where KV cache blocks lie: device memory, host memory, disk; and the copies between them."""

from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from flowserve.core.allocator import AllocatorKind, make_allocator

if TYPE_CHECKING:
    from flowserve.core.rtc import Node


class Tier(IntEnum):
    """From near to far. Computation reads HBM only."""

    HBM = 0
    DRAM = 1
    SSD = 2


class TierConfig(msgspec.Struct, frozen=True):
    """Sizes of the tiers below HBM in blocks (0: none) and when blocks move down.

    A tier with less than the share `swap_low` of its blocks free moves least recently used ones to the next tier until
    the share `swap_high` is free, at most `swap_step_blocks` of them per step. `fetch`: when what lies in a lower tier
    is brought back for a prompt: where that is not slower than computing it, always, or never.
    """

    dram_blocks: int = 0
    ssd_blocks: int = 0
    swap_low: float = 0.1
    swap_high: float = 0.2
    swap_step_blocks: int = 256
    fetch: Literal["cost", "always", "never"] = "cost"

    def __post_init__(self) -> None:
        if self.dram_blocks < 0 or self.ssd_blocks < 0:
            raise ValueError(
                f"dram_blocks {self.dram_blocks}, ssd_blocks {self.ssd_blocks}: allowed are 0 (no such tier) and more"
            )
        if not 0 <= self.swap_low <= self.swap_high <= 1:
            raise ValueError(
                f"swap_low {self.swap_low}, swap_high {self.swap_high}: allowed are shares of a tier, from 0 to 1, the"
                " low one not above the high one"
            )
        if self.swap_step_blocks < 1:
            raise ValueError(f"swap_step_blocks is {self.swap_step_blocks}: allowed are 1 and more")

    @property
    def blocks(self) -> int:
        return self.dram_blocks + self.ssd_blocks


class State(Enum):
    """Of a node of the cache: only STABLE ones can be used; the others are being copied to or from a lower tier."""

    STABLE = auto()
    SWAPPING_OUT = auto()
    SWAPPING_IN = auto()


class Move(NamedTuple):
    """A copy for the data plane, block for block; answered with `Rtc.moved(ticket, success)`."""

    ticket: int
    source: Tier
    source_blocks: list[int]
    target: Tier
    target_blocks: list[int]


class Transit:
    """Nodes on their way between tiers, by one or more moves; the handle of a populate.

    A node in transit counts to the lower of the two tiers. Its blocks in the other one, `near`, are `Node.away` and
    belong to the transit. `orphans`: blocks that left the cache while a copy still reads or writes them.
    """

    __slots__ = ("inward", "near", "nodes", "orphans", "success", "tickets")

    def __init__(self, near: Tier, inward: bool) -> None:
        self.near = near
        self.inward = inward
        self.nodes: list[Node] = []
        self.tickets: set[int] = set()
        self.orphans: list[tuple[Tier, list[int]]] = []
        self.success: bool | None = None


class Pool:
    """The blocks of one tier: free ones, and how many the cache holds.

    `leaves`: queue of what can leave the tier, by eviction key: unlocked, stable nodes without children in the same
    tier; `pinned`: those that may move to a lower tier but not be dropped. Entries go stale and are skipped.
    `low`, `high`: free blocks below which nodes move to the next tier, and how many shall be free then.
    `leaving`: blocks that become free when moves to the next tier end.
    """

    __slots__ = ("allocator", "cached", "high", "leaves", "leaving", "low", "pinned", "tier")

    def __init__(self, tier: Tier, total: int, low: int, high: int, allocator: AllocatorKind) -> None:
        self.tier = tier
        self.allocator = make_allocator(allocator, total)
        self.low = low
        self.high = high
        self.cached = 0
        self.leaving = 0
        self.leaves: list[tuple[float, int, int, Node]] = []
        self.pinned: list[tuple[float, int, int, Node]] = []
