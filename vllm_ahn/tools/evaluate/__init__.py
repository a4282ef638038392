"""What shows how good a model with an AHN is: tasks for lm-eval, their data and scores, and the paper's figures.

The tasks are YAML files in ``tasks/`` (`TASKS`, which ``vllm-ahn tasks`` prints), for lm-eval's ``--include_path``.
"""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""The folder for lm-eval's ``--include_path`` and ``TaskManager(include_path=...)``."""
