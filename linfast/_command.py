"""Code that all ``linfast`` commands share: the argument parser, progress output, errors and signals.

An interruption or an error prints one line on stderr; a closed pipe prints nothing. ``linfast/__init__.py``
imports this module first, so that an interruption or error during the later imports prints one line too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_LONGEST = 2000  # characters of a printed line; the rest is cut off
_PATIENCE = 3.0  # seconds that an interrupted command has to print its last line before it exits
_BETWEEN_LINES = 5.0  # seconds between two lines of progress


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message} (see {self.prog} --help)")
        raise SystemExit(2)


def add_earlier_files(parser: argparse.ArgumentParser, resume: str, overwrite: str) -> None:
    """Add ``--resume`` and ``--overwrite`` with these help texts; at most one of the two can be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument("--overwrite", action="store_true", help=overwrite)


def refuse_existing(
    paths: Iterable[str | Path], ways: str = "--resume goes on with that run, --overwrite replaces its files"
) -> None:
    """Raise FileExistsError if one of the paths exists; the message names the path and the options in ``ways``."""
    for path in paths:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: {ways}")


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Shows progress on stderr: a tqdm bar on a terminal where tqdm is installed, else a line every few seconds.

    Both state ``what``, how many of ``total`` units are done, the seconds passed and left, and ``note``, such as
    the loss.
    """

    def __init__(self, what: str, done: int, total: int, unit: str, enabled: bool = True) -> None:
        self.what, self.total, self.unit, self.note = what, total, unit, ""
        self.enabled = enabled and sys.stderr is not None
        self._begun, self._start = done, time.monotonic()
        self._last = self._start
        self._bar: Any = None
        if self.enabled and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(initial=done, total=total, desc=what, unit=unit, mininterval=0.5)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int) -> None:
        """Show that this many units are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self.enabled and (done == self.total or time.monotonic() >= self._last + _BETWEEN_LINES):
            self._last = time.monotonic()
            passed = self._last - self._start
            left = passed * (self.total - done) / max(1, done - self._begun)
            seconds = f"{passed:.0f} s" + (f" and about {left:.0f} s left" if done < self.total else "")
            parts = f"{done}/{self.total} {self.unit}s", seconds, self.note
            say(f"{self.what}: {', '.join(filter(None, parts))}")


def say(text: str) -> None:
    """Print ``text`` as one line on stderr; print nothing where stderr is missing or closed."""
    if sys.stderr is None:
        return
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
    try:
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def report(name: str, error: BaseException) -> int:
    """Print in one line that the command ``name`` failed, and return its exit status.

    The status is 2 for ValueError, OSError and FloatingPointError. Other errors print their class and return 1.
    """
    foreseen = isinstance(error, (ValueError, OSError, FloatingPointError))
    text = str(error) if foreseen and str(error) else f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    say(f"{name}: error: {text}")
    return 2 if foreseen else 1


def flush_output() -> None:
    """Flush stdout. Where that raises, discard the rest, so that Python's flush at exit does not raise again."""
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


_line: Callable[[], str] = lambda: "linfast: interrupted while it started: nothing was begun"  # noqa: E731


def when_interrupted(line: Callable[[], str]) -> None:
    """Set the function whose line is printed when SIGINT (Ctrl-C) or SIGTERM ends the command."""
    global _line
    _line = line


def _is_command() -> bool:
    """Whether this process was started as ``linfast`` or ``python -m linfast...``."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # argv[0] while Python still looks for the module
        return any(part.removeprefix("-m").split(".")[0] == "linfast" for part in sys.orig_argv[1:])
    return os.path.splitext(os.path.basename(program))[0] == "linfast"


def _end_by_signals() -> None:
    """Make SIGINT and SIGTERM end the process at once, with one printed line and status 128 + signal number.

    A thread prints the line and exits, since Python runs no signal handler while the main thread waits in C code,
    such as for another process. A file that linfast writes appears whole or can be resumed after a ``kill -9``.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait_for_exit(number: int, frame: FrameType | None) -> None:
        time.sleep(_PATIENCE)
        os._exit(128 + number)  # reached where the watching thread is gone, because Python is exiting

    def print_last_line() -> None:
        if os.environ.get("RANK", "0") == "0":  # the first of torchrun's processes
            if sys.stderr is not None and sys.stderr.isatty():
                print(file=sys.stderr)  # ends the line of a progress bar
            say(_line())
        flush_output()

    def watch() -> None:
        while (number := reader.recv(1)[0]) not in before:
            pass
        speaker = threading.Thread(target=print_last_line, daemon=True)
        speaker.start()
        speaker.join(_PATIENCE)
        os._exit(128 + number)

    def restore_handlers() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)

    ignored = (signal.SIG_IGN, None)  # as nohup and "&" set it
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in ignored]
    before = {number: signal.signal(number, wait_for_exit) for number in numbers}
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore_handlers)
    threading.Thread(target=watch, daemon=True).start()


if _is_command():
    while (_descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # were one of descriptors 0 to 2 closed, the next opened file would get it, and printed text
    os.close(_descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the encoding may lack characters of a file's name
    if not sys.flags.dev_mode:
        sys.excepthook = lambda kind, error, trace: os._exit(report("linfast", error))
    if threading.current_thread() is threading.main_thread():
        _end_by_signals()
