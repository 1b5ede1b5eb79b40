"""How a ``linfast`` command ends: an interruption or an error is one line on stderr, a closed pipe is none.

``linfast/__init__.py`` imports this module first: in a process that was started as the command, the imports
after it may be interrupted, or fail for a wrong LINFAST_BACKEND, and end the same way.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stops", "flush_output", "leave", "say", "status_of", "text_of"]

_LONGEST = 2000  # characters of an error's line
_PATIENCE = 3.0  # seconds after a signal in which Python can raise


def say(text: str) -> None:
    """One line on stderr; none where nobody reads it."""
    if sys.stderr is None:
        return
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    try:
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def text_of(error: BaseException) -> str:
    """What an error says, without the punctuation of Python's; the class too where it was not foreseen."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ")


def status_of(error: BaseException) -> int:
    """The exit status after an error: 2, or 1 where it was not foreseen."""
    return 2 if isinstance(error, (ValueError, OSError, FloatingPointError)) else 1


def flush_output() -> None:
    """Flush stdout; where that fails the rest goes nowhere, so that Python's own end does not fail again.

    Raises:
        OSError: no room, or nobody reads it (BrokenPipeError).
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
        raise


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Stops:
    """In this block SIGINT (Ctrl-C) and SIGTERM raise KeyboardInterrupt, once.

    A second signal ends the process at once, and so does a first one that comes where Python cannot raise
    (a weak reference's callback, say) and would print a traceback and go on. A command that has not ended a few
    seconds after the signal is ended: it may wait in C, for another process, where Python runs no handler.

    Args:
        line: what to say then.

    Attributes:
        number: the signal's, 0 before it came.
    """

    def __init__(self, line: Callable[[], str]) -> None:
        self.line, self.number = line, 0
        self._said, self._before = False, dict[int, Any]()
        self._writer: socket.socket | None = None

    def __enter__(self) -> Stops:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as nohup and "&" set it
                    self._before[number] = signal.signal(number, self._stop)
            if _IS_COMMAND:
                reader, self._writer = socket.socketpair()
                self._writer.setblocking(False)
                signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.unraisablehook = self._hook
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            self._writer.close()
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if before is _stop_while_starting else before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.say()
            os._exit(128 + number)
        self.number = number
        raise KeyboardInterrupt

    def _watch(self, reader: socket.socket) -> None:
        """End the process where its main thread does not, soon after a signal or at a second one."""
        with reader:
            while (number := int.from_bytes(reader.recv(1), "big")) not in self._before:
                if not number:  # closed
                    return
            reader.settimeout(_PATIENCE)
            with contextlib.suppress(TimeoutError):
                if not reader.recv(1):
                    return
        self.say()
        os._exit(128 + number)

    def say(self) -> None:
        """The line, once, by the first of torchrun's processes."""
        if not self._said and os.environ.get("RANK", "0") == "0":
            self._said = True
            say(self.line())

    def _unraisable(self, unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            self.say()
            os._exit(128 + (self.number or signal.SIGINT))
        self._hook(unraisable)


def leave(status: int) -> int:
    """The status of an interrupted command, with which the process ends, where it is that command's.

    Python itself would end by SIGINT after all where the interruption came through an ``exec`` of text, as
    classes of the standard library are made, whoever caught it then.
    """
    if _IS_COMMAND:
        os._exit(status)
    return status


def _is_command() -> bool:
    """Whether this process was started as ``linfast`` or ``python -m linfast...``."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # as long as Python looks for the module
        return any(part.removeprefix("-m").split(".")[0] == "linfast" for part in sys.orig_argv[1:])
    return os.path.splitext(os.path.basename(program))[0] == "linfast"


def _stop_while_starting(number: int, frame: FrameType | None) -> None:
    say("linfast: interrupted while it started: nothing was begun")
    os._exit(128 + number)


def _fail_while_starting(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say(f"linfast: error: {text_of(error)}")
    os._exit(status_of(error))


def _prepare() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # closed ones of the first three would be the next files' that are opened, and get what is printed
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be what a terminal cannot show
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    if not sys.flags.dev_mode:
        sys.excepthook = _fail_while_starting
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_while_starting)


_IS_COMMAND = _is_command()
if _IS_COMMAND:
    _prepare()
