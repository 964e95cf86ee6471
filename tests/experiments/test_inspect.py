"""`deepflow inspect`: the run at a time is the run that was, from its beginning or from a snapshot, step by step."""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments import compose, resume, run
from experiments.inspection import Inspection
from tests.experiments.conftest import Said
from tests.experiments.small import SIM

pytestmark = pytest.mark.pure  # snapshots hold objects that compiled ones are not

RUN = [*SIM, "trace=synthetic", "trace.duration_s=60", "trace.rate=2", "fleet=pd_1p1d", "dispatch=deepflow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a snapshot at 30 s."""
    folder = tmp_path_factory.mktemp("inspected")
    run(compose([*RUN, "snapshot_at=30"]), folder)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "requests.parquet").set_index("request_id")


def said_of(lines: object) -> str:
    return "\n".join(lines)  # type: ignore[arg-type]


def test_the_state_at_a_time_is_that_of_the_records(folder: Path, table: pd.DataFrame) -> None:
    """Requests open, waiting and decoding, and the tokens they have, are those that the tables tell of that time."""
    at = Inspection(folder, 20.0)
    at.until(20.0)
    open_ = table[(table.arrival_ns <= 20e9) & (table.last_token_ns > 20e9)]
    assert set(at.control.client.due) == set(open_.index)
    decoding = open_[open_.first_token_ns < 19.9e9]
    core = at.cluster.executors["te-1"].shell.core
    batch = {sequence.task.request.request_id: sequence.generated for sequence in core.decoding()}
    assert len(decoding) > 3 and set(decoding.index) <= set(batch)
    for request_id, row in decoding.iterrows():  # the rest comes at the pace of the whole, but for the hand-over
        if (left := row.output_tokens - batch[request_id]) < 30:
            continue
        assert (row.last_token_ns - 20e9) / left == pytest.approx(row.tpot_s * 1e9, rel=0.2)
    at.cluster.executors["te-1"].shell.core.check_integrity()
    shown = said_of(at.executor("te-1", most=1000))
    assert all(f"\n  {request_id} " in shown for request_id in batch)
    assert "prefix tree" in shown and "HBM:" in shown
    assert "the same run so far" in said_of(at.overview())


def test_from_a_snapshot_and_from_the_beginning_it_is_the_same(folder: Path) -> None:
    """Where there is a snapshot from before that time, it begins there, and finds what it finds without."""
    snapshot = folder / "snapshot.bin"
    near = Inspection(folder, 40.0)
    near.until(40.0)
    assert "from its snapshot at 30" in near.began
    moved = snapshot.rename(folder / "elsewhere.bin")
    try:
        far = Inspection(folder, 40.0)
        far.until(40.0)
    finally:
        moved.rename(snapshot)
    assert far.began == "from its beginning"
    assert list(near.executor("te-1")) == list(far.executor("te-1"))
    assert list(near.overview())[2:] == list(far.overview())[2:]
    assert near.log.decisions < far.log.decisions


def test_to_the_end_it_is_the_same_run(folder: Path) -> None:
    """Stopping at many times on the way changes no decision."""
    at = Inspection(folder, 0.0)
    for second in range(0, 300, 3):
        at.until(second + 0.1234)
    assert at.over
    assert at.log.different is None
    assert at.log.decisions == (folder / "decisions.jsonl").read_bytes().count(b"\n")  # with the header
    with pytest.raises(ValueError, match="is past"):
        at.until(1.0)


def test_steps_of_an_executor_one_by_one(folder: Path) -> None:
    """Each step of the engine gives each decoding sequence one token, and takes as long as the step before, or so."""
    at = Inspection(folder, 20.0)
    at.until(20.0)
    executor = at.cluster.executors["te-1"]
    for _ in range(30):
        steps = executor.steps + 1
        before = {each.task_id: each.generated for each in executor.shell.core.decoding()}
        change = at.step("te-1")
        after = {each.task_id: each.generated for each in executor.shell.core.decoding()}
        assert executor.steps == steps
        assert all(after[task] == tokens + 1 for task, tokens in before.items() if task in after)
        assert any("generated" in sentence for sentence in change.said)
    at.until(300.0)
    assert at.log.different is None


def test_events_one_by_one(folder: Path) -> None:
    """Without an executor a step is an event of the control plane, and what was decided on it."""
    at = Inspection(folder, 20.0)
    at.until(20.0)
    said = [at.step().said for _ in range(200)]
    assert any(sentences[0].startswith("RequestArrived to=je-0 request=") for sentences in said)
    assert any(sentence.startswith("  → DispatchTask") for sentences in said for sentence in sentences[1:])


def test_a_request_is_followed(folder: Path, table: pd.DataFrame) -> None:
    """Open, it is found in its engine; ended, with its tasks; not yet arrived, there is nothing to say."""
    request_id = int(table[(table.first_token_ns < 19e9) & (table.last_token_ns > 21e9)].index[0])
    at = Inspection(folder, 20.0)
    at.until(20.0)
    shown = said_of(at.request(request_id))
    assert f"request {request_id}: open" in shown
    assert "(prefill) on te-0: placed at" in shown and "(decode) on te-1" in shown and "phase decode" in shown
    with pytest.raises(ValueError, match="has not arrived"):
        list(at.request(int(table.index.max())))
    at.until(60.0)
    assert f"request {request_id}: finished" in said_of(at.request(request_id))


def test_another_run_is_noticed(folder: Path, tmp_path: Path, deepflow: Callable[..., Said]) -> None:
    """Where the decisions are no longer those of the file, it says from when on, and the exit code is 1."""
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    lines = (folder / "decisions.jsonl").read_bytes().splitlines(keepends=True)
    lines[500] = lines[500].replace(b"te-1", b"te-0").replace(b'"time":', b'"time":1')
    (tmp_path / "decisions.jsonl").write_bytes(b"".join(lines))
    said = deepflow("inspect", str(tmp_path), "t=30")
    assert said.code == 1
    assert "NOT THE SAME RUN from" in said.out
    (tmp_path / "decisions.jsonl").unlink()
    said = deepflow("inspect", str(tmp_path), "t=3", "executor=te-0", "step=2")
    assert said.code == 0, said
    assert "not checked" in said.out


def test_a_run_resumed_with_another_policy(folder: Path, tmp_path: Path) -> None:
    """It is simulated from the snapshot with what took over there; before that, it is another folder's run."""
    resume(folder / "snapshot.bin", ["dispatch=round_robin", "trace.rate=3"], folder=tmp_path)
    at = Inspection(tmp_path, 45.0)
    at.until(500.0)
    assert at.over and at.log.different is None and at.log.decisions > 1000
    with pytest.raises(ValueError, match="for times before, inspect"):
        Inspection(tmp_path, 20.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "0 folders: name that of one finished run"),
        (("nowhere",), "holds no config.yaml"),
        (("FOLDER", "t=soon"), "t=soon: allowed is a number from 0 up"),
        (("FOLDER", "time=3"), "time=3: allowed are t="),
        (("FOLDER", "t=5", "executor=te-9"), "executor 'te-9' is not up at 5 s: there are te-0, te-1"),
        (("FOLDER", "t=5", "request=100000"), "request 100000 has not arrived"),
    ],
)
def test_mistakes_are_said(deepflow: Callable[..., Said], folder: Path, arguments: tuple[str, ...], said: str) -> None:
    """One line, and exit code 2."""
    answer = deepflow("inspect", *(each.replace("FOLDER", str(folder)) for each in arguments))
    assert answer.code == 2
    assert said in answer.err


def test_a_conversation(deepflow: Callable[..., Said], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal it asks what to show next, and says what it did not understand."""
    lines = iter(
        ["next 2", "until 25", "executor te-1", "n", "request 3", "what", "until 1", "executor", "show", "quit"]
    )
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    said = deepflow("inspect", str(folder), "t=20")
    assert said.code == 0, said
    for words in ("t = 25.000000 s", "step of", "request 3: finished", "until T", "t=1 is past"):
        assert words in said.out, words
