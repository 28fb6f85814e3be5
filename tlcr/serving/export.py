"""``tlcr export --for vllm``: a discriminator as a folder that vLLM serves, with the command that does it.

vLLM serves a token classifier as its causal language model under the classifier's own head, found by the name's end:
``Qwen3ForTokenClassification`` as ``Qwen3ForCausalLM``. Attention stays causal there, so that a discriminator whose top
layers see the whole answer would give other numbers without a word; it is refused here.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.files import atomic_write, move_into
from tlcr.models.faults import raise_first
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES, label_faults, model_faults, read_config

__all__ = ["COMMAND_FILE", "TRIED", "export_for_vllm"]

logger = logging.getLogger("tlcr")

TRIED = ("llama", "qwen2", "qwen3")
"""The kinds of model whose every token was compared with vLLM's (``make vllm``)."""

COMMAND_FILE = "serve_with_vllm.sh"
SCRIPT = """\
#!/bin/sh
folder=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit
exec vllm serve "$folder" {options} "$@"
"""
"""It finds the folder beside itself, so that the folder may be copied elsewhere."""
TOKEN, CAUSAL = "ForTokenClassification", "ForCausalLM"

PARTS = (
    *("*.safetensors", "*.safetensors.index.json", "generation_config.json"),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
        "*.model",
    ),
)
"""What of a folder is copied beside its config."""


def export_for_vllm(discriminator: Path, output: Path) -> str:
    """Writes the folder and, in it, the command.

    Args:
        discriminator: a folder of ``tlcr train discriminator``.
        output: a folder that is not there yet, or empty.

    Returns:
        The command that serves it, from any folder.

    Raises:
        ConfigError: the folder holds no discriminator, or one that vLLM would serve with other numbers or not at all;
            or ``output`` is there.
    """
    cfg = ModelConfig(path=str(discriminator))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} is there already, and is not empty; name another folder, or delete that one")
    raise_first(model_faults(cfg, "discriminator"))
    config = read_config(cfg)
    raise_first(label_faults(config, str(discriminator), [TWO_CLASSES, THREE_CLASSES]))
    stem = _stem(config, discriminator)
    if config.model_type not in TRIED:
        logger.warning(
            "tlcr has compared every token with vLLM's for %s, and this discriminator is a %s; compare some before you "
            "train on its rewards",
            ", ".join(TRIED),
            config.model_type,
        )
    written = json.loads((discriminator / CONFIG_NAME).read_text(encoding="utf-8"))
    written["architectures"] = [stem + TOKEN]
    written.pop("auto_map", None)  # vLLM has the class; the folder's own would be asked for
    parts = output / ".parts"  # an empty folder stays: it may be the one that the command stands in
    with atomic_write(parts) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        for pattern in PARTS:
            for part in sorted(discriminator.glob(pattern)):
                shutil.copyfile(part, aside / part.name)
        script = SCRIPT.format(options=shlex.join(_options(written)))
        (aside / COMMAND_FILE).write_text(script, encoding="utf-8")
        (aside / COMMAND_FILE).chmod(0o755)
        (aside / CONFIG_NAME).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    move_into(output, parts, last=CONFIG_NAME)
    return shlex.join(["vllm", "serve", str(output.absolute()), *_options(written)])


def _options(config: dict[str, Any]) -> list[str]:
    """What vLLM would guess otherwise or not at all: the dtype and the positions of a config.json."""
    options = ["--dtype", str(config.get("dtype") or config.get("torch_dtype") or "float32")]
    if positions := config.get("max_position_embeddings"):
        options += ["--max-model-len", str(positions)]
    return options


def _stem(config: Any, discriminator: Path) -> str:
    """The name of the architecture without its task; raises ConfigError where vLLM would not serve it rightly."""
    layers = getattr(config, "tlcr_bidirectional_layers", 0)
    otherwise = f"serve it by 'tlcr serve --discriminator {discriminator}'"
    if layers:
        raise ConfigError(
            f"the top {layers} layers of the discriminator {str(discriminator)!r} are bidirectional, and vLLM would "
            f"read them as causal ones, with other rewards; {otherwise}, or train one with "
            "discriminator.bidirectional_layers 0"
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) or ""
    named = (config.architectures or [""])[0]
    if not named.endswith(TOKEN) or causal != named.removesuffix(TOKEN) + CAUSAL:
        raise ConfigError(
            f"the discriminator {str(discriminator)!r} is a {named or config.model_type}, whose causal model is called "
            f"{causal or 'nothing that transformers knows'}; vLLM finds it only where both names differ in {TOKEN} and "
            f"{CAUSAL} alone; {otherwise}"
        )
    return named.removesuffix(TOKEN)
