"""Import surfaces of other code, so that it runs on linfast after changing one line.

``linfast.compat.linearizer`` has the names of github.com/assafshocher/Linearizer, and
``linfast.from_reference`` builds linfast's model from one of its image models.
"""
