"""Peers that come as source: a function for each writes the requests in its format and says how it is started.

Who has a checkout gives its path, as in `deepflow bench sim vidur=CHECKOUT[:PYTHON]`; without PYTHON that is the
checkout's .venv/bin/python, else python3. Each simulates a server of its own, with the limits of ours where it has
them. Command lines and formats are those of the versions named here. DistServe's simulator and splitwise-sim have been
run: each finished all of our requests, with their arrivals and lengths. For BLIS and Vidur only the public sources were
read, nobody has run these two yet. Tests have small programs in place of all four.
"""

import csv
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec

from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, Role
from experiments.bench.harness import distserve_program, timed_loop
from experiments.bench.harness.sim_case import KV_BLOCKS, MAX_SEQUENCES, RATE, TOKEN_BUDGET, Case, workload
from experiments.bench.harness.simulators import Peer, PeerError, run

LONGEST = 16_384
"""Tokens of a prompt with its answer, at least, for peers that must know."""


class Start(NamedTuple):
    """`command`: without the interpreter. `loop`: what of it is timed, see `timed_loop`; None times the whole program,
    which is then a file of the checkout itself.
    """

    loop: str | None
    command: list[str]


def vidur(requests: int, case: Case, folder: Path) -> Start:
    """microsoft/vidur 7d47513 (2024-11). Chunked prefill; no prefill or decode executors, no prefix cache."""
    trace = folder / "trace.csv"
    rows = ((at_s, prompt, output) for _, at_s, prompt, output in _lengths(requests, case))
    _write_csv(trace, ("arrived_at", "num_prefill_tokens", "num_decode_tokens"), rows)
    settings = {
        "replica_config_model_name": "meta-llama/Meta-Llama-3-8B",
        "replica_config_device": "a100",
        "cluster_config_num_replicas": case.executors,
        "global_scheduler_config_type": "round_robin",
        "replica_scheduler_config_type": "sarathi",
        "sarathi_scheduler_config_chunk_size": TOKEN_BUDGET,
        "request_generator_config_type": "trace_replay",
        "trace_request_generator_config_trace_file": trace,
        "trace_request_generator_config_max_tokens": LONGEST,
        "random_forrest_execution_time_predictor_config_prediction_max_tokens_per_request": LONGEST,
        "metrics_config_output_dir": folder,
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    off = ["--no-metrics_config_store_plots", "--no-metrics_config_enable_chrome_trace"]
    return Start("vidur.simulator:Simulator.run", ["vidur.main", *given, *off])


def splitwise(requests: int, case: Case, folder: Path) -> Start:
    """Mutinifni/splitwise-sim 8f99e7d (2024-04). Whole prompts, no prefix cache; transfers of KV caches."""
    names = ("request_id", "request_type", "application_id", "arrival_timestamp", "batch_size")
    trace = folder / "trace.csv"
    rows = ((number, 2, 0, at_s, 1, prompt, output) for number, at_s, prompt, output in _lengths(requests, case))
    _write_csv(trace, (*names, "prompt_size", "token_size"), rows)
    counts = dict(case.groups)
    placing = ["start_state=baseline", "applications.0.scheduler=token_jsq"]
    if Role.PREFILL in counts:
        placing = ["start_state=splitwise", "applications.0.scheduler=mixed_pool"]
        placing += [f"start_state.prompt.num_instances={counts[Role.PREFILL]}"]
        placing += [f"start_state.token.num_instances={counts[Role.DECODE]}"]
    model = ["applications.0.model_architecture=llama2-70b", "applications.0.model_size=llama2-70b-fp16"]
    servers = ["cluster=dgx-h100", "cluster.servers.0.count=0", f"cluster.servers.1.count={case.executors}"]
    files = [f"trace.path={trace}", f"output_dir={folder}", "performance_model=db"]
    # Its config asks for Hydra's launcher for Ray, which a single run does not use: an empty one saves installing Ray.
    launcher = folder / "hydra" / "launcher" / "ray.yaml"
    launcher.parent.mkdir(parents=True)
    launcher.touch()
    given = ["--config-dir", str(folder), *model, *servers, *placing, *files]
    return Start("simulator:Simulator.run", ["run.py", *given])


def distserve(requests: int, case: Case, folder: Path) -> Start:
    """LLMServe/DistServe 82831f1 (2025-04), simdistserve. Whole prompts, no prefix cache; a transfer takes no time."""
    trace = folder / "trace.json"
    names = ("start_time", "prompt_len", "output_len")
    rows = [dict(zip(names, lengths, strict=True)) for _, *lengths in _lengths(requests, case)]
    trace.write_bytes(msgspec.json.encode(rows))
    counts = dict(case.groups)
    instances = [str(counts.get(role, 0)) for role in (Role.COLOCATED, Role.PREFILL, Role.DECODE)]
    arguments = ["--backend", "distserve" if Role.PREFILL in counts else "vllm", "--model", "facebook/opt-13b"]
    arguments += ["--N", str(requests), "--arrival", "custom", "--workload", str(trace)]
    return Start("simpy:Environment.run", [str(distserve_program.__file__), *instances, *arguments])


def blis(requests: int, case: Case, folder: Path) -> Start:
    """inference-sim/inference-sim f90a1e3a (2026-08), built by go build -o blis main.go. Its process is timed."""
    header, trace = folder / "trace.yaml", folder / "trace.csv"
    header.write_text("trace_version: 3\ntime_unit: microseconds\nmode: generated\nwarm_up_requests: 0\n")
    names = "request_id client_id tenant_id slo_class session_id round_index prefix_group prefix_length streaming"
    names += " input_tokens output_tokens text_tokens image_tokens audio_tokens video_tokens reason_ratio model"
    names += " deadline_us server_input_tokens arrival_time_us send_time_us first_chunk_time_us last_chunk_time_us"
    names += " num_chunks status error_message finish_reason"
    rows = []
    for number, at_s, prompt, output in _lengths(requests, case):
        at_us = round(at_s * 1e6)
        who, length = (number, "bench", "", "", "", 0, "", 0, "false"), (prompt, output, prompt, 0, 0, 0, 0, "")
        rows.append((*who, *length, 0, 0, at_us, at_us, 0, 0, 0, "ok", "", ""))
    _write_csv(trace, names.split(), rows)
    settings = {
        "trace-header": header,
        "trace-data": trace,
        "model": "meta-llama/llama-3.1-8b-instruct",
        "hardware": "A100-SXM",
        "tp": 1,
        "latency-model": "trained-physics",
        "num-instances": case.executors,
        "routing-policy": "round-robin",
        "cache-signal-delay": 0,
        "total-kv-blocks": KV_BLOCKS,
        "block-size-in-tokens": BLOCK_TOKENS,
        "max-num-running-reqs": MAX_SEQUENCES,
        "max-num-scheduled-tokens": TOKEN_BUDGET,
        "horizon": 1 << 62,
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return Start(None, ["blis", "replay", *given])


class Source(NamedTuple):
    """`has`: a file by which its checkout is known."""

    name: str
    about: str
    has: str
    start: Callable[[int, Case, Path], Start]
    disaggregated: bool = False


SOURCES = {
    "blis": Source("BLIS", "Go, Llama-3.1-8B on A100, whole process", "blis", blis),
    "distserve": Source("DistServe's simulator", "SimPy, OPT-13B", "simdistserve", distserve, disaggregated=True),
    "vidur": Source("Vidur", "Python, Llama-3-8B on A100, Sarathi", "vidur/main.py", vidur),
    "splitwise": Source("splitwise-sim", "Python, Llama2-70B on DGX-H100", "run.py", splitwise, disaggregated=True),
}


def peer(option: str, place: str | None) -> Peer:
    """`place`: CHECKOUT or CHECKOUT:PYTHON. Raises ValueError: there is no such checkout."""
    source = SOURCES[option]
    about = f"{source.about}, its own server model and timing"
    if place is None:
        why = f"not here: give its checkout by deepflow bench sim {option}=CHECKOUT[:PYTHON]"
        return Peer(source.name, about, None, why, source.disaggregated)
    path, _, python = place.partition(":")
    checkout = Path(path).expanduser().resolve()
    if not (checkout / source.has).exists():
        raise ValueError(f"{option}={place}: there is no {source.has} in {checkout}; give a checkout of {source.name}")
    own = checkout / ".venv" / "bin" / "python"
    python = python or (str(own) if own.exists() else "python3")

    def rate(requests: int, case: Case) -> float:
        return requests / _seconds(source, checkout, python, requests, case)

    return Peer(source.name, about, rate, "", source.disaggregated)


def _seconds(source: Source, checkout: Path, python: str, requests: int, case: Case) -> float:
    """Of its loop, or of the process. Raises PeerError."""
    with TemporaryDirectory() as folder:
        loop, command = source.start(requests, case, Path(folder))
        if loop is None:
            start = time.perf_counter()
            run([str(checkout / command[0]), *command[1:]], checkout)
            return time.perf_counter() - start
        said = run([python, str(timed_loop.__file__), loop, *command], checkout)
    times = [line for line in said.splitlines() if line.startswith(timed_loop.SAID)]
    if not times:
        raise PeerError(f"its program ended without a call of {loop}: is this another version?")
    return float(times[-1].removeprefix(timed_loop.SAID))


def _lengths(requests: int, case: Case) -> Iterator[tuple[int, float, int, int]]:
    """(number, arrival in seconds, tokens of the prompt, of the answer)."""
    for arrival in workload(requests, RATE * case.executors, case.shared):
        request = arrival.request
        yield request.request_id, arrival.at_ns / NS_PER_S, request.prompt_tokens, arrival.answer.output_tokens


def _write_csv(path: Path, names: Iterable[str], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
