"""Packing what changed gives what packing everything anew gives."""

import random
from collections import deque
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import identity
from cluster.request import Request, Task
from cluster.vocabulary import TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineCore
from flowserve.ops.step import Ints
from flowserve.runtime.packing import PackedStep, Packer

BLOCK = 16


class Anew(NamedTuple):
    """A plan's inputs, from the sequences alone: one entry for each sequence, chunks first, decodes by length."""

    starts: list[int]
    counts: list[int]
    tokens: list[int]
    blocks: list[list[int]]
    sampling: list[int]
    sample_places: list[int]
    positions: list[int]
    indices: list[int]


def pack_anew(plan: Plan, tokens: dict[int, list[int]]) -> Anew:
    """The plain way. `tokens`: all of each task, prompt and generated."""
    entries = [(c.sequence, c.start, c.tokens, c.samples) for c in plan.chunks]
    decodes = [(s, s.position - 1, 1, True) for s in plan.decodes]
    entries += sorted(decodes, key=lambda entry: entry[1])
    packed: list[int] = []
    last: dict[int, int] = {}
    for sequence, start, count, _ in entries:
        packed += tokens[sequence.task_id][start : start + count]
        last[sequence.task_id] = len(packed) - 1
    sampling = plan.sampling
    positions = [s.position for s in sampling]
    return Anew(
        [start for _, start, _, _ in entries],
        [count for _, _, count, _ in entries],
        packed,
        [list(sequence.blocks) for sequence, *_ in entries],
        [s.task_id for s in sampling],
        [last[s.task_id] for s in sampling],
        positions,
        [position - s.task.request.prompt_tokens for s, position in zip(sampling, positions, strict=True)],
    )


class Device:
    """What is left of a device: the table of last tokens, and tokens that depend on task and position."""

    def __init__(self) -> None:
        self.last = np.zeros(0, dtype=np.int64)

    def inputs(self, step: PackedStep) -> Ints:
        """The packed tokens of a step, decodes looked up."""
        self.last = np.concatenate((self.last, np.zeros(step.num_rows - len(self.last), dtype=np.int64)))
        self.last[step.uploads[0]] = step.uploads[1]
        tokens = step.tokens.copy()
        if len(step.decode_rows):
            tokens[-len(step.decode_rows) :] = self.last[step.decode_rows]
        return tokens


def check(step: PackedStep, anew: Anew, inputs: Ints) -> None:
    assert step.starts.tolist() == anew.starts
    assert step.counts.tolist() == anew.counts
    assert inputs.tolist() == anew.tokens
    assert step.sample_places.tolist() == anew.sample_places
    assert step.positions.tolist() == anew.positions
    assert step.indices.tolist() == anew.indices
    for row, blocks in zip(step.block_tables.tolist(), anew.blocks, strict=True):
        assert row == (blocks + blocks[:1] * len(row))[: len(row)], "padding is the sequence's own first block"
    assert step.block_tables.shape[1] == max(
        -(-(s + c) // BLOCK) for s, c in zip(anew.starts, anew.counts, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_packing_what_changed_is_packing_anew(rng: random.Random) -> None:
    """Whatever arrives, stops, is aborted or preempted, with one to three plans in flight, steps are packed the same
    and are not touched afterwards.
    """
    config = EngineConfig(
        kv_blocks=rng.choice([14, 40]),
        token_budget=rng.choice([20, 70]),
        max_sequences=rng.choice([3, 20]),
        max_in_flight=rng.choice([1, 2, 3]),
        watermark=0.0,
    )
    core, packer, device = EngineCore(config), Packer(BLOCK), Device()
    tokens: dict[int, list[int]] = {}
    launched: deque[tuple[Plan, PackedStep, Anew, dict[int, int]]] = deque()
    leaving: deque[tuple[int, int]] = deque()

    def leave(task_id: int) -> None:
        row = packer.remove(task_id)
        assert row is not None
        leaving.append((launched[-1][0].number if launched else 0, row))

    arrivals = 40
    while arrivals or not core.idle:
        if arrivals and rng.random() < 0.4:
            arrivals -= 1
            prompt = rng.randint(1, 60)
            request = Request(arrivals, prompt, rng.randint(1, 60), "m")
            tokens[arrivals] = [rng.randrange(1000) for _ in range(prompt)]
            assert core.add(Task(arrivals, request, TaskKind.SERVE), identity.unique(arrivals)) is None
            packer.add(arrivals, tokens[arrivals])
        if rng.random() < 0.05 and (here := core.task_ids()):
            task_id = rng.choice(here)
            if core.abort(task_id) is not None:
                leave(task_id)
        while (plan := core.schedule()) is not None:
            step, anew = packer.pack(plan), pack_anew(plan, tokens)
            check(step, anew, device.inputs(step))
            sampled = {}
            for task_id, position in zip(anew.sampling, anew.positions, strict=True):
                sampled[task_id] = 1000 * task_id + position
                assert len(tokens[task_id]) == position
                tokens[task_id].append(sampled[task_id])
            device.last[step.rows] = list(sampled.values())
            launched.append((plan, step, anew, sampled))
        for sequence, _ in core.failed:
            leave(sequence.task_id)
        core.failed.clear()
        if launched:
            plan, step, anew, sampled = launched[0]
            assert step.block_tables[:, 0].tolist() == [blocks[0] for blocks in anew.blocks], "changed in flight"
            assert step.starts.tolist() == anew.starts, "changed in flight"
            packer.take(step, np.array(list(sampled.values()), dtype=np.int64))
            stops = [task_id for task_id in sampled if rng.random() < 0.03]
            launched.popleft()
            for sequence, _ in core.complete(plan, stops).finished:
                leave(sequence.task_id)
            while leaving and leaving[0][0] <= plan.number:
                packer.release(leaving.popleft()[1])
        core.check_integrity()
