"""The plan: what was decided for a model, as JSON in its config.json; and recipes, the words that ask for a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sandcat.errors import PlanError
from sandcat.method import SLOTS, Decided, Method, Spec
from sandcat.models.view import ModelView, Site
from sandcat.ops.weights import FORMATS
from sandcat.plans.recipe import method_class
from sandcat.support.from_json import record

FORMAT_VERSION = 1
QUANT_METHOD = "sandcat"
COMPRESSED = "compressed-tensors"
"""What plans that only store weights as codes are saved as: transformers and others read it without us."""
MIXED = "mixed-precision"
"""What it calls weights that are stored in several ways."""


@dataclass(frozen=True)
class Calibration:
    """Where the thresholds come from: the text's name, the SHA-256 of its tokens, how many, and how they were used."""

    source: str
    sha256: str
    tokens: int
    sequential: bool


@dataclass(frozen=True)
class HeldOut:
    """What the plan loses on the part of the calibration text that was kept for it."""

    tokens: int
    perplexity_ratio: float
    kl: float


@dataclass(frozen=True)
class Budget:
    """The target that was asked for and how it was spread over the sites; what came of it."""

    target: str
    allocate: str
    bytes: float
    """Weights that a token reads, dense = 1, at the sparsities of the plan."""
    held_out: HeldOut | None = None
    """None if nothing was measured."""

    def __str__(self) -> str:
        kind, _, value = self.target.partition("=")
        return f"--{kind} {value} --allocate {self.allocate}"


@dataclass(frozen=True)
class PlanStep:
    """One method of the plan and what it decided for each site, by the site's module name."""

    method: Method
    sites: dict[str, Spec]


@dataclass(frozen=True)
class Plan:
    """All steps, in order, the calibration they rest on (None if no method needed one), and the budget (None if the
    methods' own sparsities hold)."""

    steps: list[PlanStep] = field(default_factory=list)
    calibration: Calibration | None = None
    budget: Budget | None = None

    @property
    def recipe(self) -> str:
        """What was asked for, as words of a command line."""
        words = [str(step.method) for step in self.steps]
        return " ".join([*words, str(self.budget)] if self.budget else words)

    def to_json(self) -> dict[str, Any]:
        """The plan as its format has it (docs/plan-format.md)."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "methods": [
                {"name": step.method.name, "options": step.method.options(), "sites": step.sites} for step in self.steps
            ],
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "budget": None if self.budget is None else asdict(self.budget),
        }

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json: the plan, or what others read with the plan as one more key."""
        if any(step.method.slot != "weight" for step in self.steps):
            return self.to_json()
        groups: dict[str, dict[str, Any]] = {}
        for number, step in enumerate(self.steps):
            row = FORMATS[step.method.format]
            groups[f"group_{number}"] = {
                "targets": list(step.sites), "weights": row.compressed, "input_activations": None, "format": row.layout,
            }  # fmt: skip
        layouts = {group["format"] for group in groups.values()}
        return {
            "quant_method": COMPRESSED,
            "format": layouts.pop() if len(layouts) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
            QUANT_METHOD: self.to_json(),
        }

    @classmethod
    def from_config(cls, data: dict[str, Any] | None) -> Plan | None:
        """The plan in a `quantization_config`; None if there is none.

        Raises:
            PlanError: as `from_json`.
        """
        if not isinstance(data or {}, dict):
            raise PlanError(f"the quantization_config in config.json is {data!r:.40}, and not a JSON object.")
        if data and data.get("quant_method") == COMPRESSED:
            data = data.get(QUANT_METHOD)
        return cls.from_json(data) if data and data.get("quant_method") == QUANT_METHOD else None

    def summary(self) -> dict[str, Any]:
        """`to_json` without what was decided for each site."""
        data = self.to_json()
        for method in data["methods"]:
            method["sites"] = len(method["sites"])
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """
        Raises:
            PlanError: written by a newer version, or not a plan.
        """
        version = data.get("format_version")
        if not isinstance(version, int):
            raise PlanError("config.json has a quantization_config of sandcat without a format_version: not a plan.")
        if version > FORMAT_VERSION:
            raise PlanError(
                f"this plan has format version {version}, and this sandcat reads up to {FORMAT_VERSION}. Upgrade: "
                "pip install -U sandcat."
            )
        try:
            steps = [
                PlanStep(method_class(m["name"]).from_options(m["options"]), _sites(m["sites"]))
                for m in data["methods"]
            ]
            calibration = None if data["calibration"] is None else record(Calibration, data["calibration"])
            budget = None
            if data["budget"] is not None:
                held = data["budget"]["held_out"]
                spent = {**data["budget"], "held_out": None if held is None else record(HeldOut, held)}
                budget = record(Budget, spent)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"the plan in config.json cannot be read: {type(error).__name__}, {error}") from error
        return cls(steps, calibration, budget)

    def match(self, view: ModelView) -> list[tuple[Method, Site, Spec]]:
        """Every decision with its site in this model, in the order in which they apply. What stands at a site then may
        be what a decision before it put there: see `ModelView.current`.

        Raises:
            PlanError: the plan names a site that the model does not have or its method does not change, gives a part
                of it to two methods, or decides what this site has no room for.
        """
        sites = {site.name: site for site in view.sites()}
        unknown = [name for step in self.steps for name in step.sites if name not in sites]
        if unknown:
            raise PlanError(
                f"the plan does not fit the model: of {sum(len(step.sites) for step in self.steps)} sites it names, "
                f"the model lacks {len(unknown)}, such as {unknown[0]!r}; it has {len(view.layers)} layers."
            )
        self._check_fit(view, sites)
        steps = sorted(self.steps, key=lambda step: SLOTS.index(step.method.slot))
        return [(step.method, sites[name], spec) for step in steps for name, spec in step.sites.items()]

    def _check_fit(self, view: ModelView, sites: dict[str, Site]) -> None:
        claimed: set[tuple[str, str]] = set()
        for step in self.steps:
            chosen = {site.name for site in step.method.select(view)}
            for name, spec in step.sites.items():
                if name not in chosen:
                    raise PlanError(f"the plan does not fit the model: {step.method} does not change {name}.")
                claims = {(part, step.method.slot) for part in step.method.claims(view, sites[name])}
                if claims & claimed:
                    raise PlanError(f"the plan gives the {step.method.slot} of {name} to two methods.")
                claimed |= claims
                for key, (low, high) in step.method.limits(sites[name]).items():
                    value = spec.get(key)
                    if not isinstance(value, int) or not low <= value <= high:
                        raise PlanError(
                            f"the plan does not fit the model: {key} of {name} is {value!r:.40}, and not from {low} to "
                            f"{high}."
                        )

    @property
    def formats(self) -> list[str]:
        """The formats that weights are stored in, by their names."""
        return list(dict.fromkeys(step.method.format for step in self.steps if step.method.format != "float"))

    @property
    def stored(self) -> Plan:
        """What the weights in the files went through, without what is skipped of them."""
        return Plan([step for step in self.steps if step.method.slot == "weight"], self.calibration)

    @property
    def fingerprints(self) -> dict[str, dict[str, float]]:
        """Of each site the magnitude of each tensor that the plan gives it (see layers/fingerprint.py)."""
        marks: dict[str, dict[str, float]] = {}
        for step in sorted(self.steps, key=lambda step: SLOTS.index(step.method.slot)):
            for name, spec in step.sites.items():
                marks.setdefault(name, {}).update(spec.get("fingerprint", {}))
        return marks

    def lay_out(self, view: ModelView) -> None:
        """Puts what the plan says into a model, without what was decided for it: that is in the files.

        Raises:
            PlanError: as `match`.
        """
        for method, site, spec in self.match(view):
            view.replace(site, method.build(view.current(site), spec))

    def place(self, view: ModelView, tensors: Decided) -> None:
        """Builds what the plan says, fills it, and puts it into the model."""
        for method, site, spec in self.match(view):
            site = view.current(site)
            module = method.build(site, spec)
            method.fill(module, tensors[method, site.name])
            module.train(site.module.training)
            view.replace(site, module)
            if site.kind == "head" and module.weight is not view.model.get_input_embeddings().weight:
                view.untie()


def _sites(data: dict[str, Any]) -> dict[str, Spec]:
    """What a step decided, by site, in the order of the model: it is saved in alphabetical order."""
    for name, spec in data.items():
        values = [value for key, value in spec.items() if key != "fingerprint"]
        values += spec.get("fingerprint", {}).values()
        if not all(_is_numbers(value) for value in values):
            raise TypeError(f"what is said of {name!r:.80} is not made of numbers and lists of them")
    return dict(sorted(data.items(), key=lambda item: place_of(item[0])))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    )


def layer_of(site: str) -> int | None:
    """The layer's index in a site's name, "model.layers.3.mlp"; None for the head."""
    return next((int(part) for part in site.split(".") if part.isdecimal()), None)


def place_of(site: str) -> float:
    """Where a site stands in the order of layers: the head after all."""
    layer = layer_of(site)
    return float("inf") if layer is None else layer
