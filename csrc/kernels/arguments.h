// The arguments of the kernels: pointers, sizes and numbers. They are the same for CPU and CUDA and do not use torch,
// so that a kernel can be compiled, read and tested without it. csrc/torch/bindings.cpp checks the tensors and fills in
// the arguments.
//
// "real" below is the type of the arithmetic and of every result: double where `type` is kDouble, float otherwise.
// Where a position does not count (mask 0), only its mask is read, so that a NaN there has no effect.
#pragma once

#include <cstdint>

namespace tlcr {

enum class Type : int { kFloat, kDouble, kBFloat16, kHalf };

// Rows of contiguous elements. Row n begins `(n / inner) * outer_stride + (n % inner) * inner_stride` elements after
// `data`. The rows may thus have two axes with any strides, and a slice such as logits[:, :-1] is read without a copy.
struct Rows {
  void* data = nullptr;  // only read where a comment says "in"
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

// What scoring keeps for each row, beside its results, for the backward pass on the same device: two numbers in stats
// and two in ref_stats. stats is {max, log_sum}: max is the largest x, x is logits / temperature, and log_sum = log sum
// exp(x - max). x - max - log_sum is then log p(v), without the rounding error of a single log-sum-exp of large logits.
// A device may keep other numbers that serve it better; the CPU does.

struct ScoreArguments {
  Type type;  // of logits and ref_logits
  int64_t rows, vocabulary;
  Rows logits;               // in
  Rows ref_logits;           // in; data is null without a reference
  const int64_t* token_ids;  // [rows], each in [0, vocabulary): the caller has checked, or checks on the device
  double temperature;        // used where temperatures is null
  const void* temperatures;  // real [rows], or null
  void *logprobs, *entropy;  // out, real [rows]
  void *ref_logprobs, *kl;   // out, real [rows]; null without a reference
  void *stats, *ref_stats;   // out, real [rows][2]; ref_stats null without a reference
};

// dx = p * (-g_logprob - g_entropy * (log p + H) + g_kl * (log p - log q - KL)) + g_logprob at the token;
// grad_logits = dx / temperature. A row whose three gradients are 0 (or absent) is written as 0 and not read. An entry
// with p == 0 adds no entropy or KL term, and a result whose own gradient is 0 adds exactly 0.
//
// The columns may be a part of the vocabulary: a column's gradient needs no other column.
struct ScoreBackwardArguments {
  Type type, grad_type;      // grad_type is `type`, or half precision where `type` is kFloat
  int64_t rows, vocabulary;  // as many columns as there are
  int64_t first_entry;       // of the vocabulary: the one in column 0
  Rows logits, ref_logits;   // in; ref_logits.data is null where g_kl is
  const int64_t* token_ids;
  double temperature;
  const void* temperatures;
  const void *g_logprobs, *g_entropy, *g_kl;  // in, real [rows], each may be null
  const void *entropy, *kl;                   // in, real [rows], results of the forward pass; kl null where g_kl is
  const void *stats, *ref_stats;              // in, real [rows][2]; ref_stats null where g_kl is
  Rows grad_logits;  // out, `grad_type`; if that is `type` it may be the storage of logits itself (same strides): each
                     // element is read before it is written, by the same thread
};

struct RewardOptions {
  double temperature, scale;
  double clip;     // infinity: no bound
  double kl_coef;  // with 0, kl is not read
  double band;
  bool discrete;
};

struct RewardArguments {
  Type type;                       // of logits
  int64_t batch, length, classes;  // classes is 2 or 3
  const void* logits;              // in, [batch][length][classes]
  const uint8_t* mask;             // in, [batch][length], 0 or 1
  const void* kl;                  // in, real [batch][length], or null
  const void* terminal;            // in, real [batch], or null
  RewardOptions options;
  void* rewards;  // out, real [batch][length]
};

struct HiddenRewardArguments {
  Type type;  // of hidden
  int64_t batch, length, width, classes;
  Rows hidden;         // in, batch * length rows of `width`
  const void* weight;  // in, real [classes][width]
  const void* bias;    // in, real [classes], or null
  const uint8_t* mask;
  const void* kl;
  const void* terminal;
  RewardOptions options;
  void* rewards;  // out, real [batch][length]
};

// Padded: `sequences` rows of `length` in [sequences][length]; cu_seqlens is null. Packed: `length` tokens in all, and
// sequence b is [cu_seqlens[b], cu_seqlens[b + 1]). The caller has checked that these begin with 0, never descend and
// end at `length` or before. Positions behind the last sequence get 0.
struct GaeArguments {
  Type type;  // kFloat or kDouble, of rewards and values
  int64_t sequences, length;
  const int32_t* cu_seqlens;
  const void *rewards, *values;  // in, real
  const uint8_t* mask;           // or null: all count
  double gamma, lam;
  void *advantages, *returns;  // out, real
};

// Whitens in place: the counted ones of all `count` positions get zero mean and unit population variance, the others 0.
// The order of the sums is fixed and does not depend on the number of threads.
struct WhitenArguments {
  Type type;
  int64_t count;
  const uint8_t* mask;  // or null
  void* advantages;     // in and out, real
};

struct PPOOptions {
  double clip, clip_high;
  double dual_clip;   // infinity: no bound
  double value_clip;  // infinity: no bound
  double value_coef, entropy_coef, kl_coef;
  bool per_sequence;   // aggregate="sequence"
  double denominator;  // 0: none was given
};

// The order in which a row's sums, and the results, are stored.
enum PPOStat {
  kLoss,
  kPolicy,
  kValue,
  kEntropy,
  kKL,
  kClipFraction,
  kValueClipFraction,
  kApproxKL,
  kRatioMax,
  kPPOStats
};

struct PPOArguments {
  Type type;  // kFloat or kDouble, of every tensor
  int64_t batch, length;
  const void *logprobs, *old_logprobs, *advantages;  // in, real [batch][length]
  const void *values, *old_values, *returns;  // null without a value loss; old_values null where value_clip is inf
  const void *entropy, *kl;                   // or null
  const uint8_t* mask;
  PPOOptions options;
  const void* denominator;  // real [1], or null; 0 is taken as 1
  void* row_sums;     // scratch, real [batch][kPPOStats + 1]: sums over the row's counted tokens, then their count
  void* row_weights;  // out, real [batch]: the weight of each of the row's counted tokens in a mean
  void* stats;        // out, real [kPPOStats]
};

struct PPOBackwardArguments {
  Type type;
  int64_t batch, length;
  const void *logprobs, *old_logprobs, *advantages;
  const void *values, *old_values, *returns;
  const uint8_t* mask;
  PPOOptions options;
  const void* row_weights;                         // in, real [batch], from the forward pass
  const void* g_loss;                              // in, real [1]
  void *g_logprobs, *g_values, *g_entropy, *g_kl;  // out, real [batch][length], each null where it is not wanted
};

// A step over `count` bfloat16 weights w, each the upper half of a float32 master, with moments m and v, in place:
//
//     m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//     master = decay master - step_size m / (sqrt(v) / correction + eps)
//
// The caller computes the numbers of this step: decay = 1 - rate * weight_decay, step_size = rate / (1 - beta1^t),
// correction = sqrt(1 - beta2^t).
struct AdamWArguments {
  int64_t count;
  uint16_t* weights;    // bfloat16
  int16_t* remainders;  // the bits of the masters minus 2^16 times the bits of the weights
  float *exp_avg, *exp_avg_sq;
  const void* gradients;  // in, bfloat16
  double decay, beta1, beta2, step_size, correction, eps;
};

// y = weight (x scale), scale = 1 / sqrt(mean(x^2) + eps) of each row.
struct RMSNormArguments {
  Type type;  // of x, weight and y
  int64_t rows, width;
  const void *x, *weight;  // in, [rows][width] and [width]
  double eps;
  void* y;       // out
  void* scales;  // out, real [rows]
};

// Number of rows whose gradients of the weight one thread adds up to one part.
constexpr int64_t kNormRows = 32;

struct RMSNormBackwardArguments {
  Type type;
  int64_t rows, width;
  const void *x, *weight, *g_y;  // in
  const void* scales;            // in, real [rows], from the forward pass
  void* g_x;                     // out
  void* g_weight_parts;          // out, real [ceil(rows / kNormRows)][width], to be summed by the caller
};

// y = silu(gate) up, silu(z) = z / (1 + exp(-z)), of `count` elements.
struct GatedSiLUArguments {
  Type type;  // of every tensor
  int64_t count;
  const void *gate, *up;  // in
  void* y;                // out
};

struct GatedSiLUBackwardArguments {
  Type type;
  int64_t count;
  const void *gate, *up, *g_y;  // in
  void *g_gate, *g_up;          // out
};

}  // namespace tlcr
