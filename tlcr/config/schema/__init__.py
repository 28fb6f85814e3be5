"""Every knob of tlcr, as frozen dataclasses: one typed config, read from YAML and from flags alike.

The defaults are the vetted setting. Where each comes from is the ``source`` of its knob: "paper" is arXiv 2407.16574,
"released code" its authors' training scripts, "PPO" Schulman et al. 2017 (arXiv 1707.06347) as practised by Stiennon
et al. 2020, "DPO" Rafailov et al. 2023 (arXiv 2305.18290), "Q-RM" the released code of Chen et al. 2025 (arXiv
2505.23363), "DAPO" Yu et al. 2025 (arXiv 2503.14476), "LoRA" Hu et al. 2021 (arXiv 2106.09685), "Schulman et al. 2025"
their "LoRA Without Regret", "ours" a choice of this project. Nothing here imports torch, so that ``tlcr --help``
answers at once.
"""

from __future__ import annotations

from tlcr.config.schema.checked import LARGEST, Checked, in_short, knob, undecisive, with_home
from tlcr.config.schema.data import DataConfig, LabelConfig
from tlcr.config.schema.generation import EndpointConfig, EngineConfig, EngineName, ReviserConfig, RolloutConfig
from tlcr.config.schema.models import Adapted, Dtype, GeneratorConfig, LoRAConfig, ModelConfig, ShardingConfig
from tlcr.config.schema.ppo import KLConfig, PPOConfig
from tlcr.config.schema.rewards import (
    LOGIT_KINDS,
    OFFICIAL_KINDS,
    SCORED_KINDS,
    SHARED_SCORE_KINDS,
    WHOLE_ANSWER_KINDS,
    RefreshConfig,
    RewardConfig,
    RewardKind,
)
from tlcr.config.schema.run import Arm, EvaluationConfig, RunConfig
from tlcr.config.schema.training import (
    DiscriminatorConfig,
    DPOConfig,
    QModelConfig,
    RewardModelConfig,
    SFTConfig,
    TrainingConfig,
)

__all__ = [
    "LARGEST",
    "LOGIT_KINDS",
    "OFFICIAL_KINDS",
    "SCORED_KINDS",
    "SHARED_SCORE_KINDS",
    "WHOLE_ANSWER_KINDS",
    "Adapted",
    "Arm",
    "Checked",
    "DPOConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "Dtype",
    "EndpointConfig",
    "EngineConfig",
    "EngineName",
    "EvaluationConfig",
    "GeneratorConfig",
    "KLConfig",
    "LabelConfig",
    "LoRAConfig",
    "ModelConfig",
    "PPOConfig",
    "QModelConfig",
    "RefreshConfig",
    "ReviserConfig",
    "RewardConfig",
    "RewardKind",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "ShardingConfig",
    "TrainingConfig",
    "in_short",
    "knob",
    "undecisive",
    "with_home",
]
