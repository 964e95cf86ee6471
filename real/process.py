"""Starting and stopping processes of ours: executors, tokenizers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from flowserve.runtime.log import last_words


class ChildProcess:
    """A process that runs a module and is given its setup, started at construction.

    `sentinel` becomes readable when it ends, however that happens. `log`: where what it prints goes; None: to ours.
    """

    def __init__(self, module: str, setup: msgspec.Struct, log: Path | None) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",  # spinning OpenMP threads starve the other engines of this machine
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._log: IO[bytes] | None = None if log is None else log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, msgspec.json.encode(setup).decode()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        self.sentinel = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def how_it_ended(self) -> str:
        """Exit status in words, with the last line of its log; the process must have ended or be about to."""
        code = self._process.wait(timeout=5)
        if code < 0:
            return f"killed by signal {-code}"
        last = "" if self._log is None else last_words(Path(self._log.name).read_text(errors="replace"))
        return f"exited with status {code}" + (f": {last[:200]}" if last else "")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End it now, if it has not ended."""
        self._process.kill()

    def close(self, timeout_s: float) -> None:
        """Wait for the end, by force after `timeout_s`, and free what belongs to it here."""
        try:
            self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.sentinel)
        if self._log is not None:
            self._log.close()
