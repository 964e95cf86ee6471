"""Where KV cache blocks lie: device memory, host memory, disk; and the copies between them."""

from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING, NamedTuple

from flowserve.core.allocator import AllocatorKind, make_allocator

if TYPE_CHECKING:
    from flowserve.core.rtc import Node


class Tier(IntEnum):
    """From near to far. Computation reads HBM only."""

    HBM = 0
    DRAM = 1
    SSD = 2


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
