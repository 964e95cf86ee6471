"""Benchmarks: found by file name, measured apart, kept as data, shown as tables."""

from pathlib import Path

import msgspec
import pytest

from experiments.bench import cuda, host, sim, versions
from experiments.bench.harness import machine, registry, table, workload
from experiments.bench.harness.result import Result, Row, load, median_row, save
from experiments.cli import main

ROWS = [
    median_row("speed", [2.0, 4.0, 3.0], "x", "30 against 10 tok/s", at_least=3),
    median_row("delay", [5.0], "µs", at_most=4),
    Row(name="free", value=0.5, unit=""),
]
RESULT = Result(
    bench="sample",
    about="An example.",
    date="2026-01-02T03:04:05+00:00",
    machine="A processor",
    cores=2,
    threads=1,
    options={"threads": 1, "repeats": 3, "device": None},
    versions={"python": "3.11", "torch": "2.13"},
    load=0.1,
    busy=(0.0, 0.02),
    seconds=1.5,
    rows=ROWS,
)


def test_benchmarks_are_the_files_of_their_folder() -> None:
    """Each has a description, options with defaults, and a function that runs it."""
    assert {"cuda", "engine_cpu", "host", "prefix", "versions"} <= set(registry.names())
    for name in registry.names():
        module = registry.find(name)
        assert registry.about(module).endswith(".")
        assert ("threads", 1) in registry.fields(module)
        assert callable(module.run)


def test_options_are_typed() -> None:
    """Values are converted; what a benchmark does not take is named."""
    assert registry.parse(host, ["sequences=8", "repeats=1"]) == host.Options(sequences=8, repeats=1)
    for word, dynamo in (("yes", True), ("true", True), ("no", False), ("False", False)):
        assert registry.parse(sim, [f"dynamo={word}", "blis=null"]) == sim.Options(dynamo=dynamo)
    with pytest.raises(ValueError, match=r"argument 'size=3': host takes threads=, repeats=, sequences="):
        registry.parse(host, ["size=3"])
    with pytest.raises(ValueError, match=r"Expected `int`"):
        registry.parse(host, ["sequences=many"])
    with pytest.raises(ValueError, match="repeats is 0: it must be at least 1"):
        registry.parse(host, ["repeats=0"])


def test_targets() -> None:
    """A row knows its median and whether it is what it should be."""
    assert [row.value for row in ROWS] == [3.0, 5.0, 0.5]
    assert [row.met for row in ROWS] == [True, False, None]


def test_results_are_kept(tmp_path: Path) -> None:
    """A data file comes back as it was written; another schema is refused."""
    assert load(save(RESULT, tmp_path)) == RESULT
    path = save(msgspec.structs.replace(RESULT, schema="other/9"), tmp_path)
    with pytest.raises(ValueError, match="its schema is 'other/9', this version reads 'deepflow-bench/1'"):
        load(path)


def test_the_readme_section(tmp_path: Path) -> None:
    """It is replaced between its markers, twice alike, and names machine, date, and a machine that was busy."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    noisy = msgspec.structs.replace(RESULT, bench="noisy", busy=(0.4, 0.1))
    for _ in range(2):
        assert table.update(readme, [RESULT, noisy])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| sample | speed | **3.00 x** | ≥ 3.00 | 30 against 10 tok/s |") == 1
    assert "| sample | delay | 5.00 µs | ≤ 4.00 |" in text
    assert "**A processor**, 2 cores" in text
    assert "- sample: 2026-01-02, 1 thread(s), torch 2.13\n" in text
    assert "the machine was not idle: others used 40% of its cores just before and 10% just after" in text
    (tmp_path / "other.md").write_text("no markers")
    assert not table.update(tmp_path / "other.md", [RESULT])


def test_the_table_says_what_could_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per number, and the reason where a benchmark is missing."""
    table.print_results([RESULT], {"cuda": "there is no cuda device here"})
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("speed", "3.00 x", "no cuda device", "not run here"):
        assert text in shown


def test_mixed_loads_are_seeded() -> None:
    """Lengths stay within their limits, and the same seed gives the same requests."""
    loads = workload.mixed_load(50, (32, 512), (16, 256), 100, seed=3)
    assert loads == workload.mixed_load(50, (32, 512), (16, 256), 100, seed=3)
    assert loads != workload.mixed_load(50, (32, 512), (16, 256), 100, seed=4)
    assert 32 <= min(len(each.prompt) for each in loads) < 60
    assert 300 < max(len(each.prompt) for each in loads) <= 512
    assert all(16 <= each.output <= 256 and max(each.prompt) < 100 for each in loads)


def test_more_threads_than_cores_are_refused() -> None:
    """Pinning says how many cores there are."""
    with pytest.raises(ValueError, match=f"threads is 4096, but this process may use {machine.cores()} cores"):
        machine.pin(4096)


def test_one_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs in a process of its own, and with options of its own its data go to runs/bench."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "host", "sequences=4", "repeats=1"]) == 0
    shown = capsys.readouterr().out
    result = load(tmp_path / "runs" / "bench" / "host.json")
    assert result.options["sequences"] == 4
    assert [row.unit for row in result.rows] == ["µs", "µs", "ms", "µs"]
    assert all(row.value > 0 for row in result.rows)
    assert shown.splitlines()[-1] == "runs/bench"


def test_a_benchmark_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """One line names those that do."""
    assert main(["bench", "nothing"]) == 2
    assert "no benchmark 'nothing': there are cuda, " in capsys.readouterr().err


@pytest.mark.skipif(registry.missing(cuda, cuda.Options()) is None, reason="this machine can run it")
def test_what_this_machine_lacks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark that cannot run here is no error."""
    assert main(["bench", "cuda"]) == 0
    assert "not run here" in capsys.readouterr().out


@pytest.mark.slow
def test_the_device_benchmark_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU allows: every row is there, and the profile is one that the simulator reads."""
    from sim.profile import load_latency

    monkeypatch.chdir(tmp_path)
    small = ["device=cpu", "model=tiny_llama", "dtype=float32", "prompt=64", "context=32", "requests=2"]
    assert main(["bench", "cuda", *small, "matrix=64", "megabytes=1", "repeats=1"]) == 0
    rows = load(tmp_path / "runs" / "bench" / "cuda.json").rows
    assert [row.name.partition(":")[0] for row in rows] == [
        "decode, batch 1",
        "decode, batch 32",
        "prefill of 64 tokens",
        "throughput / transformers continuous batching",
    ]
    assert load_latency(tmp_path / "runs" / "profiles" / "tiny-llama-cpu" / "profile.json").coefficients_ns


def test_batch_at_a_time_per_token() -> None:
    """Between measured batches it is interpolated; beyond them, at most the largest is claimed."""
    assert versions._batch_at(15, (10, 20, 40), (5, 10, 20)) == 30
    assert versions._batch_at(4, (10, 20, 40), (5, 10, 20)) == 8
    assert versions._batch_at(50, (10, 20, 40), (5, 10, 20)) == 40
    assert versions._batch_at(9, (10, 20), (8, 7)) == 20


@pytest.mark.slow
def test_versions_are_engines() -> None:
    """Each version serves its batches, token for token, on a device that takes its time."""
    device = versions.Device("quick", (2, 4), step_s=0.002)
    rows = list(versions._compare(device, 4.0, repeats=1))
    assert [row.name.partition(": ")[2] for row in rows] == ["v1, decode at TPOT 4 ms", "v2 / v1", "v3 / v2"]
    assert all(row.value > 0 for row in rows)
