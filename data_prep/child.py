"""A child process answers requests with limits of time and memory, for work that is not safe in this one.

Decoders take any amount of time and memory for some files, and some files crash them. The death of the child
is an answer of its own (Died), and the next request starts a new child.
"""

import atexit
import contextlib
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing import connection

WALL = 10  # times the limit of CPU time: only a child that waits for ever, or for its turn, takes longer
_SIZE = struct.Struct(">Q")
# The child imports what this process imports, from the same places, whatever is in the working folder.
_CHILD = f"import sys; sys.path[:] = sys.argv[4:]; import {__name__} as child; child._serve(*sys.argv[1:4])"
# One thread: the limit is of CPU time, and each thread reserves memory.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


class Died(Exception):
    """A request that ended the child, and why.

    Attributes:
        reason: "slow", "memory" or "crash".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Child:
    """One child process, started by the first request, and again after it died. Requests wait for each other.

    Args:
        answer: "module:function", from a request (bytes) to the parts of the reply.
        seconds: of CPU time, for each request.
        memory: bytes of address space.
    """

    def __init__(self, answer: str, seconds: int, memory: int):
        self.answer, self.seconds, self.memory = answer, seconds, memory
        self._child, self._lock, self._is_ended = None, threading.Lock(), False

    def ask(self, *request: bytes) -> bytes:
        """The reply.

        Args:
            request: its parts.

        Raises:
            Died: the child needed more time or memory, or crashed.
        """
        with self._lock:
            for _ in range(2):
                if self._is_ended:
                    raise Died("crash", "this process ends")
                if (reply := self._try(request)) is not None:
                    return reply
                code = self._close()
                if code not in (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGHUP, -signal.SIGINT):
                    break  # else it was stopped from outside, which says nothing about the request
        if code in (-signal.SIGXCPU, -signal.SIGALRM):
            raise Died("slow", f"it takes more than {self.seconds} seconds")
        if code == -signal.SIGABRT:
            raise Died("memory", f"it needs more than {self.memory / (1 << 30):.3g} GiB of memory")
        raise Died("crash", "the decoder crashed on it")

    def close(self) -> None:
        with self._lock:
            self._close()

    def end(self) -> None:
        """Kill the child, also while it works; no other one is started."""
        self._is_ended = True
        if child := self._child:
            child.kill()

    def _try(self, request: tuple[bytes, ...]) -> bytes | None:
        """The reply; None if the child dies."""
        if self._child is None:
            arguments = (self.answer, str(self.seconds), str(self.memory), *sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the parent, and must not look like a crash
            )
        try:
            for part in (_SIZE.pack(sum(map(len, request))), *request):
                self._child.stdin.write(part)
            self._child.stdin.flush()
        except BrokenPipeError:
            return None
        if not connection.wait([self._child.stdout], WALL * (self.seconds + 1)):
            self._child.send_signal(signal.SIGALRM)
        header = self._child.stdout.read(_SIZE.size)
        if len(header) < _SIZE.size:
            return None
        (size,) = _SIZE.unpack(header)
        reply = self._child.stdout.read(size)
        return reply if len(reply) == size else None

    def _close(self) -> int:
        """The child's exit status; it ends when it has no more input."""
        if self._child is None:
            return 0
        child, self._child = self._child, None
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        return child.wait()


_own: dict[tuple, Child] = {}
_own_pid = 0


def own(answer: str, seconds: int, memory: int) -> Child:
    """The child of this process for these requests: a forked worker must not talk to its parent's."""
    global _own_pid
    if _own_pid != os.getpid():
        _own.clear()
        _own_pid = os.getpid()
    key = answer, seconds, memory
    if key not in _own:
        _own[key] = Child(*key)
        atexit.register(_own[key].close)
    return _own[key]


def exit_with_parent() -> None:
    """Exit this process of multiprocessing when the one that started it is gone: a parent that was killed
    cannot stop its workers, and they wait for work for ever.
    """
    parent = multiprocessing.parent_process()  # with forkserver too, where it is not that of os.getppid()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit(what: int, value: int) -> None:
    """Set a limit of this process (resource.RLIMIT_...), as far as the system lets it."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _serve(answer: str, seconds: str, memory: str) -> None:
    """The child: answer requests until there is no more input."""
    module, _, name = answer.partition(":")
    function: Callable[[bytes], tuple] = getattr(import_module(module), name)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, int(memory))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(_SIZE.size):
        data = source.read(*_SIZE.unpack(header))
        limit(resource.RLIMIT_CPU, int(time.process_time()) + int(seconds) + 1)
        reply = function(data)
        for part in (_SIZE.pack(sum(map(len, reply))), *reply):
            sink.write(part)
        sink.flush()
