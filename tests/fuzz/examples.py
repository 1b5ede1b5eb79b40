"""What the fuzzer has found: (kind, recipe) as it printed them, each mended since."""

from __future__ import annotations

from typing import Any

EXAMPLES: list[tuple[str, dict[str, Any]]] = []
