"""`deepflow demo`, the main job: two policies on simulated 910Bs, on real engines here, and on their simulation."""

from datetime import datetime
from pathlib import Path

from experiments.commands.profile import BASE
from experiments.commands.usage import wants_help
from experiments.config import compose

POLICIES = ("round_robin", "deepflow")

USAGE = """usage: deepflow demo

Replays ten minutes of the Azure 2023 conversation trace at four times its rate on four simulated Ascend 910B2 NPUs
serving Llama-3-8B, under two dispatch policies; then a scaled-down slice on two real engines on this CPU, with the same
policies; then the same on a simulation of this CPU, from a profile taken a moment before. Under 3 minutes.
"""


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    from experiments.fidelity import pair, save_profile
    from experiments.profiling import measure
    from experiments.report import ReportRun, write_report
    from experiments.run import run_one_of_several
    from experiments.tables import Row, print_table
    from sim.profile import describe

    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}: the demo takes none; `deepflow run` does")
    folder = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_demo"
    rows, reports, notes = [], [], []
    for policy in POLICIES:
        cfg = compose([f"dispatch={policy}", "trace.rate=4", "coldstart=prewarmed", "report=false"])
        result = run_one_of_several(cfg, folder / f"{policy}_sim_910b", f"{policy}, sim 910B")
        rows.append(Row(f"{policy}, sim 910B", result.summary))
        reports.append(ReportRun(f"{policy}, sim 910B", result.folder))
        notes.append(result.source)
    measured = measure(compose([*BASE, "profile_launches=1"]), folder / "profile")
    profile = save_profile(measured, folder / "profile")
    for policy in POLICIES:
        both = pair(policy, [f"dispatch={policy}", "report=false"], profile, measured, folder / policy)
        rows.append(Row(f"{policy}, real CPU", both.real.summary))
        rows.append(Row(f"{policy}, sim of this CPU", both.simulated.summary, both.real.summary))
        reports.append(ReportRun(f"{policy}, real CPU", both.real.folder))
        reports.append(ReportRun(f"{policy}, sim of this CPU", both.simulated.folder))
    write_report(folder / "report.html", "Two policies, two clusters", reports, rows)
    print(f"trace: {notes[0]}")
    print(describe(measured).partition("\n  ")[0])
    print_table(rows, width=160)
    print(folder / "report.html")
    return 0
