"""``python -m linfast.bench``."""

from .run import main

raise SystemExit(main())
