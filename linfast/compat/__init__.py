"""Modules with other code's names, so that programs that import it run on linfast after changing one line.

``linfast.compat.linearizer`` has the names of github.com/assafshocher/Linearizer, and
``linfast.from_reference`` builds linfast's model from one of its image models.
"""
