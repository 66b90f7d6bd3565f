"""What each site's sparsity costs: the curves by which `allocate` spreads a budget. Reads only.

With g the gradient of a token's log-likelihood at a site's output, the label drawn from the model itself, and d the
error that sparsity makes there, KL to the dense model grows by about E[(g d)^2] / 2 (the Fisher information). One
backward pass, layer by layer, gives g at every site. Terms between sites are left out: they hardly change the sum
(docs/budgets.md).
Shapes: T tokens, H inputs and O outputs of a site, L levels of sparsity.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from sandcat.calibration.seeing import backward
from sandcat.data import Text
from sandcat.layers.modes import every_token_sparse
from sandcat.layers.sparse_module import Sparse, follow_prompts
from sandcat.measuring.quality import PROMPT_SHARE
from sandcat.method import Method, Seen
from sandcat.models.view import ModelView, Site

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
GRID = np.array([0.0, *LEVELS])
TOKENS = 1024
"""Tokens that a curve rests on."""


@dataclass(frozen=True, eq=False)
class Savings:
    """What one site saves at each sparsity of `GRID`."""

    site: str
    method: Method
    claims: tuple[str, ...]
    """Names of the linear layers that the method claims at the site."""
    saved_L: np.ndarray
    """Bytes saved, as a share of what a token reads of the dense model."""

    def saved_at(self, sparsity_S: np.ndarray | float) -> np.ndarray:
        """Bytes saved at a sparsity between those of `GRID`, too; of many at once, [S]."""
        return np.interp(sparsity_S, GRID, self.saved_L)


@dataclass(frozen=True, eq=False)
class Curve(Savings):
    """And what that costs."""

    error_L: np.ndarray
    """Relative error of the output: the share of its squared norm."""
    loss_L: np.ndarray
    """KL to the dense model, estimated, in nats a token."""

    def sparsity_at(self, error: float) -> float:
        """The largest sparsity with at most this error."""
        return float(np.interp(error, self.error_L, GRID))

    def loss_at(self, sparsity_S: np.ndarray) -> np.ndarray:
        """Between the levels the square root is linear."""
        return np.interp(sparsity_S, GRID, np.sqrt(self.loss_L)) ** 2


def savings(view: ModelView, sites: list[tuple[Method, Site]], dense_bytes: int) -> list[Savings]:
    """What each site saves with its method, for which no token has to be computed.

    Args:
        dense_bytes: what a token reads of the dense model.
    """
    found = []
    for method, site in sites:
        whole = sum(parameter.nbytes for parameter in site.module.parameters())
        read = [method.at(sparsity).bytes_read(site) for sparsity in LEVELS]
        saved_L = np.array([0.0, *((whole - bytes) / dense_bytes for bytes in read)])
        found.append(Savings(site.name, method, tuple(method.claims(view, site)), saved_L))
    return found


def collect(view: ModelView, sites: list[tuple[Method, Site]], text: Text, dense_bytes: int) -> list[Curve]:
    """A curve for each site with its method, on the dense model's own activations.

    Args:
        dense_bytes: what a token reads of the dense model.
    """
    saved = savings(view, sites, dense_bytes)
    windows = text.ids_NL[: max(1, TOKENS // text.ids_NL.shape[1])]
    costs: dict[tuple[Method, str], dict[str, np.ndarray]] = {}
    with torch.inference_mode(False), torch.no_grad():
        every = [site for _, site in sites]
        for index, seen in backward(view, every, windows, "measuring what sparsity costs each site"):
            for method, site in sites:
                if site.layer == index:
                    costs[method, site.name] = _costs(method, site, seen[site.name])
    return [Curve(**{**vars(one), **costs[one.method, one.site]}) for one in saved]


def _costs(method: Method, site: Site, seen: Seen) -> dict[str, np.ndarray]:
    """Error and loss of a curve."""
    x_TH, g_TO = seen.inputs, seen.gradients
    error_L, loss_L, square = np.zeros(len(GRID)), np.zeros(len(GRID)), 0.0
    sparse: list[Sparse] = []
    for sparsity in LEVELS:
        spec, tensors = method.at(sparsity).decide(site, seen)
        module = method.build(site, spec)
        method.fill(module, tensors)
        follow_prompts(module)
        sparse.append(module)
    prompt = len(x_TH[0]) // PROMPT_SHARE if any(module.chooses_in_prompt for module in sparse) else 0
    with ExitStack() as stack:
        for module in sparse:
            stack.enter_context(every_token_sparse(module, prompt=prompt))
        for x, g in zip(x_TH, g_TO, strict=True):
            y = site.module(x[None])[0, prompt:].float()
            square += float(y.square().sum())
            for level, module in enumerate(sparse, 1):
                d = module(x[None])[0, prompt:].float() - y
                error_L[level] += float(d.square().sum())
                loss_L[level] += float((d * g[prompt:]).sum(1).square().sum()) / 2
    error_L, loss_L = np.maximum.accumulate(error_L), np.maximum.accumulate(loss_L)
    return {"error_L": error_L / max(square, 1e-30), "loss_L": loss_L / sum(len(x) - prompt for x in x_TH)}
