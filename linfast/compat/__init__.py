"""Import surfaces of other code, so that it runs on linfast after changing one line.

``linfast.compat.linearizer`` is the one of github.com/assafshocher/Linearizer;
``linfast.from_reference`` turns its image models into linfast's.
"""
