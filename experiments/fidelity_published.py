"""The simulator against figures that others measured: rooflines against publications, runs against vLLM's timings."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.actions import LaunchExecutor
from cluster.events import ExecutorReady, StageFinished
from cluster.latency import StepShape
from cluster.metrics import RequestTable, Slo, Window, summarise
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import ExecutorSpec, Role, Stage, to_ns, to_s
from experiments import build
from experiments.config import compose
from sim.hardware import Hardware, kv_blocks
from sim.roofline import Roofline
from sim.topology import Hosts, Topology

TERMS = ("efficiency_gemm", "efficiency_bandwidth", "step_overhead_s")
"""What is fitted to a machine's first half of requests."""

METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p99")

Column = npt.NDArray[np.float64]


class Figure(NamedTuple):
    """A published figure and what the simulator's models say. `basis`: a term of the model that rests on it, if any."""

    what: str
    published: float
    simulated: float
    source: str
    basis: str = ""


def _hardware(name: str) -> Hardware:
    return build.hardware_of(compose(), ExecutorSpec("", Role.COLOCATED, hardware=name))


def _roofline(hardware: str, model: str, npus: int) -> Callable[[StepShape], float]:
    latency = Roofline(_hardware(hardware), build.model_shape(compose([f"model={model}"])), npus)
    return lambda shape: latency.step_ns(shape) / 1e9


def published() -> Iterator[Figure]:
    """Step times, runs, memory, start-ups and transfers, from hardware and model alone where no basis is named."""
    yield from throughput()
    yield from memory()
    yield from starts()
    yield from transfers()


def throughput() -> Iterator[Figure]:
    """Step times of Ascend NPUs, and runs of single ones."""
    step = _roofline("ascend910c", "qwen3_14b", 1)(StepShape(0, 0, 0, 16, 0))
    notes = "public roofline notes"
    yield Figure("Qwen3-14B, A3 die, decode of 16, ms", 17.0, step * 1e3, notes, "efficiency_bandwidth")

    paper = "arXiv 2506.12708"
    tokens, prompts = 16 * 16384, 16 * 4
    step = _roofline("cloudmatrix384", "deepseek_v3", 32)(StepShape(tokens, prompts * 4096 * 4097 // 2, prompts, 0, 0))
    yield Figure("DeepSeek-R1, CM384, prefill of 4K prompts, tokens/s per NPU", 6688, tokens / step / 16, paper)
    decode = _roofline("cloudmatrix384", "deepseek_v3", 320)
    for batch, served in ((96, 1943), (8, 538)):
        sequences = batch * 160
        step = decode(StepShape(0, 0, 0, sequences, sequences * 4096, sequences))
        yield Figure(f"the same, decode of {batch} per NPU, tokens/s per NPU", served, batch * 1.7 / step, paper)

    for engine, overrides, runs in SERVED:
        for prompt, output, requests, tokens_per_s in runs:
            found = _tokens_per_s(overrides, prompt, output, requests)
            what = f"Qwen3-8B, 910B2, {engine}, {requests} x {prompt} + {output}, tokens/s"
            yield Figure(what, tokens_per_s, found, "gpustack docs, performance lab, qwen3-8b on 910b")


SERVED = (
    (
        "MindIE 2.1 W8A8",
        ["engine.token_budget=8192", "engine.max_sequences=200", "+model.shape.bytes_per_value=1"],
        ((2000, 100, 500, 15_592.0), (4000, 200, 500, 13_362.0), (32_000, 100, 100, 10_831.0)),
    ),
    (
        "vLLM-Ascend 0.9.1 bf16",
        ["engine.token_budget=2048", "engine.max_sequences=256"],
        ((2000, 100, 500, 9_589.0), (4000, 200, 500, 7_677.0), (32_000, 100, 100, 2_891.0)),
    ),
)
"""Engines on one 910B NPU (which of them is not said), their limits (assumed: their defaults), and what they served of
requests that all came at once: prompt tokens, output tokens, requests, tokens of both per second.
"""


def _tokens_per_s(overrides: list[str], prompt: int, output: int, requests: int) -> float:
    """Of so many equal requests that come at once to one simulated NPU."""
    base = ["model=qwen3_8b", "+model.shape.kv_bytes_per_value=2", "coldstart=none", "decisions=false"]
    cfg = compose([*base, "fleet.groups=[{role: colocated, executors: 1}]", *overrides])
    model = build.model_name(cfg)
    arrivals = [Arrival(Request(number, prompt, output, model), Answer(output)) for number in range(requests)]
    recorder = Recorder()
    control = build.control_plane(cfg, arrivals, recorder)
    with build.cluster(cfg, None) as cluster:
        control.drive(cluster)
    return requests * (prompt + output) / summarise(recorder, Slo())["span_s"]


def memory() -> Iterator[Figure]:
    """KV cache beside weights and activations, as vLLM's own profiling left it with 2,048 tokens and 256 sequences."""
    shape = build.model_shape(compose(["model=llama3_8b"]))
    found = kv_blocks(_hardware("rtx4090"), shape, 1, 16, 2048, 256)
    yield Figure("KV cache blocks of Llama-3.1-8B, RTX 4090", 2588, found, "vLLM 0.19, recorded by LLMServingSim")


# -- weights on their way -----------------------------------------------------------------------------------------

LOADS = (
    ("llama3_8b", 1, (3.3, 1.1, 0.71, 0.15)),
    ("codellama_34b", 4, (11, 2.1, 0.76, 0.16)),
    ("qwen2_72b", 8, (24, 3.2, 0.91, 0.19)),
)
"""Seconds of TE-Load in DeepServe figure 10: SSD, DRAM, NPU-fork over RoCE, over HCCS, each from another server."""


def load_times(overrides: Sequence[str], npus: int, before: int, together: int) -> list[float]:
    """Seconds of TE-Load of executors that start together, when `before` others run already."""
    cfg = compose([*overrides, f"fleet.groups=[{{role: colocated, executors: 1, npus: {npus}}}]"])
    spec = build.groups(cfg)[0].spec
    took: dict[str, float] = {}
    with build.sim_cluster(cfg, ["cm"]) as cluster:
        for names in ([f"old-{number}" for number in range(before)], [f"new-{number}" for number in range(together)]):
            waiting = set(names)
            for name in names:
                cluster.submit(LaunchExecutor(name, spec))
            while waiting:
                event = cluster.next_event()
                if isinstance(event, StageFinished) and event.stage is Stage.TE_LOAD:
                    took[event.executor] = to_s(event.took_ns)
                elif isinstance(event, ExecutorReady):
                    waiting.discard(event.executor)
    return [seconds for name, seconds in took.items() if name.startswith("new")]


def starts() -> Iterator[Figure]:
    """TE-Load by simulated starts. Forks of figure 10 are the bytes alone, those of figure 11 what came with them, too:
    one fork took 0.15 s in the one and 0.44 s in the other.
    """
    ways = (("SSD", "ascend910b2", "local"), ("DRAM", "ascend910b2", "prewarmed"), ("RoCE", "ascend910b2", "npu_fork"))
    based = {("SSD", 1): "ssd_bytes_per_s", ("DRAM", 1): "pcie_bytes_per_s", ("DRAM", 8): "dram_bytes_per_s"}
    for model, npus, published in LOADS:
        for (way, hardware, start), seconds in zip(
            (*ways, ("HCCS", "cloudmatrix384", "npu_fork")), published, strict=True
        ):
            overrides = [f"model={model}", f"hardware={hardware}", f"coldstart={start}", "coldstart.fork_setup_s=0"]
            full = _hardware(hardware).host_npus or _hardware(hardware).node_npus
            [found] = load_times(overrides, npus, full // npus if start == "npu_fork" else 0, 1)
            what = f"weights of {model} TP{npus}, {way}, s"
            yield Figure(what, seconds, found, "DeepServe figure 10", based.get((way, npus), ""))
    fork = ["model=llama3_8b", "hardware=cloudmatrix384", "coldstart=npu_fork"]
    for targets, seconds in ((1, 0.44), (31, 0.58)):
        found = max(load_times(fork, 1, 1, targets))
        yield Figure(f"fork of llama3_8b to {targets} at once, HCCS, s", seconds, found, "DeepServe figure 11")


# -- KV cache on its way ------------------------------------------------------------------------------------------

TOKENS = (500, 1000, 4000, 8000, 10000)
TRANSFERS = {
    "FlowKV": ((0.0044, 0.0075, 0.0236, 0.0447, 0.0555), (0.0080, 0.0993)),
    "layerwise": ((0.0678, 0.1309, 0.5338, 1.1173, 1.4121), (0.1176, 1.6711)),
    "vLLM-Disagg": ((0.1179, 0.2314, 0.6670, 1.3382, 1.7373), (0.1197, 1.3462)),
    "Mooncake": ((0.3010, 0.5416, 1.3473, 2.0289, None), (0.3418, 2.1250)),
}
"""Seconds in FlowKV's table 3, Llama-3.1-8B: on a machine of L20 for `TOKENS`, and from L20 to H20 for 500 and 8000."""


def transfers() -> Iterator[Figure]:
    """KV cache between two executors that have the links to themselves. FlowKV moves it in one call, the others in one
    for keys and values of each layer and block of 16 tokens; what such a call costs is fitted to the 500 tokens on one
    machine, per system.
    """
    shape = build.model_shape(compose(["model=llama3_8b"]))
    topology = Topology(Hosts())
    for name, hardware in (("a", "l20"), ("b", "l20"), ("c", "h20")):
        topology.place(name, _hardware(hardware).host(), 1)
    one, two = topology.path("a", "b"), topology.path("a", "c")
    for system, (alone, apart) in TRANSFERS.items():
        call_ns = 0.0
        cells = [(tokens, seconds, one, "L20") for tokens, seconds in zip(TOKENS, alone, strict=True)]
        cells += [(tokens, seconds, two, "L20 to H20") for tokens, seconds in zip((500, 8000), apart, strict=True)]
        for tokens, seconds, path, where in cells:
            if seconds is None:
                continue
            blocks = -(-tokens // 16)
            num_bytes = blocks * 16 * shape.kv_bytes_per_token
            calls, fitted = (1, False) if system == "FlowKV" else (2 * shape.layers * blocks, not call_ns)
            if fitted:
                call_ns = (seconds * 1e9 - path.latency_ns - num_bytes * 1e9 / path.bytes_per_s) / calls
            each = path.call_ns if system == "FlowKV" else call_ns
            found = (path.latency_ns + calls * each + num_bytes * 1e9 / path.bytes_per_s) / 1e9
            what = f"KV cache of {tokens} tokens, {where}, {system}, s"
            yield Figure(what, seconds, found, "FlowKV table 3", f"{call_ns / 1e3:.0f} us per call" if fitted else "")


# -- timings of real engines --------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Requests that a real engine served, in order of arrival; times in seconds.

    `overrides`: the engine's limits, from what it wrote of itself. `real`: per metric, a value per request.
    """

    name: str
    overrides: list[str]
    arrivals: Column
    prompts: npt.NDArray[np.int64]
    outputs: npt.NDArray[np.int64]
    real: dict[str, Column]


def read_machine(folder: Path, hardware: str) -> Machine:
    """A folder with requests.jsonl and meta.json, as LLMServingSim records vLLM. ValueError: it is not such a folder.

    Requests arrive when the engine queues them: what its frontend did before is not simulated.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
        rows.sort(key=lambda row: row["queued_ts"])
        column = {name: np.array([row[name] for row in rows], float) for name in rows[0] if name != "request_id"}
        limits = meta["engine_kwargs"]
        overrides = [
            f"hardware={hardware}",
            f"engine.max_sequences={limits['max_num_seqs']}",
            f"engine.token_budget={limits['max_num_batched_tokens']}",
            f"engine.kv_blocks={meta.get('kv_cache', {}).get('num_gpu_blocks', 'null')}",
        ]
        queued, first, last = (column[name] for name in ("queued_ts", "first_token_ts", "last_token_ts"))
        outputs = column["output_toks"].astype(np.int64)
        prompts = column["input_toks"].astype(np.int64)
    except (OSError, json.JSONDecodeError, KeyError, IndexError) as error:
        raise ValueError(f"{folder}: expected requests.jsonl and meta.json of a recorded engine ({error!r})") from error
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(outputs > 1, (last - first) / (outputs - 1), np.nan)
    real = {"ttft": first - queued, "tpot": tpot, "e2e": last - queued}
    return Machine(folder.name, overrides, queued - queued[0], prompts, outputs, real)


BASE = [
    "model=llama3_8b",
    "engine=cuda",
    "engine.block_tokens=16",
    "engine.max_in_flight=2",
    "engine.watermark=0",
    "engine.prefix_cache=false",
    "coldstart=none",
    "decisions=false",
    "fleet.groups=[{role: colocated, executors: 1}]",
]
"""vLLM as recorded: asynchronous scheduling, no watermark, and no prompt that another one shares."""


def simulate(machine: Machine, terms: dict[str, float]) -> dict[str, Column]:
    """The same requests on the simulated engine; per metric, a value per request."""
    cfg = compose([*BASE, *machine.overrides, *(f"hardware.{name}={value!r}" for name, value in terms.items())])
    model = build.model_name(cfg)
    requests = zip(machine.arrivals.tolist(), machine.prompts.tolist(), machine.outputs.tolist(), strict=True)
    arrivals = [
        Arrival(Request(number, prompt, output, model), Answer(output), to_ns(at))
        for number, (at, prompt, output) in enumerate(requests)
    ]
    recorder = Recorder()
    control = build.control_plane(cfg, arrivals, recorder)
    with build.cluster(cfg, None) as cluster:
        control.drive(cluster)
    table = RequestTable(recorder, Window())
    order = np.argsort(table.columns["request_id"])
    return {"ttft": table.ttft[order], "tpot": table.tpot[order], "e2e": table.e2e[order]}


def statistics(values: dict[str, Column], requests: slice) -> dict[tuple[str, str], float]:
    """(metric, statistic) over some of the requests."""
    found = {}
    for metric in METRICS:
        chosen = values[metric][requests]
        found[metric, "mean"] = float(np.nanmean(chosen))
        found[metric, "p50"], found[metric, "p99"] = (float(np.nanpercentile(chosen, share)) for share in (50, 99))
    return found


def errors(machine: Machine, simulated: dict[str, Column], requests: slice) -> dict[tuple[str, str], float]:
    """(simulated - real) / real per metric and statistic."""
    real, found = statistics(machine.real, requests), statistics(simulated, requests)
    return {key: found[key] / real[key] - 1 for key in real}


DIRECTIONS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, -1, 0))
"""Of the search among `TERMS`: one by one, and two that nearly make up for each other."""


def fit_terms(machine: Machine, requests: slice) -> dict[str, float]:
    """The terms with which the simulation of these requests comes closest: least squared log(simulated / real),
    averaged over requests and metrics, by a search in steps that shrink from 30 to 1 %. It may end beside the best:
    terms can make up for each other.
    """

    def off(values: list[float]) -> float:
        simulated = simulate(machine, dict(zip(TERMS, values, strict=True)))
        ratios = [np.log(simulated[metric][requests] / machine.real[metric][requests]) for metric in METRICS]
        return float(np.mean([np.nanmean(ratio**2) for ratio in ratios]))

    start = msgspec.to_builtins(_hardware(machine.overrides[0].partition("=")[2]))
    best = [float(start[term]) for term in TERMS]
    closest, step = off(best), 0.3
    while step > 0.01:
        before = closest
        for direction in DIRECTIONS:
            for factor in (1 + step, 1 / (1 + step)):
                tried = [round(value * factor**way, 6) for value, way in zip(best, direction, strict=True)]
                tried[:2] = [min(share, 1.0) for share in tried[:2]]
                value = off(tried)
                if value < closest:
                    best, closest = tried, value
        if closest == before:
            step /= 2
    return dict(zip(TERMS, best, strict=True))


class Judged(NamedTuple):
    """Errors of one part of a machine's requests, and whether its timings were seen by the fit."""

    label: str
    real: dict[tuple[str, str], float]
    errors: dict[tuple[str, str], float]


MACHINES = {"vllm-rtx4090-llama-3.1-8b": "rtx4090", "vllm-rtxpro6000-llama-3.1-8b": "rtxpro6000"}
"""Folders of recorded engines, and their hardware; the terms are fitted to the first half of the first one."""


def judge(folder: Path) -> Iterator[Judged]:
    """Errors before any fit, and with the terms fitted to the first machine's first half: there, on its second half,
    and on the other machines, whose own figures of hardware they use.
    """
    machines = [read_machine(folder / name, hardware) for name, hardware in MACHINES.items()]
    first = machines[0]
    half = len(first.arrivals) // 2
    terms = fit_terms(first, slice(0, half))
    said = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    for label, chosen in (("as configured", {}), (f"fitted: {said}", terms)):
        parts = [(first, slice(0, half), ", seen by the fit" if chosen else ""), (first, slice(half, None), "")]
        parts += [(machine, slice(None), "") for machine in machines[1:]]
        for machine, requests, seen in parts:
            which = {(0, half): ", first half", (half, None): ", second half"}.get((requests.start, requests.stop), "")
            simulated = simulate(machine, chosen)
            yield Judged(
                f"{machine.name}{which} ({label}{seen})",
                statistics(machine.real, requests),
                errors(machine, simulated, requests),
            )


def print_published() -> None:
    """The table of published figures."""
    print(f"{'published figure':<66}{'published':>10}{'simulated':>10}{'error':>8}  a term rests on it")
    for figure in published():
        error = figure.simulated / figure.published - 1
        said = f"{figure.what:<66}{figure.published:>10.4g}{figure.simulated:>10.4g}{error:>+8.1%}"
        print(f"{said}  {figure.basis}".rstrip())


def print_judged(folder: Path) -> None:
    """The table of real engines' timings."""
    for judged in judge(folder):
        print(f"\n{judged.label}")
        print(f"  {'':<6}" + "".join(f"{statistic + ' s':>12}{'error':>8}" for statistic in STATISTICS))
        for metric in METRICS:
            cells = (f"{judged.real[metric, s]:>12.4g}{judged.errors[metric, s]:>+8.1%}" for s in STATISTICS)
            print(f"  {metric:<6}" + "".join(cells))
