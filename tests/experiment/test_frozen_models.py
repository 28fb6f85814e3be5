"""The frozen models of an arm: which are loaded, from where, and how the reward source is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.helpers import arm_run
from tlcr.errors import ConfigError
from tlcr.experiment.frozen_models import FrozenModels, load_frozen_models, load_reference
from tlcr.experiment.run_folder import RunFolder
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.saving import save_model
from tlcr.rewards.sources.build import CombinedSource
from tlcr.rewards.sources.discriminator import DiscriminatorSource
from tlcr.rewards.sources.log_ratio import LogRatioSource
from tlcr.rewards.sources.random import RandomSource
from tlcr.rewards.sources.sequence import SequenceRewardSource
from tlcr.training.done import mark_done

LM = Callable[..., PreTrainedModel]

# Which models each reward loads; the value model of the last two starts from one.
ASKED: list[tuple[dict[str, object], set[str]]] = [
    ({"reward.kind": "continuous"}, {"discriminator"}),
    ({"reward.kind": "spans"}, {"discriminator"}),
    ({"reward.kind": "sequence"}, {"reward_model"}),
    ({"reward.kind": "uniform"}, {"reward_model"}),
    ({"reward.kind": "continuous", "reward.sequence_coef": 0.5}, {"discriminator", "reward_model"}),
    ({"reward.kind": "q"}, {"q_model"}),
    ({"reward.kind": "dpo"}, {"dpo"}),
    ({"reward.kind": "random"}, set()),
    ({"reward.kind": "random", "ppo.value_init": "reward_model"}, {"reward_model"}),
    ({"reward.kind": "random", "ppo.value_init": "discriminator"}, {"discriminator"}),
]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: LM
) -> Path:
    """policy, discriminator, reward_model, dpo and q_model, trained elsewhere; seeds 0 to 4 tell them apart."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = arm_run(folder, folder / "unread").cfg.model
    discriminator = load_token_classifier(tiny_causal_lm(seed=1), cfg, id2label=TWO_CLASSES)
    discriminator.config.tlcr_temperature = 2.5
    for name, model in {
        "policy": tiny_causal_lm(seed=0),
        "discriminator": discriminator,
        "reward_model": load_sequence_classifier(tiny_causal_lm(seed=2), cfg),
        "dpo": tiny_causal_lm(seed=3),
        "q_model": load_sequence_classifier(tiny_causal_lm(seed=4), cfg),
    }.items():
        save_model(model, tiny_tokenizer, folder / name)
    return folder


def run_with(trained: Path, tmp_path: Path, **changes: object) -> RunFolder:
    named = {f"{name}.path": str(trained / name) for name in ("discriminator", "reward_model", "dpo", "q_model")}
    return arm_run(tmp_path, trained / "policy", **{"reward.callable": None, **named, **changes})


def first_weight(model: PreTrainedModel) -> torch.Tensor:
    return model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(("changes", "asked"), ASKED, ids=lambda value: " ".join(sorted(map(str, value))) or "none")
def test_a_reward_loads_the_models_that_it_asks_and_no_other(
    trained: Path, tmp_path: Path, tiny_causal_lm: LM, changes: dict[str, object], asked: set[str]
) -> None:
    run = run_with(trained, tmp_path, **changes)
    frozen = load_frozen_models(run, run.cfg)
    seeds = {"discriminator": 1, "reward_model": 2, "dpo": 3, "q_model": 4}
    for name, seed in seeds.items():
        loaded = getattr(frozen, name)
        assert (loaded is not None) == (name in asked)
        if loaded is not None:
            assert torch.equal(first_weight(loaded.model), first_weight(tiny_causal_lm(seed=seed)))
            assert loaded.model.device == run.device and not loaded.model.training
            assert loaded.tokenizer.get_vocab() == run.tokenizer.get_vocab()
    assert frozen.temperature == (2.5 if "discriminator" in asked else 1.0)


def test_a_model_speaks_by_the_tokenizer_saved_with_it_not_by_the_policys(
    trained: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = tmp_path / "other"
    run = run_with(trained, tmp_path, **{"reward.kind": "sequence", "reward_model.path": str(other)})
    own = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer, pad_token="<eos>", eos_token="<eos>")
    save_model(load_sequence_classifier(trained / "reward_model", run.cfg.model), own, other)
    frozen = load_frozen_models(run, run.cfg)
    assert frozen.reward_model is not None and frozen.reward_model.tokenizer.pad_token == "<eos>"
    assert run.tokenizer.pad_token == "<pad>"


def test_the_reference_is_the_policy_as_ppo_starts_with_it(
    trained: Path, tmp_path: Path, tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    run = run_with(trained, tmp_path, **{"reward.kind": "random"})
    assert torch.equal(first_weight(load_reference(run)), first_weight(tiny_causal_lm(seed=0)))
    assert load_reference(run) is not load_reference(run)
    options = {"reward.kind": "random", "sft.enabled": True, "output_dir": str(tmp_path / "sft")}
    after_sft = run_with(trained, tmp_path, **options)
    save_model(tiny_causal_lm(seed=7), tiny_tokenizer, after_sft.models / "sft")
    mark_done(after_sft.models / "sft", config={}, metrics={}, seconds=0.0)
    assert torch.equal(first_weight(load_reference(after_sft)), first_weight(tiny_causal_lm(seed=7)))


def test_models_come_in_the_dtype_of_the_config(trained: Path, tmp_path: Path) -> None:
    run = run_with(trained, tmp_path, **{"reward.kind": "dpo", "model.dtype": "bfloat16"})
    frozen = load_frozen_models(run, run.cfg)
    assert frozen.dpo is not None
    assert {frozen.dpo.model.dtype, load_reference(run).dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "stage", "command"),
    [
        ("continuous", "discriminator", "train discriminator"),
        ("sequence", "reward_model", "train reward-model"),
        ("dpo", "dpo", "train dpo"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_the_stage_that_makes_it(
    trained: Path, tmp_path: Path, kind: str, stage: str, command: str
) -> None:
    run = run_with(trained, tmp_path, **{"reward.kind": kind, f"{stage}.path": None})
    with pytest.raises(ConfigError, match=f"{stage} holds no finished stage; run 'tlcr {command}'"):
        load_frozen_models(run, run.cfg)


def source_of(run: RunFolder, reference: PreTrainedModel | None = None, seed: int = 0) -> object:
    return load_frozen_models(run, run.cfg).source(run, run.cfg, reference, seed)


def test_every_source_gets_the_models_tokenizers_and_sizes_of_its_run(trained: Path, tmp_path: Path) -> None:
    options = {"data.max_prompt_tokens": 17, "rollout.batch_size": 3, "dpo.beta": 0.7}
    run = run_with(trained, tmp_path, **{"reward.kind": "continuous", "reward.sequence_coef": 0.5, **options})
    combined = source_of(run)
    assert isinstance(combined, CombinedSource) and isinstance(combined.sequence, SequenceRewardSource)
    assert isinstance(combined.source, DiscriminatorSource)
    for source, labels in ((combined.source, 2), (combined.sequence, 1)):
        assert source.frozen.model.config.num_labels == labels
        assert source.frozen.policy_tokenizer is run.tokenizer and source.frozen.tokenizer is not run.tokenizer
        assert (source.frozen.max_prompt_tokens, source.frozen.micro_batch_size) == (17, 3)
    run = run_with(trained, tmp_path, **{"reward.kind": "dpo", "output_dir": str(tmp_path / "dpo"), **options})
    reference = load_reference(run)
    ratio = source_of(run, reference)
    assert isinstance(ratio, LogRatioSource) and ratio.reference is reference and ratio.beta == 0.7
    with pytest.raises(ConfigError, match="ratio to the reference"):
        source_of(run)


def test_the_seed_is_that_of_the_source(trained: Path, tmp_path: Path) -> None:
    run = run_with(trained, tmp_path, **{"reward.kind": "random", "seed": 9})
    source = source_of(run, seed=4)
    assert isinstance(source, RandomSource) and source.seed == 4


def test_without_models_there_is_no_temperature_to_speak_of() -> None:
    assert FrozenModels().temperature == 1.0
