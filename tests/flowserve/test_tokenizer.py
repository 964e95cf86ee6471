"""The tokenizer module: against transformers, and as a stream that never takes text back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from flowserve.runtime.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer
from flowserve.runtime.tokenizer import (
    ChatMessage,
    Detokenizer,
    Encoded,
    Forget,
    Prompt,
    Refused,
    StopStrings,
    Text,
    Tokenizer,
    TokenizerWorker,
    Tokens,
)

TEXTS = [
    "The for statement iterates over the elements of a sequence.",
    "",
    "  leading, trailing and   many spaces \n\t",
    "Grüße, 世界! 👩‍🚀🏽 ok, żółć",
    "<|im_start|>user\nhello<|im_end|>",
    "\u0000\u200b\ufffd",
]
CHAT = (
    ChatMessage("system", "You are brief."),
    ChatMessage("user", "What is 2 + 2?\n"),
    ChatMessage("assistant", "4 🙂"),
    ChatMessage("user", "{{ 1 + 1 }} {% raw %}"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, 512)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The other common kind: words begin with a mark, the first one's is dropped, and bytes are tokens."""
    path = tmp_path_factory.mktemp("sentencepiece")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁a", "a", "b", "▁b", "ab", "▁ab", "é", "▁é"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "é")]
    raw = RawTokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def pieces_of(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*map(stream.take, tokens), stream.finish()]


# -- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """Text to tokens and back, special tokens included."""
    tokens = tokenizer.encode(text)
    assert tokens == reference(text).input_ids
    assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "a list"])
def test_conversations_are_those_of_transformers(folder: Path, reference: Any, tmp_path: Path, where: str) -> None:
    """The template is found wherever models keep it; what users write is text, and not part of it."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if where != "chat_template.jinja":
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
        config["chat_template"] = CHAT_TEMPLATE if where == "tokenizer_config.json" else named
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    messages = [{"role": message.role, "content": message.content} for message in CHAT]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat_text(CHAT) == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(CHAT) == ids


def test_templates_see_what_they_are_written_for(folder: Path, tmp_path: Path) -> None:
    """Special tokens, JSON, the date, loop controls and marks of training all work; nothing reaches beyond the text."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "chat_template.jinja"
    path.write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}"
        "{{ eos_token }}{{ {'k': m.content} | tojson }}{{ strftime_now('%Y') | length }}{% endgeneration %}{% endfor %}"
    )
    assert Tokenizer(tmp_path).chat_text(CHAT[3:] * 2) == '<|im_end|>{"k": "{{ 1 + 1 }} {% raw %}"}4'
    path.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="the chat template refuses the messages: access to attribute"):
        Tokenizer(tmp_path).chat_text(CHAT)


# -- streams -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    """Pieces make up the text, and none ends or begins within a character."""
    for each in (tokenizer, sentencepiece):
        tokens = each.encode(text)
        pieces = pieces_of(each, tokens)
        assert "".join(pieces) == each.decode(tokens)
        if "\ufffd" not in each.decode(tokens):
            assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300) | st.sampled_from([0, 1, 2]), max_size=150))
def test_any_tokens_make_a_stream(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Tokens that no text has (as a model with random weights yields) stream as what they decode to together."""
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_stream_is_prompt_and_cheap(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text comes with its token; a few tokens are decoded again for each, in long outputs and hopeless ones as well."""
    tokens = tokenizer.encode("one two three four five " * 40)
    stream = Detokenizer(tokenizer)
    assert all(stream.take(token) for token in tokens)
    decoded: list[int] = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, each: decoded.append(len(each)) or decode(self, each))
    stream = Detokenizer(tokenizer)
    for token in tokens:
        stream.take(token)
    assert max(decoded) <= 3
    lone = next(n for n in range(3, 300) if decode(tokenizer, [n]) == "\ufffd")
    for hopeless in (lone, 0):
        decoded.clear()
        pieces = pieces_of(tokenizer, [hopeless] * 500)
        assert max(decoded) <= 64
        assert sum(map(len, pieces[:100])) >= (90 if hopeless else 0)


# -- stop strings --------------------------------------------------------------------------------------------------


def stopped(text: str, stop: list[str], sizes: list[int]) -> tuple[str, str | None]:
    """What is shown of a text that comes in pieces of these sizes, and which string ended it."""
    finder, shown, at = StopStrings(stop), "", 0
    for size in [*sizes, len(text)]:
        piece, found = finder.take(text[at : at + size])
        shown += piece
        at += size
        assert not any(each in shown for each in stop)
        if found is not None:
            return shown, found
    return shown + finder.finish(), None


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5)),
)
def test_stop_strings_are_found_across_pieces(text: str, stop: list[str], sizes: list[int]) -> None:
    """However the text is cut, it ends before the string that is complete first; without one it is whole."""
    ends = [
        (end, text[:end].rfind(each), each)
        for end in range(len(text) + 1)
        for each in stop
        if text[:end].endswith(each)
    ]
    expected: tuple[str, str | None] = (text, None)
    if ends:
        first = min(end for end, _, _ in ends)
        found = max((each for end, _, each in ends if end == first), key=len)
        expected = text[: first - len(found)], found
    assert stopped(text, stop, sizes) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    """Text is shown as soon as no stop string can begin with it."""
    finder = StopStrings(["\n\nUser:", "END"])
    assert [finder.take(piece)[0] for piece in ("a\n", "b E", "N", "x\n\nU", "ser")] == ["a", "\nb ", "", "ENx", ""]
    assert finder.take(": hi") == ("", "\n\nUser:")


# -- the worker ----------------------------------------------------------------------------------------------------


def test_a_worker_serves_requests_side_by_side(tokenizer: Tokenizer) -> None:
    """Prompts become tokens, outputs text; a stop string ends its request alone, and later tokens are not answered."""
    worker = TokenizerWorker(tokenizer)
    answer = tokenizer.encode("yes. STOP here")
    assert worker.handle(Prompt(1, "hello", (". STOP",))) == Encoded(1, tokenizer.encode("hello"))
    assert worker.handle(Prompt(2, CHAT)) == Encoded(2, tokenizer.encode_chat(CHAT))
    texts = {1: "", 2: ""}
    for token in answer:
        for number in (1, 2):
            reply = worker.handle(Tokens(number, [token]))
            if reply is not None:
                assert isinstance(reply, Text)
                texts[number] += reply.text
                if reply.last:
                    assert (number, reply.stop) == (1, ". STOP")
                    assert reply.tokens < len(answer)
    last = worker.handle(Tokens(2, [], last=True))
    assert last == Text(2, "", len(answer), last=True)
    assert texts == {1: "yes", 2: "yes. STOP here"}
    assert worker.handle(Tokens(1, answer)) is None
    assert worker.handle(Prompt(3, "x")) is not None
    assert worker.handle(Forget(3)) is None
    assert worker.handle(Tokens(3, answer)) is None
    assert not worker._outputs


def test_a_worker_holds_back_until_the_end(tokenizer: Tokenizer) -> None:
    """What might have begun a stop string, or was half a character, comes with the last message."""
    worker = TokenizerWorker(tokenizer)
    worker.handle(Prompt(1, "hello", ("never",)))
    tokens = tokenizer.encode("it is nev🙂")[:-1]
    first = worker.handle(Tokens(1, tokens))
    last = worker.handle(Tokens(1, [], last=True))
    assert isinstance(first, Text)
    assert isinstance(last, Text)
    assert first.text == "it is "
    assert last.text == "nev\ufffd"


# -- what is refused -----------------------------------------------------------------------------------------------


def test_prompts_that_are_refused(tokenizer: Tokenizer) -> None:
    """The reason names what is wrong; the worker goes on."""
    worker = TokenizerWorker(tokenizer)
    assert worker.handle(Prompt(1, "")) == Refused(1, "the prompt has no tokens")
    refused = worker.handle(Prompt(2, (ChatMessage("tool", "x"),)))
    assert refused == Refused(
        2, "the chat template refuses the messages: role tool is not one of system, user, assistant"
    )
    assert isinstance(worker.handle(Prompt(3, "x")), Encoded)


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    """A folder without a tokenizer, or with a broken file, is an error that names it."""
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
        Tokenizer(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"the chat template of .* cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the model has no chat template: send text"):
        Tokenizer(tmp_path).encode_chat(CHAT)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 200: bytes and special tokens take 259"):
        make_tokenizer(tmp_path, 200)
