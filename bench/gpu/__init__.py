"""bench/gpu.sh: what one call on a GPU machine runs, in which order, and what it leaves when it is cut short.

Nothing here imports torch, numpy or linfast: whatever is missing or broken on the machine, the summary says so.
"""
