"""``python -m linfast.bench``: ``linfast bench``."""

import sys

from linfast.cli import main

raise SystemExit(main(["bench", *sys.argv[1:]]))
