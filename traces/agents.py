"""Sessions of coding agents: LLM calls and tools in turns, user turns with think times between them.

The defaults are fitted to 710 Claude Code sessions (callanjfox/kv-cache-tester, Apache-2.0): log-normal mixtures, their
Kolmogorov-Smirnov distances 0.01 to 0.05. The gap before a call that follows a tool's result is taken for the tool's
time; it holds whatever else happened meanwhile, such as a person's consent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster import identity
from cluster.request import Trigger
from cluster.streams import stream
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S
from cluster.work import Agent, Call, Step, Tool, Truth, WorkArrival, WorkRequest
from traces.errors import require
from traces.synthetic import LogNormal, Mixture

SYSTEM_TOKENS = 15_034
"""Tool and system prompt that all sessions begin with: the medians, 12,262 and 2,772."""
CALLS = Mixture(341, (LogNormal(1.0, 3.67, 1.16),))
"""LLM calls per session, clipped at their p99."""
TURN_SHARE = 0.15
"""Share of calls that follow a user, not a tool."""
NEW_TOKENS = Mixture(16_800, (LogNormal(0.42, 5.94, 0.53), LogNormal(0.46, 7.14, 0.85), LogNormal(0.12, 9.04, 1.63)))
"""That each call adds to the context, the answer before it included; clipped at the p99 of the growth of prompts."""
OUTPUT = Mixture(18_195, (LogNormal(0.48, 5.06, 0.39), LogNormal(0.52, 6.03, 0.98)))
TOOL_S = Mixture(3600, (LogNormal(0.67, 1.94, 0.50), LogNormal(0.33, 3.64, 1.36)))
THINK_S = Mixture(13_400, (LogNormal(0.54, 4.04, 1.40), LogNormal(0.46, 6.01, 1.76)))


@dataclass(frozen=True)
class AgentSessions:
    """`sessions` of agents that begin at `rate` per second (Poisson). Each user turn is a request: the first of a
    session comes at a time, the others when the one before has ended and the user has thought.

    A session ends early where its context would exceed `max_context` tokens. `time_scale`: times the trace's times of
    tools and users. `max_output_tokens`: longer answers are cut. ValueError: a number out of range.
    """

    model: str
    sessions: int = 20
    rate: float = 0.1
    max_context: int = 120_000
    time_scale: float = 1.0
    max_output_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.sessions >= 1, "sessions", self.sessions, "at least 1", "leave the source out for none")
        require(self.rate > 0, "rate", self.rate, "more than 0 sessions/s", "raise it")
        require(self.time_scale >= 0, "time_scale", self.time_scale, "0 or more", "1 keeps the times of the trace")
        least = SYSTEM_TOKENS + 1000
        require(self.max_context >= least, "max_context", self.max_context, f"at least {least} tokens", "raise it")
        require(self.max_output_tokens >= 1, "max_output_tokens", self.max_output_tokens, "1 or more", "raise it")

    def __iter__(self) -> Iterator[WorkArrival]:
        starts = np.cumsum(stream(self.seed, "agent sessions").exponential(NS_PER_S / self.rate, self.sessions))
        turns = []  # (when the session begins, session, its turns), in order of sessions: triggered rows follow at once
        number = 0
        for session, start in enumerate(starts.tolist()):
            turns = self._turns(session)
            for turn, (rounds, lengths, ids, think_ns) in enumerate(turns):
                request = WorkRequest(number, Agent(rounds, (ids,)), self.model)
                after = None if turn == 0 else Trigger("ended", request_id=number - 1, delay_ns=think_ns)
                yield WorkArrival(request, Truth(lengths), round(start) if after is None else 0, after)
                number += 1

    def _turns(self, session: int) -> list[tuple[tuple[tuple[Step, ...], ...], tuple[int, ...], tuple[int, ...], int]]:
        """(rounds, lengths, block ids of the context, think time before it in ns) of each user turn."""
        rng = stream(self.seed, f"agent session {session}")
        calls = CALLS.draw(rng, 1)[0]
        new, output = NEW_TOKENS.draw(rng, calls), OUTPUT.draw(rng, calls)
        tool, think = TOOL_S.draw(rng, calls), THINK_S.draw(rng, calls)
        by_user = rng.random(calls) < TURN_SHARE
        ids = _ids(self.seed, session, self.max_context // BLOCK_TOKENS)
        turns: list[tuple[tuple[tuple[Step, ...], ...], tuple[int, ...], tuple[int, ...], int]] = []
        rounds: list[tuple[Step, ...]] = []
        lengths: list[int] = []
        think_ns, end = 0, SYSTEM_TOKENS  # of the context so far

        def close() -> None:
            if rounds:
                turns.append((tuple(rounds), tuple(lengths), ids[: end // BLOCK_TOKENS], think_ns))

        for call in range(calls):
            answer = min(output[call], self.max_output_tokens)
            before = min(output[call - 1], self.max_output_tokens) if call else 0
            prompt = end + max(1, new[call] - before)
            if prompt + answer > self.max_context:
                break
            if call and by_user[call]:
                close()
                rounds, lengths, think_ns = [], [], round(think[call] * self.time_scale * NS_PER_S)
            elif call:
                rounds.append((Tool(),))
                lengths.append(round(tool[call] * self.time_scale * NS_PER_S))
            rounds.append((Call(prompt, answer, 0),))
            lengths.append(answer)
            end = prompt + answer
        close()
        return turns


def _ids(seed: int, session: int, blocks: int) -> tuple[int, ...]:
    """Block ids of a session's context: the system prompt's, shared by all sessions, then its own."""
    shared = SYSTEM_TOKENS // BLOCK_TOKENS
    system = identity.from_trace([f"agents {seed}"], shared * BLOCK_TOKENS, shared * BLOCK_TOKENS, 0)
    own = identity.from_trace([f"agents {seed} {session}"], blocks * BLOCK_TOKENS, blocks * BLOCK_TOKENS, 0)
    return system + own[shared:]
