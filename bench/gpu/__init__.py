"""``bench/gpu.sh``: the stages of one call on a GPU machine, and the files that it leaves even if it is killed.

Nothing here imports torch, numpy or linfast, so that the summary can name what is missing or broken on the machine.
"""
