"""Benchmarks of linfast, installed as ``linfast.bench``: one case per file in ``cases/``."""
