"""``python -m tests.static``: compile what changed, keep the tables, print them.

``--triton 3.6.0``: that version's table alone; a version that is not installed is put into build/.
"""

import argparse

from tests.static.table import VERSIONS, launches, refresh, text

parser = argparse.ArgumentParser(prog="python -m tests.static")
parser.add_argument("--triton", action="append", choices=VERSIONS)
now = launches()
for version in parser.parse_args().triton or VERSIONS:
    print(f"Triton {version}\n{text(refresh(version, now))}\n")
