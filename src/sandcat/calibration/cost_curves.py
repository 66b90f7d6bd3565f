"""What each site's sparsity costs: the curves by which `allocate` spreads a budget. Reads only.

With g the gradient of a token's log-likelihood at a site's output, the label drawn from the model itself, and d the
error that sparsity makes there, KL to the dense model grows by about E[(g d)^2] / 2 (the Fisher information). One
backward pass, layer by layer, gives g at every site. Terms between sites are left out: they hardly change the sum
(docs/budgets.md).
Shapes: T tokens, H inputs and O outputs of a site, L levels of sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sandcat.calibration.calibrate import FIRST_POSITIONS, first_states, run_stage
from sandcat.data import Text
from sandcat.layers.core_mlp import follow_prompts
from sandcat.layers.modes import every_token_sparse
from sandcat.layers.sparse_module import Sparse
from sandcat.measuring.quality import PROMPT_SHARE
from sandcat.method import Method
from sandcat.models.offload import at_hand, idle_layers, moved
from sandcat.models.view import ModelView, Site
from sandcat.support.progress import track

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

    The backward pass goes stage by stage: each is run again on what entered it, so that the graph of one stage, and the
    inputs and gradients of its sites, are all that is held at a time.

    Args:
        dense_bytes: what a token reads of the dense model.
    """
    saved = savings(view, sites, dense_bytes)
    windows = text.ids_NL[: max(1, TOKENS // text.ids_NL.shape[1])]
    first, last = min(site.layer for _, site in sites), len(view.layers)
    costs: dict[tuple[Method, str], dict[str, np.ndarray]] = {}
    with torch.inference_mode(False), torch.no_grad():
        states, kwargs = first_states(view, windows.split(1))
        entered = [states]  # by stage, what enters it in each window
        for index in track(range(last), "measuring what enters each layer"):
            with at_hand(view, index):
                run = partial(run_stage, view, view.stages[index], kwargs=moved(kwargs[index], view.device))
                entered.append([run(state) for state in entered[-1]])
        downstream: list[Tensor] = []
        for index in track(range(last, first - 1, -1), "measuring what sparsity costs each site"):
            here = [(method, site) for method, site in sites if site.layer == index]
            with at_hand(view, index):
                if index == last:
                    run = partial(_log_likelihood, view, windows, torch.Generator().manual_seed(0))
                else:
                    run = partial(_weighted, view, index, moved(kwargs[index], view.device), downstream)
                inputs, gradients, downstream = _seen([site for _, site in here], run, entered.pop(), view.device)
                for method, site in here:
                    costs[method, site.name] = _costs(method, site, inputs[site.name], gradients[site.name])
    return [Curve(**{**vars(one), **costs[one.method, one.site]}) for one in saved]


def _log_likelihood(view: ModelView, ids_NL: Tensor, generator: torch.Generator, window: int, state: Tensor) -> Tensor:
    """That of tokens drawn from the model itself, which is what norm, head and all between them make of a state."""
    with idle_layers(view, last=state):
        log_p = (
            view.model(ids_NL[window, None].to(view.model.device), use_cache=False).logits[0].float().log_softmax(-1)
        )
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return log_p.gather(1, drawn).sum()


def _weighted(
    view: ModelView, index: int, kwargs: dict, downstream: list[Tensor], window: int, state: Tensor
) -> Tensor:
    """A number that has, to what a layer gives, the gradient that the log-likelihood has."""
    out = run_stage(view, view.stages[index], state, kwargs)
    return (out * downstream[window]).sum()


def _seen(
    sites: list[Site], run: Callable[[int, Tensor], Tensor], states: list[Tensor], device: torch.device
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], list[Tensor]]:
    """Inputs [T, H] of a stage's sites and gradients [T, O] at their outputs, by windows; the gradients at its states.

    Args:
        run: gives, for a window and its state, what the gradients are of.
    """
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    gradients: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    upstream: list[Tensor] = []
    for window, state in enumerate(states):
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for site in sites:

                def see(module: nn.Module, args: tuple, out: Tensor, name: str = site.name, seen=outputs) -> None:
                    inputs[name].append(args[0].detach()[0, FIRST_POSITIONS:])
                    seen[name] = out

                hooks.enter_context(_hook(site.module, see))
            state = state.to(device).detach().requires_grad_()
            at_state, *at_outputs = torch.autograd.grad(run(window, state), [state, *outputs.values()])
        upstream.append(at_state)
        for name, gradient in zip(outputs, at_outputs, strict=True):
            gradients[name].append(gradient[0, FIRST_POSITIONS:])
    return inputs, gradients, upstream


@contextmanager
def _hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    """A forward hook, always removed."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _costs(method: Method, site: Site, x_TH: list[Tensor], g_TO: list[Tensor]) -> dict[str, np.ndarray]:
    """Error and loss of a curve."""
    error_L, loss_L, square = np.zeros(len(GRID)), np.zeros(len(GRID)), 0.0
    sparse: list[Sparse] = []
    for sparsity in LEVELS:
        spec, tensors = method.at(sparsity).decide(site, x_TH)
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
