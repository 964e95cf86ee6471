"""Profiles from exports of Ascend's profilers, made here after their documented columns."""

from pathlib import Path

import pytest

from cluster.latency import StepShape
from experiments import msprof
from experiments.outputs import read_summary
from experiments.step_logs import read_steps
from sim import profile as profiles
from tests.experiments.conftest import Command
from tests.experiments.small import SIM

OP_SUMMARY = (
    "Device_id",
    "Op Name",
    "OP Type",
    "Task Type",
    "Task Start Time(us)",
    "Task Duration(us)",
    "Input Shapes",
)
KERNEL_DETAILS = (
    "Step Id",
    "Device_id",
    "Name",
    "Type",
    "Accelerator Core",
    "Start Time(us)",
    "Duration(us)",
    "Input Shapes",
)
LAYERS, HEADS, HEAD_DIM = 4, 4, 64


def query(tokens: int, sequences: int, bsh: bool = False) -> str:
    """Input shapes of a fused attention: TND with a list of lengths, or BSH of a decode."""
    if bsh:
        return f"{sequences},1,{HEADS * HEAD_DIM};128,128,128;128,128,128;;;;{sequences};;;;;;;;{sequences},8"
    return f"{tokens},{HEADS},{HEAD_DIM};128,128,128;128,128,128;;2048,2048;{sequences};{sequences}"


def export(
    path: Path, steps: list[tuple[int, int, float]], columns: tuple[str, ...] = OP_SUMMARY, bsh: bool = False
) -> Path:
    """Kernels of steps of (tokens, sequences, us): two per layer, half of the time, the rest between them; a step
    behind the last one shows where that ends.
    """
    lines, now = [], 1_000_000.0
    for number, (tokens, sequences, took) in enumerate([*steps, (1, 1, 100.0)]):
        each = took / (2 * LAYERS)
        for _ in range(LAYERS):
            for kind, shapes in (("FusedInferAttentionScore", query(tokens, sequences, bsh)), ("MatMulV2", "9,9;9,9")):
                values = {
                    "Step Id": number,
                    "Device_id": 0,
                    "OP Type": kind,
                    "Type": kind,
                    "Task Start Time(us)": f"{now:.3f}\t",
                    "Start Time(us)": f"{now:.3f}\t",
                    "Task Duration(us)": each / 2,
                    "Duration(us)": each / 2,
                    "Input Shapes": f'"""{shapes}"""',
                }
                lines.append(",".join(str(values.get(name, "x")) for name in columns))
                now += each
    path.write_text(",".join(columns) + "\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "columns"), [("op_summary_1.csv", OP_SUMMARY), ("kernel_details.csv", KERNEL_DETAILS)]
)
def test_steps_of_kernels(name: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    """A step lasts until the next one's first attention; its query tells tokens, its list of lengths sequences."""
    found = read_steps(
        export(tmp_path / name, [(3, 3, 4000.0), (102, 3, 9000.0), (50, 1, 5000.0)], columns), LAYERS, HEAD_DIM
    )
    assert found == [
        (StepShape(0, 0, 0, 3, 0), 4_000_000),
        (StepShape(100, 5050, 1, 2, 0), 9_000_000),
        (StepShape(50, 1275, 1, 0, 0), 5_000_000),
    ]


def test_a_decode_in_bsh(tmp_path: Path) -> None:
    """A query of one token per sequence, as graphs have it."""
    file = export(tmp_path / "op_summary_1.csv", [(7, 7, 3000.0)], bsh=True)
    assert read_steps(file, LAYERS, HEAD_DIM) == [(StepShape(0, 0, 0, 7, 0), 3_000_000)]


def test_a_pause_is_no_step(tmp_path: Path) -> None:
    """Where the device had nothing to do, the step ended with its last kernel."""
    file = export(tmp_path / "op_summary_1.csv", [(3, 3, 4000.0)])
    head, *rows = file.read_text().splitlines()
    moved = [row.replace("1004", "1904") for row in rows]  # the second step comes 0.9 s later
    file.write_text("\n".join([head, *moved]) + "\n")
    ((_, took),) = read_steps(file, LAYERS, HEAD_DIM)
    assert took == pytest.approx(3_750_000)


def test_traces_of_steps(tmp_path: Path) -> None:
    """Times of either profiler, with what steps computed in a table beside them; steps it does not have are left."""
    beside = "step,prefill_tokens,decode_sequences,decode_context\n1,0,4,400\n2,10,4,404\n"
    torch = tmp_path / "step_trace_time.csv"
    torch.write_text(
        "Device_id,Step,Computing,Communication(Not Overlapped),Overlapped,Communication,Free,Stage\n"
        "0,1,3000.0,200.0,100.0,300.0,50.0,3250.0\n0,2,4000.5,0,0,0,0,4000.5\n0,3,1,1,1,1,1,1\n"
    )
    msprof.contents(torch).write_text(beside)
    shapes = [StepShape(0, 0, 0, 4, 400), StepShape(10, 55, 1, 4, 404)]
    assert read_steps(torch) == list(zip(shapes, [3_250_000, 4_000_500], strict=True))
    graph = tmp_path / "step_trace_0_1.csv"
    graph.write_text(
        "Iteration ID,FP Start(us),BP End(us),Iteration End(us),Iteration Time(us)\n1,N/A,N/A,5,7.5\n2,N/A,N/A,9,8\n"
    )
    with pytest.raises(ValueError, match=r"needed is step_trace_0_1\.contents\.csv beside it"):
        read_steps(graph)
    msprof.contents(graph).write_text(beside)
    assert read_steps(graph) == list(zip(shapes, [7500, 8000], strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Op Name\nx\n", r"line 2: needed are the columns of op_summary"),
        ("OP Type,Task Start Time(us),Task Duration(us)\nMatMul,1,1\n", "no attention among the types of 1 kernels"),
        ("OP Type,Task Start Time(us),Task Duration(us)\nMatMul,soon,1\n", "line 2: 'soon' is no time"),
        (
            "OP Type,Task Start Time(us),Task Duration(us)\nFusedInferAttentionScore,1,1\n",
            "1 attention kernels are no whole number of steps of 4 layers",
        ),
        (
            "OP Type,Task Start Time(us),Task Duration(us)\n" + "FlashAttentionScore,1,1\n" * 8,
            "has Input Shapes '': profile with shapes",
        ),
    ],
)
def test_what_is_no_export(text: str, message: str, tmp_path: Path) -> None:
    """Missing columns, no attention, other numbers of layers, no shapes: each says what is needed."""
    file = tmp_path / "op_summary_1.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_steps(file, LAYERS, HEAD_DIM)


def test_from_kernels_to_a_simulation(deepflow: Command, tmp_path: Path) -> None:
    """An export becomes a profile with its held-out error, that profile a run, which says what is beyond the export."""
    steps = [
        (tokens + batch, batch + (tokens > 0), 5000 + 10.0 * tokens + 200 * batch)
        for tokens in (0, 64, 256)
        for batch in range(1, 30)
    ]
    file = export(tmp_path / "op_summary_1.csv", steps)
    said = deepflow("profile", "--from", str(file), "model=tiny_llama", "out=fitted")
    assert said.code == 0, said
    assert "held-out error of a step" in said.out
    fitted = profiles.load_latency(said.folder)
    assert fitted.step_ns(StepShape(64, 2080, 1, 10, 0)) == pytest.approx(7.64e6, rel=0.02)
    ran = deepflow("run", *SIM, "latency=profile", f"latency.path={said.folder}", "report=true", "out=ran")
    assert ran.code == 0, ran
    assert "step times" in ran.out
    assert "are extrapolated" in ran.out
    assert "are extrapolated" in (ran.folder / "report.html").read_text()
    assert "are extrapolated" in read_summary(ran.folder).provenance["notes"][0]
