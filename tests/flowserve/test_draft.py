"""Speculative decoding on the torch runner: fewer steps, and not one token that would not have come without it."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowserve.core.config import EngineConfig
from flowserve.core.tiers import TierConfig
from flowserve.runtime.checkpoint import make_checkpoint
from flowserve.runtime.draft import FEWEST, MOST, PromptLookup
from flowserve.runtime.intake import Intake
from flowserve.runtime.runner import Payload, TokenLogprobs
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.torch_runner import TorchRunner
from tests.flowserve.driver import TINY, Engine, make_prompt
from tests.flowserve.npu import plugged
from tests.flowserve.test_torch_runner import transfer

LIMIT = 40
PERIOD = [7, 200, 31, 5, 90]
PROMPTS = [make_prompt(length, length) for length in (1, 16, 33, 60, 100, 150)] + [PERIOD * 9]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.0, top_k=5, seed=4, min_tokens=30, stop_token_ids=(9,)),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=0.5, top_p=0.8, presence_penalty=0.4, seed=5),
    Sampling(logprobs=2),
    Sampling(logit_bias=dict.fromkeys(PERIOD, 9.0)),
]
"""One for each prompt: among them two that depend on the tokens so far."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", TINY, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other sizes and weights, but of the same vocabulary."""
    shape = msgspec.structs.replace(TINY, hidden_size=32, num_layers=1, num_kv_heads=1, seed=1)
    return make_checkpoint("smaller", shape, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[int]]:
    """Outputs without speculation, one request at a time."""
    outputs = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        engine = Engine(folder)
        task = engine.add(prompt, LIMIT, sampling)
        outputs.append(engine.run()[task])
        engine.close()
    return outputs


def guessing(folder: Path, draft: Path | None = None, guesses: int = 3, **limits: Any) -> Engine:
    drafter = "ngram" if draft is None else "model"
    limits = {"max_sequences": 16, "speculative_tokens": guesses, "drafter": drafter} | limits
    return Engine(folder, draft=draft, **limits)


def steps(engine: Engine) -> int:
    """How many it takes to the end."""
    return sum(1 for _ in iter(engine.step, None))


# -- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("kind", ["ngram", "smaller", "itself"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"token_budget": 37, "max_sequences": 3}, {"kv_blocks": 22, "watermark": 0.0, "kv_layout": "block_major"}],
    ids=["together", "odd chunks, few at a time", "preempted"],
)
def test_outputs_are_those_without_speculation(
    folder: Path, smaller: Path, plain: list[list[int]], kind: str, in_flight: int, limits: dict[str, Any]
) -> None:
    """Greedy or sampled, with penalties, bias or probabilities, in any company: token by token the same."""
    draft = {"ngram": None, "smaller": smaller, "itself": folder}[kind]
    engine = guessing(folder, draft, max_in_flight=in_flight, **limits)
    tasks = [engine.add(prompt, LIMIT, sampling) for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True)]
    output = engine.run()
    assert [output[task] for task in tasks] == plain
    assert bool(engine.core.preemptions) == ("kv_blocks" in limits)
    engine.close()


def test_a_retry_and_forced_tokens(folder: Path, plain: list[list[int]]) -> None:
    """A request goes on behind tokens that are there, and forced tokens come out, right or wrong as guesses."""
    forced = [3, 1, 4, 1, 5, 9, 2, 6]
    without = Engine(folder)
    task = without.add(PROMPTS[4], LIMIT, forced=forced)
    expected = without.run()[task]
    without.close()
    assert expected[:8] == forced
    for draft in (None, folder):
        engine = guessing(folder, draft)
        whole = engine.add(PROMPTS[4], LIMIT, forced=forced)
        retry = engine.add(PROMPTS[1], LIMIT, SAMPLINGS[1], generated=plain[1][:7])
        output = engine.run()
        assert output[whole] == expected
        assert output[retry] == plain[1][7:]
        engine.close()


def test_a_random_draft_model_changes_nothing_and_is_seldom_right(folder: Path, smaller: Path) -> None:
    """Its guesses are verified: hardly any is right."""
    engine = guessing(folder, smaller)
    task = engine.add(PROMPTS[5], LIMIT)
    assert steps(engine) > LIMIT * 0.8
    assert len(engine.output[task]) == LIMIT
    engine.close()


# -- fewer steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[1]], ids=["greedy", "sampled"])
def test_a_model_that_guesses_for_itself_is_always_right(folder: Path, sampling: Sampling, in_flight: int) -> None:
    """All guesses are accepted: 1 + k tokens a step, also behind a prefix that is found in the cache."""
    engine = guessing(folder, folder, guesses=3, max_in_flight=in_flight)
    prompt = PROMPTS[5]
    for _ in range(2):
        task = engine.add(prompt, 41, sampling)
        sequence = engine.core.sequence(task)
        assert sequence is not None
        assert steps(engine) == 1 + 40 // 4
        assert (sequence.drafted, sequence.accepted, sequence.rejected) == (30, 30, 0)
        prompt = prompt + engine.output[task]
    assert sequence.cached_tokens == 144
    engine.close()


def test_repetitive_output_takes_fewer_steps(folder: Path) -> None:
    """Prompt lookup guesses a text that repeats itself, and nothing where nothing has occurred before."""
    forced = PERIOD * 8
    without, engine = Engine(folder), guessing(folder)
    outputs, taken_steps = [], []
    for each in (without, engine):
        task = each.add(PROMPTS[0], len(forced), forced=forced)
        sequence = each.core.sequence(task)
        assert sequence is not None
        taken_steps.append(steps(each))
        outputs.append(each.output[task])
        each.close()
    assert outputs == [forced, forced]
    assert taken_steps[0] == len(forced)
    assert taken_steps[1] < 0.5 * taken_steps[0]
    assert sequence.accepted >= 24
    assert sequence.drafted - sequence.accepted <= 3


def test_where_nothing_repeats_nothing_is_verified(folder: Path) -> None:
    """A step without guesses computes one token for each sequence, and its plan says so."""
    engine = guessing(folder)
    engine.add(list(range(30)), 5, forced=list(range(100, 105)))
    while (plan := engine.step()) is not None:
        assert plan.shape.draft_tokens == 0
        assert all(verify.draft == 0 for verify in plan.verifies)
        assert plan.shape.decode_context == sum(verify.start + 1 for verify in plan.verifies)
    engine.close()


def test_guesses_work_behind_a_hand_over(folder: Path) -> None:
    """The draft model's KV cache goes with the model's: after a fetch it is as right as where the prompt was."""
    prefill, decode = (guessing(folder, folder, kv_blocks=blocks) for blocks in (80, 200))
    tasks = transfer(prefill, decode, PROMPTS[1:5], 41)
    sequences = [decode.core.sequence(task) for task in tasks]
    decode.run()
    for sequence in sequences:
        assert sequence is not None
        assert (sequence.drafted, sequence.rejected) == (30, 0)
    lone = Engine(folder)
    handle = lone.runner.kv_handle
    with pytest.raises(ValueError, match="the peer has no KV cache of a draft model"):
        decode.runner.fetch(handle, [0], [0])
    for engine in (prefill, decode, lone):
        engine.close()


def test_guesses_work_behind_other_tiers(folder: Path) -> None:
    """The draft model's KV cache goes to host memory and back with the model's."""
    tiers = TierConfig(64, 0, swap_low=0.5, swap_high=0.7, fetch="always")
    engine = guessing(folder, folder, kv_blocks=24, tiers=tiers, preemption="swap", max_sequences=4)
    documents, sequences = [make_prompt(seed, 80) for seed in range(6)], []
    for document in [*documents, *documents]:
        sequences.append(engine.core.sequence(engine.add([*document, *make_prompt(len(sequences), 7)], 17)))
        engine.run()
    assert sum(sequence.fetched_tokens[0] for sequence in sequences if sequence is not None) >= 5 * 80
    assert all(sequence is not None and sequence.accepted == sequence.drafted == 12 for sequence in sequences)
    engine.close()


@pytest.mark.parametrize("graph_sizes", [(), (1, 2, 4, 8)], ids=["", "graphs"])
@pytest.mark.parametrize("itself", [False, True], ids=["ngram", "itself"])
def test_speculation_on_an_npu(tmp_path: Path, itself: bool, graph_sizes: tuple[int, ...]) -> None:
    """On the Ascend operators' stand-in, in float16: the same tokens, by as many right guesses."""
    folder = make_checkpoint("wide", msgspec.structs.replace(TINY, head_dim=128), tmp_path)
    place: dict[str, Any] = {"dtype": "float16", "device": "npu", "graph_sizes": graph_sizes}
    sizes: dict[str, Any] = {"block_tokens": 128, "kv_blocks": 32}
    outputs = []
    with plugged():
        for engine in (
            Engine(folder, **place, **sizes),
            guessing(folder, folder if itself else None, **place, **sizes),
        ):
            requests = list(zip(PROMPTS, SAMPLINGS, strict=True))
            sequences = [engine.core.sequence(engine.add(prompt, 20, sampling)) for prompt, sampling in requests]
            engine.run()
            assert not engine.failed
            outputs.append(engine.output)
            engine.close()
    assert outputs[0] == outputs[1]
    right = [
        sequence.accepted / sequence.drafted for sequence in sequences if sequence is not None and sequence.drafted
    ]
    assert right == [1.0] * 5 if itself else sum(right) > 0


# -- ends ---------------------------------------------------------------------------------------------------------


def taken(engine: Engine, payloads: Sequence[tuple[int, Payload]]) -> dict[int, list[tuple[int, TokenLogprobs | None]]]:
    """What users get of these tasks, stops applied as an engine's loop does: tokens and their probabilities."""
    intake = Intake(engine.runner.eos)
    for task, payload in payloads:
        intake.add(task, payload)
    found: dict[int, list[tuple[int, TokenLogprobs | None]]] = {task: [] for task, _ in payloads}
    while (plan := engine.core.schedule()) is not None:
        engine.runner.launch(plan)
        output = engine.runner.collect()
        got = intake.take(plan, output)
        probabilities = {(task, index): each for task, index, each in got.logprobs}
        for task, index, token in got.tokens or ():
            assert index == len(found[task])
            found[task].append((token, probabilities.pop((task, index), None)))
        assert not probabilities
        engine.complete(plan, got.stopped, got.accepted)
    assert engine.core.idle
    return found


@pytest.mark.parametrize("least", [0, 25])
def test_an_end_inside_an_accepted_run(folder: Path, plain: list[list[int]], least: int) -> None:
    """A stop token ends the output where it would without guesses, wherever in a run it comes; `min_tokens` hold."""
    found = []
    for draft in (None, folder):
        engines = [Engine(folder), guessing(folder, draft, guesses=4)]
        for engine in engines:
            tasks = []
            for place in range(5, 11):
                stop = Sampling(stop_token_ids=(plain[0][place],), min_tokens=least, logprobs=1)
                task = engine.add(PROMPTS[0], LIMIT, stop)
                tasks.append((task, Payload(PROMPTS[0], stop)))
            found.append(list(taken(engine, tasks).values()))
            engine.close()
    without, *others = found
    lengths = [len(output) for output in without]
    assert min(lengths) > least
    assert max(lengths) < LIMIT or least
    for other in others:
        for output, expected in zip(other, without, strict=True):
            assert [token for token, _ in output] == [token for token, _ in expected]
            for (_, each), (_, wanted) in zip(output, expected, strict=True):
                assert each is not None
                assert wanted is not None
                assert each.chosen == pytest.approx(wanted.chosen, abs=1e-4)


@pytest.mark.parametrize("draft_positions", [None, 40, 34])
def test_positions_run_out(tmp_path: Path, draft_positions: int | None) -> None:
    """Guesses end with the model's positions, and with the draft model's own; every token is there."""
    folder = make_checkpoint("short", msgspec.structs.replace(TINY, max_position=40), tmp_path)
    draft = None
    if draft_positions is not None:
        draft = make_checkpoint("draft", msgspec.structs.replace(TINY, max_position=draft_positions), tmp_path)
    engine = guessing(folder, draft)
    task = engine.add((PERIOD * 6)[:30], 100)
    engine.run()
    assert engine.failed == {task: "the model has only 40 positions"}
    assert len(engine.output[task]) == 40 - 30 + 1
    engine.close()


def test_logits_that_are_not_numbers_fail_their_request_alone(folder: Path, plain: list[list[int]]) -> None:
    """NaN from a forced token fails its task; who gets its blocks is guessed for and served as before."""
    engine = guessing(folder, folder, kv_blocks=14, prefix_cache=False)
    seen = {token for tokens in PROMPTS[:3] + plain[:3] for token in tokens}
    poison = next(token for token in range(256) if token not in seen)
    for model in (engine.runner.model, engine.runner._drafter.model):  # type: ignore[union-attr]
        model.weights()["model.embed_tokens.weight"][poison] = float("nan")
    bad = engine.add(PROMPTS[4], LIMIT, forced=[1, 2, poison, 4, 5])
    engine.run()
    assert engine.failed == {bad: "its logits are not finite numbers"}
    tasks = [engine.add(prompt, 25, sampling) for prompt, sampling in zip(PROMPTS[:3], SAMPLINGS[:3], strict=True)]
    sequences = [engine.core.sequence(task) for task in tasks]
    engine.run()
    assert [engine.output[task] for task in tasks] == [output[:25] for output in plain[:3]]
    assert all(sequence is not None and sequence.accepted == sequence.drafted for sequence in sequences)
    engine.close()


# -- prompt lookup ------------------------------------------------------------------------------------------------


def look_up(tokens: list[int], most: int) -> list[int]:
    """The plain way."""
    for size in range(min(MOST, len(tokens) - 1), FEWEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                longer = list(tokens)
                for place in itertools.islice(itertools.count(end), most):
                    longer.append(longer[place])
                return longer[len(tokens) :]
    return []


@settings(max_examples=300)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 12))
def test_prompt_lookup_is_the_plain_way(tokens: list[int], most: int) -> None:
    """The latest occurrence of the longest end that occurs before, and what followed it."""
    assert PromptLookup().guess(np.array(tokens, dtype=np.int32), most).tolist() == look_up(tokens, most)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_models_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    """A draft model must be named, be there, and have the model's vocabulary."""
    config = EngineConfig(kv_blocks=8, max_sequences=4, speculative_tokens=2, drafter="model")
    with pytest.raises(ValueError, match="no draft model is named"):
        TorchRunner(folder, config)
    with pytest.raises(ValueError, match=r"nowhere/config.json does not exist"):
        TorchRunner(folder, config, draft_dir=tmp_path / "nowhere")
    other = make_checkpoint("other", msgspec.structs.replace(TINY, vocab_size=300), tmp_path)
    with pytest.raises(ValueError, match="has a vocabulary of 300 tokens and the model it guesses for 256"):
        TorchRunner(folder, config, draft_dir=other)
