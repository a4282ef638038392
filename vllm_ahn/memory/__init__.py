"""The compressed memories of the paper: their table (``spec.py``), one layer a file, and the optional router."""
