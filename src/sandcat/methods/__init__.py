"""The methods: one file each. To add one, write its file and add it to this tuple."""

from sandcat.methods.cats import Cats
from sandcat.methods.int8 import Int8
from sandcat.methods.relufy import Relufy
from sandcat.methods.teal import Teal

METHODS = (Cats, Int8, Relufy, Teal)

__all__ = ["METHODS", "Cats", "Int8", "Relufy", "Teal"]
