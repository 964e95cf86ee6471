"""`deepflow run`: one experiment."""

from collections import Counter
from pathlib import Path

from cluster.vocabulary import Outcome
from experiments.commands.usage import split, wants_help
from experiments.config import compose
from experiments.process import age_s
from experiments.run import RunResult, resume, run
from experiments.tables import Row, job_lines, print_table

USAGE = """usage: deepflow run [--config-dir DIR] [GROUP=OPTION ...] [KEY=VALUE ...]

Runs one experiment and writes requests.parquet, executors.parquet, scaling.parquet, decisions.jsonl, summary.json,
timeline.json, config.yaml and report.html to a new folder below runs/ (or out=FOLDER), whose path is the last line.
Exit code 0; 1 if no request finished, 2 for an error in the arguments, 130 after Ctrl-C.

  deepflow run                                             Azure conversations on 4 simulated Ascend 910B2
  deepflow run fleet=pd_1p1d dispatch=deepflow trace.rate=0.5
  deepflow run backend=real model=tiny_llama engine=small hardware=cpu trace.duration_s=10 trace.prompt_scale=0.05
  deepflow run experiment=three_models                     a whole setting by name, of conf/experiment
  deepflow run dispatch._target_=my_module.MyPolicy        a policy of your own, by its import path
  deepflow run snapshot_at=300                             writes snapshot.bin in the middle of a simulated run, and
  deepflow run resume=DIR dispatch=deepflow                goes on from it: as it was, or with another dispatch,
                                                           scaling, slo or trace.rate. Resume only files that you
                                                           trust: reading one can run any code.
"""

MODELS_SHOWN = 10


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    config_dirs, overrides = split(arguments)
    snapshot = [each.removeprefix("resume=") for each in overrides if each.startswith("resume=")]
    if snapshot:
        others = [each for each in overrides if not each.startswith("resume=")]
        result = resume(Path(snapshot[-1]), others, config_dirs, spent_s=age_s())
    else:
        result = run(compose(overrides, config_dirs), spent_s=age_s())
    models = list(result.models.items())[:MODELS_SHOWN]
    print_table([Row(result.label, result.summary), *(Row(f"  {name}", metrics) for name, metrics in models)])
    if len(result.models) > len(models):
        print(f"and {len(result.models) - len(models)} models asked for less, see report.html")
    print(f"trace: {result.source}")
    for note in result.notes:
        print(f"note: {note}")
    for line in job_lines(result.summary):
        print(line)
    for outcome, reason, number in _not_finished(result):
        print(f"{number} of {result.recorder.ended} requests {outcome}{reason and ': ' + reason}")
    for (kind, outcome, reason), number in _jobs_not_finished(result):
        print(f"{number} {kind} job{'s' * (number > 1)} {outcome}{reason and ': ' + reason}")
    if result.interrupted:
        print("interrupted: the results hold what happened until then")
    print(result.folder)
    if result.interrupted:
        return 130
    return 0 if result.recorder.finished or any(row.outcome == Outcome.FINISHED for row in result.jobs.rows) else 1


def _not_finished(result: RunResult) -> list[tuple[str, str, int]]:
    """(outcome, reason, number) of requests that did not finish, the most frequent first, at most five."""
    pairs = Counter(zip(result.recorder.outcomes, result.recorder.reasons, strict=True))
    return [(outcome, why, number) for (outcome, why), number in pairs.most_common() if outcome != "finished"][:5]


def _jobs_not_finished(result: RunResult) -> list[tuple[tuple[str, str, str], int]]:
    """The same of jobs: (kind, outcome, reason)."""
    rows = [row for row in result.jobs.rows if row.outcome != "finished"]
    return Counter((row.kind, row.outcome, row.reason) for row in rows).most_common(5)
