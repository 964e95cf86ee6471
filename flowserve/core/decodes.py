"""The sequences of one engine that decode, each a token in every plan."""

import heapq

from cluster.engine_policy import QueueOrder
from flowserve.core.rtc import Rtc
from flowserve.core.sequence import DECODE, LAST, DecodeClock, Sequence


class DecodeBatch:
    """`clock` counts its plans. `members` are in order of joining; `context`: positions of theirs whose KV cache is
    computed or issued, together. `latest`: the members as the last plan has them, None where they have changed since.

    A plan costs nothing per member: who starts a block with it is found by phase, who reaches the client's limit by a
    heap.
    """

    __slots__ = ("_limits", "_order", "_phases", "_size", "clock", "context", "latest", "members")

    def __init__(self, block_tokens: int, order: QueueOrder) -> None:
        self.clock = DecodeClock()
        self.members: dict[int, Sequence] = {}
        self.context = 0
        self.latest: tuple[Sequence, ...] | None = ()
        self._order = order
        self._size = block_tokens
        # A sequence needs its next block at every clock that is congruent to its phase modulo the block size; None, not
        # an empty list, where nobody does: with a thousand engines it is memory that counts, and most phases are so.
        self._phases: list[list[Sequence] | None] = [None] * block_tokens
        self._limits: list[tuple[int, int, Sequence]] = []

    def join(self, sequence: Sequence, most: int) -> None:
        """It decodes from the next plan on, up to `most` tokens."""
        clock = self.clock.issued
        sequence.status = DECODE
        sequence.joined = clock
        self.members[sequence.task_id] = sequence
        self.latest = None
        self.context += sequence.computed
        phase = (clock - sequence.computed) % self._size
        others = self._phases[phase]
        if others is None:
            self._phases[phase] = [sequence]
        else:
            others.append(sequence)
        sequence.limit = clock + most
        heapq.heappush(self._limits, (sequence.limit, sequence.arrival, sequence))
        self._order.joined(sequence, clock)

    def leave(self, sequence: Sequence) -> None:
        """No later plan decodes it; those in flight may."""
        del self.members[sequence.task_id]
        self.latest = None
        phase = (sequence.joined - sequence.computed) % self._size
        others = self._phases[phase]
        assert others is not None
        others.remove(sequence)
        if not others:
            self._phases[phase] = None
        sequence.computed, sequence.limit, sequence.status = sequence.position, None, LAST
        self.context -= sequence.computed
        self._order.left(sequence, self.clock.issued)

    def in_order(self) -> tuple[Sequence, ...]:
        """The members, for a plan."""
        latest = self.latest
        if latest is None:
            latest = self.latest = tuple(self.members.values())
        return latest

    def starting(self) -> list[Sequence] | None:
        """Who may need a block for the next plan, in order of joining; None: nobody."""
        return self._phases[self.clock.issued % self._size]

    def issue(self, plans: int, last: list[Sequence]) -> None:
        """So many plans decode all; those that reach the client's limit with the last of them leave, for `last`."""
        self.context += plans * len(self.members)
        self.clock.issued += plans
        while self._limits and self._limits[0][0] <= self.clock.issued:
            limit, _, sequence = heapq.heappop(self._limits)
            if sequence.status is DECODE and sequence.limit == limit:
                self.leave(sequence)
                last.append(sequence)

    def plans_left(self, most: int) -> int:
        """How many plans may follow, up to `most`, until one of them reaches its limit."""
        limits = self._limits
        while limits and limits[0][2].limit != limits[0][0]:
            heapq.heappop(limits)
        return min(most, limits[0][0] - self.clock.issued) if limits else most

    def advance(self, plans: int, rtc: Rtc, last: list[Sequence]) -> None:
        """As many plans are complete, and as many more issued, as if one by one; there are blocks for that."""
        phases, size = self._phases, self._size
        first = self.clock.issued
        for clock in range(first, first + plans):
            phase = phases[clock % size]
            if phase is not None:
                for sequence in phase:
                    blocks = sequence.blocks
                    if len(blocks) * size <= sequence.computed + clock - sequence.joined:
                        rtc.append_block(blocks)
        self.clock.done += plans
        self.issue(plans, last)

    def check_integrity(self) -> None:
        """Its sums agree with its members."""
        assert sum(sequence.position for sequence in self.members.values()) == self.context
        assert sum(len(phase or ()) for phase in self._phases) == len(self.members)
