"""The README.md of a saved model."""

from __future__ import annotations

from pathlib import Path

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


INT8 = """\
The weights are int8, in the `int-quantized` layout of compressed-tensors, with which transformers reads this folder
too; sandcat runs its own kernels on them."""


INT8_AND_SKIPPED = """\
**Load it with `import sandcat` only**: the weights are int8, and loaders that do not know the plan in `config.json`
read them as if they were not, and write nonsense. The thresholds, one a neuron or input channel, say what is skipped
for each token."""


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
    return INT8 if plan.stored == plan else INT8_AND_SKIPPED
