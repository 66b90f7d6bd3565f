"""sandcat: a pretrained language model that reads, for each token, only the weights it needs."""

from sandcat.errors import SandcatError
from sandcat.hub import load
from sandcat.method import Method
from sandcat.methods import METHODS
from sandcat.plan import Plan, parse
from sandcat.saving import save
from sandcat.sparsify import sparsify

__version__ = "0.1.0"

__all__ = ["METHODS", "Method", "Plan", "SandcatError", "load", "parse", "save", "sparsify"]
