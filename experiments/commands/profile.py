"""`deepflow profile`: measure the engine here and write a latency profile for the simulator."""

from datetime import datetime
from pathlib import Path

from experiments.commands.usage import compose_from, wants_help

USAGE = """usage: deepflow profile [KEY=VALUE ...]
       deepflow profile --from LOG [LOG ...] [out=FOLDER]

Runs two engines of the tiny model on this machine's CPU (or what the overrides say) under a load of its own, fits a
latency model to the steps, and writes profile.json. Use it with latency=profile latency.path=FILE.

With --from nothing is run: the steps come from logs, of one engine each.
  *.turns.jsonl   what backend.record=true leaves of our own engines
  *.csv, *.jsonl  a row per step: duration_ms (or _s, _us, _ns), prefill_tokens, prefill_chunks (default 1),
                  prefill_context (tokens cached before the chunks, summed; default 0), decode_sequences,
                  decode_context (summed over sequences; default 0), draft_tokens (default 0)
  *.log, *.txt    vLLM's with --enable-logging-iteration-details, which does not tell contexts
  op_summary*.csv, kernel_details*.csv
                  kernels as msprof and torch_npu.profiler export them, with shapes; say model=OPTION as well
  step_trace*.csv their times of steps; what the steps computed in step_trace….contents.csv: step and the columns above
"""

BASE = ["backend=real", "model=tiny_llama", "engine=small", "hardware=cpu", "fleet=colocated2", "trace=synthetic"]


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    from experiments.fidelity import save_profile
    from experiments.profiling import from_logs, measure
    from sim.profile import describe

    from_log = arguments[:1] == ["--from"]
    files = [Path(each) for each in arguments[1:] if "=" not in each] if from_log else []
    if from_log and not files:
        raise ValueError("name the logs to read: deepflow profile --from LOG [LOG ...] [out=FOLDER]")
    cfg = compose_from([each for each in arguments[1:] if "=" in each] if from_log else arguments, BASE)
    folder = Path(cfg.out) if cfg.out else Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_profile"
    profile = from_logs(cfg, files) if files else measure(cfg, folder)
    print(describe(profile))
    print(save_profile(profile, folder))
    return 0
