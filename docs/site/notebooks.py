"""A hook of mkdocs: notebooks in examples/notebooks become pages, with the outputs that their files hold.

docs/examples.md links to the notebooks in the checkout; on the site these links lead to the pages.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages to the section that has docs/examples.md."""
    section = next(pages for entry in config.nav or () for pages in entry.values() if "examples.md" in pages)
    section += [f"notebooks/{path.stem}.md" for path in _notebooks(config)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in _notebooks(config):
        pictures: list[bytes] = []
        text = "\n\n".join(_parts(json.loads(path.read_text()), path.stem, pictures))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_text()))
        for i, picture in enumerate(pictures):
            files.append(File.generated(config, f"notebooks/{path.stem}_{i}.png", content=picture))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\]\(\.\./examples/notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def _notebooks(config: MkDocsConfig) -> list[Path]:
    return sorted(Path(config.config_file_path).parent.glob("examples/notebooks/*.ipynb"))


def _parts(notebook: dict[str, Any], name: str, pictures: list[bytes]) -> Iterator[str]:
    """The notebook as Markdown, part by part; ``pictures`` receives the PNGs."""
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"]).replace("](../../docs/", "](../")
        elif source := "".join(cell["source"]):
            yield f"```python\n{source}\n```"
        printed = ""
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                yield _text(printed) + f"![output of the cell above]({name}_{len(pictures)}.png)"
                pictures.append(base64.b64decode("".join(data["image/png"])))
                printed = ""
            elif output.get("name") != "stderr":  # without progress bars
                printed += "".join(data.get("text/plain", output.get("text", ())))
        yield _text(printed)
        if i == 0:
            yield f"[Download this notebook]({name}.ipynb)"


def _text(printed: str) -> str:
    return f"```text\n{printed.rstrip()}\n```\n\n" if printed.strip() else ""
