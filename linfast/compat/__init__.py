"""Import surfaces of other code, so that it runs on linfast after changing one line."""
