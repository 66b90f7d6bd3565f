"""Loading models, from folders and from the hub; and reloading one to verify what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from sandcat.checkpoints.embedded import resolve
from sandcat.checkpoints.files import COUNTS, check_counts, check_size, fetch, fetch_texts, read_json, sizes
from sandcat.checkpoints.refusals import check_is_model, check_readable, unreadable
from sandcat.checkpoints.save import quiet
from sandcat.errors import CheckpointError, ParityError, PlanError, SandcatError
from sandcat.layers.packing import align
from sandcat.models.families import check_config
from sandcat.models.host_memory import FilePages
from sandcat.models.quantised import quantisation_in
from sandcat.plans.check import check_dense
from sandcat.plans.plan import Plan
from sandcat.support.devices import pick_device, pick_dtype

PACKED = 16
"""Weights that a number of a model quantised by others can hold: two bits each of an int32."""


def read_plan(folder: str | Path) -> Plan | None:
    """The plan in a folder's config.json; None if it holds a dense model.

    Raises:
        CheckpointError: no folder, or no config.json in it. PlanError: a plan that cannot be read.
    """
    return plan_in(read_json(Path(folder) / "config.json"))


def plan_in(config: dict) -> Plan | None:
    """The plan in the content of a config.json; None if there is none."""
    return Plan.from_config(config.get("quantization_config"))


def load(
    name: str | Path,
    *,
    dense: bool = False,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    require_plan: bool = False,
    to_sparsify: bool = False,
    tensor_parallel: int = 1,
):
    """Loads a model and its tokenizer, ready to run.

    Args:
        name: a folder, a hub id, or `EMBEDDED`.
        dense: ignore what the plan skips: the model that lies in the same files (with weights as codes if they are).
        device: "cpu", "cuda", "cuda:N"; default a GPU if there is one.
        dtype: a torch dtype or its name; default the checkpoint's.
        trust_remote_code: run Python code from the checkpoint.
        require_plan: raise unless the model was saved by sandcat.
        to_sparsify: raise unless it can be made sparse: a family that is known, a dense model, weights in floats.
        tensor_parallel: split the weights over so many processes, which torchrun has started, each on its own device
            (then `device` has no say).

    Returns:
        (model, tokenizer)

    Raises:
        CheckpointError: not a model, damaged, not to be had, or it needs code that is not trusted.
        PlanError: a plan that cannot be read or does not fit. DeviceError, UnsupportedModel, PlanConflict.
            What a config.json tells is found before weights are fetched.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    source = resolve(str(name))
    local = Path(source).is_dir()
    if local or Path(source).exists() or source.startswith((".", "/", "~")):
        check_is_model(Path(source))
    data: dict[str, Any] = {}
    try:
        folder = Path(source) if local else fetch_texts(source)
        data = read_json(folder / "config.json")
        plan = plan_in(data)
        if data.get("auto_map") and data.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            raise CheckpointError(
                f"{source!r} brings its own Python code (auto_map in config.json), which would run on this machine. "
                "Read it first; then allow it with --trust-remote-code."
            )
        if require_plan and plan is None:
            raise PlanError(f"{source!r} is a dense model: no plan in its config.json. Make one with sandcat sparsify.")
        if to_sparsify:
            check_config(data)
            check_dense(plan, quantisation_in(data), loaded=False)
        check_readable(source, plan, quantisation_in(data))
        folder = folder if local else fetch(source)
        numbers = sizes(folder)
        check_counts(data, max(COUNTS, len(numbers)))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        packed = 1 if plan is not None or quantisation_in(data) is None else PACKED
        check_size(config, sum(numbers.values()) * packed, trust_remote_code=trust_remote_code)
        if plan is not None:
            config.quantization_config = (plan.stored if dense else plan).to_json()
            if dense and not plan.stored.steps:
                del config.quantization_config
        where = {"device_map": {"": place}}
        if tensor_parallel > 1:
            where = {"distributed_config": DistributedConfig(tp_size=tensor_parallel)}
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=kind, trust_remote_code=trust_remote_code, use_safetensors=True, **where
            )
        align(model, FilePages(model))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except SandcatError:
        raise
    except Exception as error:
        raise CheckpointError(unreadable(source, local, data, error)) from error
    return model.eval(), tokenizer


@torch.inference_mode()
def verify(model: nn.Module, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Reloads a saved model and compares it with the one in memory, logit for logit; what overflows does so in both.

    Raises:
        ParityError: they differ.
    """
    again, _ = load(folder, device=str(model.device), dtype=model.dtype, trust_remote_code=trust_remote_code)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16).mul(7919).remainder(vocabulary)[None].to(model.device)
    found = []
    for net in (model, again):
        prompt = net(ids, use_cache=True)
        step = net(ids[:, :1], past_key_values=prompt.past_key_values)
        found.append(torch.cat([prompt.logits, step.logits], 1))
    if not all(torch.equal(*map(look, found)) for look in (torch.isnan, torch.nan_to_num)):
        raise ParityError(f"the model saved in {str(folder)!r} gives other logits when it is loaded again.")
