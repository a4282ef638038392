"""Tests that run in Triton's interpreter: collected only in a process started for it, see ``test_interpreted.py``."""

from support import interpreter

if interpreter.active():
    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]
