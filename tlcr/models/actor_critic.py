"""Policy and value model as one module: what both say of the tokens of answers, in one forward pass.

An action is a token that the policy chose. The action in column c was chosen from the logits of column c - 1, and the
value of the state it was chosen in is read from the same column. The last column is therefore never an input, and
logits exist for the N actions only, which are counted over all rows (axis N): padding reaches no output layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from tlcr import ops
from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.files import atomic_write, remove, write_json
from tlcr.models.heads import Head, backbone, use_float32_head
from tlcr.models.loading import load_causal_lm, load_token_classifier
from tlcr.models.lora.adapters import adapter_of, adapts_output, own_parameters, own_part
from tlcr.models.lora.files import FOLDER, load_adapter, save_trained
from tlcr.models.packing import Packing, packed_inputs, takes_positions
from tlcr.models.preparing import disable_dropout
from tlcr.models.probes import is_causal, require_plain_head
from tlcr.models.stored import is_unread, when_read
from tlcr.ops.types import TokenScores
from tlcr.training.distributed import on_main_process, process_device
from tlcr.training.sharding import Sharding, as_forward, fill, has_shards, shard, whole_state

Terms = Literal["both", "policy", "value"]


HEAD, HEAD_WEIGHTS = "value_head.json", "value_head.safetensors"
"""Files of a shared value model: what its head reads, and the weights of that."""


class PolicyOutput(NamedTuple):
    """What policy and value model say of N actions; every field (N,), float32 or float64, None where not asked for."""

    logprobs_N: Tensor | None
    """log-probability of the action at the sampling temperature, nats."""
    entropy_N: Tensor | None
    """Entropy of the distribution it was drawn from, nats."""
    kl_N: Tensor | None
    """Exact KL(policy || reference) over the vocabulary, nats; with a reference only."""
    values_N: Tensor | None
    """Value of the state in which the action was chosen."""
    ref_logprobs_N: Tensor | None = None
    """log-probability of the action under the reference; with a reference only."""


class ActorCritic(nn.Module):
    """Policy and value model in one module, so that data parallelism synchronises their gradients once.

    policy: a causal language model. value_model: a token classifier with one label, or None for a linear head on the
    policy's last hidden state. chunk_tokens: logits exist for that many tokens at a time.

    Dropout is always off: with dropout the ratio to the rollout's log-probs would be noise (released code).
    The value head computes in float32 whatever the models' dtype (`use_float32_head`): the 8 bits of a bfloat16 value
    would be noise in every advantage.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value_model: PreTrainedModel | None,
        *,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if value_model is policy:
            raise ConfigError(
                "the value model is the policy itself; pass None for a head on the policy, or load a model of its own"
            )
        self.policy = policy
        self.value_model = value_model
        self.value_head = None if value_model is not None else _new_value_head(policy)
        self._chunk_tokens = chunk_tokens
        # Chunked logits and the shared value head both start from the hidden states.
        self._from_hidden = chunk_tokens is not None or value_model is None
        for model in [policy] if value_model is None else [policy, value_model]:
            disable_dropout(model)
        if value_model is not None:
            use_float32_head(value_model)
        if self._from_hidden:
            when_read(policy, partial(require_plain_head, policy))
        self.eval()

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for p in own_parameters(self.policy) if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.critic.parameters() if p.requires_grad]

    @property
    def critic(self) -> nn.Module:
        """What belongs to the value model alone."""
        critic = self.value_head if self.value_model is None else own_part(self.value_model)
        assert critic is not None
        return critic

    def forward(
        self,
        ids_BL: Tensor,
        layout: Tensor | Packing,
        actions_N: Tensor,
        *,
        temperature: float,
        reference: PreTrainedModel | None = None,
        terms: Terms = "both",
    ) -> PolicyOutput:
        """Log-probabilities, entropies and values of the actions.

        Args:
            ids_BL: integers (B, L), a prompt and its answer in each row, with padding at either end; or (1, L), packed
                rows, without padding.
            layout: the attention mask of padded rows, bool (B, L), True where a token counts; or where packed rows
                stand.
            actions_N: integers (N,), the place ``row * L + column`` of each action; no action stands in column 0.
            temperature: what the answers were sampled at.
            reference: also compute the exact KL to this model, and its log-probabilities, without gradient to it.
            terms: "value" skips the policy and gives it no gradient; "policy" skips the value model.

        Returns:
            The terms that were asked for, each (N,), in nats where they are log-probabilities, entropy or KL.
        """
        batch = _Batch.of(ids_BL, layout, actions_N)
        scores, values_N, hidden_NH = None, None, None
        if self._from_hidden and (terms != "value" or self.value_model is None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and terms != "value"):
                hidden_NH = _hidden_states(self.policy, batch)
        if terms != "value":
            scores = self._scores(self.policy, batch, temperature, reference, hidden_NH)
        if terms != "policy":
            values_N = self._values(batch, hidden_NH)
        if scores is None:
            return PolicyOutput(None, None, None, values_N)
        return PolicyOutput(scores.logprobs, scores.entropy, scores.kl, values_N, scores.ref_logprobs)

    @torch.no_grad()
    def reference_logprobs(
        self,
        reference: PreTrainedModel,
        ids_BL: Tensor,
        layout: Tensor | Packing,
        actions_N: Tensor,
        *,
        temperature: float,
    ) -> Tensor:
        """Log-probabilities of the actions under the reference, computed and rounded as the policy's are.

        The KL of a policy that has not changed is then exactly 0, in bfloat16 too.

        Args:
            reference: the reference model.
            ids_BL: integers (B, L), a prompt and its answer in each row, with padding at either end; or (1, L), packed
                rows, without padding.
            layout: the attention mask of padded rows, bool (B, L), True where a token counts; or where packed rows
                stand.
            actions_N: integers (N,), the place ``row * L + column`` of each action.
            temperature: what the answers were sampled at.

        Returns:
            (N,), in nats.
        """
        batch = _Batch.of(ids_BL, layout, actions_N)
        return self._scores(reference, batch, temperature, None, None).logprobs

    def _scores(
        self,
        model: PreTrainedModel,
        batch: _Batch,
        temperature: float,
        reference: PreTrainedModel | None,
        hidden_NH: Tensor | None,
    ) -> TokenScores:
        if not self._from_hidden:
            logits_NV = _logits(model, batch)
            with torch.no_grad():
                ref_logits_NV = None if reference is None else _logits(reference, batch)
            return ops.score_tokens(logits_NV, batch.action_ids_N, ref_logits=ref_logits_NV, temperature=temperature)
        hidden_NH = _hidden_states(model, batch) if hidden_NH is None else hidden_NH
        with torch.no_grad():
            ref_hidden_NH = None if reference is None else _hidden_states(reference, batch)
        head = model.get_output_embeddings()
        ref_head = None if reference is None else reference.get_output_embeddings()
        if self._chunk_tokens is None:
            # The head in the model's dtype: in bfloat16 it takes a fraction of the time of score_hidden in float32.
            return _scores_of_head(head, ref_head, temperature, hidden_NH, ref_hidden_NH, batch.action_ids_N)
        if not adapts_output(self.policy):
            return ops.score_hidden(
                hidden_NH,
                head.weight,
                batch.action_ids_N,
                bias=head.bias,
                ref_hidden=ref_hidden_NH,
                ref_weight=None if ref_head is None else ref_head.weight,
                ref_bias=None if ref_head is None else ref_head.bias,
                temperature=temperature,
                chunk_tokens=self._chunk_tokens,
            )
        # score_hidden reads one matrix. The sum of the head's and its adapter's would be (V, H), and so its gradient.
        given = (hidden_NH, ref_hidden_NH, batch.action_ids_N)
        pieces = zip(*(_pieces(x_NX, self._chunk_tokens) for x_NX in given), strict=False)
        again = partial(checkpoint, _scores_of_head, head, ref_head, temperature, use_reentrant=False)
        return _joined([again(*piece) for piece in pieces])

    def _values(self, batch: _Batch, hidden_NH: Tensor | None) -> Tensor:
        if self.value_model is None:
            assert self.value_head is not None and hidden_NH is not None
            # A copy: fully_shard wants no view of what it returns, whose gradient it waits for.
            return self.value_head(hidden_NH).squeeze(-1).clone()
        values_N = batch.at_states(self.value_model(**_inputs(self.value_model, batch)).logits.squeeze(-1))
        return values_N if values_N.dtype == torch.float64 else values_N.float()

    @classmethod
    def load(
        cls,
        policy: ModelConfig,
        value_folder: Path,
        *,
        chunk_tokens: int | None = None,
        device: torch.device | None = None,
        sharding: Sharding | None = None,
    ) -> ActorCritic:
        """The models that ``save`` wrote.

        Args:
            policy: settings of loading; ``policy.path`` is the policy's folder.
            value_folder: the value model's folder.
            chunk_tokens: logits exist for that many tokens at a time.
            device: where the weights go; None: the CPU.
            sharding: how the caller will cut the module; its weights are read then (``load_causal_lm``).

        Returns:
            Both models as one module.
        """
        model = load_causal_lm(policy, device=device, sharding=sharding)
        if (value_folder / HEAD).is_file():
            actor_critic = cls(model, None, chunk_tokens=chunk_tokens)
            assert actor_critic.value_head is not None
            device = actor_critic.value_head.weight.device
            actor_critic.value_head = load_value_head(value_folder).to(device)
            return actor_critic
        options: dict[str, Any] = {"id2label": {0: "value"}, "device": device, "sharding": sharding}
        return cls(model, load_token_classifier(value_folder, policy, **options), chunk_tokens=chunk_tokens)

    def restore(self, policy: ModelConfig, value_folder: Path, *, sharding: Sharding | None = None) -> None:
        """Fills both models with what ``save`` wrote of models like these; adapters as they were trained, not merged.

        Args:
            policy: settings of loading; ``policy.path`` is the policy's folder.
            value_folder: the value model's folder.
            sharding: how this module is cut; None: it is whole.
        """
        device = process_device()
        if adapter_of(self.policy) is None:
            saved = ActorCritic.load(policy, value_folder, device=device, sharding=sharding)
            shard(saved, sharding)
            fill(self, saved.state_dict())
            return
        load_adapter(self.policy, Path(policy.path) / FOLDER)
        if self.value_model is None:
            assert self.value_head is not None
            fill(self.value_head, load_value_head(value_folder).state_dict())
        elif adapter_of(self.value_model) is not None:
            load_adapter(self.value_model, value_folder / FOLDER)
        else:
            options: dict[str, Any] = {"id2label": {0: "value"}, "device": device, "sharding": sharding}
            value_model = load_token_classifier(value_folder, policy, **options)
            shard(value_model, sharding)
            fill(self.value_model, value_model.state_dict())

    def save(self, tokenizer: PreTrainedTokenizerBase, policy_folder: Path, value_folder: Path) -> None:
        """Writes policy and value model for others to load. Every process calls it.

        ``AutoModelForCausalLM`` loads the policy, and ``AutoModelForTokenClassification`` the value model. For a
        shared value model only the head is written (``load_value_head``). The value head is float32 in the file.
        ``from_pretrained`` of transformers rounds it to the dtype of the loaded model; ``load`` does not.

        Args:
            tokenizer: saved with each model.
            policy_folder: where the policy goes.
            value_folder: where the value model goes.
        """
        save_trained(self.policy, tokenizer, policy_folder)
        if self.value_model is not None:
            for name in (HEAD, HEAD_WEIGHTS):  # load would take the head of an earlier run
                on_main_process(partial(remove, value_folder / name))
            save_trained(self.value_model, tokenizer, value_folder)
        else:
            assert self.value_head is not None
            save_value_head(self.value_head, value_folder)


def build_value_model(
    cfg: PPOConfig,
    model: ModelConfig,
    *,
    policy: PreTrainedModel,
    reward_model: PreTrainedModel | None = None,
    discriminator: PreTrainedModel | None = None,
) -> PreTrainedModel | None:
    """The value model that ``cfg`` asks for.

    Its backbone is copied from the policy, the reward model or the discriminator (``cfg.value_init``). The head starts
    at zero (ours: the first values are then 0). A reward model's head is copied: it already predicts the worth of an
    answer (released code).

    Args:
        cfg: which model to start from, and whether policy and values share a backbone.
        model: dtype and settings of loading.
        policy: the policy that PPO starts with.
        reward_model: the sequence reward model, where ``cfg.value_init`` names it.
        discriminator: the discriminator, where ``cfg.value_init`` names it.

    Returns:
        A token classifier with the label "value"; None for a value head on the policy.

    Raises:
        ConfigError: ``cfg.value_init`` names a model that is not there, or one that is no decoder.
    """
    if cfg.value_model == "shared":
        return None
    sources = {"policy": policy, "reward_model": reward_model, "discriminator": discriminator}
    source = sources[cfg.value_init]
    if source is None:
        raise ConfigError(
            f"ppo.value_init is {cfg.value_init!r}, but there is no such model in this run; train it, or set "
            f"ppo.value_init to {' or '.join(repr(name) for name, found in sources.items() if found is not None)}"
        )
    head = cfg.value_init == "reward_model"
    value_model = load_token_classifier(source, model, id2label={0: "value"}, copy_head=head)
    kind = type(source).__name__

    def require_causal() -> None:
        if not is_causal(value_model):
            raise ConfigError(
                f"ppo.value_init is {cfg.value_init!r}, but {kind} is no decoder: it reads later tokens, which a value "
                "must not know; set ppo.value_init to 'policy'"
            )

    if cfg.value_init != "policy":
        when_read(value_model, require_causal)
    return value_model


def save_value_head(head: Head, folder: Path) -> None:
    """Write the head of a shared value model: safetensors, and a JSON that says what it reads. Every process calls."""
    state = whole_state(head) if has_shards(head) else head.state_dict()
    about = {
        "hidden_size": head.in_features,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "reads": "the policy's last hidden state (after its final norm), in the column before the action's token",
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove(folder / CONFIG_NAME)  # a value model that was there is none any more
        with atomic_write(folder / HEAD_WEIGHTS) as aside:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside)
        write_json(folder / HEAD, about)

    on_main_process(write)


def load_value_head(folder: Path) -> Head:
    """The head that `save_value_head` wrote; CheckpointError where there is none."""
    about, weights = folder / HEAD, folder / HEAD_WEIGHTS
    if not weights.is_file() or not about.is_file():
        raise CheckpointError(
            f"no value head in {folder}: wanted {weights.name} and {about.name}, as a PPO run with "
            "ppo.value_model=shared writes them; a separate value model loads with AutoModelForTokenClassification"
        )
    described = json.loads(about.read_text(encoding="utf-8"))
    head = Head(described["hidden_size"], 1, dtype=getattr(torch, described["dtype"]))
    head.load_state_dict(load_file(weights))
    return head


def _new_value_head(policy: PreTrainedModel) -> Head:
    weight = policy.get_output_embeddings().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    device = process_device() if is_unread(policy) else weight.device  # no file has it
    # not hidden_size: OPT-350m projects its last hidden states to the width of its embeddings
    head = Head(weight.shape[1], 1, dtype=dtype, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class _Batch(NamedTuple):
    """What models read, all columns but the last of padded rows; and where in it, rows laid end to end, the actions'
    states are."""

    ids_BK: Tensor
    layout: Tensor | Packing
    action_ids_N: Tensor
    states_N: Tensor

    @classmethod
    def of(cls, ids_BL: Tensor, layout: Tensor | Packing, actions_N: Tensor) -> _Batch:
        action_ids_N = ids_BL.flatten()[actions_N]
        if isinstance(layout, Packing):
            return cls(ids_BL, layout, action_ids_N, actions_N - 1)
        # One column to the left, in rows that are one shorter.
        states_N = actions_N - actions_N // ids_BL.shape[1] - 1
        return cls(ids_BL[:, :-1], layout[:, :-1].long(), action_ids_N, states_N)

    def at_states(self, x_BKX: Tensor) -> Tensor:
        """(N, ...): what a model says in the states in which the actions were chosen."""
        return x_BKX.flatten(0, 1).index_select(0, self.states_N)


def _inputs(model: PreTrainedModel, batch: _Batch) -> dict[str, Any]:
    """A model's inputs. Positions count real tokens only: padding would shift them."""
    if isinstance(batch.layout, Packing):
        return packed_inputs(model, batch.ids_BK, batch.layout)
    inputs = {"input_ids": batch.ids_BK, "attention_mask": batch.layout, "use_cache": False}
    if takes_positions(model):
        inputs["position_ids"] = (batch.layout.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def _logits(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """(N, V): the model's own logits, whatever it does to them after its head, which sees the actions' states only."""

    def keep_states(head: nn.Module, hidden: tuple[Tensor]) -> Tensor:
        return batch.at_states(hidden[0]).unsqueeze(0)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_states)
    try:
        return model(**_inputs(model, batch)).logits.squeeze(0)
    finally:
        hook.remove()


def _scores_of_head(
    head: nn.Module,
    ref_head: nn.Module | None,
    temperature: float,
    hidden_NH: Tensor,
    ref_hidden_NH: Tensor | None,
    ids_N: Tensor,
) -> TokenScores:
    with torch.no_grad():
        ref_logits_NV = None if ref_head is None else ref_head(ref_hidden_NH)
    return ops.score_tokens(head(hidden_NH), ids_N, ref_logits=ref_logits_NV, temperature=temperature)


def _pieces(x_NX: Tensor | None, tokens: int) -> Iterable[Tensor | None]:
    return repeat(None) if x_NX is None else x_NX.split(tokens)


def _joined(pieces: Sequence[TokenScores]) -> TokenScores:
    fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*pieces, strict=True)]
    return TokenScores(*fields)


def _hidden_states(model: PreTrainedModel, batch: _Batch) -> Tensor:
    body = backbone(model)
    # The head, which is read next, stays gathered where the model is a sharded root, as the reference is.
    hidden_BKH = as_forward(model, lambda: body(**_inputs(body, batch)).last_hidden_state, keep=True)
    return batch.at_states(hidden_BKH)
