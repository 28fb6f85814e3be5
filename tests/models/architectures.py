"""Tiny causal language models of every architecture of transformers, and a table of what tlcr makes of them.

    python -m tests.models.architectures [model_type ...]

For each type of config that ``AutoModelForCausalLM`` knows: a token and a sequence classifier are made from a random
model, saved, and loaded by tlcr and by transformers alone. All have to give the same outputs. It takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError

VOCABULARY = 99
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LARGEST = 30_000_000
"""Parameters beyond which a config counts as one that this module cannot make small."""

WIDTH = 32
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    WIDTH: """hidden_size n_embd d_model dim embed_dim embedding_size emb_dim word_embed_proj_dim lru_width
        moe_intermediate_size shared_expert_intermediate_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads num_key_value_heads n_kv_heads num_experts_per_tok moe_k
        mamba_expand""",
    16: """head_dim global_head_dim d_kv q_lora_rank kv_lora_rank v_head_dim qk_head_dim mamba_d_head
        mamba_head_dim""",
    64: """intermediate_size n_inner ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dff n_ctx ffn_hidden_size
        max_position_embeddings n_positions max_seq_len max_sequence_length mamba_d_ssm shared_intermediate_size""",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups",
    8: """qk_rope_head_dim qk_nope_head_dim mamba_d_state mamba_dt_rank rotary_dim time_step_rank state_size
        ssm_state_size hidden_size_per_layer_input attention_window""",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8), "attn_layers": ["local", "local"]},
    "rembert": {"input_embedding_size": WIDTH, "output_embedding_size": WIDTH},
    "codegen": {"n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
"""What the general sizes do not suit."""


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of two layers and few units; raises whatever the architecture raises where these sizes do not suit."""
    options = _options(kind) | OWN.get(kind.model_type, {}) | changes
    for name, part in (kind.sub_configs or {}).items():
        if part.__name__ != "AutoConfig":
            options[name] = _options(part)
    config = kind(**options)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in SPECIAL.items():
            setattr(part, name, value)
        kinds, layers = getattr(part, "layer_types", None), getattr(part, "num_hidden_layers", None)
        if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) > layers:
            part.layer_types = [*kinds[: layers - 1], kinds[-1]]
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"still {parameters / 1e6:.0f} million parameters")
    return config


def tiny_model(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedModel:
    """A random causal language model of `tiny_config`."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config of a causal language model, by its type."""
    return next(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.model_type == model_type)


def _options(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    named = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    return {name: size for name, size in SMALL.items() if name in named}


def _outputs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits


def try_out(model: PreTrainedModel, tokenizer: Any, folder: Path) -> str:
    """Makes, saves and reloads both classifiers of ``model``.

    Returns whose classes they are; raises AssertionError where two outputs differ.
    """
    from tlcr.models.heads import classification_head
    from tlcr.models.inspection import TWO_CLASSES
    from tlcr.models.loading import load_sequence_classifier, load_token_classifier
    from tlcr.models.reward_model import sequence_scores
    from tlcr.models.saving import save_model

    cfg, whose = ModelConfig(attn_implementation=model.config._attn_implementation or "eager"), []
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    mask[1, 4:], ids[1, 4:] = False, SPECIAL["pad_token_id"]
    for auto in (AutoModelForTokenClassification, AutoModelForSequenceClassification):
        token = auto is AutoModelForTokenClassification
        made = (
            load_token_classifier(model, cfg, id2label=TWO_CLASSES) if token else load_sequence_classifier(model, cfg)
        )
        torch.nn.init.normal_(classification_head(made).weight, generator=torch.Generator().manual_seed(1))
        here = folder / ("token" if token else "sequence")
        save_model(made, tokenizer, here)
        ours = type(made).__module__.startswith("tlcr.")
        whose.append("ours" if ours else "transformers")
        loaded = load_token_classifier(here, cfg) if token else load_sequence_classifier(here, cfg)
        elsewhere = auto.from_pretrained(here, trust_remote_code=True)
        assert type(elsewhere).__module__.startswith("transformers"), type(elsewhere)
        assert type(elsewhere).__name__ == type(made).__name__
        wanted = _outputs(made, ids, mask)
        counts = mask if token else ...
        assert torch.equal(_outputs(loaded, ids, mask)[counts], wanted[counts]), "tlcr loads another model"
        assert torch.equal(_outputs(elsewhere, ids, mask)[counts], wanted[counts]), "transformers loads another model"
        if not token:
            scores = sequence_scores(made, ids, mask)
            assert torch.allclose(scores, wanted[:, 0], atol=1e-5), "its own forward reads the score elsewhere"
    return f"token: {whose[0]}, sequence: {whose[1]}"


def _rows(types: list[str]) -> Iterator[tuple[str, str, str]]:
    from tests.models.test_architectures import word_tokenizer

    tokenizer = word_tokenizer()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        if types and kind.model_type not in types:
            continue
        try:
            model = tiny_model(kind)
            _outputs(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3))
        except Exception as error:  # noqa: BLE001 (reported)
            yield kind.model_type, "no tiny model here", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                yield kind.model_type, "works", try_out(model, tokenizer, Path(folder))
        except ConfigError as error:
            yield kind.model_type, "refused", str(error)[:120]
        except Exception as error:  # noqa: BLE001 (reported)
            yield kind.model_type, "FAILS", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main() -> None:
    """Prints one line for each type, and the counts."""
    warnings.filterwarnings("ignore")
    counts: Counter[str] = Counter()
    for name, result, why in _rows(sys.argv[1:]):
        counts[f"{result}; {why}" if result == "works" else result] += 1
        sys.stdout.write(f"{name:26} {result:20} {why}\n")
        sys.stdout.flush()
    sys.stdout.writelines(f"{number:4} {result}\n" for result, number in sorted(counts.items()))
    raise SystemExit(counts["FAILS"] > 0)


if __name__ == "__main__":
    main()
