"""Tokenizers of one model, as many processes side by side as it takes, or one in this process."""

import os
import tempfile
import time
from collections import deque
from pathlib import Path

import zmq

from flowserve.runtime import tokenizer as tk
from real.process import ChildProcess


class _Member:
    __slots__ = ("process", "requests")

    def __init__(self, process: ChildProcess) -> None:
        self.process = process
        self.requests: set[int] = set()


class TokenizerPool:
    """Each new request goes to the process with the fewest, and stays there.

    With `processes` 0 the replies are there as soon as a message is sent. `log_dir`: where processes write what they
    print. ValueError: the folder has no tokenizer; RuntimeError: a process did not start.
    """

    START_TIMEOUT_S = 60.0

    def __init__(self, model_dir: str | Path, processes: int = 0, log_dir: Path | None = None) -> None:
        if processes < 0:
            raise ValueError(f"processes is {processes}: allowed are 0 (in this process) and more")
        self._worker = tk.TokenizerWorker(tk.Tokenizer(model_dir)) if processes == 0 else None
        self._replies: deque[tk.Reply] = deque()
        self._members: dict[bytes, _Member] = {}
        self._member_of: dict[int, bytes] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="deepflow-")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        address = f"ipc://{self._folder.name}/tokenizers"
        self._socket.bind(address)
        try:
            for number in range(processes):
                name = f"tokenizer-{number}"
                setup = tk.TokenizerSetup(name, str(model_dir), address, os.getpid())
                log = None if log_dir is None else log_dir / f"{name}.log"
                process = ChildProcess("flowserve.runtime.tokenizer", setup, log)
                self._members[name.encode()] = _Member(process)
            self._await_start()
        except BaseException:
            self.close()
            raise

    @property
    def sources(self) -> list["zmq.Socket[bytes] | int"]:
        """What becomes readable when there may be something to `receive`."""
        return [self._socket, *self.process_sentinels] if self._worker is None else []

    @property
    def process_sentinels(self) -> list[int]:
        return [member.process.sentinel for member in self._members.values()]

    @property
    def process_ids(self) -> list[int]:
        return [member.process.pid for member in self._members.values()]

    def send(self, message: tk.ToTokenizer) -> None:
        """Messages about one request are handled in order, each with at most one reply."""
        if self._worker is not None:
            reply = self._worker.handle(message)
            if reply is not None:
                self._replies.append(reply)
            return
        number = message.request_id
        if isinstance(message, tk.Prompt):
            if not self._members:
                self._replies.append(tk.Refused(number, "no tokenizer process is left"))
                return
            name = min(self._members, key=lambda each: len(self._members[each].requests))
            self._member_of[number] = name
            self._members[name].requests.add(number)
        name = self._member_of.get(number, b"")
        if name in self._members:
            self._socket.send_multipart([name, tk.encode(message)])
            if isinstance(message, tk.Forget):
                self._closed(number)

    def receive(self) -> list[tk.Reply]:
        """All replies that are there. The requests of a process that ended are refused."""
        while self._socket.poll(0):
            self._read()
        for name, member in list(self._members.items()):
            if member.process.ended:
                reason = f"the tokenizer process {member.process.how_it_ended()}"
                self._replies += [tk.Refused(number, reason) for number in sorted(member.requests)]
                for number in member.requests:
                    del self._member_of[number]
                member.process.close(0)
                del self._members[name]
        replies = list(self._replies)
        self._replies.clear()
        return replies

    def close(self) -> None:
        """End the processes."""
        if self._context.closed:
            return
        for member in self._members.values():
            member.process.kill()
        for member in self._members.values():
            member.process.close(5.0)
        self._members.clear()
        self._socket.close()
        self._context.term()
        self._folder.cleanup()

    def _await_start(self) -> None:
        waiting, deadline = set(self._members), time.monotonic() + self.START_TIMEOUT_S
        while waiting:
            if not self._socket.poll(100):
                for name in waiting:
                    if self._members[name].process.ended and not self._socket.poll(0):
                        raise RuntimeError(f"{name.decode()} {self._members[name].process.how_it_ended()}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{len(waiting)} tokenizer processes did not start in {self.START_TIMEOUT_S} s")
                continue
            name, body = self._socket.recv_multipart()
            message = tk.decode_from_tokenizer(body)
            if isinstance(message, tk.Crashed):
                raise ValueError(message.reason)
            waiting.discard(name)

    def _read(self) -> None:
        _, body = self._socket.recv_multipart()
        message = tk.decode_from_tokenizer(body)
        if isinstance(message, tk.Encoded | tk.Text | tk.Refused):
            self._replies.append(message)
            if isinstance(message, tk.Refused) or (isinstance(message, tk.Text) and message.last):
                self._closed(message.request_id)

    def _closed(self, number: int) -> None:
        name = self._member_of.pop(number, None)
        if name in self._members:
            self._members[name].requests.discard(number)
