"""Fp8 weights: half the bytes of bfloat16 for every token, in the format that engines know as FP8.

Source: FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv 2209.05433), e4m3: a sign, four bits of
exponent, three of mantissa, up to 448; one scale an output channel, as compressed-tensors' `float-quantized` has it,
which transformers and vLLM read. Codes are denser near 0 than int8's and coarser at the top of a row: the error of a
weight is relative to itself, not to the largest of its row. See rounding.py.
Differs: activations stay as they are. The head is changed too, as by int8.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandcat.rounding import Rounding


@dataclass(frozen=True, kw_only=True)
class Fp8(Rounding):
    """y = scale * (x codes^T), codes floats of eight bits."""

    name = format = "fp8"
