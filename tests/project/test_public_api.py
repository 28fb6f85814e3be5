"""The names and signatures that people build on. A change here is a change of the public interface."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import pytest

import tlcr

ROOT = Path(__file__).parents[2]

NAMES = {
    "ActorCritic",
    "PPOLoss",
    "RewardSource",
    "RunConfig",
    "TokenLabel",
    "TokenScores",
    "__version__",
    "build_info",
    "build_reward_source",
    "dump_config",
    "fused_gae",
    "fused_reward",
    "load_config",
    "ops",
    "ppo_loss",
    "reward_from_hidden",
    "run",
    "score_hidden",
    "score_tokens",
    "token_labels",
    "train_discriminator",
    "train_dpo",
    "train_ppo",
    "train_q_model",
    "train_reward_model",
    "train_sft",
}

REWARD_OPTIONS = (
    "kl=None, kl_coef=0.0, terminal=None, temperature=1.0, scale=1.0, clip=None, "
    "kind='continuous', band=0.0, impl='auto'"
)
ON_PAIRS = "tokenizer, train, held_out, folder, resume=False, callbacks=(), origin=None"
SIGNATURES = {
    "fused_reward": f"(logits, mask, *, {REWARD_OPTIONS})",
    "reward_from_hidden": f"(hidden, weight, mask, *, bias=None, {REWARD_OPTIONS})",
    "fused_gae": "(rewards, values, mask=None, *, gamma=1.0, lam=0.95, whiten=False, cu_seqlens=None, impl='auto')",
    "score_tokens": "(logits, token_ids, *, ref_logits=None, temperature=1.0, impl='auto')",
    "score_hidden": "(hidden, weight, token_ids, *, bias=None, ref_hidden=None, ref_weight=None, ref_bias=None, "
    "temperature=1.0, chunk_tokens=None, impl='auto')",
    "ppo_loss": "(logprobs, old_logprobs, advantages, mask, *, clip=0.2, clip_high=None, dual_clip=None, values=None, "
    "old_values=None, returns=None, value_clip=0.2, value_coef=1.0, entropy=None, entropy_coef=0.0, kl=None, "
    "kl_coef=0.0, aggregate='token', denominator=None, impl='auto')",
    "token_labels": "(rejected_ids, revised_ids)",
    "build_info": "()",
    "train_sft": f"(cfg, *, model, {ON_PAIRS})",
    "train_reward_model": f"(cfg, *, backbone, {ON_PAIRS})",
    "train_q_model": f"(cfg, *, backbone, {ON_PAIRS})",
    "train_dpo": f"(cfg, *, model, {ON_PAIRS})",
    "train_discriminator": "(cfg, *, backbone, tokenizer, train, held_out, held_out_preferences=(), folder, "
    "resume=False, callbacks=(), origin=None)",
    "train_ppo": "(cfg, *, actor_critic, reference, tokenizer, reward_source, reward_temperature=1.0, prompts, folder, "
    "seed, resume=False, callbacks=(), evaluate=None, environment=None, refresh=None, origin=None)",
    "build_reward_source": "(cfg, *, policy_tokenizer, discriminator=None, reward_model=None, q_model=None, "
    "q_beta=0.2, dpo=None, reference=None, dpo_beta=0.1, data, seed, micro_batch_size=None)",
    "ActorCritic.__init__": "(self, policy, value_model, *, chunk_tokens=None)",
    "RewardSource.__call__": "(self, rollout)",
    "RewardSource.state_dict": "(self)",
    "RewardSource.load_state_dict": "(self, state)",
    "load_config": "(path, overrides=None)",
    "dump_config": "(cfg)",
    "run": "(cfg, *, resume=False)",
}
RECIPES = tuple(name for name in SIGNATURES if name.startswith("train_"))
FIELDS = {
    "TokenScores": ("logprobs", "entropy", "ref_logprobs", "kl"),
    "PPOLoss": (
        *("loss", "policy", "value", "entropy", "kl"),
        *("clip_fraction", "value_clip_fraction", "approx_kl", "ratio_max"),
    ),
}


def test_the_public_names_are_these_and_all_resolve() -> None:
    assert set(tlcr.__all__) == set(dir(tlcr)) == NAMES
    for name in NAMES:
        assert getattr(tlcr, name) is not None


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_everything_that_is_called_has_the_agreed_signature(name: str) -> None:
    signature = inspect.signature(attrgetter(name)(tlcr))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == SIGNATURES[name]
    assert signature.return_annotation is not inspect.Signature.empty


def test_no_public_function_is_forgotten() -> None:
    assert {name for name in NAMES if inspect.isfunction(getattr(tlcr, name))} == {
        name for name in SIGNATURES if "." not in name
    }


def test_the_recipes_name_what_they_share_in_one_order() -> None:
    """Models, tokenizer, data, folder, seed, resume, callbacks, evaluate; what two recipes share stands alike."""
    order = (
        *("cfg", "actor_critic", "model", "backbone", "reference", "tokenizer", "reward_source", "reward_temperature"),
        *("train", "held_out", "held_out_preferences", "prompts", "folder", "seed", "resume", "callbacks", "evaluate"),
        *("environment", "refresh", "origin"),
    )
    for name in RECIPES:
        parameters = inspect.signature(getattr(tlcr, name)).parameters
        assert list(parameters) == [parameter for parameter in order if parameter in parameters]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_documents_every_argument_its_source_and_its_errors(name: str) -> None:
    recipe = getattr(tlcr, name)
    docstring = inspect.getdoc(recipe)
    assert docstring is not None and "Source: " in docstring
    arguments = docstring.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
    documented = re.findall(r"^    (\w+):", arguments, re.MULTILINE)
    assert documented == list(inspect.signature(recipe).parameters)
    raised = re.findall(r"^    (\w+):", docstring.split("\nRaises:\n")[1], re.MULTILINE)
    assert {"DataError", "ConfigError", "CheckpointError", "TrainingDiverged", "KeyboardInterrupt"} == set(raised)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_results_have_the_agreed_fields(name: str) -> None:
    assert getattr(tlcr, name)._fields == FIELDS[name]


def test_labels_are_ordered_integers() -> None:
    assert [(label.name, int(label)) for label in tlcr.TokenLabel] == [
        ("NEGATIVE", -1),
        ("NEUTRAL", 0),
        ("POSITIVE", 1),
    ]


def test_the_recipes_are_functions_whichever_was_imported_first() -> None:
    from tlcr.recipes import train_ppo as module

    for name in ("train_sft", "train_reward_model", "train_dpo", "train_discriminator", "train_ppo"):
        assert inspect.isfunction(getattr(tlcr, name))
    assert tlcr.train_ppo is module.train_ppo


def test_the_version_is_that_of_the_installed_package() -> None:
    assert tlcr.__version__ == version("tlcr-rlhf")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fused_rewards'"):
        _ = tlcr.fused_rewards  # type: ignore[attr-defined]


def test_importing_tlcr_imports_nothing_heavy_and_starts_nothing() -> None:
    code = (
        "import sys, threading; before = set(sys.modules); import tlcr; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new - set(sys.stdlib_module_names) - {'tlcr'}; "
        "assert not heavy, heavy; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
