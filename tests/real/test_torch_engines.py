"""The control plane on real engines of a tiny random Llama: the same tokens, wherever and however they are computed."""

from pathlib import Path
from typing import Literal

import msgspec
import pytest

from cluster import events as ev
from cluster.actions import LaunchExecutor, SubmitRequest, SwitchRole
from cluster.manager import GroupPlan
from cluster.metrics import Slo, summarise
from cluster.request import Answer, Arrival, KvSource, Request, Trigger
from cluster.vocabulary import Role, TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.record import read_turns
from flowserve.core.transfer import KvTransfer
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from flowserve.runtime.wire import TorchDevice
from real.cluster import Engine, RealCluster
from tests.builders import MODEL, chain, disaggregated, make_spec
from tests.contract.backends import ACTORS, Driver
from tests.real.engines import COLOCATED, RealRun, Watch, kill_on, run_real, shared_memory
from tests.real.test_real_metrics import read

SHAPE = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=256, max_position=512
)
# Prompts take several chunks, and the KV cache holds them all.
ENGINE = EngineConfig(kv_blocks=256, token_budget=48, max_sequences=16)
PAIR = disaggregated(1, 1)
FIRST, REQUESTS = 10, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    return make_checkpoint("tiny", SHAPE, tmp_path_factory.mktemp("models"))


def workload() -> list[Arrival]:
    """Two waves of requests; those of the second share prefixes of 5 blocks with those of the first."""
    arrivals = []
    for number in range(REQUESTS):
        prompt, output = 85 + 13 * number % 70, 30 + 7 * number % 50
        shared = [1, number % 3, 4, 4, 2]
        ids = chain(*shared, *[number % 10] * (prompt // 16 - len(shared)))
        request = Request(number, prompt, output + 3, MODEL, ids if number % 5 else None)
        after = Trigger("ended", count=FIRST) if number >= FIRST else None
        arrivals.append(Arrival(request, Answer(output), after=after))
    return arrivals


def run_torch(
    model: Path,
    groups: list[GroupPlan],
    watch: Watch | None = None,
    log_dir: Path | None = None,
    in_flight: int = 1,
    drafter: Literal["ngram", "model"] | None = None,
    kv_transfer: KvTransfer = "by_request",
) -> RealRun:
    engine = msgspec.structs.replace(ENGINE, max_in_flight=in_flight, kv_transfer=kv_transfer)
    if drafter is not None:
        engine = msgspec.structs.replace(engine, token_budget=80, speculative_tokens=4, drafter=drafter)

    run = run_real(
        workload(),
        groups=groups,
        engine=engine,
        device=TorchDevice(str(model), draft_dir=str(model) if drafter == "model" else None),
        vocab=SHAPE.vocab_size,
        watch=watch,
        log_dir=log_dir,
        record=log_dir is not None,
    )
    assert run.ends == {a.request.request_id: ("finished", a.answer.output_tokens) for a in workload()}
    return run


@pytest.fixture(scope="module")
def colocated(model: Path) -> RealRun:
    """The workload on two colocated engines."""
    return run_torch(model, COLOCATED)


def test_colocated_engines_serve_and_cache(colocated: RealRun) -> None:
    """Outputs have the right lengths, lie in the vocabulary, differ between prompts, and prefixes are found again."""
    assert {number: len(tokens) for number, tokens in colocated.outputs.items()} == {
        arrival.request.request_id: arrival.answer.output_tokens for arrival in workload()
    }
    assert all(0 <= token < SHAPE.vocab_size for tokens in colocated.outputs.values() for token in tokens)
    assert len({tuple(tokens[:5]) for tokens in colocated.outputs.values()}) > REQUESTS // 2
    cached = {event.request_id: event.cached_tokens for event in colocated.of(ev.TaskFinished)}
    # A request that shares nothing finds nothing; where one lands that shares its first 80 tokens is a matter of load.
    assert sum(cached[number] >= 80 for number in range(FIRST, REQUESTS) if number % 5) >= 4
    assert all(cached[number] == 0 for number in range(REQUESTS) if not number % 5)
    assert {event.executor for event in colocated.of(ev.TaskFinished)} == {"te-0", "te-1"}


@pytest.mark.parametrize(
    ("in_flight", "kv_transfer"), [(1, "by_request"), (2, "by_request"), (1, "by_chunk"), (2, "by_chunk")]
)
def test_disaggregated_engines_give_the_same_tokens(
    colocated: RealRun, model: Path, tmp_path: Path, in_flight: int, kv_transfer: KvTransfer
) -> None:
    """Prefill and decode on different engines, with the KV cache moved between them, yield the very same tokens."""
    run = run_torch(model, PAIR, log_dir=tmp_path, in_flight=in_flight, kv_transfer=kv_transfer)
    assert run.outputs == colocated.outputs
    turns = list(read_turns(tmp_path / "te-1.turns.jsonl"))
    parts = [(task_id, blocks) for turn in turns for task_id, _, blocks in turn.transfers]
    moved: dict[int, list[int]] = {}
    for task_id, blocks in parts:
        moved.setdefault(task_id, []).extend(blocks)
    assert (len(parts) > len(moved)) == (kv_transfer == "by_chunk")
    decoded = {event.task_id: event for event in run.of(ev.TaskFinished) if event.executor == "te-1"}
    assert len(decoded) == REQUESTS
    assert set(moved) <= set(decoded)
    assert not any(plan.chunks for turn in turns for plan in turn.plans), "the decode engine computed a prompt"
    prompts = {arrival.request.request_id: arrival.request.prompt_tokens for arrival in workload()}
    for task_id, event in decoded.items():
        # What was not cached there was moved, to the block.
        needed = -(-prompts[event.request_id] // 16) - event.cached_tokens // 16
        assert len(moved.get(task_id, [])) == needed
    assert any(event.cached_tokens for event in decoded.values())
    assert shared_memory() == set()


@pytest.mark.parametrize(
    ("in_flight", "kv_transfer"), [(1, "by_request"), (2, "by_request"), (1, "by_chunk"), (2, "by_chunk")]
)
def test_an_engine_that_changed_sides_gives_the_same_tokens(
    colocated: RealRun, model: Path, tmp_path: Path, in_flight: int, kv_transfer: KvTransfer
) -> None:
    """It decodes in the blocks of its own prefills, which may be under way, and copies nothing from itself."""
    engine = msgspec.structs.replace(ENGINE, max_in_flight=in_flight, kv_transfer=kv_transfer)
    ready = ev.TaskFinished if kv_transfer == "by_request" else ev.PrefillStarted
    requests = [(arrival.request, arrival.answer) for arrival in workload()[:FIRST]]
    with RealCluster(
        ACTORS,
        lambda spec: Engine(engine, TorchDevice(str(model))),
        lambda model: SHAPE.vocab_size,
        log_dir=tmp_path,
        record=True,
    ) as cluster:
        driver = Driver(cluster)
        driver.launch("te-0", Role.PREFILL)
        for request, answer in requests:
            driver.submit(SubmitRequest("je", request, answer))
            driver.wait(ev.RequestArrived, to="je", request=request)
            driver.dispatch("te-0", request, request.request_id, TaskKind.PREFILL)
        driver.submit(SwitchRole("te-0", Role.DECODE))
        for request, _ in requests:
            number = request.request_id
            driver.wait(ready, task_id=number)
            driver.dispatch("te-0", request, 100 + number, TaskKind.DECODE, 1, KvSource("te-0", number))
        for request, answer in requests:
            finished = driver.wait(ev.TaskFinished, task_id=100 + request.request_id)
            assert finished.generated == answer.output_tokens
        outputs = cluster.outputs()
    assert outputs == {number: colocated.outputs[number] for number in range(FIRST)}
    turns = list(read_turns(tmp_path / "te-0.turns.jsonl"))
    assert not any(turn.transfers for turn in turns)
    prompts = sum(request.prompt_tokens for request, _ in requests)
    assert sum(tokens for turn in turns for plan in turn.plans for _, _, tokens in plan.chunks) <= prompts
    assert shared_memory() == set()


@pytest.mark.parametrize(
    ("groups", "drafter", "in_flight"),
    [(COLOCATED, "ngram", 2), (PAIR, "model", 1)],
    ids=["colocated, prompt lookup", "disaggregated, draft model"],
)
def test_engines_that_speculate_give_the_same_tokens(
    colocated: RealRun,
    model: Path,
    tmp_path: Path,
    groups: list[GroupPlan],
    drafter: Literal["ngram", "model"],
    in_flight: int,
) -> None:
    """Guessed or not, outputs are the same, ends inside accepted runs included; what was guessed is counted."""
    run = run_torch(model, groups, log_dir=tmp_path, in_flight=in_flight, drafter=drafter)
    assert run.outputs == colocated.outputs
    summary = summarise(run.recorder, Slo())
    assert 0 < summary["accepted_tokens"] <= summary["draft_tokens"]
    if drafter == "model":  # it guesses for itself, and its KV cache came with the model's
        assert summary["draft_acceptance"] == 1
        verifies = [v for turn in read_turns(tmp_path / "te-1.turns.jsonl") for p in turn.plans for v in p.verifies]
        assert len(verifies) < 0.3 * sum(len(tokens) for tokens in run.outputs.values())
    series = read((tmp_path / "metrics.prom").read_text())
    assert sum(series["spec_decode_num_draft_tokens_total"].values()) == summary["draft_tokens"]
    assert sum(series["spec_decode_num_accepted_tokens_total"].values()) == summary["accepted_tokens"]


@pytest.mark.parametrize(
    ("groups", "watch"),
    [
        pytest.param(COLOCATED, kill_on("te-1", ev.FirstToken, 2), id="colocated"),
        pytest.param(PAIR, kill_on("te-1", ev.TaskFinished, 3, stopped=True), id="decode"),
    ],
)
def test_a_killed_engine_costs_no_token(colocated: RealRun, model: Path, groups: list[GroupPlan], watch: Watch) -> None:
    """After kill -9 of an engine in mid-run, with plans in flight, prompts and tokens so far are computed again, to the
    same result as without.
    """
    run = run_torch(model, groups, watch, in_flight=2)
    assert [event.executor for event in run.of(ev.ExecutorFailed)] == ["te-1"]
    assert {event.executor for event in run.of(ev.TaskFailed)} == {"te-1"}
    assert len(run.launches) == 3
    assert run.outputs == colocated.outputs


def test_an_engine_without_a_model_says_so(tmp_path: Path) -> None:
    """An engine whose model folder does not exist is reported as failed, with the folder."""
    engine = Engine(ENGINE, TorchDevice(str(tmp_path / "nowhere")))
    with RealCluster(ACTORS, lambda spec: engine, lambda model: 256) as cluster:
        driver = Driver(cluster)
        driver.submit(LaunchExecutor("te-0", make_spec()))
        failed = driver.wait(ev.ExecutorFailed)
        assert str(tmp_path / "nowhere") in failed.reason
