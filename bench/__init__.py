"""Benchmarks of linfast, installed as ``linfast.bench``: one case a file in ``cases/``."""
