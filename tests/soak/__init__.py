"""Training and sampling, killed and resumed repeatedly: ``python -m tests.soak --minutes 30``."""
