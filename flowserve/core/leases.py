"""KV cache of one engine that others fetch: offered to them as it is computed, and kept until they have it."""

from flowserve.core.messages import KvOffered, KvRequested
from flowserve.core.outbox import Outbox
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineCore
from flowserve.core.sequence import HELD, PREFILL, Sequence


class _Lease:
    """Executor `reader` fetches for its `for_task`. `offered`: how many blocks, from the first on."""

    __slots__ = ("for_task", "offered", "reader")

    def __init__(self, reader: str, for_task: int) -> None:
        self.reader = reader
        self.for_task = for_task
        self.offered = 0


class Leases:
    """Who fetches what from executor `name`, by prefill task. Offers go to the outbox."""

    def __init__(self, name: str, core: EngineCore, outbox: Outbox) -> None:
        self.name = name
        self._core = core
        self._outbox = outbox
        self._leases: dict[int, _Lease] = {}
        self._lost: set[str] = set()

    def reads_held(self, task_id: int) -> bool:
        """Whether somebody reads these blocks, and no prefill is under way that fills them."""
        return task_id in self._leases and task_id in self._core.held

    def request(self, message: KvRequested) -> None:
        """Offer what is there; None where that is nothing and will be nothing."""
        if message.by in self._lost:
            return  # sent before it died: nobody would end this lease
        task_id, core = message.task_id, self._core
        lease = _Lease(message.by, message.for_task)
        if message.by == self.name and (own := core.sequence(task_id)) is not None:
            lease.offered = len(own.blocks)  # it goes on in them: it waits for the end of the prefill alone
        if (held := core.held.get(task_id)) is not None:
            self._add(task_id, lease)
            self._offer(task_id, lease, held.blocks[lease.offered :], more=False)
        elif (
            (sequence := core.sequence(task_id)) is not None
            and core.config.kv_transfer != "by_request"
            and (sequence.status is PREFILL or sequence.status is HELD)
        ):
            self._add(task_id, lease)
            core.followed.add(task_id)
            self._offer_up_to(sequence, core.computed_here(sequence))
            self.offer_computing()
        else:  # it is not here (any more), or gave way to others and waits
            self._offer(task_id, lease, None, more=False)

    def offer_computed(self, plan: Plan) -> None:
        """What has come with a plan of prefills that others follow; with the last chunk of one, `finished`."""
        for chunk in plan.chunks:
            if not chunk.samples and chunk.sequence.task_id in self._core.followed:
                self._offer_up_to(chunk.sequence, chunk.start + chunk.tokens)

    def offer_computing(self) -> None:
        """Last chunks that the device has begun, where each layer is sent when it is there."""
        if self._core.config.kv_transfer != "by_layer" or not self._core.in_flight:
            return
        plan = self._core.in_flight[0]
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.samples and sequence.task_id in self._core.followed:
                lease = self._leases[sequence.task_id]
                rest = sequence.blocks[lease.offered :]
                if rest:
                    self._offer(sequence.task_id, lease, rest, more=True, step=plan.number)

    def finished(self, sequence: Sequence, held: bool) -> None:
        """A task is done; a prefill that is `held` has all of its KV cache."""
        lease = self._leases.get(sequence.task_id)
        if lease is None:
            return
        if held:
            self._core.followed.discard(sequence.task_id)
            self._offer(sequence.task_id, lease, sequence.blocks[lease.offered :], more=False)
        else:
            self.end(sequence.task_id)

    def end(self, task_id: int) -> None:
        """Nobody reads this any more: also where a prefill ends that came to nothing. The job executor, who hears of
        that, asks the reader's task back; what it read is of no use to anyone.
        """
        if self._leases.pop(task_id, None) is not None:
            self._core.leased.discard(task_id)
            self._core.followed.discard(task_id)

    def released(self, task_id: int, reader: str) -> None:
        """The reader has what it wanted, wants it no more, or needs none of it; or another one reads by now."""
        lease = self._leases.get(task_id)
        if lease is None or lease.reader == reader:
            self.end(task_id)
            self._core.release_held(task_id)

    def lost(self, executor: str) -> None:
        """It is gone, and fetches nothing any more."""
        self._lost.add(executor)
        for task_id, lease in list(self._leases.items()):
            if lease.reader == executor:
                self.released(task_id, executor)

    def _add(self, task_id: int, lease: _Lease) -> None:
        self._leases[task_id] = lease
        self._core.leased.add(task_id)

    def _offer_up_to(self, sequence: Sequence, tokens: int) -> None:
        """The blocks that are full of what is computed, and were not offered."""
        lease, full = self._leases[sequence.task_id], tokens // self._core.config.block_tokens
        if full > lease.offered:
            self._offer(sequence.task_id, lease, sequence.blocks[lease.offered : full], more=True)

    def _offer(
        self, task_id: int, lease: _Lease, blocks: list[int] | None, more: bool, step: int | None = None
    ) -> None:
        size, first = self._core.config.block_tokens, lease.offered
        lease.offered += len(blocks or ())
        offer = KvOffered(task_id, lease.for_task, self.name, blocks, size, first, more, step)
        self._outbox.peers.append((lease.reader, offer))
