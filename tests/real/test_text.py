"""Text in, text out on real engines: streams, ends, cancels, and tokenizers as processes of their own."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import events as ev
from cluster.actions import EndRun, SetTimer
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager, GroupPlan
from cluster.recorder import Recorder
from cluster.vocabulary import to_ns
from flowserve.core.config import EngineConfig
from flowserve.runtime.checkpoint import CheckpointShape, make_checkpoint
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.tiny_tokenizer import make_tokenizer
from flowserve.runtime.tokenizer import ChatMessage, Tokenizer
from flowserve.runtime.wire import NullDevice, TorchDevice
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from real.cluster import Engine, RealCluster
from real.text import ServedModel, TextClient, TextPiece
from real.tokenizer_pool import TokenizerPool
from tests.builders import MODEL, make_spec
from tests.real.engines import alive

VOCAB = 400
SHAPE = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=VOCAB, max_position=512
)
QUESTIONS = ["Where do names come from?", "What is an iterator, if I may ask?", "x", "The del statement", "Grüße 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("tiny", SHAPE, tmp_path_factory.mktemp("models"))
    make_tokenizer(path, VOCAB)
    return path


class Desk:
    """Users of one engine: asks, and collects the pieces of every answer until all have ended."""

    def __init__(self, folder: Path, device: NullDevice | TorchDevice, processes: int = 0) -> None:
        self.pieces: list[TextPiece] = []
        self.events: list[ev.Event] = []
        self.on_piece: Callable[[TextPiece], None] = lambda piece: None
        kind = Engine(EngineConfig(kv_blocks=64, token_budget=64, max_sequences=16), device)
        self.cluster = RealCluster(
            ("client", "je-0", "cm"), lambda spec: kind, lambda name: VOCAB, report_period_s=0.05, keep_outputs=True
        )
        self.pool = TokenizerPool(folder, processes)
        self.client = TextClient(self.cluster, self.pool, ServedModel.from_folder(MODEL, folder), self._show)
        manager = ClusterManager((GroupPlan(make_spec(), 1, 1, 1),), Fixed(), ("je-0",))
        self.control = ControlPlane(self.client, [JobExecutor("je-0", 0, LeastOutstanding())], manager, Recorder())

    def _show(self, piece: TextPiece) -> None:
        assert self.finish(piece.request_id) is None, "a piece came behind the last one"
        self.pieces.append(piece)
        self.on_piece(piece)

    def of(self, number: int) -> list[TextPiece]:
        return [piece for piece in self.pieces if piece.request_id == number]

    def text(self, number: int) -> str:
        return "".join(piece.text for piece in self.of(number))

    def finish(self, number: int) -> str | None:
        pieces = self.of(number)
        return pieces[-1].finish if pieces else None

    def ask(self, prompt: str | list[ChatMessage], limit: int = 24, **sampling: object) -> int:
        return self.client.submit(prompt, Sampling(**sampling), limit)  # type: ignore[arg-type]

    def step(self) -> None:
        """The next event, which comes soon: what tokenizers say is heard on the way, and is none."""
        self.cluster.submit(SetTimer("client", "tick", self.cluster.now() + to_ns(0.02)))
        event = self.cluster.next_event()
        assert event is not None
        self.events.append(event)
        for action in self.control.on_event(event):
            self.cluster.submit(action)

    def run(self) -> None:
        """Until every answer has ended, for users and for the engine."""
        while self.client._requests:
            self.step()

    def tokens(self, number: int) -> list[int]:
        return self.cluster.outputs()[number]

    def close(self) -> None:
        self.cluster.close()
        self.pool.close()


@pytest.fixture(scope="module", params=[0, 2], ids=["inline", "processes"])
def desk(request: pytest.FixtureRequest, folder: Path) -> Iterator[Desk]:
    """Users of an engine that sleeps, with the tokenizer in this process or in two of its own."""
    desk = Desk(folder, NullDevice(0.002, vocab=VOCAB), request.param)
    yield desk
    desk.close()


@pytest.fixture(scope="module")
def torch_desk(folder: Path) -> Iterator[Desk]:
    desk = Desk(folder, TorchDevice(str(folder)))
    yield desk
    desk.close()


# -- on an engine that sleeps --------------------------------------------------------------------------------------


def test_answers_stream_side_by_side(desk: Desk, folder: Path) -> None:
    """Each answer comes in pieces that make up the text of its tokens, up to the limit."""
    numbers = [desk.ask(question, 20 + n) for n, question in enumerate(QUESTIONS)]
    numbers.append(desk.ask([ChatMessage("user", "Who are you?")], 30))
    desk.run()
    tokenizer = Tokenizer(folder)
    for n, number in enumerate(numbers):
        assert len(desk.tokens(number)) == (20 + n if n < len(QUESTIONS) else 30)
        assert desk.text(number) == tokenizer.decode(desk.tokens(number))
        assert desk.finish(number) == "length"
        assert desk.of(number)[-1].tokens == len(desk.tokens(number))
        assert len(desk.of(number)) > 8
    orders = [piece.request_id for piece in desk.pieces if piece.request_id in numbers]
    assert orders != sorted(orders), "answers came one after the other"
    assert not desk.client.due


def test_a_stop_string_ends_the_request_on_the_engine(desk: Desk) -> None:
    """The text ends before it, however many tokens it spans; the engine is told, and its blocks are free again."""
    whole = desk.ask(QUESTIONS[0], 60)
    desk.run()
    text = desk.text(whole)
    stop = text[20:26]
    assert stop not in text[:25]
    number = desk.ask(QUESTIONS[0], 60, stop=("never in there", stop))
    other = desk.ask(QUESTIONS[0], 60)
    desk.run()
    assert (desk.text(number), desk.finish(number)) == (text[:20], "stop")
    assert desk.text(other) == text
    counted = desk.of(number)[-1].tokens
    tokens = desk.tokens(number)
    assert counted <= len(tokens) < 60
    ended = [event for event in desk.events if isinstance(event, ev.RequestEnded) and event.request_id == number]
    assert [event.outcome.value for event in ended] == ["cancelled"]


def test_stop_tokens_end_an_answer(desk: Desk) -> None:
    """The engine stops at the first that comes behind min_tokens, and the reason is told apart from the limit."""
    whole = desk.ask(QUESTIONS[1], 30)
    desk.run()
    tokens = desk.tokens(whole)
    first, later = tokens[3], tokens[12]
    one = desk.ask(QUESTIONS[1], 30, stop_token_ids=(first, later))
    two = desk.ask(QUESTIONS[1], 30, stop_token_ids=(first, later), min_tokens=len(tokens[: tokens.index(later)]))
    three = desk.ask(QUESTIONS[1], tokens.index(first) + 1, stop_token_ids=(first,))
    desk.run()
    assert desk.tokens(one) == tokens[: tokens.index(first) + 1] == desk.tokens(three)
    assert desk.tokens(two)[-1] == later
    assert {desk.finish(number) for number in (one, two, three)} == {"stop"}


def test_a_cancelled_answer_is_over_at_once(desk: Desk) -> None:
    """The user hears nothing more; other answers go on; cancelling twice, or too late, does nothing."""
    number, other = desk.ask(QUESTIONS[2], 400), desk.ask(QUESTIONS[3], 20)
    while not desk.text(number):
        desk.step()
    desk.client.cancel(number)
    desk.client.cancel(number)
    assert desk.finish(number) == "cancelled"
    early = desk.ask(QUESTIONS[2], 400)
    desk.client.cancel(early)
    desk.run()
    desk.client.cancel(other)
    assert desk.finish(other) == "length"
    assert desk.finish(early) == "cancelled"
    assert len(desk.tokens(number)) < 400


def test_what_cannot_be_served_says_why(desk: Desk) -> None:
    """Prompts without tokens or beyond the model, chats that the template refuses: an error piece, and no more."""
    cases = {
        desk.ask("", 5): "the prompt has no tokens",
        desk.ask("hello " * 300, 500): "together they must not pass the model's 512 positions",
        desk.ask([ChatMessage("robot", "beep")]): "role robot is not one of system, user, assistant",
    }
    desk.run()
    for number, reason in cases.items():
        (piece,) = desk.of(number)
        assert (piece.text, piece.tokens, piece.finish) == ("", 0, "error")
        assert reason in piece.reason
    for sampling, message in (
        ({"stop_token_ids": (VOCAB,)}, f"stop_token_ids has token {VOCAB}"),
        ({"min_tokens": 25}, "min_tokens is 25: allowed is at most max_tokens, 24"),
    ):
        with pytest.raises(ValueError, match=message):
            desk.ask("x", **sampling)
    with pytest.raises(ValueError, match="max_tokens is 0: allowed are 1 and more"):
        desk.ask("x", 0)


# -- on an engine that computes ------------------------------------------------------------------------------------


def test_probabilities_come_with_the_text(torch_desk: Desk) -> None:
    """Pieces carry those of their tokens: one for each, the chosen token among the most likely when greedy."""
    number = torch_desk.ask(QUESTIONS[0], 12, logprobs=2)
    other = torch_desk.ask(QUESTIONS[1], 12)
    torch_desk.run()
    found = [each for piece in torch_desk.of(number) for each in piece.logprobs]
    assert len(found) == 12
    for token, each in zip(torch_desk.tokens(number), found, strict=True):
        assert len(each.top) == 2
        assert each.top[0] == (token, each.chosen)
        assert each.top[1][1] <= each.chosen < 0
    assert not any(piece.logprobs for piece in torch_desk.of(other))


def test_settings_change_the_answer(torch_desk: Desk) -> None:
    """Seeds repeat an answer, others change it; what a request asks for concerns it alone."""
    ask = torch_desk.ask
    numbers = [ask(QUESTIONS[0], 16, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    numbers += [ask(QUESTIONS[0], 16), ask(QUESTIONS[0], 16, repetition_penalty=5.0), ask(QUESTIONS[0], 16)]
    torch_desk.run()
    one, two, again, greedy, penalised, same = map(torch_desk.tokens, numbers)
    assert one == again != two
    assert greedy == same != penalised
    assert len(set(penalised)) == 16


def test_the_models_end_of_sequence_ends_an_answer(torch_desk: Desk, folder: Path, tmp_path: Path) -> None:
    """Its token ends the output, unless it is ignored or the minimum is not reached; then another takes its place."""
    plain = torch_desk.ask(QUESTIONS[0], 20)
    torch_desk.run()
    tokens = torch_desk.tokens(plain)
    place = next(n for n in range(4, 20) if tokens[n] not in tokens[:n])
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[place], VOCAB + 50]}))
    desk = Desk(copy, TorchDevice(str(copy)))
    ended, ignored = desk.ask(QUESTIONS[0], 20), desk.ask(QUESTIONS[0], 20, ignore_eos=True)
    longer = desk.ask(QUESTIONS[0], 20, min_tokens=place + 1)
    desk.run()
    assert (desk.tokens(ended), desk.finish(ended)) == (tokens[: place + 1], "stop")
    assert (desk.tokens(ignored), desk.finish(ignored)) == (tokens, "length")
    assert desk.tokens(longer)[:place] == tokens[:place]
    assert desk.tokens(longer)[place] != tokens[place]
    desk.close()


def test_a_lost_engine_is_not_heard_of(folder: Path) -> None:
    """After kill -9 of the engine in mid-answer, the text goes on where it was, on the next."""
    desk = Desk(folder, TorchDevice(str(folder)))
    calm = desk.ask(QUESTIONS[0], 40, presence_penalty=1.5, temperature=0.8, seed=3)
    desk.run()
    killed: list[int] = []

    def kill(piece: TextPiece) -> None:
        if piece.tokens > 10 and not killed:
            killed.extend(desk.cluster.process_ids().values())
            os.kill(killed[0], signal.SIGKILL)

    desk.on_piece = kill
    number = desk.ask(QUESTIONS[0], 40, presence_penalty=1.5, temperature=0.8, seed=3)
    desk.run()
    assert killed
    assert any(isinstance(event, ev.TaskFailed) for event in desk.events)
    assert desk.tokens(number) == desk.tokens(calm)
    assert desk.text(number) == desk.text(calm)
    desk.close()


# -- tokenizer processes -------------------------------------------------------------------------------------------


def test_a_lost_tokenizer_takes_its_own_requests_along(folder: Path) -> None:
    """Requests of a killed process end with an error; those of the others go on, and take the new ones."""
    desk = Desk(folder, NullDevice(0.002, vocab=VOCAB), processes=2)
    first, second = desk.ask(QUESTIONS[0], 300), desk.ask(QUESTIONS[1], 100)
    while not (desk.text(first) and desk.text(second)):
        desk.step()
    pids = desk.pool.process_ids
    os.kill(pids[0], signal.SIGKILL)
    desk.run()
    assert (desk.finish(first), desk.finish(second)) == ("error", "length")
    assert desk.of(first)[-1].reason == "the tokenizer process killed by signal 9"
    third = desk.ask(QUESTIONS[2], 10)
    desk.run()
    assert desk.finish(third) == "length"
    os.kill(desk.pool.process_ids[0], signal.SIGKILL)
    while desk.pool.process_ids:
        desk.step()
    last = desk.ask(QUESTIONS[2], 10)
    desk.client._answers()
    assert desk.of(last)[-1].reason == "no tokenizer process is left"
    desk.cluster.submit(EndRun())
    desk.close()
    assert not any(map(alive, pids))


def test_tokenizers_that_cannot_start(tmp_path: Path) -> None:
    """A folder without a tokenizer is the user's error, in this process and in others; nothing is left behind."""
    for processes in (0, 2):
        with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
            TokenizerPool(tmp_path, processes)
    with pytest.raises(ValueError, match="processes is -1: allowed are 0"):
        TokenizerPool(tmp_path, -1)
