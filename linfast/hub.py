"""save_pretrained, from_pretrained and push_to_hub, through huggingface_hub's ModelHubMixin, an optional package.

A directory, and a repository on the Hugging Face Hub, hold

    model.safetensors   the file of ``linfast.save``: architecture and weights, no pickle and no code
    config.json         the class and the version, for the Hub
    README.md           a model card
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._version import __version__
from .checks import check_path
from .dispatch import usable_device

__all__ = ["HubMethods"]

_Model = TypeVar("_Model", bound="HubMethods")

files: dict[str, Callable[..., Any]] = {}
"""``save`` and ``load`` of linfast.io, which enters them here: it belongs to a later layer."""

_MODEL, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_CARD_TEXT = """---
{{ card_data }}
---

# {{ kind }}

A `{{ kind }}` of linfast. `model.safetensors` holds its architecture and its weights, and no code.

```bash
pip install 'linfast[hub]'
```

```python
import linfast as lf

model = lf.{{ base }}.from_pretrained("{{ place }}")
```
"""


class HubMethods:
    """Methods that share a model by a directory or by the Hugging Face Hub (``pip install 'linfast[hub]'``)."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` (see ``linfast.save``), ``config.json`` and a model card into a directory.

        The directory is made where it is missing. An earlier model of ``save_pretrained`` is replaced, with
        its card; if the new one cannot be saved, it stays. A ``README.md`` that a person wrote or edited is kept.

        Raises:
            FileExistsError: a ``model.safetensors`` or ``config.json`` that linfast did not write.
            ImportError: huggingface_hub is not installed.
            TypeError, ValueError, OSError: as for ``linfast.save``.
        """
        folder = check_path("directory", directory, utf8=True)
        model = _mixin()(self)
        for path in (folder / _MODEL, folder / _CONFIG):
            if path.exists() and not _is_ours(path):
                raise FileExistsError(f"{path} is not of linfast and would be replaced: choose another directory")
        described = _described(self, folder.resolve().name)
        replaced = not (folder / _CARD).exists() or _is_unedited(model, folder)
        folder.mkdir(parents=True, exist_ok=True)
        files["save"](self, folder / _MODEL)  # first: where it raises, the other files are of the earlier model
        (folder / _CONFIG).write_text(json.dumps(described["config"], indent=2))
        if replaced:
            model.generate_model_card(**described["model_card_kwargs"]).save(folder / _CARD)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        directory_or_repo_id: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> _Model:
        """The model in a directory, or else in the repository "owner/name" on the Hugging Face Hub, on ``device``.

        A Path, and a string that is absolute, begins with "." or "~" or has more than one "/", names a directory.
        It is in the train or eval mode in which it was saved.

        Args:
            revision: a branch, tag or commit of the repository; by default its newest commit.
            token: for a private repository; by default that of ``hf auth login``.
            cache_dir: where downloaded files are kept; by default huggingface_hub's cache.
            local_files_only: read only what is in the cache.
            force_download: download what is in the cache again.

        Raises:
            FileNotFoundError: a directory without ``model.safetensors``, or a path that is not a directory.
            ImportError: huggingface_hub is not installed.
            ValueError: as for ``linfast.load``; a model that is not of this class.
        """
        source = check_path("directory_or_repo_id", directory_or_repo_id, utf8=True)
        if (source.exists() or _names_a_path(directory_or_repo_id)) and not source.is_dir():
            raise FileNotFoundError(f"directory_or_repo_id: {source} is not a directory")
        where = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where |= {"local_files_only": local_files_only, "force_download": force_download}
        found = _mixin().from_pretrained(str(source), device=usable_device(device), **where)
        model = found.linfast_model
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise ValueError(
                f"{source} holds a {kind}, which is not a {cls.__name__}: use lf.{_base(model)}.from_pretrained"
            )
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload a linfast model",
        create_pr: bool = False,
    ) -> str:
        """Upload the files of ``save_pretrained`` to a repository on the Hugging Face Hub; the commit's address.

        The repository is made where it is missing. A ``README.md`` that it has stays as it is.

        Args:
            repo_id: "owner/name", or "name" for a repository of your own.
            private: whether a new repository is private; None is the owner's default.
            token: one that may write; by default that of ``hf auth login``.
            branch: the branch that the commit is made on; by default "main".
            create_pr: open a pull request instead.

        Raises:
            ImportError: huggingface_hub is not installed.
            TypeError, ValueError: as for ``linfast.save``; no repository has been made then.
        """
        model = _mixin()(self)
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        kept = [_CARD] if api.file_exists(repo_id, _CARD, revision=branch) else None
        options: dict[str, Any] = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        options |= {"commit_message": commit_message, "ignore_patterns": kept}
        with tempfile.TemporaryDirectory() as folder:  # it is saved there before a repository is made
            commit = model.save_pretrained(
                folder, push_to_hub=True, repo_id=repo_id, **_described(self, repo_id), **options
            )
        return commit.commit_url


@functools.cache
def _mixin() -> Any:
    """The class by which huggingface_hub handles a model, its ``linfast_model``."""
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        raise ImportError(f"this needs huggingface_hub: pip install 'linfast[hub]' ({error})") from error

    class Pretrained(ModelHubMixin, library_name="linfast", model_card_template=_CARD_TEXT):
        def __init__(self, linfast_model: Any) -> None:  # a name that no other library's config.json has
            self.linfast_model = linfast_model

        def _save_pretrained(self, save_directory: Path) -> None:
            files["save"](self.linfast_model, save_directory / _MODEL)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, device: torch.device, **where: Any) -> Any:  # type: ignore[override]
            folder = Path(model_id)
            path = folder / _MODEL if folder.is_dir() else hf_hub_download(model_id, _MODEL, **where)
            return cls(files["load"](path, device))

    return Pretrained


def _described(model: Any, place: str) -> dict[str, Any]:
    """The contents of config.json, and what the model card says; ``place``: what ``from_pretrained`` is given."""
    kind = type(model).__name__
    return {
        "config": {"linfast_class": kind, "linfast_version": __version__},
        "model_card_kwargs": {"kind": kind, "base": _base(model), "place": place},
    }


def _base(model: Any) -> str:
    """The public class with these methods that the model's class derives from: Bijection, Density or Linearizer."""
    return next(cls.__name__ for cls in type(model).__mro__ if HubMethods in cls.__bases__)


def _names_a_path(place: str | os.PathLike[str]) -> bool:
    """Whether no repository can have this name."""
    if not isinstance(place, str):
        return True
    return place.startswith((".", "~")) or os.path.isabs(place) or place.count("/") > 1


def _is_unedited(model: Any, folder: Path) -> bool:
    """Whether the folder's model card is, byte for byte, the one that ``save_pretrained`` writes there."""
    card = (folder / _CARD).read_bytes()
    found = re.search(rb"A `(\w+)` of linfast.*lf\.(\w+)\.from_pretrained", card, re.DOTALL)
    if found is None:
        return False
    kind, base = (name.decode() for name in found.groups())
    return card == str(model.generate_model_card(kind=kind, base=base, place=folder.resolve().name)).encode()


def _is_ours(path: Path) -> bool:
    """Whether ``save_pretrained`` wrote this file: both begin with a key of linfast's."""
    with open(path, "rb") as file:
        return b'"linfast' in file.read(64)
