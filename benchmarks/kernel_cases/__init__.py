"""What `kernels.py` verifies and times: one module a case, over the pages and calls of `layer`."""
