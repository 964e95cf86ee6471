"""FlowServe on one CUDA device against what the device can do: Llama-3-8B's shape, random weights, bfloat16.

Decode steps are CUDA graphs. They are compared with reading weights and KV cache once at the rate of a copy and a triad
measured here, a long prompt with the rate of a large matrix product measured here, mixed requests with transformers'
continuous batching. The steps of the mixed requests become a latency profile for the simulator,
`experiments/data/profiles/MODEL-DEVICE/`.
`deepflow bench cuda device=cpu model=tiny_llama dtype=float32 prompt=256 requests=8 matrix=512 megabytes=64` tries the
program where there is no such device; those numbers say nothing.
"""

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from cluster.latency import StepShape
from experiments import build
from experiments.bench.harness import machine
from experiments.bench.harness.engine import FlowServe
from experiments.bench.harness.registry import no_peer
from experiments.bench.harness.result import DATA, Row, median_row
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.workload import Load, mixed_load
from experiments.config import compose
from flowserve import ops
from flowserve.core.config import EngineConfig
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from sim import profile as profiles
from sim.contention import Contention
from sim.model_shape import ModelShape

BLOCK_TOKENS = 256
BATCHES = (1, 32)
DECODED = 64
GRAPHS = (1, 2, 4, 8, 16, 32, 48, 64)
"""Decode batches captured as CUDA graphs."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Options(CommonOptions, frozen=True, kw_only=True):
    """`prompt`: tokens of the long prompt; `context`: of the sequences whose decoding is timed; `requests`: of the
    mixed load; `matrix`, `megabytes`: sizes of the matrix product and of the copied memory.
    """

    device: str = "cuda"
    model: str = "llama3_8b"
    dtype: str = "bfloat16"
    prompt: int = 4096
    context: int = 512
    requests: int = 64
    matrix: int = 8192
    megabytes: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: allowed are {', '.join(DTYPES)}")


def missing(options: Options) -> str | None:
    if options.device != "cpu" and not (torch.cuda.is_available() and options.device.startswith("cuda")):
        return f"there is no {options.device} device here"
    if torch.device(options.device).type not in ops.DEVICES:
        return f"this version has no operators for {options.device}: there are {', '.join(ops.DEVICES)}"
    return no_peer()


def run(options: Options) -> list[Row]:
    from experiments.bench.harness.peer import Peer

    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    bandwidth = _bandwidth(options.megabytes, device)
    matrix_rate = _matrix_rate(options.matrix, dtype, device)
    shape = build.model_shape(compose([f"model={options.model}"]))
    folder = _checkpoint(shape, options.dtype)
    mixed = mixed_load(options.requests, (128, 1024), (32, 256), shape.vocab)
    longest = max(options.prompt, max(BATCHES) * (options.context + DECODED))
    blocks = -(-max(longest, sum(len(load.prompt) + load.output for load in mixed)) // BLOCK_TOKENS)
    config = EngineConfig(
        kv_blocks=blocks + 2 * max(options.requests, *BATCHES),
        block_tokens=BLOCK_TOKENS,
        token_budget=max(2048, options.prompt),
        max_sequences=max(options.requests, *BATCHES),
        prefix_cache=False,
    )
    start = time.perf_counter()
    engine = FlowServe(folder, config, options.dtype, options.device, options.threads, GRAPHS)
    loading_s = time.perf_counter() - start
    rows = [_decode(engine, shape, batch, options, bandwidth) for batch in BATCHES]
    rows.append(_prefill(engine, shape, options, matrix_rate))

    engine.steps.clear()
    wanted = sum(load.output for load in mixed)
    ours = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        engine.serve(mixed)
        ours.append(wanted / (time.perf_counter() - start))
    steps = list(engine.steps)
    engine.close()
    del engine  # the peer needs the memory
    peer = Peer(folder, dtype, options.device, options.threads)
    pages = blocks + 2 * options.requests
    peer.continuous(mixed[:2], BLOCK_TOKENS, pages, config.token_budget)
    theirs = [
        wanted / peer.continuous(mixed, BLOCK_TOKENS, pages, config.token_budget)[0] for _ in range(options.repeats)
    ]
    rows.append(
        median_row(
            "throughput / transformers continuous batching",
            [a / b for a, b in zip(ours, theirs, strict=True)],
            "x",
            f"{np.median(ours):.0f} against {np.median(theirs):.0f} tok/s, {len(mixed)} requests",
        )
    )
    _save_profile(shape, options, steps, loading_s)
    return rows


def _decode(engine: FlowServe, shape: ModelShape, batch: int, options: Options, bandwidth: float) -> Row:
    """Share of the bound: every weight but the embedding's rows, and the KV cache of all sequences, read once."""
    weights = engine.runner.model.weights()
    read = sum(tensor.nbytes for name, tensor in weights.items() if "embed_tokens" not in name)
    size = DTYPES[options.dtype].itemsize
    if shape.tied_embeddings:
        read += shape.vocab * shape.hidden * size
    context = options.context + DECODED / 2
    read += round(batch * context * 2 * shape.layers * shape.kv_heads * shape.head_dim * size)
    bound_s = read / bandwidth
    loads = mixed_load(batch, (options.context,) * 2, (DECODED,) * 2, shape.vocab, seed=batch)
    gaps = []
    for _ in range(options.repeats):
        served = engine.serve(loads)
        together = max(each.times_s[0] for each in served)  # from here on all decode in every step
        times = [at for at in served[0].times_s if at >= together]
        gaps.append(float(np.median(np.diff(times))))
    return median_row(
        f"decode, batch {batch}: bandwidth bound / TPOT",
        [bound_s / gap for gap in gaps],
        "",
        f"{np.median(gaps) * 1e3:.2f} ms against {bound_s * 1e3:.2f} ms: {read / 1e9:.3g} GB at "
        f"{bandwidth / 1e9:.0f} GB/s",
    )


def _prefill(engine: FlowServe, shape: ModelShape, options: Options, matrix_rate: float) -> Row:
    """Share of the measured matrix rate that one long prompt reaches, counting the layers' products and attention."""
    tokens = options.prompt
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * queries + 2 * keys + 3 * shape.intermediate)
    flops = shape.layers * (2 * layer * tokens + 2 * queries * tokens * tokens)
    rates = []
    for seed in range(options.repeats + 1):
        load = mixed_load(1, (tokens, tokens), (1, 1), shape.vocab, seed)[0]
        start = time.perf_counter()
        served = engine.serve([Load(load.prompt, 1)])[0]
        rates.append(flops / (served.times_s[0] - start))
    rates = rates[1:]
    return median_row(
        f"prefill of {tokens} tokens: rate / matrix rate",
        [rate / matrix_rate for rate in rates],
        "",
        f"{np.median(rates) / 1e12:.3g} of {matrix_rate / 1e12:.3g} TFLOP/s",
    )


def _bandwidth(megabytes: int, device: torch.device) -> float:
    """Bytes per second, read and written, of the faster of a copy and a triad."""
    count = megabytes * 2**20 // 4
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    copy = 8 * count / _seconds(lambda: c.copy_(a), device)
    triad = 12 * count / _seconds(lambda: torch.add(a, b, alpha=3.0, out=c), device)
    return max(copy, triad)


def _matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)


def _seconds(call: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Median of single calls, the device waited for."""
    samples = []
    for _ in range(times + 3):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        samples.append(time.perf_counter() - start)
    return float(np.median(samples[3:]))


def _checkpoint(shape: ModelShape, dtype: str) -> Path:
    """Random weights in the user's cache, stored in `dtype`: 16 GB for the default."""
    return make_checkpoint(
        f"{shape.name}-{dtype}",
        CheckpointShape(
            hidden_size=shape.hidden,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocab,
            tie=shape.tied_embeddings,
            dtype="bfloat16" if dtype == "bfloat16" else "float32",
        ),
    )


def _save_profile(shape: ModelShape, options: Options, steps: list[tuple[StepShape, int]], loading_s: float) -> None:
    """The format of `deepflow profile`, of one engine without messages: those delays are not measured."""
    from experiments.fidelity import save_profile

    name = torch.cuda.get_device_name() if options.device != "cpu" else machine.describe()
    model = profiles.fit(steps)
    error, residuals = profiles.held_out(steps)
    profile = profiles.Profile(
        schema=profiles.SCHEMA,
        machine=name,
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=machine.versions(),
        model=shape.name,
        engines=1,
        steps=len(steps),
        contention=Contention(),
        residuals=residuals,
        disturbed=None,
        coefficients_ns=list(model.coefficients_ns),
        knots=list(model.knots),
        held_out=error,
        ranges=profiles.feature_ranges(steps),
        dispatch_s=None,
        event_s=None,
        stages_s={"te_load": loading_s},
    )
    folder = Path("runs") if options.device == "cpu" else DATA.parent
    save_profile(profile, folder / "profiles" / f"{shape.name}-{options.device}")
