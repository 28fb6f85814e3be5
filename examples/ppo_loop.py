"""TLCR in a loop of one's own: the whole method, small, with tlcr's functions and a transformers model.

    python -m examples.ppo_loop

Read it from top to bottom; its numbers are sections of the paper (arXiv 2407.16574). No network, no GPU. The same with
checkpoints, calibration, other rewards to compare with and a report: tlcr run examples/quickstart.yaml

Axes are suffixes: B rows, P columns of prompts, T of answers, L = P + T, V vocabulary, C classes. Prompts are padded on
the left and answers on the right: every answer begins in column P. Index t of a (B, T) tensor belongs to action t, the
choice of the token in column P + t; the end of sequence is an action too. A mask is True where a token counts, and
comes from lengths, not from ids: padding and end of sequence may share one.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

import tlcr
from tlcr.data import embedded

NO_TARGET = -100  # target of columns without a loss: prompt and padding
KL_COEF, LAM = 0.1, 0.7  # reward per nat; lambda of GAE: a reward for every token needs less than the usual 0.95


def load(seed: int, pairs: int):
    """Tokenizer, policy, preferences (prompt, chosen), edits (prompt, rejected, revised) and prompts held out, of a
    language made in code. Yours: AutoTokenizer, AutoModelForCausalLM, lists of objects with these fields; prompts end
    where a word ends; a scorer for `embedded.score`; learning rates for 1B parameters are some 1e-5, in PPO 1e-6."""
    tokenizer = embedded.build_tokenizer(seed)
    policy, held_out = embedded.build_model(tokenizer, seed).eval(), embedded.prompts(128, seed, "held_out")
    return tokenizer, policy, *embedded.generate_pairs(pairs, seed), held_out


def encode(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    prompt_ids, answer_ids = tokenizer([prompt, answer], add_special_tokens=False)["input_ids"]
    return prompt_ids, [*answer_ids, tokenizer.eos_token_id]


def pad(rows, value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor (B, L), and its mask."""
    ids, ones = [torch.tensor(row) for row in rows], [torch.ones(len(row), dtype=torch.bool) for row in rows]
    how = {"batch_first": True, "padding_side": side}
    return nn.utils.rnn.pad_sequence(ids, padding_value=value, **how), nn.utils.rnn.pad_sequence(ones, **how)


def forward(model, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The model's output at every column. Positions count real tokens only: padding on the left would shift them."""
    positions_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids_BL, attention_mask=mask_BL.long(), position_ids=positions_BL, use_cache=False).logits


def fit(model, examples, loss_of, learning_rate: float, weight_decay: float = 0.0) -> None:
    """Two passes of minimising `loss_of`. An example is a list of rows, a row its ids and a target for each of them."""
    batches = [batch.tolist() for _ in range(2) for batch in torch.randperm(len(examples)).split(32)]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.95), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for step, batch in enumerate(batches):
        ids, targets = zip(*(row for index in batch for row in examples[index]), strict=True)
        loss = loss_of(forward(model, *pad(ids, 0)), pad(targets, NO_TARGET)[0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{loss_of.__name__} at step {step:3} of {len(batches)}: {loss.item():.3f}")


def sft_loss(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """-log p of an answer's token, on average. A language model predicts a token one column before it."""
    return nn.functional.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), ids_BL[:, 1:], ignore_index=NO_TARGET)


# ---- 3.1 From edits to token labels
def labelled(tokenizer, edit) -> list[tuple[list[int], list[int]]]:
    """Both sides of an edit: -1 for removed tokens, 1 for inserted ones, 0 for kept ones, the end included."""
    prompt_ids, rejected_ids = encode(tokenizer, edit.prompt, edit.rejected)
    _, revised_ids = encode(tokenizer, edit.prompt, edit.revised)
    sides = zip((rejected_ids, revised_ids), tlcr.token_labels(rejected_ids, revised_ids), strict=True)
    return [(prompt_ids + ids, [NO_TARGET] * len(prompt_ids) + [int(label) for label in own]) for ids, own in sides]


# ---- 3.2 The discriminator, which learns these labels in context
def with_new_head(policy, outputs: int):
    """A token classifier: a copy of the policy with a linear head of zeros in place of its own, and without dropout."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.classifier_dropout = outputs, 0.0
    model = AutoModelForTokenClassification.from_config(config).eval()
    model.base_model.load_state_dict(policy.base_model.state_dict())
    for parameter in set(model.parameters()) - set(model.base_model.parameters()):
        nn.init.zeros_(parameter)
    return model


def discriminator_loss(logits_BLC: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross entropy with [1, 0] for negative tokens, [.5, .5] for neutral, [0, 1] for positive ones: the mean over one
    side's tokens plus that over the other's. A classifier scores a token at its own column, where it has seen it."""
    targets_BCL = torch.stack([1 - labels_BL, 1 + labels_BL], dim=1) / 2
    loss_BL = nn.functional.cross_entropy(logits_BLC.transpose(1, 2), targets_BCL, reduction="none")
    counts_BL = labels_BL != NO_TARGET
    return 2 * (torch.where(counts_BL, loss_BL, 0.0).sum(1) / counts_BL.sum(1)).mean()


# ---- 3.3 Answers, and a reward for every token
@torch.no_grad()
def sample(policy, tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor, int]:
    """Answers from the distribution whose log-probs PPO compares: temperature 1, the whole vocabulary."""
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ids_BP, mask_BP = pad(prompt_ids, tokenizer.pad_token_id, "left")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids_BL = policy.generate(input_ids=ids_BP, attention_mask=mask_BP.long(), **sampling, **special)
    ends_BT = (ids_BL[:, ids_BP.shape[1] :] == tokenizer.eos_token_id).int()
    mask_BT = ends_BT.cumsum(1) - ends_BT == 0  # no earlier end: the first end counts, later tokens do not
    return ids_BL, torch.cat([mask_BP, mask_BT], dim=1), ids_BP.shape[1]


def score(policy, value_model, ids_BL: Tensor, mask_BL: Tensor, P: int, reference=None):
    """Log-probs of every action under policy and reference, and the value of its state. That state ends
    one column before the token: all three are read at column P + t - 1, and the last column is no input."""
    states = ids_BL[:, :-1], mask_BL[:, :-1]
    ref_logits_BTV = None if reference is None else forward(reference, *states)[:, P - 1 :]
    scores = tlcr.score_tokens(forward(policy, *states)[:, P - 1 :], ids_BL[:, P:], ref_logits=ref_logits_BTV)
    return scores, forward(value_model, *states)[:, P - 1 :, 0]


def token_rewards(discriminator, ids_BL: Tensor, mask_BL: Tensor, P: int, kl_BT: Tensor) -> Tensor:
    """2 D(a_t | x, a_<t) - 1, minus the KL penalty. D scores a token that it has seen: it is read at column P + t."""
    logits_BTC = forward(discriminator, ids_BL, mask_BL)[:, P:]
    return tlcr.fused_reward(logits_BTC, mask_BL[:, P:], kl=kl_BT, kl_coef=KL_COEF)


# ---- 3.4 PPO
@torch.no_grad()
def experience(tokenizer, policy, value_model, reference, discriminator, prompts: list[str]):
    """Answers to the prompts: the tensors that an update needs; their figures; their text."""
    ids_BL, mask_BL, P = sample(policy, tokenizer, prompts)
    mask_BT = mask_BL[:, P:]
    old, values_BT = score(policy, value_model, ids_BL, mask_BL, P, reference)
    kl_BT = old.logprobs - old.ref_logprobs  # of the action taken: a KL over the vocabulary would not depend on it
    rewards_BT = token_rewards(discriminator, ids_BL, mask_BL, P, kl_BT)
    # Ours: the average token earns 0. If it earned more, every further token would be rewarded, whatever it is.
    centred_BT = rewards_BT - rewards_BT[mask_BT].mean()
    advantages_BT, returns_BT = tlcr.fused_gae(centred_BT, values_BT, mask_BT, gamma=1.0, lam=LAM, whiten=True)
    texts = tokenizer.batch_decode(ids_BL[:, P:], skip_special_tokens=True)
    kl, tokens = kl_BT[mask_BT].mean().item(), mask_BT.sum().item()
    figures = {"reward": rewards_BT[mask_BT].mean().item() + KL_COEF * kl, "KL": kl}
    figures |= {"gold": sum(embedded.score(prompts, texts)) / tokens, "length": tokens / len(prompts)}
    return (P, ids_BL, mask_BL, old.logprobs, values_BT, advantages_BT, returns_BT), figures, texts


def update(policy, value_model, optimizer, P: int, *tensors: Tensor, passes: int = 2, minibatch: int = 16) -> None:
    """Clipped steps on a round's answers. In every (B, T) tensor index t is action t, so nothing is shifted here."""
    for rows in [rows for _ in range(passes) for rows in torch.randperm(len(tensors[0])).split(minibatch)]:
        ids_BL, mask_BL, old_logprobs_BT, old_values_BT, advantages_BT, returns_BT = (x[rows] for x in tensors)
        new, values_BT = score(policy, value_model, ids_BL, mask_BL, P)
        critic = {"values": values_BT, "old_values": old_values_BT, "returns": returns_BT, "value_coef": 0.5}
        optimizer.zero_grad()
        tlcr.ppo_loss(new.logprobs, old_logprobs_BT, advantages_BT, mask_BL[:, P:], **critic).loss.backward()
        for model in (policy, value_model):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main(arguments: list[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The stages in their order. Returns the figures on prompts that training never saw, before and after PPO."""
    parser = argparse.ArgumentParser(description="TLCR's PPO, the whole method at small scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=4000, help="preferences and edits to learn from")
    parser.add_argument("--rounds", type=int, default=25, help="of PPO")
    parser.add_argument("--batch", type=int, default=32, help="answers of a round")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    tokenizer, policy, preferences, edits, held_out = load(args.seed, args.pairs)
    print(f"an answer that lost:{edits[0].rejected}\nits minimal edit:   {edits[0].revised}")
    chosen = [encode(tokenizer, pair.prompt, pair.chosen) for pair in preferences]
    fit(policy, [[(prompt + ids, [NO_TARGET] * len(prompt) + ids)] for prompt, ids in chosen], sft_loss, 3e-3)
    discriminator = with_new_head(policy, 2)
    fit(discriminator, [labelled(tokenizer, edit) for edit in edits], discriminator_loss, 3e-3, weight_decay=0.1)
    reference, value_model = copy.deepcopy(policy), with_new_head(policy, 1)
    optimizer = torch.optim.AdamW([*policy.parameters(), *value_model.parameters()], 4e-4, (0.9, 0.95), weight_decay=0)
    models = (policy, value_model, reference, discriminator)
    _, before, texts_before = experience(tokenizer, *models, held_out)
    print("means per token, and tokens per answer\n round  " + "  ".join(f"{name:>6}" for name in before))
    for number in range(1, args.rounds + 1):
        prompts = [preferences[index].prompt for index in torch.randint(len(preferences), (args.batch,))]
        rollout, figures, _ = experience(tokenizer, *models, prompts)
        update(policy, value_model, optimizer, *rollout)
        print(f"{number:6}  " + "  ".join(f"{value:6.3f}" for value in figures.values()))
    _, after, texts_after = experience(tokenizer, *models, held_out)
    for name, figures, texts in (("before", before, texts_before), ("after", after, texts_after)):
        print(f"{name:>6}  " + "  ".join(f"{value:6.3f}" for value in figures.values()) + f"  for example:{texts[0]}")
    return before, after


if __name__ == "__main__":
    main()
