"""Random engines and random requests against the reference, from one integer each: see ``python -m fuzz --help``.

:mod:`fuzz.case` draws an engine with its requests, :mod:`fuzz.play` runs them, :mod:`fuzz.check` compares the answers
with the reference, and :mod:`fuzz.report` counts what was covered.
"""
