"""Text in, text out: the client actor of a running real cluster, between users' words and engines' tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster import events as ev
from cluster import identity
from cluster.actions import Action, CancelRequest, SubmitRequest
from cluster.request import Request
from cluster.vocabulary import Outcome
from flowserve.runtime import tokenizer as tk
from flowserve.runtime.runner import TokenLogprobs
from flowserve.runtime.sampling import Sampling
from real.cluster import RealCluster
from real.frontend import ClientPrompt, NewTokens
from real.tokenizer_pool import TokenizerPool


class TextPiece(NamedTuple):
    """What a user gets to see next of an answer. `tokens`: of the output so far, up to where a stop string ended it.

    `finish`: with the last piece, why it is the last: "stop" (the model's end, a stop token or a stop string),
    "length" (the client's limit), "cancelled", or "error" with a `reason`. `logprobs`: of the tokens new with this
    piece, where they were asked for (their text may come later).
    """

    request_id: int
    text: str
    tokens: int
    finish: str | None = None
    reason: str = ""
    logprobs: Sequence[TokenLogprobs] = ()


class ServedModel(NamedTuple):
    """What a client must know of a model: name, vocabulary size, and positions for prompt and output together."""

    name: str
    vocab_size: int
    max_positions: int

    @classmethod
    def from_folder(cls, name: str, folder: str | Path) -> "ServedModel":
        """From a Hugging Face folder. ValueError: config.json lacks one of them."""
        config = json.loads((Path(folder) / "config.json").read_text())
        try:
            return cls(name, config["vocab_size"], config["max_position_embeddings"])
        except KeyError as error:
            raise ValueError(f"{folder}/config.json has no {error}") from error


class _Open:
    """`over`: the cluster has ended the request. `told`: the user has the last piece. `ended`: by a stop token."""

    __slots__ = ("ended", "logprobs", "max_tokens", "over", "sampling", "submitted", "tokens", "told")

    def __init__(self, sampling: Sampling, max_tokens: int) -> None:
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.submitted = self.over = self.told = self.ended = False
        self.tokens = 0
        self.logprobs: list[TokenLogprobs] = []


class TextClient:
    """The actor `client` of a control plane whose requests come from users, at any time.

    Pieces go to `on_text`, from within `RealCluster.next_event` (or at once, where a request is refused at the door).
    A stop string ends its request on the engine; what that had computed behind it is dropped.
    """

    name = "client"

    def __init__(
        self,
        cluster: RealCluster,
        pool: TokenizerPool,
        model: ServedModel,
        on_text: Callable[[TextPiece], None],
        job_executors: Sequence[str] = ("je-0",),
    ) -> None:
        self.due: dict[int, int] = {}
        self._cluster = cluster
        self._pool = pool
        self._model = model
        self._on_text = on_text
        self._job_executors = tuple(job_executors)
        self._salt = identity.salt(model.name)
        self._requests: dict[int, _Open] = {}
        self._next = 0
        self._watched = pool.sources
        cluster.listen(self._take)
        for source in self._watched:
            cluster.watch(source, self._answers)

    def submit(self, prompt: str | Sequence[tk.ChatMessage], sampling: Sampling, max_tokens: int) -> int:
        """Send a prompt, as text or as a conversation; returns the number under which pieces of its answer come.

        ValueError: a setting that this model does not allow.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: allowed are 1 and more")
        sampling.check(self._model.vocab_size, max_tokens)
        number, self._next = self._next, self._next + 1
        self._requests[number] = _Open(sampling, max_tokens)
        self._send(tk.Prompt(number, prompt if isinstance(prompt, str) else tuple(prompt), sampling.stop))
        return number

    def cancel(self, request_id: int) -> None:
        """The user wants no more of an answer; its last piece comes at once. Requests that are over are ignored."""
        request = self._requests.get(request_id)
        if request is not None and not request.told:
            self._send(tk.Forget(request_id))
            self._finish(request_id, "", request.tokens, "cancelled")

    def on_event(self, event: ev.Event) -> list[Action]:
        """A request's end is its last piece, once its text is complete."""
        if isinstance(event, ev.RequestEnded):
            number, request = event.request_id, self._requests[event.request_id]
            del self.due[number]
            request.over = True
            if request.told:
                del self._requests[number]
            elif event.outcome is Outcome.FINISHED:
                self._send(tk.Tokens(number, [], last=True))
            else:
                self._send(tk.Forget(number))
                finish = "cancelled" if event.outcome is Outcome.CANCELLED else "error"
                self._finish(number, "", request.tokens, finish, event.reason)
        return []

    # -- between tokenizer and cluster ----------------------------------------------------------------------------

    def _send(self, message: tk.ToTokenizer) -> None:
        self._pool.send(message)
        if not self._watched:  # it has answered already
            self._answers()

    def _take(self, new: NewTokens) -> None:
        request = self._requests.get(new.request_id)
        if request is not None and not request.told:
            request.ended = new.ended
            request.logprobs += new.logprobs
            self._send(tk.Tokens(new.request_id, new.tokens))

    def _answers(self) -> None:
        replies = self._pool.receive()
        for gone in set(self._watched).difference(self._pool.sources):
            self._cluster.unwatch(gone)
            self._watched.remove(gone)
        for reply in replies:
            number, request = reply.request_id, self._requests.get(reply.request_id)
            if request is None or request.told:
                continue
            match reply:
                case tk.Encoded():
                    self._encoded(number, request, reply.tokens)
                case tk.Refused():
                    self._finish(number, "", request.tokens, "error", reply.reason)
                case tk.Text(last=True):
                    finish = "stop" if request.ended or reply.stop is not None else "length"
                    self._finish(number, reply.text, reply.tokens, finish)
                case tk.Text():
                    self._show(number, request, TextPiece(number, reply.text, reply.tokens))

    def _encoded(self, number: int, request: _Open, tokens: list[int]) -> None:
        if len(tokens) + request.max_tokens > self._model.max_positions:
            self._send(tk.Forget(number))
            reason = (
                f"the prompt has {len(tokens)} tokens and max_tokens is {request.max_tokens}: together they must not "
                f"pass the model's {self._model.max_positions} positions"
            )
            self._finish(number, "", 0, "error", reason)
            return
        request.submitted = True
        self.due[number] = self._cluster.now()
        self._cluster.offer(number, ClientPrompt(tokens, request.sampling))
        blocks = identity.from_tokens(tokens, self._salt)
        wanted = Request(number, len(tokens), request.max_tokens, self._model.name, blocks)
        self._cluster.submit(SubmitRequest(self._job_executor(number), wanted, None))

    def _finish(self, number: int, text: str, tokens: int, finish: str, reason: str = "") -> None:
        """The last piece; the cluster lets go of a request that is still open there."""
        request = self._requests[number]
        request.told = True
        if request.over or not request.submitted:
            del self._requests[number]
        else:
            self._cluster.submit(CancelRequest(self._job_executor(number), number))
        self._show(number, request, TextPiece(number, text, tokens, finish, reason))

    def _show(self, number: int, request: _Open, piece: TextPiece) -> None:
        logprobs = request.logprobs[: piece.tokens - request.tokens]
        del request.logprobs[: len(logprobs)]
        request.tokens = piece.tokens
        if piece.text or piece.finish or logprobs:
            self._on_text(piece._replace(logprobs=logprobs))

    def _job_executor(self, number: int) -> str:
        return self._job_executors[number % len(self._job_executors)]
