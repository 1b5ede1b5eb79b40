"""A fuzzer of the public functions: ``python -m tests.fuzz --minutes 30``.

--seconds or --calls say how long as well, --seed which draws, --only which kind.

A kind is a module of this folder with ``RECIPES``, a hypothesis strategy of plain dictionaries, and
``check(judge, recipe)``, which builds what the recipe says, calls public functions and holds every answer to an
oracle. A recipe says everything: the same recipe gives the same tensors. A finding is printed as

    python -m tests.fuzz --only KIND --try "RECIPE"

which runs it again; once mended, it goes into examples.py as it is. One call is one call of a public function whose
answer an oracle has accepted, or that was refused as it should be.

    __main__.py    options, the processes, the report       flows.py       bijections and flows
    worker.py      one process: rounds of one kind each     operators.py   operators and their algebra
    judge.py       what counts as right, counted calls      linearizer.py  f, its algebra, induced spaces
    drawing.py     strategies and tensors of recipes        sampling.py    collapse, sample, invert, streams
    formulas.py    ops written out                          examples.py    what was found
    plain.py       flows written out from the formulas      ops.py         the ops in plain torch
    files.py       save and load                            kernels.py     the same in Triton's interpreter
    libraries.py   accelerate and restore                   arguments.py   arguments that are to be refused
"""
