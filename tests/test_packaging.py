"""The sdist builds a wheel, the wheel holds only the package, and it works where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import linfast

_ROOT = Path(__file__).parent.parent
_FOLDERS = {"linfast": "linfast", **{f"linfast/{name}": name for name in ("kernels", "bench", "examples")}}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without --wheel or --sdist the wheel is built from the sdist, so that an sdist that lacks a file fails here.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(_ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    """The files of the wheel, by name."""
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    return message_from_bytes(next(content for name, content in wheel.items() if name.endswith("/METADATA")))


def _committed(ending: str = "") -> set[str]:
    """The files that git tracks, or those that are there if this is not a git checkout."""
    git = subprocess.run(["git", "ls-files"], cwd=_ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    return {name for name in git.stdout.split("\n") if name.endswith(ending)}


def test_the_wheel_has_every_module_and_nothing_else(wheel: dict[str, bytes]) -> None:
    modules = {
        f"{inside}/{name.removeprefix(f'{folder}/')}"
        for inside, folder in _FOLDERS.items()
        for name in _committed(".py")
        if name.startswith(f"{folder}/")
    }
    information = {name for name in wheel if name.split("/")[0].endswith(".dist-info")}
    assert wheel.keys() - information == modules | {"linfast/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in information)


def test_the_sdist_has_what_builds_and_cites_it_and_no_tests(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "build"))]


def test_the_installed_wheel_works(dist: Path, tmp_path: Path) -> None:
    """In a fresh environment, which borrows the packages that linfast requires from the one that runs the tests."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    python = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--ignore-installed", "--no-deps"]
    subprocess.run([*pip, str(next(dist.glob("*.whl")))], check=True, capture_output=True, timeout=120)
    site = Path(next(venv.glob("**/linfast/__init__.py"))).parent.parent
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    script = tmp_path / "installed.py"
    script.write_text((_ROOT / "tests" / "installed.py").read_text())
    done = subprocess.run([python, "-I", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "linfast")]


def test_every_claim_of_a_python_version_is_the_same(metadata: Message) -> None:
    """pyproject.toml's classifiers, CI's matrix, and the oldest version that ruff and mypy check for."""
    found = re.findall(r"Programming Language :: Python :: (3\.\d+)", str(metadata.get_all("Classifier")))
    [matrix] = re.findall(r"python: (\[.+\])", (_ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert re.findall(r"3\.\d+", matrix) == found
    assert metadata["Requires-Python"] == f">={found[0]}"
    settings = (_ROOT / "pyproject.toml").read_text()
    assert f'target-version = "py{found[0].replace(".", "")}"' in settings
    assert f'python_version = "{found[0]}"' in settings


def test_ci_runs_the_readmes_tests_or_fails(tmp_path: Path) -> None:
    """As GitHub runs a step, by ``bash -e``; each library that the tests compare with must be there."""
    steps = (_ROOT / ".github" / "workflows" / "ci.yml").read_text()
    [step] = re.findall(r"- name: The README's test command\n((?:        .+\n)+)", steps)
    assert re.search(r"env:.*\bLINFAST_REQUIRE_PEERS: 1\b", step)
    script = re.sub(r"^ +", "", step.partition("run: ")[2].removeprefix("|\n"), flags=re.MULTILINE)
    (tmp_path / ".ci").mkdir()
    shutil.copy(_ROOT / ".ci" / "readme_command", tmp_path / ".ci")
    for readme, status in (("", 1), ("<!-- tests -->\n```bash\necho it ran\n```\n", 0)):
        (tmp_path / "README.md").write_text(readme)
        done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "" if status else "it ran\n"), done.stderr


def test_the_citation_is_of_this_version() -> None:
    citation = (_ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [linfast.__version__]
