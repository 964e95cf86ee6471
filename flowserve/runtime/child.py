"""What a process of ours does first: it lives no longer than the one that started it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int) -> bool:
    """Be killed when process `parent` ends, and leave Ctrl-C, which reaches the whole group, to it.

    False where it has ended already: then it is the caller's turn to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent  # it may have died before we asked to be told
