"""Tests that run in Triton's interpreter: collected only in a process started for it, see ``test_interpreted.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter

if interpreter.active():
    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]
