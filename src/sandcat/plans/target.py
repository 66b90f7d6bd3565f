"""What a user asks of a recipe as a whole: a sparsity, a share of the bytes, or a loss of quality."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandcat.errors import BadRecipe

FORMS = "sparsity=0.5, bytes=0.72 or quality=ppl+1%"


@dataclass(frozen=True)
class Target:
    """Of `kind` "sparsity": `value` of the bytes of what the methods change is not read. "bytes": a token reads `value`
    of the bytes of weights that it reads of the dense model. "quality": as few bytes as keep perplexity on held-out
    text within 1 + `value` times the dense model's.

    Raises:
        BadRecipe: an unknown kind, or a value outside its range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in ("sparsity", "bytes", "quality"):
            raise BadRecipe(f"target {self.kind!r} is unknown. Give {FORMS}.")
        if not (0 < self.value < 1 or (self.kind == "quality" and self.value > 0)):
            wanted = "a loss above 0 %, as in ppl+1%" if self.kind == "quality" else "between 0 and 1"
            raise BadRecipe(f"target {self}: it has to be {wanted}.")

    @classmethod
    def parse(cls, text: str) -> Target:
        """
        Raises:
            BadRecipe: not of one of the `FORMS`.
        """
        loss = re.fullmatch(r"(?:quality=)?ppl\+(.+)%", text.strip())
        kind, _, number = ("quality", "", loss[1]) if loss else text.strip().partition("=")
        try:
            value = float("" if kind == "quality" and not loss else number)
        except ValueError:
            raise BadRecipe(f"target {text!r} is not understood. Give {FORMS}.") from None
        return cls(kind, value / 100 if loss else value)

    def __str__(self) -> str:
        return f"quality=ppl+{100 * self.value:g}%" if self.kind == "quality" else f"{self.kind}={self.value:g}"


def the_one(**given: float | str | None) -> Target | None:
    """The target among the options of a command line; None if none was given.

    Raises:
        BadRecipe: several, or as `Target.parse`.
    """
    words = [f"{kind}={value}" for kind, value in given.items() if value is not None]
    if len(words) > 1:
        raise BadRecipe(f"{' and '.join(words)} are two targets: give one of them.")
    return Target.parse(words[0]) if words else None
