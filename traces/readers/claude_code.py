"""Claude Code sessions (callanjfox/kv-cache-tester, Apache-2.0): calls with block hashes, tools and users between them.

https://github.com/callanjfox/kv-cache-tester, traces/: one JSON file per session, here in a .tar.xz of many.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cluster import identity
from cluster.request import Trigger
from cluster.streams import stream
from cluster.vocabulary import NS_PER_S
from cluster.work import Agent, AnyArrival, Call, Step, Tool, Truth, WorkArrival, WorkRequest
from traces.errors import TraceError, require
from traces.file_trace import FileTrace

TOKENS_PER_HASH = 64


class _Call(msgspec.Struct, rename={"prompt": "in", "output": "out"}):
    """A call, or, where it has `requests`, a subagent with calls of its own."""

    type: str
    prompt: int = 0
    output: int = 0
    hash_ids: list[int] = []
    input_types: list[str] = []
    think_time: float = 0.0
    requests: list["_Call"] = []


class _Session(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_Call]


@dataclass
class _Turn:
    """A user turn under way. `contexts`: block ids, each list extended while prompts only add to it."""

    think_ns: int = 0
    rounds: list[tuple[Step, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    contexts: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class ClaudeCodeTrace(FileTrace):
    """Each user turn is a request of one agent job: calls, and between them the tools, which take the time that lies
    between a call's end and the next call. The first turn of a session comes at a time, the others when the one ahead
    has ended and its user has thought; a turn begins where a prompt brings something else than a tool's result.

    The trace's sessions have clocks of their own: they begin at `rate` per second (Poisson, by `seed`), at most
    `sessions` of them. A session ends ahead of a call whose prompt and answer exceed `max_context` tokens. Calls of
    subagents follow in the order of the file, with contexts of their own. Ids of blocks are local to a session, so
    nothing is shared between them.
    """

    sessions: int | None = None
    rate: float = 0.1
    seed: int = 0
    max_context: int = 250_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rate > 0, "rate", self.rate, "more than 0 sessions/s", "raise it")
        require(self.sessions is None or self.sessions >= 1, "sessions", self.sessions, "1 and more", "or null for all")
        require(self.max_context >= 1, "max_context", self.max_context, "1 and more", "raise it")

    def read(self, file: Path) -> Iterator[AnyArrival]:
        rng, at_s, number = stream(self.seed, "claude code sessions"), 0.0, 0
        for count, session in enumerate(_sessions(file)):
            if count == self.sessions:
                return
            at_s += float(rng.exponential(1 / self.rate))
            first = number
            for turn in self._turns(session):
                work = Agent(tuple(turn.rounds), tuple(turn.contexts))
                request = WorkRequest(number, work, self.model)
                after = None if number == first else Trigger("ended", number - 1, delay_ns=turn.think_ns)
                at_ns = round(at_s * NS_PER_S) if after is None else 0
                yield WorkArrival(request, Truth(tuple(turn.lengths)), at_ns, after)
                number += 1

    def _turns(self, session: _Session) -> Iterator[_Turn]:
        turn = _Turn()
        calls = [call for each in session.requests for call in (each.requests or [each])]
        salt = identity.salt(self.model, session.id)
        for call in calls:
            output = max(call.output, self.min_output)
            if call.prompt < 1 or output < 1:
                continue  # errors of the API
            if call.prompt + output > self.max_context:
                break
            gap_ns = round(call.think_time * NS_PER_S)
            if "tool_result" not in call.input_types and turn.rounds:
                yield turn
                turn = _Turn(gap_ns)
            elif turn.rounds:
                turn.rounds.append((Tool(),))
                turn.lengths.append(gap_ns)
            hashes = call.hash_ids[: call.prompt // TOKENS_PER_HASH]
            ids = identity.from_trace(hashes, TOKENS_PER_HASH, call.prompt, salt)
            context = _context(turn.contexts, ids)
            limit = max(self.max_tokens, output)
            turn.rounds.append((Call(call.prompt, limit, context),))
            turn.lengths.append(output)
        if turn.rounds:
            yield turn


def _context(contexts: list[tuple[int, ...]], ids: tuple[int, ...]) -> int:
    """The number of the context that these ids go on with, which is made longer by them; else a new one's.

    What a prompt has beyond whole trace blocks has no ids.
    """
    for number, known in enumerate(contexts):
        common = min(len(known), len(ids))
        if known[:common] == ids[:common]:
            contexts[number] = max(known, ids, key=len)
            return number
    contexts.append(ids)
    return len(contexts) - 1


def _sessions(file: Path) -> Iterator[_Session]:
    """The sessions of an archive, in its order, or the one of a JSON file."""
    decode = msgspec.json.Decoder(_Session).decode

    def read(name: str, text: bytes) -> _Session:
        try:
            session = decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"{file}: {name} is no session ({error}): fetch the file again") from error
        if session.block_size != TOKENS_PER_HASH:
            raise TraceError(f"{file}: {name} has blocks of {session.block_size} tokens: allowed is {TOKENS_PER_HASH}")
        return session

    if file.suffix == ".json":
        yield read(file.name, file.read_bytes())
        return
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                content: Any = archive.extractfile(member) if member.name.endswith(".json") else None
                if content is not None:
                    yield read(member.name, content.read())
    except tarfile.TarError as error:
        raise TraceError(f"{file} is no archive ({error}): allowed is .json, or a .tar.xz of them") from error
