"""The code of the pages in docs/ and of public docstrings runs; the API reference has every public name.

The ```python blocks of a page run in order, in one namespace and in an empty directory; those with >>> are
doctests. A comment before a block says otherwise: ``<!-- needs: NAME -->`` runs it only where that package can be
imported (a failure where LINFAST_REQUIRE_PEERS is set), and ``<!-- not run: REASON -->`` never. The ``linfast``
commands in ```bash blocks are parsed, not run. tests/test_readme.py runs the code of README.md.
"""

from __future__ import annotations

import doctest
import inspect
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from linfast.bench import run as bench

import linfast as lf
from linfast import cli, training
from linfast.accelerate import adapter

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
_FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARKED = re.compile(r"<!-- (needs|not run): *([^\n]*?) *-->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its text without indentation, the line of its first line, and its marker, such as needs."""

    language: str
    text: str
    line: int
    mark: str
    argument: str

    @property
    def doctests(self) -> bool:
        return self.text.lstrip().startswith(">>>")


def blocks(page: str) -> Iterator[Block]:
    for found in _FENCED.finditer(page):
        indent, language, text = found.groups()
        marked = _MARKED.search(page[: found.start()])
        mark, argument = marked.groups() if marked else ("", "")
        assert argument or not mark, f"<!-- {mark}: --> does not say {'why' if mark == 'not run' else 'what'}"
        text = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        yield Block(language, text, page.count("\n", 0, found.start()) + 2, mark, argument)


def execute(page: str, path: Path) -> list[str]:
    """Run a page's python blocks. The result says which blocks were left out because a package is not installed."""
    module = ModuleType(f"page_{path.stem}")  # in sys.modules, as dataclasses and pickle require
    sys.modules[module.__name__] = module
    left_out = []
    try:
        for block in blocks(page):
            if block.language != "python" or block.mark == "not run":
                continue
            if block.mark == "needs" and find_spec(block.argument) is None:
                left_out.append(f"line {block.line} needs {block.argument}")
            elif block.doctests:
                _compare(block, module, path)
            else:  # empty lines before it, so that a traceback names the lines of the page
                exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return left_out


def _compare(block: Block, module: ModuleType, path: Path) -> None:
    example = doctest.DocTestParser().get_doctest(block.text, {}, path.name, str(path), block.line - 1)
    example.globs = vars(module)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append, clear_globs=False)
    assert not result.failed, "".join(said)


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of each ``linfast`` command in a page's bash blocks."""
    for block in blocks(page):
        if block.language == "bash" and block.mark != "not run":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
                words = words if len(words) < 2 else _without_settings(words)
                if words and Path(words[0]).name == "linfast":
                    yield words[1:]
                elif "linfast.cli" in words:  # python -m linfast.cli
                    yield words[words.index("linfast.cli") + 1 :]


def _without_settings(words: list[str]) -> list[str]:
    """Words up to a pipe or another operator, without the variables set before the command."""
    end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>()")), len(words))
    start = next((i for i, word in enumerate(words) if "=" not in word), end)
    return words[start:end]


def parse(arguments: list[str]) -> None:
    if arguments[:1] == ["bench"]:
        bench.parser().parse_args(arguments[1:])
    else:
        cli._parser().parse_args(arguments)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty directory, a registry of adapters of its own, no window, and torch as it is outside the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(adapter, "ADAPTERS", dict(adapter.ADAPTERS))
    torch.use_deterministic_algorithms(False)
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")  # a notebook's test counts the figures that are open


@pytest.mark.parametrize("name", [*PAGES, "README.md"])
def test_the_commands_of_a_page_exist(name: str) -> None:
    for arguments in commands((ROOT / name).read_text()):
        parse(arguments)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name: str, alone: None) -> None:
    left_out = execute((ROOT / name).read_text(), ROOT / name)
    if left_out:
        assert not os.environ.get("LINFAST_REQUIRE_PEERS"), f"{name}: {left_out}"
        warnings.warn(f"{name}: not run, {', '.join(left_out)}", stacklevel=1)


def test_pages_are_found_and_run(alone: None) -> None:
    """Names pass from block to block; pages, plain blocks, doctests and commands are found at all."""
    assert len(PAGES) > 15
    plain, doctests = "```python\nx = 1\n```\ntext\n", "```python\n>>> x\n1\n>>> y = x + 1\n```\n"
    indented = "- in a list\n\n  ```python\n  assert y == 2\n  ```\n"
    assert execute(plain + doctests + indented, Path("page.md")) == []
    wrong = "```python\n1 / 0\n```\n"
    assert execute(f"<!-- needs: no_such_package -->\n{wrong}", Path("page.md")) == ["line 3 needs no_such_package"]
    assert execute(f"<!-- not run: divides by zero -->\n{wrong}", Path("page.md")) == []
    shell = "A=1 .venv/bin/linfast demo \\\n  --seed 3 | tee out\npip install linfast\npython -m linfast.cli info\n"
    assert list(commands(f"```bash\n{shell}```\n")) == [["demo", "--seed", "3"], ["info"]]


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```python\n>>> 1 + 1\n3\n```\n", AssertionError),
        ("<!-- not run: -->\n```python\n1 / 0\n```\n", AssertionError),
        ("```python\nx = 1\n```\n<!-- needs: torch -->\n```python\ny\n```\n", NameError),
    ],
)
def test_a_block_that_fails_is_noticed(page: str, error: type[Exception], alone: None) -> None:
    with pytest.raises(error):
        execute(page, Path("page.md"))


@pytest.mark.parametrize("arguments", [["demo", "--nothing"], ["bench", "--nothing"], ["nothing"]])
def test_a_command_that_does_not_exist_is_noticed(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


PUBLIC = {"linfast": set(lf.__all__) - {"ops", "__version__"}, "linfast.ops": lf.ops.__all__}
PUBLIC |= {"linfast.training": training.__all__}
EXAMPLES = {
    f"{package}.{name}": text
    for package, names in PUBLIC.items()
    for name in sorted(names)
    if ">>> " in (text := inspect.getdoc(getattr(sys.modules[package], name)) or "")
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_docstring_run(name: str, alone: None) -> None:
    page = ModuleType("docstring")
    vars(page).update(torch=torch, lf=lf)
    _compare(Block("python", EXAMPLES[name], 1, "", ""), page, Path(name))


def test_the_reference_has_every_public_name() -> None:
    """A directive ``::: linfast.NAME``, or one of a module whose option ``members`` lists names."""
    text = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    directive, listed = r"^::: (linfast(?:\.ops|\.training)?)\.(.*)\n((?: +.*\n)*)", []
    for package, name, options in re.findall(directive, text, re.MULTILINE):
        members = re.search(r" members: \[(.*)\]", options)
        names = members.group(1).split(", ") if members else [name.rpartition(".")[2]]
        listed += [f"{package}.{name}" for name in names]
    assert sorted(listed) == sorted(f"{package}.{name}" for package in PUBLIC for name in PUBLIC[package])
