"""`deepflow validate`: the same trace on real engines and on a simulation of them; the error of every metric."""

import os
from datetime import datetime
from pathlib import Path

from experiments.commands.profile import BASE
from experiments.commands.usage import split, wants_help
from experiments.config import compose

USAGE = """usage: deepflow validate [--config-dir DIR] [KEY=VALUE,VALUE ...]
       deepflow validate experiment=cpu_matrix [out=FOLDER] [KEY=VALUE ...]
       deepflow validate --published

Profiles the engine here, runs the trace on two real engines of the tiny model on this CPU, and simulates the same from
the profile. A key with several values makes one pair of runs per value, e.g.

  deepflow validate trace.rate=1,2,4
  deepflow validate fleet=pd_1p1d

With an experiment that lists cases (conf/experiment/cpu_matrix.yaml), each runs on real engines more than once, and in
simulation; the table says what the simulator is off by, beside what the real runs differ by. It wants an idle machine
of two cores: it waits for one, and runs again what other work disturbed. With out=FOLDER it goes on where it was
interrupted, and repeats only what was disturbed.

With --published nothing is run: rooflines are held against published figures of Ascend systems and, where the folder
DEEPFLOW_GROUNDTRUTH names has recorded engines (LLMServingSim's bench/examples), simulations against their timings.
"""


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    if arguments == ["--published"]:
        return _published()
    if any(each.startswith("experiment=") for each in arguments):
        return _matrix(arguments)
    from experiments.fidelity import pair, save_profile, slug
    from experiments.profiling import measure
    from experiments.report import ReportRun, write_report
    from experiments.tables import Row, print_table
    from sim.profile import describe

    config_dirs, overrides = split(arguments)
    folder = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_validate"
    measured = measure(compose([*BASE, *_of_the_engine(overrides)], config_dirs), folder / "profile")
    profile = save_profile(measured, folder / "profile")
    print(describe(measured))
    rows, reports = [], []
    variants = _variants(overrides)
    common = set.intersection(*map(set, variants)) if len(variants) > 1 else set()
    for variant in variants:
        label = " ".join(each for each in variant if each not in common) or "defaults"
        both = pair(label, [*variant, "report=false"], profile, measured, folder / slug(label), config_dirs)
        rows.append(Row(f"{label}: real CPU", both.real.summary))
        rows.append(Row(f"{label}: sim of it", both.simulated.summary, both.real.summary))
        reports += [ReportRun(f"{label}: real", both.real.folder), ReportRun(f"{label}: sim", both.simulated.folder)]
    print_table(rows)
    write_report(folder / "report.html", "Simulation against real engines", reports, rows)
    print(folder)
    return 0


def _matrix(arguments: list[str]) -> int:
    from experiments.matrix import Matrix, pace_table, print_matrix, report_runs, save, table
    from experiments.report import write_report
    from sim.profile import describe

    config_dirs, overrides = split(arguments)
    out = compose(overrides, config_dirs).out
    folder = Path(out) if out else Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_validate"
    matrix = Matrix([each for each in overrides if not each.startswith("out=")], config_dirs, folder)
    profile, results = matrix.run()
    tables = [table(results), pace_table(results)]
    print(describe(profile))
    for each in tables:
        print()
        print_matrix(each)
    save(results, profile, folder / "matrix.json")
    runs, rows = report_runs(results, folder)
    write_report(folder / "report.html", "Simulation against real engines", runs, rows, tables)
    print(folder)
    return 0


def _published() -> int:
    from experiments.fidelity_published import print_judged, print_published

    print_published()
    folder = os.environ.get("DEEPFLOW_GROUNDTRUTH")
    if folder:
        print_judged(Path(folder))
    else:
        print("\nno timings of real engines: set DEEPFLOW_GROUNDTRUTH to the folder that has them")
    return 0


def _of_the_engine(overrides: list[str]) -> list[str]:
    """The overrides that make another engine to profile. ValueError: several values of one of these."""
    found = [each for each in overrides if each.partition("=")[0].partition(".")[0] in ("engine", "model", "backend")]
    for override in found:
        if len(_variants([override])) > 1:
            raise ValueError(f"{override}: one profile serves all runs of a validation, so give it one value at a time")
    return found


def _variants(overrides: list[str]) -> list[list[str]]:
    """Every combination of the values of keys that have several."""
    variants: list[list[str]] = [[]]
    for override in overrides:
        key, _, values = override.partition("=")
        listed = [values] if values.startswith(("[", "{")) else values.split(",")
        variants = [[*variant, f"{key}={value}"] for variant in variants for value in listed]
    return variants
