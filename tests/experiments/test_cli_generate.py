"""`deepflow generate` on a tiny model."""

import re
from pathlib import Path

import msgspec
import pytest

from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from flowserve.runtime.tiny_tokenizer import make_tokenizer
from tests.experiments.conftest import Command

SHAPE = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=400, max_position=128
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("tiny", SHAPE, tmp_path_factory.mktemp("models"))
    make_tokenizer(path, SHAPE.vocab_size)
    return path


def test_an_answer_is_printed(deepflow: Command, folder: Path) -> None:
    """The answer alone is on standard output, how fast it came on the other; a seed repeats it."""
    call = ("generate", str(folder), "sampling=chat", "seed=3", "--chat", "--prompt", "Who?", "--max-tokens", "30")
    said = deepflow(*call)
    assert said.code == 0
    assert len(said.out) > 30
    told = r"30 tokens \(length\), the first after [\d.]+ s, then [\d.]+ tokens/s; engine ready in [\d.]+ s\n"
    assert re.fullmatch(told, said.err)
    stop = said.out[10:13]
    cut = deepflow(*call, "--stop", stop)
    assert cut.out == said.out[: said.out.index(stop)] + "\n"
    assert "(stop)" in cut.err


def test_speculation_changes_nothing_but_the_speed(deepflow: Command, folder: Path) -> None:
    """With guesses by prompt lookup, or by the model itself, a seed gives the answer that it gives without."""
    call = ("generate", str(folder), "sampling=chat", "seed=3", "--prompt", "ab ab ab ab", "--max-tokens", "30")
    said = deepflow(*call)
    assert len(said.out) > 30
    for guesses in (("engine.drafter=ngram",), ("engine.drafter=model", f"backend.draft_model={folder}")):
        assert deepflow(*call, "engine.speculative_tokens=3", *guesses).out == said.out


def test_a_draft_model_of_another_vocabulary(deepflow: Command, folder: Path, tmp_path: Path) -> None:
    """It is refused before anything starts, with both sizes."""
    other = make_checkpoint("other", msgspec.structs.replace(SHAPE, vocab_size=300), tmp_path)
    options = ("engine.speculative_tokens=3", "engine.drafter=model", f"backend.draft_model={other}")
    said = deepflow("generate", str(folder), *options, "--prompt", "x")
    assert (said.code, said.out) == (2, "")
    assert "has a vocabulary of 300 tokens, the model" in said.err
    assert "of 400" in said.err


def test_what_the_engine_cannot_do_is_one_line(deepflow: Command, folder: Path) -> None:
    """A prompt beyond the model's positions, and an engine that does not start, are errors like any other."""
    said = deepflow("generate", str(folder), "--prompt", "x", "--max-tokens", "500")
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(r"deepflow: error: the prompt has 1 tokens and max_tokens is 500: .* 128 positions\n", said.err)
    said = deepflow("generate", str(folder), "backend.dtype=int4", "--prompt", "x")
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(r"deepflow: error: .*dtype is 'int4': allowed are .*\n", said.err)
