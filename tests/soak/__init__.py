"""Training and sampling that are killed and go on, for as long as you like: ``python -m tests.soak --minutes 30``."""
