"""What the modules of an executor say: to actors, to other executors, to their data plane, and to each other."""

from typing import NamedTuple

from cluster.events import Event
from flowserve.core.messages import Message
from flowserve.core.tiers import Move


class Transfer(NamedTuple):
    """KV cache for the data plane to copy, block for block, from executor `source`; answer it with `KvFetched`.

    `step`: the plan of the source that computes these blocks: each layer is copied as soon as it is there.
    """

    task_id: int
    source: str
    source_blocks: list[int]
    blocks: list[int]
    step: int | None = None


class Outbox:
    """What has come of the calls since the last `take`. `moves`: copies between tiers for the data plane, each answered
    with `KvMoved`. `forgotten`: tasks that no later plan names, whose tokens may go.
    """

    __slots__ = ("events", "forgotten", "moves", "peers", "transfers")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.peers: list[tuple[str, Message]] = []
        self.transfers: list[Transfer] = []
        self.moves: list[Move] = []
        self.forgotten: list[int] = []

    def take(self) -> "Outbox":
        """Everything since the last call; whoever takes it delivers it."""
        taken = Outbox()
        if self.events:
            taken.events, self.events = self.events, taken.events
        if self.peers:
            taken.peers, self.peers = self.peers, taken.peers
        if self.transfers:
            taken.transfers, self.transfers = self.transfers, taken.transfers
        if self.moves:
            taken.moves, self.moves = self.moves, taken.moves
        if self.forgotten:
            taken.forgotten, self.forgotten = self.forgotten, taken.forgotten
        return taken

    def __bool__(self) -> bool:
        """Whether there is anything to deliver."""
        return bool(self.events or self.peers or self.transfers or self.moves or self.forgotten)


class Load(NamedTuple):
    """How much an engine has to do and holds: the numbers of a `LoadReport`."""

    waiting: int
    running: int
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    generated_tokens: int
    preemptions: int
    busy_ns: int


NOTHING = Load(0, 0, 0, 0, 0, 0, 0, 0, 0)
