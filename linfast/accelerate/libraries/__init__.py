"""One file per library: its couplings' formulas, how an instance is recognised, and its chain class."""
