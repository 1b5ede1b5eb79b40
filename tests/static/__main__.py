"""``python -m tests.static``: compile what has changed, update the tables and print them.

``--triton 3.6.0``: only the table of that version, which is installed into build/ if it is missing.
"""

import argparse

from tests.static.table import VERSIONS, launches, refresh, text

parser = argparse.ArgumentParser(prog="python -m tests.static")
parser.add_argument("--triton", action="append", choices=VERSIONS)
now = launches()
for version in parser.parse_args().triton or VERSIONS:
    print(f"Triton {version}\n{text(refresh(version, now))}\n")
