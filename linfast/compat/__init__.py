"""Import surfaces of other code, so that it runs on linfast after changing one line.

``linfast.compat.linearizer`` is the one of github.com/assafshocher/Linearizer.
"""
