"""What a model does with its input, found by running it on a few random ids.

An architecture's name does not say where a classifier reads its score, or whether a model sees later tokens. The probes
take a few short rows, as long as reading the weights once or twice, and are remembered for each model.

Axes: B rows, L columns, H hidden units.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError
from tlcr.models.faults import one_line
from tlcr.models.heads import backbone, classification_head, evaluating, has_linear_head
from tlcr.models.packing import Packing, packed_inputs, takes_positions

LENGTHS = (7, 4)
"""Tokens of the two rows of a probe."""

FLOAT32_ROUNDING = 2e-6
"""Relative: several times what mixtures of experts differ by, and a hundredth of what rows that are mixed do (ours,
with random models of each architecture of transformers)."""

_remembered: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the hidden states of a column are the same without the columns after it.

    Args:
        model: a model with a head, such as a token classifier.

    Returns:
        False for an encoder, and for an encoder-decoder.
    """
    return _remember(model, "is_causal", lambda: _is_causal(model))


def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether a reward model is a decoder whose score is a linear layer on the hidden state of the last token.

    Args:
        model: a sequence classifier.

    Returns:
        False for every other way to a score, such as the pooled first token of an encoder.
    """
    return _remember(model, "reads_last_token", lambda: _reads_last_token(model))


def check_reward_model(model: PreTrainedModel) -> None:
    """Checks that a reward model gives every text one score, whatever else is in the batch.

    A model that does not read its score at the last token (``reads_last_token``) is run as it is, padded on the right,
    so its score must not depend on padding.

    Args:
        model: a sequence classifier with one output.

    Raises:
        ConfigError: its own forward pass fails on a text without special tokens, gives something else than one score,
            or gives another score with padding.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"the reward model is a {name}, an encoder and a decoder: it looks for its score at an end-of-sequence "
            "token, which a cut answer does not have; name an encoder or a decoder with one output"
        )
    if reads_last_token(model):
        return
    rows = _rows(model)
    ids_BL = torch.zeros((len(rows), max(LENGTHS)), dtype=torch.long) + (model.config.pad_token_id or 0)
    mask_BL = torch.zeros_like(ids_BL)
    for row, ids_1L in enumerate(rows):
        ids_BL[row, : ids_1L.shape[1]], mask_BL[row, : ids_1L.shape[1]] = ids_1L[0].cpu(), 1
    try:
        with evaluating(model):
            alone = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows]
            device = rows[0].device
            together = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device)).logits
    except Exception as error:
        raise ConfigError(
            f"the reward model is a {name}, whose forward pass fails on a plain text "
            f"({type(error).__name__}: {one_line(error)[:200]}); name one that needs ids and an attention "
            "mask only"
        ) from error
    if together.shape != (len(rows), 1):
        raise ConfigError(
            f"the reward model is a {name}, which gives outputs of shape {tuple(together.shape)} for {len(rows)} "
            f"texts; wanted ({len(rows)}, 1), a score for each"
        )
    if not _close(torch.cat(alone), together):
        raise ConfigError(
            f"the reward model is a {name}, whose scores depend on padding: alone {torch.cat(alone)[:, 0].tolist()}, "
            f"in one batch {together[:, 0].tolist()}; name one that reads its attention mask"
        )


def packing_fault(model: PreTrainedModel) -> str | None:
    """Why a model, with its attention implementation, cannot read packed rows; None where it can.

    Two rows are packed, and the tokens of either are changed. What the model says of the second row must not depend on
    the first, and must be what it says of that row alone. A recurrent layer fails, and an attention that reads no
    positions; so do architectures that take positions and still make a mask of ones (OPT, BioGPT).

    Args:
        model: a causal model with a head.

    Returns:
        What was found, to be put after the model's name.
    """
    if not (takes_positions(model) and takes_positions(backbone(model))):
        return "takes no positions, which keep packed rows apart"
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        # Versions of transformers count its chunks from the first packed row on; two short rows do not show it.
        return "attends within chunks, which do not begin with a packed row"
    first, second = _rows(model)
    cut = first.shape[1]
    try:
        with evaluating(model):
            for read in (_before_head, _after_backbone):
                own = read(model, (first, second))
                before_changed = read(model, (first.flip(1), second))
                after_changed = read(model, (first, second.flip(1)))
                # The experts of a mixture get other numbers of tokens and round otherwise, in the first row too, which
                # a causal model reads before the change. Elsewhere not a bit may differ, in bfloat16 either.
                rounding = max(8 * _apart(own[:, :cut], after_changed[:, :cut]), FLOAT32_ROUNDING)
                if _apart(own[:, cut:], before_changed[:, cut:]) > rounding:
                    return "mixes packed rows: what it says of a token depends on the rows before"
                if _apart(own[:, cut:], read(model, (second,))) > torch.finfo(own.dtype).eps ** 0.5:
                    return "reads a packed row otherwise than the same row alone"
    except Exception as error:  # noqa: BLE001
        return f"fails on packed rows ({type(error).__name__}: {one_line(error)[:200]})"
    return None


def require_causal(model: PreTrainedModel) -> None:
    """Raises ConfigError where a language model fails on plain text, or sees later tokens."""
    name = type(model).__name__
    try:
        causal = is_causal(model)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be used as a language model: its forward pass fails on plain text "
            f"({type(error).__name__}: {one_line(error)[:200]}); use a decoder such as Llama, Qwen or OPT"
        ) from error
    if not causal:
        raise ConfigError(
            f"{name} is no causal language model: what it says of a token depends on later tokens; use a decoder such "
            "as Llama, Qwen or OPT, or set is_decoder in its config.json if it was trained as one"
        )


def require_plain_head(model: PreTrainedModel) -> None:
    """Raises ConfigError where a language model does more than one product from the last hidden state to the logits.

    A cap of 30 changes a logit of 0.1 by less than rounding and makes 26 of 40, so that the model's own logits, of two
    tokens, do not show it. Instead the head says numbers up to 100, and the model must return them as they are.

    Args:
        model: the language model. One on the meta device is not run.
    """
    head = model.get_output_embeddings()
    if head.weight.is_meta:  # of a model that is simulated
        return
    read: list[Tensor] = []
    said: list[Tensor] = []

    def say_large_numbers(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(args[0])
        said.append(torch.linspace(-100, 100, output.numel(), dtype=output.dtype, device=output.device).view_as(output))
        return said[-1]

    ids_BL = torch.arange(2, device=head.weight.device).unsqueeze(0)
    with torch.no_grad():
        hook = head.register_forward_hook(say_large_numbers)
        try:
            logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        finally:
            hook.remove()
        own_BLH = backbone(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    plain = (
        len(read) == 1
        and read[0].shape == own_BLH.shape
        and _apart(own_BLH, read[0]) <= torch.finfo(own_BLH.dtype).eps ** 0.5
        and torch.equal(logits_BLV.to(said[0].dtype), said[0])
    )
    if not plain:
        raise ConfigError(
            f"the logits of {type(model).__name__} are not just its last hidden state times its head (they are capped "
            "or scaled), which ppo.chunk_tokens and ppo.value_model=shared rely on; set ppo.chunk_tokens=null and "
            "ppo.value_model=separate"
        )


def require_decoder(model: PreTrainedModel, what: str) -> None:
    """Raises ConfigError where ``what`` needs a score at every token and the reward model has none."""
    if not reads_last_token(model):
        raise ConfigError(
            f"{what} needs a reward model that is a decoder with a linear head, and {type(model).__name__} is none; "
            "train one with 'tlcr train reward-model', or use reward.kind sequence or uniform"
        )


def _remember(model: PreTrainedModel, what: str, probe: Callable[[], bool]) -> bool:
    known = _remembered.setdefault(model, {})
    if what not in known:
        with evaluating(model):
            known[what] = probe()
    return known[what]


def _rows(model: PreTrainedModel) -> list[Tensor]:
    """Rows (1, L) of random ids, none of which is special."""
    config = model.config.get_text_config()
    named = [value for name, value in vars(config).items() if name.endswith("_token_id")]
    special = {token for value in named for token in (value if isinstance(value, (list, tuple)) else [value])}
    plain = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])
    generator = torch.Generator().manual_seed(0)
    return [plain[torch.randint(len(plain), (1, length), generator=generator)].to(model.device) for length in LENGTHS]


def _hidden(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    states: Tensor = backbone(model)(
        input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False
    ).last_hidden_state
    return states


def _before_head(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """What the head of a model reads, (1, L, H), of packed rows; of one row, what it reads of that row as usual."""
    head = model.get_output_embeddings() or classification_head(model)
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        model(**_as_packed(model, rows))
    finally:
        hook.remove()
    (states,) = read
    return states


def _after_backbone(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """The hidden states (1, L, H) of packed rows; of one row, those of that row as usual."""
    body = backbone(model)
    states: Tensor = body(**_as_packed(body, rows)).last_hidden_state
    return states


def _as_packed(model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Any]:
    ids_1L = torch.cat(list(rows), dim=1)
    if len(rows) == 1:
        return {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L), "use_cache": False}
    return packed_inputs(model, ids_1L, Packing.of([row.shape[1] for row in rows], ids_1L.device))


def _apart(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b, relative to that of a; 0 where both are zeros."""
    difference = float(torch.linalg.vector_norm(a.double() - b.double()))
    return difference and difference / float(torch.linalg.vector_norm(a.double()))


def _is_causal(model: PreTrainedModel) -> bool:
    if model.config.is_encoder_decoder:
        return False
    row, short = _rows(model)
    cut = row.shape[1] - 2
    beside = row.flip(1)

    def read(row_1L: Tensor, beside_1L: Tensor) -> Tensor:
        return _hidden(model, torch.cat([row_1L, beside_1L]))[0, :cut]

    own = read(row, beside)
    later_changed = read(torch.cat([row[:, :cut], short[:, :2]], dim=1), beside)
    # A row does not depend on the one beside it, but for what experts round otherwise that get other numbers of tokens.
    # Without experts not a bit may differ: beside one large activation all other differences are small.
    beside_changed = read(row, torch.cat([short, short[:, : row.shape[1] - short.shape[1]]], dim=1))
    rounding = max(8 * _apart(own, beside_changed), FLOAT32_ROUNDING)
    return _apart(own, later_changed) <= min(rounding, torch.finfo(own.dtype).eps ** 0.5)


def _reads_last_token(model: PreTrainedModel) -> bool:
    if not has_linear_head(model) or not is_causal(model):
        return False
    ids_BL, head = _rows(model)[0], classification_head(model)
    generator = torch.Generator().manual_seed(0)
    random_H = torch.randn(head.in_features, generator=generator, dtype=torch.float64).to(model.device)

    def project(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """In place of the head's product, which may be 0 for every input."""
        return (args[0].double() @ random_H)[..., None]

    hook = head.register_forward_hook(project)
    try:
        own = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False).logits
        last = head(_hidden(model, ids_BL)[:, -1])
    finally:
        hook.remove()
    return own.shape == last.shape and _apart(last, own) <= FLOAT32_ROUNDING


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of different kernels; another formula differs by as much as the numbers themselves."""
    scale = float(a.abs().max())
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * scale)
