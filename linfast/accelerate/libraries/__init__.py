"""One file per library: its couplings' formulas, how an instance is recognised, its chain for memory="invert"."""
