"""Several processes that work as one: the public name of support/processes.py."""

from sandcat.support.processes import together

__all__ = ["together"]
