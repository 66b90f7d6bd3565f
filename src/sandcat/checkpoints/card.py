"""The README.md of a saved model."""

from __future__ import annotations

from pathlib import Path

from sandcat.ops.weights import FORMATS
from sandcat.plans.plan import Plan

CARD = """\
---
{head}
---

# {name}, sparse by sandcat

{weights}

```python
import sandcat

model, tokenizer = sandcat.load("this folder")
```

Recipe: `{recipe}`.
{table}"""


UNTOUCHED = """\
The weights are those of the dense model; the plan in `config.json` and the thresholds, one a neuron or input channel,
say what is skipped for each token. Without `import sandcat`, this folder loads as the dense model."""


CODES = """\
The weights are {formats}, in the {layouts} of compressed-tensors, with which transformers reads this folder too;
sandcat runs its own kernels on them."""


CODES_AND_SKIPPED = """\
**Load it with `import sandcat` only**: the weights are {formats}, and loaders that do not know the plan in
`config.json` read them as if they were not, and write nonsense. The thresholds, one a neuron or input channel, say what
is skipped for each token."""


def model_card(plan: Plan | None, base: str | None = None, table: str = "") -> str:
    """The README.md of a saved model: what it is, how to load it, and the measured table."""
    head = ["library_name: transformers", "tags: [sandcat, contextual-sparsity]"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    return CARD.format(
        head="\n".join(head),
        name=base or "A model",
        weights=_weights(plan),
        recipe=plan.recipe if plan else "dense",
        table=f"\n## Measured on this saved model, reloaded\n\n{table}\n" if table else "",
    )


def _weights(plan: Plan | None) -> str:
    if plan is None or not plan.stored.steps:
        return UNTOUCHED
    layouts = " and ".join(f"`{FORMATS[name].layout}` layout" for name in plan.formats)
    text = CODES if plan.stored == plan else CODES_AND_SKIPPED
    return text.format(formats=" and ".join(plan.formats), layouts=layouts)
