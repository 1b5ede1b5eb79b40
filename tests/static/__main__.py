"""``python -m tests.static``: compile what changed, keep the table, print it."""

from tests.static.table import refreshed, text, write

table = refreshed()
write(table)
print(text(table))
