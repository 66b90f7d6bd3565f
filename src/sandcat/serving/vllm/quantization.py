"""The plan as vLLM carries it: which of its layers do something else than a dense model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from sandcat.errors import PlanError
from sandcat.plans.plan import QUANT_METHOD, Plan
from sandcat.serving import engine_plan
from sandcat.serving.vllm.linear import SandcatLinear, Table


class SandcatQuantization(QuantizationConfig):
    """A plan, in the form in which vLLM carries what is special about a checkpoint."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.sites: Any = None  # `engine_plan.Sites`, once the model's config is known
        self.activation = ""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SandcatQuantization:
        plan = Plan.from_config(config)
        if plan is None:
            raise PlanError(f"config.json names the quantization method {QUANT_METHOD!r}, but holds no plan.")
        return cls(plan)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None) -> str | None:
        """Plans that only store weights as codes are saved in another's layout, with the plan as one more key."""
        return QUANT_METHOD if QUANT_METHOD in hf_quant_cfg else None

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        self.sites = engine_plan.sites_of(self.plan, hf_config)
        self.activation = engine_plan.activation_of(hf_config, self.sites.architecture)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.sites = self.sites.renamed(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The thresholds of neurons are an MLP's own in the checkpoint; vLLM's MLPs have no tensors."""
        mlp = self.sites.architecture.mlp
        return WeightsMapper(orig_to_new_suffix={f".{mlp}.threshold": f".{mlp}.gate_up_proj.neurons"})

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return Table() if self.sites.head_skips else None
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parts = self.sites.parts(prefix, self.packed_modules_mapping)
        side = self.sites.neurons(prefix, self.packed_modules_mapping)
        if side is None and parts == [engine_plan.Part()] * len(parts):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        sequences = get_current_vllm_config().scheduler_config.max_num_seqs
        return SandcatLinear(prefix, parts, side, self.activation, sequences)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def register() -> None:
    """Makes our plans one of vLLM's quantizations."""
    register_quantization_config(QUANT_METHOD)(SandcatQuantization)
