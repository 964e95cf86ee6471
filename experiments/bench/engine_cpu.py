"""FlowServe against transformers on this CPU: a 101 M Llama, float32, the same requests, weights and threads.

32 requests at once, prompts of 32 to 512 tokens, 16 to 256 tokens to generate, lengths log-uniform. FlowServe runs its
own loop in this process, and once more as a real engine process behind the control plane. The peer runs `generate` on
batches of 8 in order of arrival, padded (a batch runs to its longest output), and its continuous batching, SDPA
attention both. Runs alternate, so that a ratio is of neighbours in time.
"""

import time
from collections.abc import Sequence

import numpy as np

from cluster.metrics import Slo, summarise
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request
from experiments import build
from experiments.bench.harness import machine
from experiments.bench.harness.engine import FlowServe, Served
from experiments.bench.harness.registry import no_peer
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from experiments.bench.harness.workload import MODEL, Load, checkpoint, mixed_load
from experiments.config import compose
from experiments.progress import ProgressBar
from experiments.run import drive
from flowserve.core.config import EngineConfig

BATCH = 8
ENGINE = EngineConfig(kv_blocks=1600, max_sequences=32, token_budget=512, prefix_cache=False)
SINGLE = (128, 64)
"""Prompt and output tokens of a request alone."""


class Options(CommonOptions, frozen=True, kw_only=True):
    """`page` and `budget`: the peer's page size and tokens per batch."""

    repeats: int = 2
    requests: int = 32
    prompt_max: int = 512
    output_max: int = 256
    page: int = 32
    budget: int = 512


def run(options: Options) -> list[Row]:
    from experiments.bench.harness.peer import Peer

    folder = checkpoint()
    loads = mixed_load(options.requests, (32, options.prompt_max), (16, options.output_max))
    wanted = sum(load.output for load in loads)
    peer = Peer(folder, threads=options.threads)
    engine = FlowServe(folder, ENGINE, threads=options.threads)
    shorter = FlowServe(folder, ENGINE, "bfloat16", threads=options.threads)
    alone = Load(mixed_load(1, (SINGLE[0],) * 2, (SINGLE[1],) * 2, seed=1)[0].prompt, SINGLE[1])
    peer.generate([Load(load.prompt[:32], 4) for load in loads[:BATCH]], BATCH)
    for each in (engine, shorter):
        each.serve([Load(load.prompt[:32], 4) for load in loads[:BATCH]])

    ours: list[float] = []
    static: list[float] = []
    continuous: list[float] = []
    apart: list[float] = []
    short: list[float] = []
    gaps: list[tuple[float, float]] = []
    outputs: list[list[int]] = []
    expected: list[list[int]] = []
    blocks = sum(-(-(len(load.prompt) + load.output) // options.page) + 1 for load in loads)
    for _ in range(options.repeats):
        start = time.perf_counter()
        outputs = [served.tokens for served in engine.serve(loads)]
        ours.append(wanted / (time.perf_counter() - start))
        start = time.perf_counter()
        shorter.serve(loads)
        short.append(wanted / (time.perf_counter() - start))
        apart.append(_as_process(loads, options.threads))
        seconds, _ = peer.continuous(loads, options.page, blocks, options.budget)
        continuous.append(wanted / seconds)
        start = time.perf_counter()
        expected = peer.generate(loads, BATCH)
        static.append(wanted / (time.perf_counter() - start))
        gaps += [(_tpot(engine.serve([alone])), _gap(peer.stream(alone))) for _ in range(3)]
    for each in (engine, shorter):
        each.close()
    same = sum(output == other for output, other in zip(outputs, expected, strict=True))
    own, theirs = np.median(gaps, axis=0) * 1e3
    return [
        median_row(
            "throughput / transformers generate",
            [a / b for a, b in zip(ours, static, strict=True)],
            "x",
            f"{np.median(ours):.0f} against {np.median(static):.0f} tok/s; {same} of {len(loads)} outputs equal",
            at_least=3,
        ),
        median_row(
            "throughput / transformers continuous batching",
            [a / b for a, b in zip(ours, continuous, strict=True)],
            "x",
            f"{np.median(ours):.0f} against {np.median(continuous):.0f} tok/s",
            at_least=1.5,
        ),
        median_row(
            "one request alone: TPOT / transformers",
            [a / b for a, b in gaps],
            "x",
            f"{own:.1f} against {theirs:.1f} ms",
            at_most=1.05,
        ),
        median_row(
            "engine process behind the control plane / in process",
            [a / b for a, b in zip(apart, ours, strict=True)],
            "x",
            f"{np.median(apart):.0f} tok/s",
            at_least=0.95,
        ),
        median_row(
            "bfloat16 / float32 throughput, in process",
            [a / b for a, b in zip(short, ours, strict=True)],
            "x",
            f"{np.median(short):.0f} tok/s",
        ),
    ]


def _tpot(served: Sequence[Served]) -> float:
    return _gap(served[0].times_s)


def _gap(times_s: list[float]) -> float:
    """Median seconds between tokens."""
    return float(np.median(np.diff(times_s)))


def _as_process(loads: Sequence[Load], threads: int) -> float:
    """Tokens per second of the same lengths (prompts drawn by the frontend) from first arrival to last token."""
    limits = [f"engine.{name}={getattr(ENGINE, name)}" for name in ("kv_blocks", "max_sequences", "token_budget")]
    base = ["backend=real", f"model={MODEL}", "engine=small", "hardware=cpu", "fleet=colocated2", "trace=synthetic"]
    own = ["fleet.groups.0.executors=1", "engine.prefix_cache=false", f"backend.threads={threads}", "backend.pin=true"]
    cfg = compose([*base, *limits, *own])
    arrivals = [
        Arrival(Request(number, len(load.prompt), load.output, build.model_name(cfg)), Answer(load.output))
        for number, load in enumerate(loads)
    ]
    recorder = Recorder()
    control = build.control_plane(cfg, arrivals, recorder)
    with machine.unpinned(), build.cluster(cfg, None) as cluster, ProgressBar(None, "", enabled=False) as bar:
        if drive(control, cluster, bar, simulated=False):
            raise KeyboardInterrupt
    summary = summarise(recorder, Slo())
    assert summary["finished"] == len(loads), f"only {summary['finished']:.0f} of {len(loads)} requests finished"
    return summary["throughput_tokens_per_s"]


def missing(options: Options) -> str | None:
    return no_peer()
