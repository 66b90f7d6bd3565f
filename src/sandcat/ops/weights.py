"""A weight as it is stored, and a dense product with it. Shapes: T tokens, I input channels, O outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**24
"""Numbers of an int8 weight that are widened at once for a dense product: it never lies in memory as a whole twice."""


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, scale_O: Tensor | None = None) -> Tensor:
    """x times a weight in x's dtype, or times an int8 weight if there are scales; in x's dtype, [T, O].

    The codes are exact in every dtype, and so are their 128ths, which keep sums in the range of float16. The scale is
    applied at the end.
    """
    if scale_O is None:
        return F.linear(x_TI, weight_OI, bias_O)
    parts, rows = [], max(1, AT_ONCE // x_TI.shape[-1])
    for first in range(0, len(weight_OI), rows):
        part = slice(first, first + rows)
        y_TO = F.linear(x_TI, weight_OI[part].to(x_TI.dtype).mul_(2**-7)).float() * (scale_O[part].float() * 2**7)
        parts.append((y_TO if bias_O is None else y_TO + bias_O[part]).to(x_TI.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
