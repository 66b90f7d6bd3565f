"""The methods: one file each. To add one, write its file and add it to this tuple."""

from sandcat.methods.cats import Cats
from sandcat.methods.coreinfer import Coreinfer
from sandcat.methods.fp8 import Fp8
from sandcat.methods.int8 import Int8
from sandcat.methods.relufy import Relufy
from sandcat.methods.rsparse import Rsparse
from sandcat.methods.teal import Teal

METHODS = (Cats, Coreinfer, Fp8, Int8, Relufy, Rsparse, Teal)

__all__ = ["METHODS", "Cats", "Coreinfer", "Fp8", "Int8", "Relufy", "Rsparse", "Teal"]
