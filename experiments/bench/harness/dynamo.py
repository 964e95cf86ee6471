"""A peer of the simulator: the mocker of NVIDIA Dynamo, `python -m dynamo.replay` on a Mooncake-format file.

It simulates a server of its own, with the same limits, on the same requests; its rate is of its own wall time for the
loop. It lives in an environment of its own, because it brings versions of everything.
"""

import sys
import venv
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from cluster.vocabulary import BLOCK_TOKENS, Role
from experiments.bench.harness.sim_case import (
    KV_BLOCKS,
    KV_BYTES_PER_TOKEN,
    MAX_SEQUENCES,
    RATE,
    TOKEN_BUDGET,
    Case,
    workload,
)
from experiments.bench.harness.simulators import Peer, PeerError, run

VERSION = "1.4.2"
ABOUT = f"ai-dynamo {VERSION}, Rust, its own server model and timing"
ENVIRONMENT = Path.home() / ".cache" / "deepflow" / f"dynamo-{VERSION}"
LINK_GB_PER_S = 25.0


def peer() -> Peer:
    """Installed at the first call."""
    interpreter, why = _python()
    rate = None if interpreter is None else partial(_requests_per_s, interpreter)
    return Peer("Dynamo's mocker", ABOUT, rate, why, disaggregated=True, prefixes=True)


def _python() -> tuple[str | None, str]:
    """The interpreter that has it; or None, and why it is not there."""
    interpreter = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".complete").is_file():
        print(f"installing ai-dynamo {VERSION} into {ENVIRONMENT} (some minutes, once)", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        # pip has been seen to end well with half of what a package requires: `check` tells.
        for command in (["install", "--quiet", f"ai-dynamo=={VERSION}"], ["check"]):
            try:
                run([str(interpreter), "-m", "pip", *command], ENVIRONMENT)
            except PeerError as error:
                return None, f"pip could not install ai-dynamo=={VERSION}: {error}"
        (ENVIRONMENT / ".complete").touch()
    return str(interpreter), ""


def _requests_per_s(interpreter: str, requests: int, case: Case) -> float:
    """Of its loop. Raises PeerError."""
    engine = {
        "num_gpu_blocks": KV_BLOCKS,
        "block_size": BLOCK_TOKENS,
        "max_num_batched_tokens": TOKEN_BUDGET,
        "max_num_seqs": MAX_SEQUENCES,
    }
    command = [interpreter, "-m", "dynamo.replay", "trace.jsonl", "--trace-format", "mooncake"]
    command += ["--trace-block-size", str(BLOCK_TOKENS), "--replay-mode", "offline", "--report-json", "report.json"]
    command += ["--router-mode", "kv_router" if case.aware else "round_robin"]
    counts = dict(case.groups)
    if Role.PREFILL in counts:
        link = {"kv_transfer_bandwidth": LINK_GB_PER_S, "kv_bytes_per_token": KV_BYTES_PER_TOKEN}
        for role in (Role.PREFILL, Role.DECODE):
            command += [f"--num-{role}-workers", str(counts[role])]
            command += [f"--{role}-engine-args", _json(engine | link | {f"is_{role}": True})]
    else:
        command += ["--num-workers", str(case.executors), "--extra-engine-args", _json(engine)]
    with TemporaryDirectory() as folder:
        _write_trace(Path(folder, "trace.jsonl"), requests, case)
        run(command, Path(folder))
        wall_ms: float = msgspec.json.decode(Path(folder, "report.json").read_bytes())["wall_time_ms"]
    return requests / wall_ms * 1e3


def _json(values: object) -> str:
    return msgspec.json.encode(values).decode()


def _write_trace(path: Path, requests: int, case: Case) -> None:
    """The same requests; the last, partial block of a prompt has an identity here too."""
    first = 1 << 40
    with path.open("wb") as file:
        for arrival in workload(requests, RATE * case.executors, case.shared):
            request = arrival.request
            blocks = -(-request.prompt_tokens // BLOCK_TOKENS)
            known = list(request.block_ids or ())
            row = {
                "timestamp": arrival.at_ns / 1e6,
                "input_length": request.prompt_tokens,
                "output_length": arrival.answer.output_tokens,
                "hash_ids": [*known, *range(first, first + blocks - len(known))],
            }
            file.write(msgspec.json.encode(row) + b"\n")
            first += blocks
