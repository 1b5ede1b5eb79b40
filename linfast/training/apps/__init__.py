"""The bodies of ``linfast train``: build, train, measure, draw and save, one file an application."""
