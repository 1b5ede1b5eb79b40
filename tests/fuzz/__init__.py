"""A fuzzer of the public functions: ``python -m tests.fuzz --minutes 30``.

--seconds or --calls limit the run as well; --seed sets the draws, and --only the kind.

A kind is a module of this folder with ``RECIPES``, a hypothesis strategy of plain dictionaries, and
``check(judge, recipe)``, which builds the objects of the recipe, calls public functions and compares every result
with an oracle. A recipe is complete: the same recipe gives the same tensors. A finding is printed as

    python -m tests.fuzz --only KIND --try "RECIPE"

which runs it again. Once the fault is corrected, add it to examples.py. One call is one call of a public function
whose result an oracle has accepted, or that raised the error that it should.

    __main__.py    options, the processes, the report       flows.py       bijections and flows
    worker.py      one process: rounds of one kind each     operators.py   operators and their algebra
    judge.py       what counts as right; counts calls      linearizer.py  f, its algebra, induced spaces
    drawing.py     strategies and tensors of recipes        sampling.py    collapse, sample, invert, streams
    formulas.py    ops written out                          examples.py    findings so far
    plain.py       flows written out from the formulas      ops.py         the ops in plain torch
    files.py       save and load                            kernels.py     the same in Triton's interpreter
    libraries.py   accelerate and restore                   arguments.py   arguments that must be refused
"""
