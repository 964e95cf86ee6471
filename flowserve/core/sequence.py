"""A request inside one engine: what is known of it, what is computed, which blocks it holds."""

from enum import Enum, auto
from typing import Final

from cluster.identity import BlockIds
from cluster.request import Task
from flowserve.core.rtc import Node


class DecodeClock:
    """Counts decode plans: `issued` were scheduled, `done` are complete. Sequences that decode read their place off it.

    Every decode plan holds every decoding sequence, so one count serves all and a step costs nothing per sequence.
    """

    __slots__ = ("done", "issued")

    def __init__(self) -> None:
        self.issued = 0
        self.done = 0


class Status(Enum):
    """Where a sequence is. FETCHING: its KV cache comes from another engine, or from a prefill here that is not done;
    POPULATING: some of it comes from a lower tier; HELD: prefilled here, for a decode task here or elsewhere.

    SPECULATE: it decodes by verifying guesses, outside the decode clock. LAST: it decodes in a plan in flight for the
    last time that the client's limit allows.
    """

    WAITING = auto()
    FETCHING = auto()
    POPULATING = auto()
    PREFILL = auto()
    DECODE = auto()
    LAST = auto()
    SPECULATE = auto()
    HELD = auto()
    ENDED = auto()


# The same as plain names: looking a member up in its class takes longer than what is done with it in every step.
WAITING: Final = Status.WAITING
FETCHING: Final = Status.FETCHING
POPULATING: Final = Status.POPULATING
PREFILL: Final = Status.PREFILL
DECODE: Final = Status.DECODE
LAST: Final = Status.LAST
SPECULATE: Final = Status.SPECULATE
HELD: Final = Status.HELD
ENDED: Final = Status.ENDED


class Sequence:
    """Few true numbers; the rest is derived.

    `ids`: identities of the blocks of its context, the answer's among them.
    `target`: tokens whose KV cache must be there before the next token is sampled.
    `computed`: positions whose KV cache is computed or being computed by an issued plan (while not decoding).
    `sampled`: tokens of the request so far, sampled by completed plans (while not decoding).
    `pending`: a plan in flight samples for it, while it speculates: only then is known how far it got.
    `drafted`: guesses made for it, `accepted`: right ones, `rejected`: verifications that a wrong or missing one ended.
    `runs`: (first, last) values of the decode clock between which it decoded, in completed plans.
    `limit`: the decode clock at which the client's token limit is reached.
    `cached_tokens`: not computed, because they were cached; `fetched_tokens`: of these, from DRAM and from SSD.
    `may_fetch`: whether lower tiers are used; no longer once that has failed.
    """

    __slots__ = (
        "accepted",
        "arrival",
        "blocks",
        "cached_tokens",
        "clock",
        "computed",
        "drafted",
        "duplicates",
        "fetched_tokens",
        "ids",
        "joined",
        "limit",
        "may_fetch",
        "node",
        "pending",
        "preemptions",
        "rejected",
        "runs",
        "sampled",
        "status",
        "target",
        "task",
        "task_id",
        "tree_blocks",
    )

    def __init__(self, task: Task, ids: BlockIds, arrival: int, clock: DecodeClock) -> None:
        self.task = task
        self.ids = ids
        self.task_id = task.task_id
        self.arrival = arrival
        self.clock = clock
        self.status = WAITING
        self.target = task.context_tokens
        self.computed = 0
        self.sampled = task.generated
        self.pending = False
        self.joined = 0
        self.limit: int | None = None
        self.blocks: list[int] = []
        self.node: Node | None = None
        self.tree_blocks = 0
        self.duplicates: list[int] = []
        self.cached_tokens = 0
        self.fetched_tokens = (0, 0)
        self.may_fetch = True
        self.runs: list[tuple[int, int]] = []
        self.preemptions = 0
        self.drafted = 0
        self.accepted = 0
        self.rejected = 0

    @property
    def age(self) -> int:
        """The smaller, the older the request: its number, the same through all its attempts."""
        return self.task.request.request_id

    @property
    def position(self) -> int:
        """Positions whose KV cache is computed or issued: where the next issued token goes."""
        if self.status is DECODE:
            return self.computed + self.clock.issued - self.joined
        return self.computed

    @property
    def generated(self) -> int:
        """Tokens of the request sampled by completed plans, those of earlier attempts included."""
        if self.status is DECODE or self.status is LAST:
            return self.sampled + max(0, self.clock.done - self.joined)
        return self.sampled

    @property
    def private_blocks(self) -> list[int]:
        """Blocks that are this sequence's own: not in the tree, to be freed when it ends."""
        return self.blocks[self.tree_blocks :] + self.duplicates
