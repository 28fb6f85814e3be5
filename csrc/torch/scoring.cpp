// score_tokens and score_hidden, forward and backward, for every device: the same code around the device's kernel.
#include "scoring.h"

#include <algorithm>
#include <limits>

#include "memory.h"
#include "product.h"
#include "run.h"

namespace tlcr {

namespace {

// Products of matrices are made of square tiles. A part of a matrix that is no multiple of a tile wastes the rest of
// one.
constexpr int64_t kProductTile = 128;

// The shapes of tensors that do not exist in a call.
constexpr std::array<int64_t, 1> kNone{0};
constexpr std::array<int64_t, 2> kNoPair{0, 2};

struct Results {
  Tensor logprobs, entropy, ref_logprobs, kl, stats, ref_stats;

  Results(const Tensor& token_ids, Dtype real, bool with_reference)
      : Results(token_ids, real, token_ids.sizes(), pairs(token_ids.sizes()), with_reference) {}

  Scores scores() const { return {logprobs, entropy, ref_logprobs, kl, stats, ref_stats}; }

 private:
  Results(const Tensor& like, Dtype real, Sizes shape, const std::vector<int64_t>& shape_of_pairs, bool with_reference)
      : logprobs(empty(shape, real, like)),
        entropy(empty(shape, real, like)),
        ref_logprobs(empty(with_reference ? shape : Sizes(kNone), real, like)),
        kl(empty(with_reference ? shape : Sizes(kNone), real, like)),
        stats(empty(shape_of_pairs, real, like)),
        ref_stats(empty(with_reference ? Sizes(shape_of_pairs) : Sizes(kNoPair), real, like)) {}

  static std::vector<int64_t> pairs(Sizes shape) {
    std::vector<int64_t> longer(shape.begin(), shape.end());
    longer.push_back(2);
    return longer;
  }
};

// The data of the tokens that both passes use. A slice of them starts at token `begin`.
struct Tokens {
  Tensor ids;
  double temperature;
  MaybeTensor temperatures;
  Dtype real;

  Tokens(const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, Dtype real, int64_t vocabulary)
      : ids(dense(token_ids, kLong)), temperature(temperature), temperatures(dense(temperatures, real)), real(real) {
    // On a GPU the kernel checks the ids: the host would have to wait for them.
    if (!ids.is_cpu()) return;
    const int64_t* id = static_cast<const int64_t*>(pointer(ids));
    for (int64_t n = 0, count = ids.numel(); n < count; ++n)
      if (id[n] < 0 || id[n] >= vocabulary)
        // Python gets an IndexError.
        throw std::out_of_range("tlcr: token_ids holds " + std::to_string(id[n]) + ", wanted ids in [0, " +
                                std::to_string(vocabulary) + ")");
  }

  template <typename Arguments>
  void fill(Arguments& arguments, int64_t begin, int64_t rows) const {
    arguments.rows = rows;
    arguments.token_ids = static_cast<const int64_t*>(pointer(ids)) + begin;
    arguments.temperature = temperature;
    arguments.temperatures = advanced(pointer(temperatures), begin, real);
  }
};

void score_rows(const Tensor& logits, const MaybeTensor& ref_logits, const Tokens& tokens, const Results& out,
                int64_t begin, int64_t rows) {
  if (rows == 0) return;
  const RowsOf policy(logits);
  const RowsOf reference(ref_logits.value_or(logits));
  ScoreArguments arguments{};
  arguments.type = type_of(logits);
  arguments.vocabulary = logits.size(-1);
  arguments.logits = policy.rows();
  if (ref_logits.has_value()) arguments.ref_logits = reference.rows();
  tokens.fill(arguments, begin, rows);
  arguments.logprobs = advanced(pointer(out.logprobs), begin, tokens.real);
  arguments.entropy = advanced(pointer(out.entropy), begin, tokens.real);
  arguments.ref_logprobs = advanced(pointer(out.ref_logprobs), begin, tokens.real);
  arguments.kl = advanced(pointer(out.kl), begin, tokens.real);
  arguments.stats = advanced(pointer(out.stats), 2 * begin, tokens.real);
  arguments.ref_stats = advanced(pointer(out.ref_stats), 2 * begin, tokens.real);
  run_score(logits, arguments);
}

// Results of the forward pass and the gradients that reach them.
struct Incoming {
  MaybeTensor g_logprobs, g_entropy, g_kl;
  Tensor entropy, kl, stats, ref_stats;

  Incoming(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy, const MaybeTensor& g_kl, const Tensor& entropy,
           const Tensor& kl, const Tensor& stats, const Tensor& ref_stats)
      : g_logprobs(dense(g_logprobs, dtype_of(entropy))),
        g_entropy(dense(g_entropy, dtype_of(entropy))),
        g_kl(dense(g_kl, dtype_of(entropy))),
        entropy(dense(entropy)),
        kl(dense(kl)),
        stats(dense(stats)),
        ref_stats(dense(ref_stats)) {}
};

// Writes the gradient into `grad`, which may be `logits` itself. The reference is used only if the KL is. The logits
// are those of the tokens from `begin` and of the vocabulary's entries from `first_entry`.
void score_rows_backward(const Tensor& logits, const MaybeTensor& ref_logits, const Tokens& tokens, const Incoming& in,
                         const Tensor& grad, int64_t begin, int64_t rows, int64_t first_entry = 0) {
  if (rows == 0) return;
  const RowsOf policy(logits), out(grad);
  const RowsOf reference(ref_logits.value_or(logits));
  ScoreBackwardArguments arguments{};
  arguments.type = type_of(logits);
  arguments.grad_type = type_of(grad);
  arguments.vocabulary = logits.size(-1);
  arguments.first_entry = first_entry;
  arguments.logits = policy.rows();
  arguments.grad_logits = out.rows();
  tokens.fill(arguments, begin, rows);
  arguments.g_logprobs = advanced(pointer(in.g_logprobs), begin, tokens.real);
  arguments.g_entropy = advanced(pointer(in.g_entropy), begin, tokens.real);
  const void *entropy = pointer(in.entropy), *kl = pointer(in.kl);
  const void *stats = pointer(in.stats), *ref_stats = pointer(in.ref_stats);
  arguments.entropy = advanced(entropy, begin, tokens.real);
  arguments.stats = advanced(stats, 2 * begin, tokens.real);
  if (in.g_kl.has_value() && ref_logits.has_value()) {
    arguments.ref_logits = reference.rows();
    arguments.g_kl = advanced(pointer(in.g_kl), begin, tokens.real);
    arguments.kl = advanced(kl, begin, tokens.real);
    arguments.ref_stats = advanced(ref_stats, 2 * begin, tokens.real);
  }
  run_score_backward(logits, arguments);
}

// Both logits in one dtype that kernels read, whose arithmetic is that of the results, `real`: a backward pass without
// the KL reads no reference, but statistics that are float64 if the reference was.
std::pair<Tensor, MaybeTensor> same_dtype(const Tensor& logits, const MaybeTensor& ref_logits, Dtype real) {
  Tensor policy = real == kDouble ? cast(logits, real) : readable(logits);
  if (!ref_logits.has_value()) return {policy, MaybeTensor()};
  Tensor reference = readable(*ref_logits);
  // float32 holds both half precisions.
  const Dtype common = dtype_of(policy) == dtype_of(reference) ? dtype_of(policy) : real_dtype(policy, reference);
  return {cast(policy, common), cast(reference, common)};
}

// Inside an operator no gradients are recorded. (Autocast needs no guard: it knows none of the operators called here.)
class WithoutGradients {
 public:
  WithoutGradients() { aoti_torch_grad_mode_set_enabled(false); }
  WithoutGradients(const WithoutGradients&) = delete;
  WithoutGradients& operator=(const WithoutGradients&) = delete;
  ~WithoutGradients() { aoti_torch_grad_mode_set_enabled(before_); }

 private:
  bool before_ = aoti_torch_grad_mode_is_enabled();
};

// Memory that is about to be written completely.
Tensor fresh(Sizes sizes, Dtype dtype, const Tensor& like) {
  Tensor memory = empty(sizes, dtype, like);
  if (memory.is_cpu())
    prefer_huge_pages(memory.data_ptr(), static_cast<std::size_t>(memory.numel() * element_size(dtype)));
  return memory;
}

// The beginning of `memory` as a matrix.
Tensor matrix(const Tensor& memory, int64_t rows, int64_t columns) {
  return view(memory, {rows, columns}, {columns, 1});
}

// A language-model head and the hidden states that it turns into logits, which are float32 (float64) whatever the
// dtypes of the two.
class Head {
 public:
  Head(const Tensor& weight, const MaybeTensor& bias, const Tensor& hidden, Dtype real)
      : weight_VH_(weight), hidden_NH_(flat(hidden)), bias_(dense(bias, real)) {
    // Where no half-precision product has a float32 result, the factors are widened.
    const bool narrow = real == kFloat && dtype_of(hidden) == dtype_of(weight) && multiplies_into_float(weight);
    dtype_ = narrow ? dtype_of(weight) : real;
  }

  // The dtype of the factors of products.
  Dtype dtype() const { return dtype_; }
  Tensor weight(int64_t first, int64_t columns) const { return cast(rows_of(weight_VH_, first, columns), dtype_); }
  Tensor hidden(int64_t begin, int64_t rows) const { return cast(rows_of(hidden_NH_, begin, rows), dtype_); }

  // The logits of `columns` entries of the vocabulary, from `first`, in `memory`.
  Tensor logits(const Tensor& hidden_RH, const Tensor& weight_CH, int64_t first, const Tensor& memory) const {
    const int64_t columns = weight_CH.size(0);
    Tensor logits_RC = matrix(memory, hidden_RH.size(0), columns);
    if (bias_.has_value()) {
      copy_into(logits_RC, view(*bias_, {columns}, {1}, first));
      add_product(logits_RC, hidden_RH, transposed(weight_CH));
    } else {
      product(logits_RC, hidden_RH, transposed(weight_CH));
    }
    return logits_RC;
  }

 private:
  Tensor weight_VH_, hidden_NH_;
  MaybeTensor bias_;
  Dtype dtype_ = 0;
};

std::optional<Head> reference_of(const MaybeTensor& hidden, const MaybeTensor& weight, const MaybeTensor& bias,
                                 Dtype real) {
  if (!hidden.has_value()) return std::nullopt;
  if (!weight.has_value())
    throw std::runtime_error("tlcr: score_hidden got ref_hidden without ref_weight, wanted both or neither");
  return Head(*weight, bias, *hidden, real);
}

// The logits that exist at once in the backward pass: of all tokens and some entries of the vocabulary, or of some
// tokens and all entries. The first finishes the head's gradient for its entries and adds to that of all hidden states;
// the second finishes that of its hidden states and adds to that of the whole head. What is added to is a float32 sum
// of the size of all hidden states or of the head, so the smaller of the two is added to; where only one gradient is
// wanted, none is.
struct Part {
  int64_t rows, columns;

  Part(int64_t tokens, const Tensor& weight, bool wants_hidden, bool wants_weight, int64_t memory, int64_t logit_bytes,
       int64_t column_bytes)
      : rows(tokens), columns(weight.size(0)) {
    if (wants_weight && (!wants_hidden || tokens <= columns)) {
      columns = fitting(memory, tokens * logit_bytes + column_bytes, columns);
    } else {
      rows = fitting(memory, columns * logit_bytes, tokens);
    }
  }

 private:
  static int64_t fitting(int64_t memory, int64_t each, int64_t all) {
    const int64_t count = memory / std::max<int64_t>(1, each);
    const int64_t in_tiles = count < kProductTile ? count : count / kProductTile * kProductTile;
    return std::clamp<int64_t>(in_tiles, 1, std::max<int64_t>(1, all));
  }
};

// A gradient that is a sum of products, formed in float32 (float64), and rounded once to the dtype of the result.
class GradientSum {
 public:
  // `one_product`: every row of the result is one product, of at most `rows` rows at a time.
  GradientSum(const Tensor& result, int64_t rows, bool one_product, Dtype real)
      : result_(result),
        direct_(dtype_of(result) == real),
        one_product_(one_product),
        sum_(direct_ ? result : fresh({one_product ? rows : result.size(0), result.size(1)}, real, result)) {}

  void add(int64_t begin, int64_t rows, bool is_first, const Tensor& left, const Tensor& right) {
    const Tensor sum = rows_of(sum_, one_product_ && !direct_ ? 0 : begin, rows);
    is_first ? product(sum, left, right) : add_product(sum, left, right);
    if (one_product_ && !direct_) copy_into(rows_of(result_, begin, rows), sum);
  }

  void finish() {
    if (!one_product_ && !direct_) copy_into(result_, sum_);
  }

 private:
  Tensor result_;
  bool direct_, one_product_;
  Tensor sum_;
};

}  // namespace

Scores score_tokens(const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits, double temperature,
                    const MaybeTensor& temperatures) {
  const WithoutGradients without_gradients;
  const Dtype real = real_dtype(logits, ref_logits);
  const auto [policy, reference] = same_dtype(logits, ref_logits, real);
  const Tokens tokens(token_ids, temperature, temperatures, real, logits.size(-1));
  const Results out(token_ids, real, ref_logits.has_value());
  score_rows(policy, reference, tokens, out, 0, token_ids.numel());
  return out.scores();
}

Tensor score_tokens_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy, const MaybeTensor& g_kl,
                             const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits,
                             double temperature, const MaybeTensor& temperatures, const Tensor& entropy,
                             const Tensor& kl, const Tensor& stats, const Tensor& ref_stats) {
  const WithoutGradients without_gradients;
  const Dtype real = dtype_of(entropy);
  const auto [policy, reference] = same_dtype(logits, g_kl.has_value() ? ref_logits : MaybeTensor(), real);
  const Tokens tokens(token_ids, temperature, temperatures, real, logits.size(-1));
  const Incoming in(g_logprobs, g_entropy, g_kl, entropy, kl, stats, ref_stats);
  const Tensor grad = fresh(logits.sizes(), dtype_of(policy), logits);
  score_rows_backward(policy, reference, tokens, in, grad, 0, token_ids.numel());
  return cast(grad, dtype_of(logits));
}

Scores score_hidden(const Tensor& hidden, const Tensor& weight, const Tensor& token_ids, const MaybeTensor& bias,
                    const MaybeTensor& ref_hidden, const MaybeTensor& ref_weight, const MaybeTensor& ref_bias,
                    double temperature, const MaybeTensor& temperatures, int64_t chunk_tokens) {
  const WithoutGradients without_gradients;
  const Dtype real = real_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias);
  const int64_t count = token_ids.numel(), vocabulary = weight.size(0);
  const Tokens tokens(token_ids, temperature, temperatures, real, vocabulary);
  const Results out(token_ids, real, ref_hidden.has_value());
  const Head head(weight, bias, hidden, real);
  const std::optional<Head> reference = reference_of(ref_hidden, ref_weight, ref_bias, real);
  const int64_t chunk = std::min(chunk_tokens, std::max<int64_t>(1, count));
  const Tensor weight_VH = head.weight(0, vocabulary), memory = fresh({chunk * vocabulary}, real, hidden);
  const Tensor ref_weight_VH = reference.has_value() ? reference->weight(0, vocabulary) : weight_VH;
  const Tensor ref_memory = fresh({reference.has_value() ? chunk * vocabulary : 0}, real, hidden);
  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t rows = std::min(chunk, count - begin);
    const Tensor logits_RV = head.logits(head.hidden(begin, rows), weight_VH, 0, memory);
    MaybeTensor ref_logits_RV;
    if (reference.has_value()) {
      ref_logits_RV = reference->logits(reference->hidden(begin, rows), ref_weight_VH, 0, ref_memory);
    }
    score_rows(logits_RV, ref_logits_RV, tokens, out, begin, rows);
  }
  return out.scores();
}

HiddenGradients score_hidden_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy,
                                      const MaybeTensor& g_kl, const Tensor& hidden, const Tensor& weight,
                                      const Tensor& token_ids, const MaybeTensor& bias, const MaybeTensor& ref_hidden,
                                      const MaybeTensor& ref_weight, const MaybeTensor& ref_bias, double temperature,
                                      const MaybeTensor& temperatures, int64_t chunk_tokens, const Tensor& entropy,
                                      const Tensor& kl, const Tensor& stats, const Tensor& ref_stats, bool wants_hidden,
                                      bool wants_weight, bool wants_bias) {
  const WithoutGradients without_gradients;
  const Dtype real = dtype_of(entropy);
  const int64_t count = token_ids.numel(), vocabulary = weight.size(0), width = weight.size(1);
  const Tokens tokens(token_ids, temperature, temperatures, real, vocabulary);
  const Incoming in(g_logprobs, g_entropy, g_kl, entropy, kl, stats, ref_stats);
  const Head head(weight, bias, hidden, real);
  const std::optional<Head> reference =
      reference_of(g_kl.has_value() ? ref_hidden : MaybeTensor(), ref_weight, ref_bias, real);

  const auto gradient_of = [&](const Tensor& of, bool wanted) {
    Tensor gradient = fresh(wanted ? of.sizes() : Sizes(kNone), dtype_of(of), of);
    if (count == 0) check(aoti_torch_zero_(gradient.get()));
    return gradient;
  };
  const Tensor grad_hidden = gradient_of(hidden, wants_hidden), grad_weight = gradient_of(weight, wants_weight);

  // As many bytes as the logits of a chunk of the forward pass.
  const int64_t real_bytes = element_size(real), models = ref_hidden.has_value() ? 2 : 1;
  const int64_t token_bytes = vocabulary * real_bytes * models;
  const int64_t memory_bytes = std::min(chunk_tokens, std::numeric_limits<int64_t>::max() / token_bytes) * token_bytes;
  const bool narrows = head.dtype() != real;
  const int64_t logit_bytes =
      real_bytes * (reference.has_value() ? 2 : 1) + (narrows ? element_size(dtype_of(weight)) : 0);
  // Beside its logits, a column needs its part of the head, widened, and of the head's gradient, before it is rounded.
  const int64_t wide = (dtype_of(weight) != real ? 1 : 0) + (dtype_of(weight) != head.dtype() ? 1 : 0);
  const Part part(count, weight, wants_hidden, wants_weight, memory_bytes, logit_bytes, wide * width * real_bytes);
  const int64_t part_logits = count == 0 ? 0 : part.rows * part.columns;
  const Tensor memory = fresh({part_logits}, real, hidden);
  const Tensor ref_memory = fresh({reference.has_value() ? part_logits : 0}, real, hidden);
  const Tensor narrow_memory = fresh({narrows ? part_logits : 0}, head.dtype(), hidden);
  std::optional<GradientSum> sum_hidden, sum_weight;
  if (wants_hidden) sum_hidden.emplace(flat(grad_hidden), part.rows, part.columns == vocabulary, real);
  if (wants_weight) sum_weight.emplace(grad_weight, part.columns, part.rows == count, real);

  // A sum for each part of the tokens, because the stable ABI has no sum that adds to what is there.
  const int64_t token_parts = count == 0 ? 0 : (count + part.rows - 1) / part.rows;
  const Tensor grad_bias_PV = empty({token_parts, wants_bias ? vocabulary : 0}, real, weight);

  const Tensor counts_N1 = zeros({count, 1}, kBool, hidden), zero = zeros({}, head.dtype(), hidden);
  for (const MaybeTensor& g : {in.g_logprobs, in.g_entropy, in.g_kl})
    if (g.has_value()) call("aten::logical_or_", "", counts_N1, view(*g, {count, 1}, {1, 1}));

  Tensor hidden_RH = zero, ref_hidden_RH = zero;  // set where the first part of the vocabulary begins
  for (int64_t first = 0; first < vocabulary; first += part.columns) {
    const int64_t columns = std::min(part.columns, vocabulary - first);
    const Tensor weight_CH = head.weight(first, columns);
    const Tensor ref_weight_CH = reference.has_value() ? reference->weight(first, columns) : weight_CH;
    for (int64_t begin = 0; begin < count; begin += part.rows) {
      const int64_t rows = std::min(part.rows, count - begin);
      if (first == 0) {
        // A row that takes no gradient must not add to the weight's gradient either: 0 * NaN would be NaN.
        hidden_RH = call("aten::where", "self", rows_of(counts_N1, begin, rows), head.hidden(begin, rows), zero);
        if (reference.has_value()) ref_hidden_RH = reference->hidden(begin, rows);
      }
      const Tensor logits_RC = head.logits(hidden_RH, weight_CH, first, memory);
      MaybeTensor ref_logits_RC;
      if (reference.has_value()) {
        ref_logits_RC = reference->logits(ref_hidden_RH, ref_weight_CH, first, ref_memory);
      }
      const Tensor grad_RC = narrows ? matrix(narrow_memory, rows, columns) : logits_RC;
      score_rows_backward(logits_RC, ref_logits_RC, tokens, in, grad_RC, begin, rows, first);
      if (wants_bias) {
        Tensor sum_C = view(grad_bias_PV, {columns}, {1}, begin / part.rows * vocabulary + first);
        torch::stable::sum_out(sum_C, grad_RC, {{0}});
      }
      if (wants_hidden) sum_hidden->add(begin, rows, first == 0, grad_RC, weight_CH);
      if (wants_weight) sum_weight->add(first, columns, begin == 0, transposed(grad_RC), hidden_RH);
    }
  }
  if (wants_hidden) sum_hidden->finish();
  if (wants_weight) sum_weight->finish();
  return {grad_hidden, grad_weight, cast(torch::stable::sum(grad_bias_PV, {{0}}), dtype_of(bias.value_or(weight)))};
}

}  // namespace tlcr
