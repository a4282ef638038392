"""What ``kernels.py`` verifies and times: one module a case."""
