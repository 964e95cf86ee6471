"""The torch runner under the real engine core: whatever the schedule, the tokens are the model's."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import KvSource
from cluster.vocabulary import TaskKind
from flowserve.core.config import EngineConfig
from flowserve.core.sequence import Status
from flowserve.runtime.checkpoint import make_checkpoint
from flowserve.runtime.runner import Payload, Runner
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.torch_runner import TorchRunner
from tests.flowserve.driver import TINY, Engine, Reference, make_prompt, serve

LENGTHS = [1, 5, 16, 17, 31, 32, 33, 60, 100, 150]
PROMPTS = [make_prompt(length, length) for length in LENGTHS]
LIMIT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", TINY, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """Each prompt's greedy output, served alone and in one chunk."""
    return [serve(folder, [prompt], LIMIT)[0] for prompt in PROMPTS]


# -- greedy: every schedule gives the same tokens ------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(reference: Reference, alone: list[list[int]]) -> None:
    """Greedy decoding follows the reference implementation, but where two logits are within 1e-4."""
    for prompt, output in zip(PROMPTS, alone, strict=True):
        assert len(output) == LIMIT
        reference.check_greedy(prompt, output)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"token_budget": 16, "max_sequences": 16},
        {"token_budget": 37, "max_sequences": 3},
        {"block_tokens": 128, "kv_blocks": 32},
        {"prefix_cache": False},
        {"max_in_flight": 2},
        {"max_in_flight": 3, "token_budget": 37, "max_sequences": 3},
        {"kv_layout": "block_major", "token_budget": 37, "max_sequences": 16},
    ],
    ids=[
        "together",
        "small chunks",
        "odd chunks, few at a time",
        "blocks of 128",
        "no prefix cache",
        "two plans in flight",
        "three plans in flight, odd chunks, few at a time",
        "block major",
    ],
)
def test_batched_and_chunked_is_as_alone(folder: Path, alone: list[list[int]], limits: dict[str, Any]) -> None:
    """Mixed steps of chunks and decodes change no token."""
    assert serve(folder, PROMPTS, LIMIT, **limits) == alone


@pytest.mark.parametrize("in_flight", [1, 2])
def test_preempted_requests_go_on_where_they_were(folder: Path, alone: list[list[int]], in_flight: int) -> None:
    """With too few blocks, sequences are preempted and recomputed; no token is lost, repeated or changed."""
    engine = Engine(folder, kv_blocks=26, watermark=0.0, max_in_flight=in_flight)
    tasks = [engine.add(prompt, LIMIT) for prompt in PROMPTS]
    engine.run()
    assert engine.core.preemptions
    assert [engine.output[task] for task in tasks] == alone
    engine.close()


def test_a_cached_prefix_changes_nothing(folder: Path, alone: list[list[int]]) -> None:
    """A prompt whose first blocks are found in the cache gives the tokens that it gives without."""
    engine = Engine(folder)
    first = engine.add(PROMPTS[-1], LIMIT)
    engine.run()
    again, shorter = engine.add(PROMPTS[-1], LIMIT), engine.add(PROMPTS[-1][:70], LIMIT)
    plan = engine.step()
    assert plan is not None
    assert [chunk.start for chunk in plan.chunks] == [144, 64]
    engine.run()
    assert engine.output[first] == engine.output[again] == alone[-1]
    assert engine.output[shorter] == serve(folder, [PROMPTS[-1][:70]], LIMIT)[0]
    engine.close()


def test_a_retry_continues_behind_what_the_frontend_holds(folder: Path, alone: list[list[int]]) -> None:
    """A new task that starts with 7 generated tokens prefills them and goes on with the eighth."""
    engine = Engine(folder)
    tasks = [engine.add(prompt, LIMIT, generated=output[:7]) for prompt, output in zip(PROMPTS, alone, strict=True)]
    engine.run()
    assert [engine.output[task] for task in tasks] == [output[7:] for output in alone]
    engine.close()


def test_a_stop_is_learned_late(folder: Path, alone: list[list[int]]) -> None:
    """With plans in flight, the token that follows a stop is dropped; those before are the same."""
    engine = Engine(folder, max_in_flight=2)
    tasks = [engine.add(prompt, LIMIT) for prompt in PROMPTS]
    late = 0
    while engine.core.in_flight or engine.core.num_running or engine.core.waiting.count:
        engine.step([task for task in tasks if len(engine.output[task]) == 9])
        engine.core.check_integrity()
        late += sum(s.status is Status.ENDED for plan in engine.core.in_flight for s in plan.decodes)
    assert late
    assert [engine.output[task] for task in tasks] == [output[:10] for output in alone]
    engine.close()


@settings(max_examples=12)
@given(st.randoms(use_true_random=False))
def test_any_traffic_gives_the_models_tokens(folder: Path, reference: Reference, rng: random.Random) -> None:
    """Shared prefixes, late arrivals, aborts, stops and preemptions at random: outputs are always the reference's."""
    budget = rng.choice([24, 50, 200])
    engine = Engine(
        folder,
        kv_blocks=rng.choice([24, 60]),
        token_budget=budget,
        max_sequences=rng.choice([4, 24]),
        max_in_flight=rng.choice([1, 2, 3]),
    )
    bases = [make_prompt(seed, 120) for seed in range(3)]
    requests: dict[int, list[int]] = {}
    for _ in range(40):
        if len(requests) < 12 and rng.random() < 0.5:
            base = rng.choice(bases)
            prompt = base[: rng.randint(1, 120)] + make_prompt(rng.randint(0, 5), rng.randint(0, 30))
            requests[engine.add(prompt, rng.randint(1, 40))] = prompt
        if rng.random() < 0.05:
            task = rng.choice(list(requests) or [0])
            if engine.core.abort(task) is not None:
                engine.runner.remove(task)
        engine.step(stop=[s.task_id for s in engine.core.decoding() if rng.random() < 0.03])
    engine.run()
    for task, prompt in requests.items():
        if engine.output[task]:
            reference.check_greedy(prompt, engine.output[task])
    engine.close()


# -- prefill here, decode there ------------------------------------------------------------------------------------


def transfer(prefill: Engine, decode: Engine, prompts: list[list[int]], limit: int) -> list[int]:
    """Prefill on one engine, decode on the other; returns the decode engine's task ids."""
    first = [prefill.add(prompt, limit, kind=TaskKind.PREFILL) for prompt in prompts]
    prefill.run()
    assert prefill.held == first
    tasks = []
    for prompt, source in zip(prompts, first, strict=True):
        kv = KvSource("prefill", source)
        token = prefill.output[source]
        tasks.append(decode.add(prompt, limit, generated=token, kind=TaskKind.DECODE, kv=kv))
    decode.core.schedule()
    handle = prefill.runner.kv_handle
    for sequence, skip, _ in decode.core.fetches:
        assert sequence.task.kv is not None
        skipped = skip // 16
        held = prefill.core.held[sequence.task.kv.task_id].blocks[skipped : len(sequence.blocks)]
        assert 1 <= decode.runner.fetch(handle, held, sequence.blocks[skipped:]) <= len(held)
        decode.core.fetched(sequence.task_id, True)
        prefill.core.release_held(sequence.task.kv.task_id)
    decode.core.fetches.clear()
    return tasks


@pytest.mark.parametrize("layout", ["layer_major", "block_major"])
def test_disaggregated_is_as_local(folder: Path, alone: list[list[int]], layout: str) -> None:
    """A prefill on one engine and decodes on another, over fetched blocks, give the tokens of one engine."""
    prefill, decode = (Engine(folder, kv_blocks=blocks, kv_layout=layout) for blocks in (80, 200))
    decode.add(make_prompt(99, 50), 3)  # so that block numbers differ
    decode.run()
    tasks = transfer(prefill, decode, PROMPTS, LIMIT)
    decode.run()
    outputs = [prefill.output[i + 1] + decode.output[task] for i, task in enumerate(tasks)]
    assert outputs == alone
    assert prefill.core.idle
    prefill.close()
    decode.close()


def test_a_peer_that_is_gone_is_an_os_error(folder: Path) -> None:
    """Blocks cannot be fetched from an engine that is closed, nor from one that has no KV cache to read."""
    one, two = Engine(folder), Engine(folder)
    handle = one.runner.kv_handle
    assert two.runner.fetch(handle, [0, 1], [3, 4]) == 1
    one.close()
    with pytest.raises(OSError, match="/proc/"):
        two.runner.fetch(handle, [0], [0])
    with pytest.raises(OSError, match="no KV cache"):
        two.runner.fetch(None, [0], [0])
    two.close()


# -- sampling ------------------------------------------------------------------------------------------------------


def test_temperature_sampling_depends_on_the_seed_alone(folder: Path, alone: list[list[int]]) -> None:
    """Drawn tokens are the same alone, in a mixed batch, under preemption and after a retry; other seeds differ."""
    sampling = Sampling(temperature=0.8, seed=7)
    single = Engine(folder)
    task = single.add(PROMPTS[6], LIMIT, sampling)
    expected = single.run()[task]
    single.close()

    crowd = Engine(folder, kv_blocks=26, watermark=0.0, max_in_flight=2)
    others = [crowd.add(prompt, LIMIT) for prompt in PROMPTS[:6]]
    same = crowd.add(PROMPTS[6], LIMIT, sampling)
    other = crowd.add(PROMPTS[6], LIMIT, Sampling(temperature=0.8, seed=8))
    retry = crowd.add(PROMPTS[6], LIMIT, sampling, generated=expected[:5])
    output = crowd.run()
    assert crowd.core.preemptions
    assert output[same] == expected
    assert output[retry] == expected[5:]
    assert output[other] != expected
    assert expected != alone[6]
    assert [output[task] for task in others] == alone[:6]
    crowd.close()


def test_forced_tokens_replace_the_models(folder: Path, alone: list[list[int]], reference: Reference) -> None:
    """Forced tokens come out at their output index, also behind a retry, and what follows is conditioned on them."""
    engine = Engine(folder)
    forced = [3, 1, 4, 1, 5]
    whole = engine.add(PROMPTS[4], LIMIT, forced=forced)
    retry = engine.add(PROMPTS[4], LIMIT, generated=[3, 1], forced=forced)
    free = engine.add(PROMPTS[4], LIMIT)
    output = engine.run()
    assert output[whole][:5] == forced
    assert output[retry] == output[whole][2:]
    reference.check_greedy(PROMPTS[4] + forced, output[whole][5:])
    assert output[free] == alone[4]
    engine.close()


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
def test_logits_that_are_not_numbers_fail_their_request_alone(
    folder: Path, alone: list[list[int]], in_flight: int
) -> None:
    """NaN names its task and leaves the others their tokens, even those that later get the very same blocks."""
    engine = Engine(folder, kv_blocks=12, prefix_cache=False, max_in_flight=in_flight)
    embedding = engine.runner.model.weights()["model.embed_tokens.weight"]
    seen = {token for tokens in PROMPTS[:4] + alone[:4] for token in tokens}
    poison = next(token for token in range(256) if token not in seen)
    embedding[poison] = float("nan")
    good = engine.add(PROMPTS[3], LIMIT)
    bad = engine.add([poison] * 100, LIMIT)
    engine.step()
    assert engine.failed == {bad: "its logits are not finite numbers"}
    assert (engine.output[good], engine.output[bad]) == (alone[3][:1], [])
    later = [engine.add(prompt, LIMIT) for prompt in PROMPTS[:4]]
    engine.run()
    assert engine.output[good] == alone[3]
    assert [engine.output[task] for task in later] == alone[:4]
    engine.close()


def test_not_a_number_does_not_travel(folder: Path, alone: list[list[int]]) -> None:
    """Blocks that hold NaN of failed requests are moved, and moved into, half filled; the requests get their tokens."""
    prefill, decode = (Engine(folder, kv_blocks=12, prefix_cache=False) for _ in range(2))
    seen = {token for tokens in PROMPTS[:4] + alone[:4] for token in tokens}
    poison = next(token for token in range(256) if token not in seen)
    for engine in (prefill, decode):
        engine.runner.model.weights()["model.embed_tokens.weight"][poison] = float("nan")
        bad = engine.add([poison] * 12 * 15, LIMIT)
        engine.run()
        assert bad in engine.failed
    tasks = transfer(prefill, decode, PROMPTS[:4], LIMIT)
    decode.run()
    outputs = [prefill.output[i + 2] + decode.output[task] for i, task in enumerate(tasks)]
    assert outputs == alone[:4]
    prefill.close()
    decode.close()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_positions_run_out(tmp_path: Path, in_flight: int) -> None:
    """A request that goes beyond the model's positions fails by name, after every token the model has a place for."""
    folder = make_checkpoint("short", msgspec.structs.replace(TINY, max_position=40), tmp_path)
    engine = Engine(folder, max_in_flight=in_flight)
    task = engine.add(make_prompt(0, 30), 100)
    engine.run()
    assert engine.failed == {task: "the model has only 40 positions"}
    assert len(engine.output[task]) == 40 - 30 + 1
    with pytest.raises(ValueError, match="has 41 tokens: the model has 40 positions"):
        engine.runner.add(99, Payload(make_prompt(0, 41), Sampling()))
    engine.close()


def test_tokens_outside_the_vocabulary_are_refused(folder: Path) -> None:
    """Prompt and forced tokens must be ids of the model's vocabulary."""
    engine = Engine(folder)
    for tokens, forced in (([0, 256], None), ([-1], None), ([1], [999])):
        with pytest.raises(ValueError, match="vocabulary is 0 to 255"):
            engine.runner.add(1, Payload(tokens, Sampling(), forced=forced))
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4': allowed are float32"),
        ({"device": "tpu"}, "no operators for device 'tpu': there are cpu, cuda, npu"),
    ],
)
def test_arguments_that_are_not_supported(folder: Path, arguments: dict[str, str], message: str) -> None:
    """Dtypes and devices are refused with what there is."""
    with pytest.raises(ValueError, match=message):
        TorchRunner(folder, EngineConfig(kv_blocks=4), **arguments)  # type: ignore[arg-type]


def test_the_runner_is_a_runner(folder: Path) -> None:
    """It has the protocol's members (for the type checker), forgets unknown tasks silently, and threads are set."""
    runner: Runner = TorchRunner(folder, EngineConfig(kv_blocks=4))
    runner.remove(12345)
    assert torch.get_num_threads() == 1
    handle = runner.kv_handle
    assert handle is not None
    assert handle.shape == (2, 2, 4, 16, 2, 16)
    runner.close()


def test_many_tasks_and_long_ones_grow_the_block_tables(folder: Path) -> None:
    """More tasks than rows and more blocks than columns were made for at first: rows are widened and reused."""
    engine = Engine(folder, kv_blocks=400, token_budget=1000)
    long = make_prompt(1, 500)
    prompts = [make_prompt(seed, 3 + seed) for seed in range(20)]
    tasks = [engine.add(long[:30], 3), engine.add(long, 9), *(engine.add(prompt, 9) for prompt in prompts)]
    output = engine.run()
    assert output[tasks[1]] == serve(folder, [long], 9, kv_blocks=40)[0]
    assert [output[task] for task in tasks[2:]] == [serve(folder, [prompt], 9)[0] for prompt in prompts]
    rows = engine.runner._packer.num_rows
    for prompt in prompts:
        engine.add(prompt, 2)
    engine.run()
    assert engine.runner._packer.num_rows == rows
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_floats_serve(folder: Path, dtype: str) -> None:
    """The other dtypes run end to end: weights, KV cache and its handle are of that dtype."""
    engine = Engine(folder, dtype)
    tasks = [engine.add(prompt, 5) for prompt in PROMPTS]
    engine.run()
    assert all(len(engine.output[task]) == 5 for task in tasks)
    handle = engine.runner.kv_handle
    assert handle is not None
    assert handle.dtype == dtype
    engine.close()


def test_settings_reach_the_sampler(folder: Path, alone: list[list[int]]) -> None:
    """Penalties, stop tokens and probabilities of a request work in an engine, also preempted and retried."""
    sampling = Sampling(repetition_penalty=5.0, logprobs=3)
    single = Engine(folder)
    task = single.add(PROMPTS[6], LIMIT, sampling)
    expected = single.run()[task]
    single.close()
    assert len(set(expected)) == LIMIT, "a penalty so strong lets no token come twice"
    assert len(set(alone[6])) < LIMIT

    crowd = Engine(folder, kv_blocks=24, watermark=0.0)
    others = [crowd.add(prompt, LIMIT) for prompt in PROMPTS[:6]]
    same = crowd.add(PROMPTS[6], LIMIT, sampling)
    retry = crowd.add(PROMPTS[6], LIMIT, sampling, generated=expected[:5])
    output = crowd.run()
    assert crowd.core.preemptions
    assert output[same] == expected
    assert output[retry] == expected[5:]
    assert [output[task] for task in others] == alone[:6]
    crowd.close()

    engine = Engine(folder)
    task = engine.add(PROMPTS[6], 1, sampling)
    plan = engine.core.schedule()
    assert plan is not None
    engine.runner.launch(plan)
    found = engine.runner.collect()
    assert found.logprobs is not None
    (logprobs,) = found.logprobs[task]
    best = [token for token, _ in logprobs.top]
    assert found.tokens == [[expected[0]]]
    assert len(best) == 3
    assert best[0] == alone[6][0]
    with pytest.raises(ValueError, match="stop_token_ids has token 256: the model's vocabulary is 0 to 255"):
        engine.runner.add(9, Payload([1], Sampling(stop_token_ids=(256,))))
    engine.close()
