"""Int8 weights: half the bytes of bfloat16 for every token, whatever the context.

Source: round to nearest, symmetric, one scale an output channel, as LLM.int8() (Dettmers et al., 2022, arXiv
2208.07339) stores its weights; `clip=search` as AWQ and OmniQuant search it. Codes in [-127, 127]; see rounding.py.
Differs: activations are not quantised. The head is quantised too: with tied embeddings it gets an int8 copy of its own
beside the table, which costs memory and saves bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandcat.rounding import Rounding


@dataclass(frozen=True, kw_only=True)
class Int8(Rounding):
    """y = scale * (x codes^T), codes whole numbers."""

    name = format = "int8"
