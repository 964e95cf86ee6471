"""Text to tokens and tokens to text, as a module that scales by itself (DeepServe section 4.1): in the process of its
user, or as processes of their own, any number side by side.

Started as `python -m flowserve.runtime.tokenizer SETUP` with a `TokenizerSetup` in JSON. Messages about one request go
to the same process, in order: a `Prompt` or an `Open`, then its output in `Tokens`.
"""

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.sandbox
import msgspec
import tokenizers
import zmq

from flowserve.runtime.child import follow_parent

_BROKEN = "\ufffd"
_PATIENCE = 8  # tokens without a complete character after which what is certain is given out
_WINDOW = 64  # tokens that are decoded together at most


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


# -- messages ----------------------------------------------------------------------------------------------------------


class TokenizerSetup(msgspec.Struct, frozen=True):
    """All that a tokenizer process is told at start. `parent`: the process that starts it, and that it follows."""

    name: str
    model_dir: str
    address: str
    parent: int


class Prompt(msgspec.Struct, frozen=True, tag=True):
    """A request begins: its prompt as text or as a conversation. `stop`: strings that will end its output."""

    request_id: int
    prompt: str | tuple[ChatMessage, ...]
    stop: tuple[str, ...] = ()


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """The next tokens of a request's output. `last`: there will be no more."""

    request_id: int
    tokens: list[int]
    last: bool = False


class Forget(msgspec.Struct, frozen=True, tag=True):
    """The request is over; no reply."""

    request_id: int


class Encoded(msgspec.Struct, frozen=True, tag=True):
    """The tokens of a prompt."""

    request_id: int
    tokens: list[int]


class Text(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Tokens`: text that became certain with them, maybe none.

    `tokens`: how many of the output are taken so far. `stop`: the string that ended the output, which is not in the
    text; later tokens have no answer.
    """

    request_id: int
    text: str
    tokens: int
    stop: str | None = None
    last: bool = False


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A prompt that cannot be made tokens of; the request is forgotten."""

    request_id: int
    reason: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process serves; the first that is heard of it."""


class Crashed(msgspec.Struct, frozen=True, tag=True):
    """Last words of a tokenizer process."""

    reason: str


ToTokenizer = Prompt | Tokens | Forget
Reply = Encoded | Text | Refused
FromTokenizer = Encoded | Text | Refused | Ready | Crashed

encode = msgspec.msgpack.Encoder().encode
decode_to_tokenizer = msgspec.msgpack.Decoder(ToTokenizer).decode
decode_from_tokenizer = msgspec.msgpack.Decoder(FromTokenizer).decode


# -- the tokenizer -----------------------------------------------------------------------------------------------------


class Tokenizer:
    """The tokenizer and the chat template of a Hugging Face model folder. ValueError: it has none that can be read."""

    def __init__(self, model_dir: str | Path) -> None:
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json: name the folder of a model with its tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
        self._special = {name: value for name, value in special.items() if isinstance(value, str)}
        self._template = _chat_template(folder, config)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with those that the model wants in front (and behind)."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins. ValueError: as for `chat_text`."""
        return self._tokenizer.encode(self.chat_text(messages), add_special_tokens=False).ids

    def chat_text(self, messages: Sequence[ChatMessage]) -> str:
        """A conversation as the model's template writes it. ValueError: no template, or it refuses the messages."""
        if self._template is None:
            raise ValueError("the model has no chat template: send text instead of messages")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class Detokenizer:
    """Text of one output, token by token: what is given out is never taken back, and is whole characters.

    Only the last few tokens are decoded again: those since the last point where the text was complete, and those just
    before, because some decoders write a word differently at the start of a text. A character whose bytes are spread
    over tokens waits for the last of them; bytes that are no text become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._complete = 0  # tokens of the window up to the last point where its text was complete
        self._sent = 0  # characters of the window's text that were given out

    def take(self, token: int) -> str:
        """The text that is certain with this token, and was not before."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_BROKEN):
            if len(self._window) - self._complete < _PATIENCE:
                return ""
            certain = _certain(text)
            new, self._sent = text[self._sent : certain], max(self._sent, certain)
        else:
            new = text[self._sent :]
            if new:  # else the token adds nothing by itself
                self._window = self._window[self._complete :]
                self._complete = len(self._window)
                self._sent = len(self._tokenizer.decode(self._window))
        if len(self._window) >= _WINDOW:  # no character has more bytes than 4: these tell how the text goes on
            self._window, self._complete = self._window[-4:], 0
            self._sent = _certain(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """What was held back: the output is over."""
        rest = self._tokenizer.decode(self._window)[self._sent :]
        self._window, self._complete, self._sent = [], 0, 0
        return rest


class StopStrings:
    """Finds strings that end an output, wherever they lie across pieces; text that may begin one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def take(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the string found): of several the one that is complete first, then the longest.

        The text ends before the string; nothing is to be taken after it.
        """
        if not self._stop:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        longest = max(map(len, self._stop)) - 1
        hold = next(n for n in range(min(longest, len(text)), -1, -1) if not n or self._may_begin(text[-n:]))
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)


class _Output:
    __slots__ = ("detokenizer", "stop", "tokens")

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stop = StopStrings(stop)
        self.tokens = 0


class TokenizerWorker:
    """What a tokenizer process does with its messages; works as well in the process of its user."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._outputs: dict[int, _Output] = {}

    def handle(self, message: ToTokenizer) -> Reply | None:
        """The reply to a message; None where there is none, as for a request that is over."""
        match message:
            case Prompt():
                return self._prompt(message)
            case Tokens():
                return self._tokens(message)
            case Forget():
                self._outputs.pop(message.request_id, None)
                return None

    def _prompt(self, message: Prompt) -> Reply:
        try:
            if isinstance(message.prompt, str):
                tokens = self._tokenizer.encode(message.prompt)
            else:
                tokens = self._tokenizer.encode_chat(message.prompt)
        except ValueError as error:
            return Refused(message.request_id, str(error))
        if not tokens:
            return Refused(message.request_id, "the prompt has no tokens")
        self._outputs[message.request_id] = _Output(self._tokenizer, message.stop)
        return Encoded(message.request_id, tokens)

    def _tokens(self, message: Tokens) -> Reply | None:
        number, output = message.request_id, self._outputs.get(message.request_id)
        if output is None:
            return None
        pieces = []
        for token in message.tokens:
            output.tokens += 1
            piece, stop = output.stop.take(output.detokenizer.take(token))
            pieces.append(piece)
            if stop is not None:
                return self._end(number, output, pieces, stop)
        if not message.last:
            return Text(number, "".join(pieces), output.tokens)
        piece, stop = output.stop.take(output.detokenizer.finish())
        pieces += [piece, output.stop.finish()]
        return self._end(number, output, pieces, stop)

    def _end(self, number: int, output: _Output, pieces: list[str], stop: str | None) -> Text:
        del self._outputs[number]
        return Text(number, "".join(pieces), output.tokens, stop, last=True)


# -- the process -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Entry point of the process: serve until the one that started it ends it, or ends itself."""
    setup = msgspec.json.decode(sys.argv[1], type=TokenizerSetup)
    if not follow_parent(setup.parent):
        return 1
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, setup.name.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(setup.address)
    try:
        worker = TokenizerWorker(Tokenizer(setup.model_dir))
        socket.send(encode(Ready()))
        while True:
            reply = worker.handle(decode_to_tokenizer(socket.recv()))
            if reply is not None:
                socket.send(encode(reply))
    except Exception as error:
        socket.send(
            encode(Crashed(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"))
        )
        return 1
    finally:
        socket.close()
        context.term()


# -- reading a folder --------------------------------------------------------------------------------------------------


def _certain(text: str) -> int:
    """How many characters stay whatever follows: all but the last three of those that may be parts of one."""
    return len(text) - min(3, len(text) - len(text.rstrip(_BROKEN)))


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _content(value: object) -> object:
    """The text of a special token, which is written as such or with its properties."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _chat_template(folder: Path, config: dict[str, object]) -> jinja2.Template | None:
    """chat_template.jinja, else what tokenizer_config.json has; of several the one named default."""
    path, source = folder / "chat_template.jinja", config.get("chat_template")
    if path.is_file():
        source = path.read_text()
    elif isinstance(source, list):
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    # The settings that templates are written for; sandboxed, because they come with the model.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    # Training marks the assistant's words with these; for a prompt they are nothing.
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {folder} cannot be read: {error}") from error


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    sys.exit(main())
