"""Training and sampling, killed and going on, for as long as you like: ``python -m tests.soak --minutes 30``."""
