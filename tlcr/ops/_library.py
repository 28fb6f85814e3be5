"""The torch operators ``torch.ops.tlcr.*``: what C++, CUDA and Triton kernels are registered under.

The schemas stand here, and nowhere in C++, because an installation without compiled code registers its Triton kernels
under the same ones; where there is compiled code, torch compares its signatures with these and refuses to import it if
they differ. An operator takes checked arguments (`tlcr.ops` is the door), returns in float32 or float64, and where a
result does not exist (no reference, no gradient wanted) gives a tensor of no elements in its place.
"""

SCHEMAS = {
    "fused_reward": (
        "(Tensor logits, Tensor mask, Tensor? kl, float kl_coef, Tensor? terminal, float temperature, float scale, "
        "float? clip, bool discrete, float band) -> Tensor"
    ),
    "reward_from_hidden": (
        "(Tensor hidden, Tensor weight, Tensor mask, Tensor? bias, Tensor? kl, float kl_coef, Tensor? terminal, "
        "float temperature, float scale, float? clip, bool discrete, float band) -> Tensor"
    ),
    "fused_gae": (
        "(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam, bool whiten, Tensor? cu_seqlens) "
        "-> (Tensor advantages, Tensor returns)"
    ),
    "score_tokens": (
        "(Tensor logits, Tensor token_ids, Tensor? ref_logits, float temperature, Tensor? temperatures) "
        "-> (Tensor logprobs, Tensor entropy, Tensor ref_logprobs, Tensor kl, Tensor stats, Tensor ref_stats)"
    ),
    "score_tokens_backward": (
        "(Tensor? g_logprobs, Tensor? g_entropy, Tensor? g_kl, Tensor logits, Tensor token_ids, Tensor? ref_logits, "
        "float temperature, Tensor? temperatures, Tensor entropy, Tensor kl, Tensor stats, Tensor ref_stats) -> Tensor"
    ),
    "score_hidden": (
        "(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, "
        "Tensor? ref_bias, float temperature, Tensor? temperatures, int? chunk_tokens) "
        "-> (Tensor logprobs, Tensor entropy, Tensor ref_logprobs, Tensor kl, Tensor stats, Tensor ref_stats)"
    ),
    "score_hidden_backward": (
        "(Tensor? g_logprobs, Tensor? g_entropy, Tensor? g_kl, Tensor hidden, Tensor weight, Tensor token_ids, "
        "Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, float temperature, "
        "Tensor? temperatures, int? chunk_tokens, Tensor entropy, Tensor kl, Tensor stats, Tensor ref_stats, "
        "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor hidden, Tensor weight, Tensor bias)"
    ),
    "ppo_loss": (
        "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float clip, float clip_high, "
        "float? dual_clip, Tensor? values, Tensor? old_values, Tensor? returns, float? value_clip, float value_coef, "
        "Tensor? entropy, float entropy_coef, Tensor? kl, float kl_coef, bool per_sequence, float? denominator, "
        "Tensor? denominator_tensor) -> (Tensor loss, Tensor stats, Tensor row_weights)"
    ),
    "ppo_loss_backward": (
        "(Tensor g_loss, Tensor row_weights, Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, "
        "float clip, float clip_high, float? dual_clip, Tensor? values, Tensor? old_values, Tensor? returns, "
        "float? value_clip, float value_coef, Tensor? entropy, float entropy_coef, Tensor? kl, float kl_coef, "
        "bool wants_logprobs, bool wants_values, bool wants_entropy, bool wants_kl) "
        "-> (Tensor logprobs, Tensor values, Tensor entropy, Tensor kl)"
    ),
}
