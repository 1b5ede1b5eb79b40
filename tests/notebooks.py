"""``python -m tests.notebooks [NAME ...]`` runs the example notebooks at full size and stores their outputs.

Needs ``pip install nbclient ipykernel``. A digest of the code is stored too, so that tests/test_notebooks.py fails
where a cell was changed and not run again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> dict[str, Any]:
    """The notebook, as the JSON that is in its file."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def digest(notebook: dict[str, Any]) -> str:
    """Of the code in all cells."""
    return hashlib.sha256("\0".join(source(cell) for cell in code_cells(notebook)).encode()).hexdigest()


def main(names: list[str]) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in names or NAMES:
        path, start = FOLDER / f"{name}.ipynb", time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as empty:
            resources = {"metadata": {"path": empty}}
            NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "linfast": {"digest": digest(notebook)},
        }
        nbformat.write(notebook, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
