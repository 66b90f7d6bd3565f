"""Tasks by lm-eval: the public name of measuring/tasks.py."""

from sandcat.measuring.tasks import TaskResult, load_tasks, run_tasks

__all__ = ["TaskResult", "load_tasks", "run_tasks"]
