"""The ``vllm-ahn`` command and what stands behind its sub-commands."""
