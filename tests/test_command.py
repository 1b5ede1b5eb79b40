"""How the ``linfast`` command ends: interrupted at its start, with a closed pipe, or on a full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import linfast
from linfast import _command
from linfast.cli import main

_INTERRUPTED_IMPORT = """
import signal, sys

class Interrupt:
    def find_spec(name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)

sys.argv = {argv!r}
sys.meta_path.insert(0, Interrupt)
import linfast
"""


def _python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, timeout=300, **options)


@pytest.mark.parametrize("argv", [["/usr/bin/linfast", "info"], ["linfast.exe"]])
def test_an_interruption_while_it_starts_is_one_line(argv: list[str]) -> None:
    done = _python("-c", _INTERRUPTED_IMPORT.format(argv=argv))
    assert done.returncode == 130
    assert done.stderr == "linfast: interrupted while it started: nothing was begun\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_inside_an_exec_of_text_has_its_status(number: int, status: int, tmp_path: Path) -> None:
    """With ``python -m`` Python remembers the interruption, and would itself end by SIGINT."""
    text = f"import signal; signal.raise_signal({int(number)})"
    (tmp_path / "sitecustomize.py").write_text(
        f"import platform\nplatform.python_version = lambda: exec({text!r})\n"
    )
    path = os.pathsep.join((str(tmp_path), str(Path(linfast.__file__).parents[1])))
    done = _python("-m", "linfast.cli", "info", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == status
    assert done.stderr == "linfast info: interrupted; it writes nothing\n"


def test_imports_by_other_programs_keep_their_signals() -> None:
    done = _python("-c", _INTERRUPTED_IMPORT.format(argv=["other.py", "linfast"]))
    assert "KeyboardInterrupt" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "started", "is_command"),
    [
        (["-m"], ["python", "-m", "linfast.cli", "info"], True),
        (["-m"], ["python", "-mlinfast.cli"], True),
        (["-m"], ["python", "-m", "linfastic.cli"], False),
        (["-c"], ["python", "-c", "linfast.cli"], False),
        (["/x/linfast"], ["python", "/x/linfast"], True),
        ([], ["python"], False),
    ],
)
def test_what_counts_as_the_command(argv, started, is_command: bool, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("sys.orig_argv", started)
    assert _command._is_command() == is_command


def test_a_wrong_backend_is_one_line_to_the_command_and_an_error_to_python() -> None:
    wrong = {"env": {**os.environ, "LINFAST_BACKEND": "nope"}}
    done = _python("-m", "linfast.cli", "info", **wrong)
    assert done.returncode == 2
    assert done.stderr == "linfast: error: LINFAST_BACKEND must be one of auto, triton, reference; got 'nope'\n"
    assert "ValueError: LINFAST_BACKEND must be one of" in _python("-c", "import linfast", **wrong).stderr


def test_a_closed_pipe_is_silent_and_a_full_disk_is_one_line(capfd, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    try:
        for descriptor, line, status in (
            (writer, "", 141),
            (os.open("/dev/full", os.O_WRONLY), "linfast info: error: [Errno 28] No space left on device\n", 2),
        ):
            os.dup2(descriptor, 1)
            with monkeypatch.context() as patch, open(1, "w", closefd=False) as stdout:
                patch.setattr("sys.stdout", stdout)
                assert main(["info"]) == status
                stdout.flush()  # as Python does at its end
            os.dup2(kept, 1)
            assert capfd.readouterr().err == line
    finally:
        os.close(kept)
    monkeypatch.setattr("sys.stdout", None)
    assert main(["info"]) == 0


def test_help_into_a_closed_pipe_is_silent(monkeypatch, capsys) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["--help"]) == 141
    assert capsys.readouterr().err == ""


def test_an_interruption_ends_the_wait_for_other_processes(tmp_path: Path) -> None:
    """torch waits for them in C++, where Python's signal handlers do not run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    names = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": place[0], "MASTER_PORT": str(place[1])}
    arguments = ["sample", "--checkpoint", "f", "--count", "1", "--out", "x.npy"]
    waiting = subprocess.Popen(
        [sys.executable, "-m", "linfast.cli", *arguments],
        env={**os.environ, **names, "PYTHONPATH": str(Path(linfast.__file__).parents[1])},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while waiting.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(place):
                break  # it listens, and waits
            time.sleep(0.1)
        waiting.send_signal(signal.SIGINT)
        assert waiting.communicate(timeout=60)[1].splitlines()[-1] == "linfast sample: interrupted; nothing is kept"
    finally:
        waiting.kill()
    assert waiting.returncode == 130


_STARTED = """
import os, signal, sys, time, weakref
sys.argv = ["linfast"]
from linfast import _command
_command.when_interrupted(lambda: "interrupted; kept")
"""


def _ends(code: str, status: int = 130, said: str = "interrupted; kept\n") -> None:
    done = _python("-W", "ignore", "-c", _STARTED + code)  # Python 3.12 and newer warn of a fork beside threads
    assert (done.returncode, done.stderr) == (status, said)


def test_a_childs_signals_are_its_own() -> None:
    _ends(
        """
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.write(writer, b"-")
    time.sleep(60)
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
""",
        0,
        "",
    )


def test_a_signal_ends_the_command_wherever_it_comes() -> None:
    """Also where Python cannot raise, in a loop that catches everything, and for two signals."""
    _ends(
        """
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
dying = Dying()
del dying
time.sleep(60)
"""
    )
    _ends(
        """
while True:
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        pass
""",
        143,
    )
    _ends("for number in (signal.SIGINT, signal.SIGTERM): signal.raise_signal(number)")


def test_what_was_printed_is_flushed_when_a_signal_comes(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        done = _python("-c", _STARTED + "print('done'); signal.raise_signal(signal.SIGINT)", stdout=file)
    assert done.returncode == 130
    assert (tmp_path / "out").read_text() == "done\n"


def test_a_signal_while_python_ends_does_not_hang() -> None:
    _ends("import atexit; atexit.register(signal.raise_signal, signal.SIGINT)")


def test_an_ignored_signal_stays_ignored() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + _STARTED
    done = _python("-c", code + "signal.raise_signal(signal.SIGINT); print('on', file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "on\n")
