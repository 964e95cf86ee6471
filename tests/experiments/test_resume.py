"""`deepflow run snapshot_at=…` and `resume=…`: the same run, other policies from there on, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments import compose, resume, run
from experiments.commands.replay import replay
from experiments.outputs import read_summary
from tests.experiments.conftest import Said
from tests.experiments.small import SIM

pytestmark = pytest.mark.pure  # snapshots hold objects that compiled ones are not

RUN = [*SIM, "trace=synthetic", "trace.duration_s=60", "trace.rate=2", "report=false", "progress=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that goes on to its end after its snapshot."""
    folder = tmp_path_factory.mktemp("whole")
    run(compose([*RUN, "snapshot_at=30"]), folder)
    return folder


def same_tables(one: Path, other: Path) -> bool:
    return all(
        pd.read_parquet(one / name).equals(pd.read_parquet(other / name))
        for name in ("requests.parquet", "executors.parquet", "scaling.parquet")
    )


def test_resumed_without_overrides_every_file_is_the_same(whole: Path, tmp_path: Path) -> None:
    """Decisions, tables, timeline and metrics of the resumed run are those of the uninterrupted one, bit for bit."""
    result = resume(whole / "snapshot.bin", folder=tmp_path)
    for name in ("decisions.jsonl", "timeline.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert same_tables(tmp_path, whole)
    of_the_process = {"startup_s", "wall_s"}
    before = read_summary(whole).metrics
    assert {key: value for key, value in result.summary.items() if key not in of_the_process} == pytest.approx(
        {key: value for key, value in before.items() if key not in of_the_process}, nan_ok=True
    )
    assert "resumed at 30" in " ".join(read_summary(tmp_path).provenance["notes"])
    count, difference = replay(tmp_path)
    assert difference is None and count > 1000


def test_a_snapshot_is_no_part_of_the_run(whole: Path, tmp_path: Path) -> None:
    """A run that takes a snapshot decides what the same run without one does."""
    run(compose(RUN), tmp_path)
    assert (tmp_path / "decisions.jsonl").read_bytes() == (whole / "decisions.jsonl").read_bytes()


def test_another_policy_takes_over(whole: Path, tmp_path: Path) -> None:
    """Requests that ended before the snapshot are as they were, those after it are placed by the other policy."""
    resume(whole, ["dispatch=round_robin"], folder=tmp_path)
    before, after = pd.read_parquet(whole / "requests.parquet"), pd.read_parquet(tmp_path / "requests.parquet")
    assert sorted(before.request_id) == sorted(after.request_id)
    ended = before.last_token_ns < 30e9
    assert ended.any() and not ended.all()
    assert before[ended].equals(after[: ended.sum()])
    assert not before[~ended].reset_index(drop=True).equals(after[ended.sum() :].reset_index(drop=True))
    with pytest.raises(ValueError, match="cannot be replayed"):
        replay(tmp_path)


def test_another_scaling_policy_takes_over(whole: Path, tmp_path: Path) -> None:
    """A fleet of fixed size begins to scale at the snapshot."""
    scaling = ["scaling=target_utilisation", "scaling.period_s=1", "scaling.down_delay_s=2", "scaling.target=0.9"]
    resume(whole / "snapshot.bin", scaling, folder=tmp_path)
    steps = pd.read_parquet(tmp_path / "scaling.parquet")
    assert set(steps[steps.time_s < 30].what) == set(pd.read_parquet(whole / "scaling.parquet").what)
    assert "retired" in set(steps[steps.time_s > 30].what)


def test_another_rate_from_there_on(whole: Path, tmp_path: Path) -> None:
    """The same requests come at their old times before the snapshot, and twice as fast behind it."""
    resume(whole / "snapshot.bin", ["trace.rate=4"], folder=tmp_path)
    before = pd.read_parquet(whole / "requests.parquet").sort_values("request_id").arrival_ns.to_numpy()
    after = pd.read_parquet(tmp_path / "requests.parquet").sort_values("request_id").arrival_ns.to_numpy()
    at = json.loads((whole / "snapshot.bin").read_bytes().partition(b"\n")[0])["at_ns"]
    early, late = before <= at, before > at + 1e9
    assert early.any() and (before[early] == after[early]).all()
    assert late.any() and after[late] - at == pytest.approx((before[late] - at) / 2, abs=50_000)  # decisions take time


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=qwen2_5_7b", "allowed in a resumed run are dispatch, scaling, slo, trace.rate"),
        ("engine.kv_blocks=7", "allowed in a resumed run are"),
        ("trace.duration_s=7", "allowed in a resumed run are"),
        ("dispatch=round_robin,deepflow", "allowed in a resumed run are"),
        ("dispatch.no_such_key=7", "there is no dispatch.no_such_key"),
        ("dispatch=no_such_policy", "no_such_policy"),
        ("trace.rate=0", "allowed is a factor above 0"),
        ("slo.ttft_s=-1", "slo.ttft_s is -1"),
    ],
)
def test_what_cannot_change_is_refused(deepflow: Callable[..., Said], whole: Path, override: str, said: str) -> None:
    """One line that says what may change, and exit code 2."""
    answer = deepflow("run", f"resume={whole / 'snapshot.bin'}", override)
    assert answer.code == 2
    assert said in answer.err


def test_only_what_this_code_wrote_is_read(whole: Path, tmp_path: Path) -> None:
    """Another schema, version, Python or code, a damaged file and none at all are said to be so, before unpickling."""
    header, _, payload = (whole / "snapshot.bin").read_bytes().partition(b"\n")
    file = tmp_path / "snapshot.bin"
    for key, value in (("schema", "other/1"), ("version", "9"), ("python", "2.7"), ("code", "0")):
        file.write_bytes(json.dumps({**json.loads(header), key: value}).encode() + b"\n" + b"not to be unpickled")
        with pytest.raises(ValueError, match="was written with another"):
            resume(file)
    file.write_bytes(header + b"\n" + payload[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        resume(file)
    file.write_bytes(b"\x80\x05nothing")
    with pytest.raises(ValueError, match="is no snapshot"):
        resume(file)
    with pytest.raises(ValueError, match="does not exist"):
        resume(tmp_path / "no.bin")


def test_decisions_must_lie_beside_the_snapshot(whole: Path, tmp_path: Path) -> None:
    """Without them the log would begin in the middle; it can be done without."""
    moved = tmp_path / "snapshot.bin"
    moved.write_bytes((whole / "snapshot.bin").read_bytes())
    with pytest.raises(ValueError, match="put it beside the snapshot again"):
        resume(moved, folder=tmp_path / "out")
    resume(moved, ["decisions=false"], folder=tmp_path / "out")
    assert same_tables(tmp_path / "out", whole)


def test_a_snapshot_needs_a_simulated_run_that_gets_there(tmp_path: Path) -> None:
    """Real engines cannot be pickled; a run that ends before says so."""
    with pytest.raises(ValueError, match="of a simulated run"):
        run(compose([*RUN, "snapshot_at=-1"]), tmp_path)
    result = run(compose([*RUN, "trace.limit=3", "snapshot_at=1000"]), tmp_path)
    assert not (tmp_path / "snapshot.bin").exists()
    assert any("no snapshot was taken" in note for note in read_summary(result.folder).provenance["notes"])


def test_the_compiled_core_has_no_snapshots(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects cannot be pickled, which is said before anything runs or is written."""
    monkeypatch.setenv("DEEPFLOW_COMPILED", "1")
    with pytest.raises(ValueError, match="snapshot_at is 30, but objects of the compiled core cannot be pickled"):
        run(compose([*RUN, "snapshot_at=30"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="resume without DEEPFLOW_COMPILED"):
        resume(whole / "snapshot.bin", folder=tmp_path / "out")


def test_from_the_command_line(deepflow: Callable[..., Said], whole: Path) -> None:
    """`deepflow run resume=FILE dispatch=…` prints its table and its folder like any run."""
    said = deepflow("run", f"resume={whole / 'snapshot.bin'}", "dispatch=round_robin", "progress=false")
    assert said.code == 0, said
    assert "RoundRobin" in said.out
    assert (said.folder / "summary.json").exists()
