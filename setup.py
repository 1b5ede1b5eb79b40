"""The packages of linfast. kernels/, bench/ and examples/ are installed inside it: a top-level package called
``kernels`` would shadow the one that transformers uses, and ``examples`` would shadow many others."""

from setuptools import find_packages, setup

_MAPPED = {f"linfast.{folder}": folder for folder in ("kernels", "bench", "examples")}


def _packages() -> list[str]:
    names = ["linfast", *(f"linfast.{name}" for name in find_packages("linfast"))]
    for package, folder in _MAPPED.items():
        names += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return names


setup(
    packages=_packages(),
    package_dir={"linfast": "linfast", **_MAPPED},
    package_data={"linfast": ["py.typed"]},
)
