// score_tokens and score_hidden, forward and backward, for every device: the same code around the device's kernel.
#include "scoring.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

struct Results {
  Tensor logprobs, entropy, ref_logprobs, kl, stats, ref_stats;

  Results(at::IntArrayRef shape, const at::TensorOptions& real, bool with_reference) {
    std::vector<int64_t> pairs(shape.begin(), shape.end());
    pairs.push_back(2);
    const std::vector<int64_t> none{0}, none_pairs{0, 2};
    logprobs = at::empty(shape, real);
    entropy = at::empty(shape, real);
    ref_logprobs = at::empty(with_reference ? shape : at::IntArrayRef(none), real);
    kl = at::empty(with_reference ? shape : at::IntArrayRef(none), real);
    stats = at::empty(pairs, real);
    ref_stats = at::empty(with_reference ? pairs : none_pairs, real);
  }

  Scores scores() const { return {logprobs, entropy, ref_logprobs, kl, stats, ref_stats}; }
};

// The data of the tokens that both passes use. A slice of them starts at token `begin`.
struct Tokens {
  Tensor ids;
  double temperature;
  MaybeTensor temperatures;
  at::ScalarType real;

  Tokens(const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, at::ScalarType real,
         int64_t vocabulary)
      : ids(token_ids.to(at::kLong).contiguous()),
        temperature(temperature),
        temperatures(dense(temperatures, real)),
        real(real) {
    // On a GPU the kernel checks the ids: the host would have to wait for them.
    if (!ids.is_cpu()) return;
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < ids.numel(); ++n)
      TORCH_CHECK_INDEX(id[n] >= 0 && id[n] < vocabulary, "tlcr: token_ids holds ", id[n], ", wanted ids in [0, ",
                        vocabulary, ")");
  }

  template <typename Arguments>
  void fill(Arguments& arguments, int64_t begin, int64_t rows) const {
    arguments.rows = rows;
    arguments.token_ids = ids.const_data_ptr<int64_t>() + begin;
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
  arguments.type = type_of(logits.scalar_type());
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
      : g_logprobs(dense(g_logprobs, entropy.scalar_type())),
        g_entropy(dense(g_entropy, entropy.scalar_type())),
        g_kl(dense(g_kl, entropy.scalar_type())),
        entropy(entropy.contiguous()),
        kl(kl.contiguous()),
        stats(stats.contiguous()),
        ref_stats(ref_stats.contiguous()) {}
};

// Writes the gradient into `grad`, which may be `logits` itself. The reference is used only if the KL is. The logits
// are those of the tokens from `begin` and of the vocabulary's entries from `first_entry`.
void score_rows_backward(const Tensor& logits, const MaybeTensor& ref_logits, const Tokens& tokens, const Incoming& in,
                         const Tensor& grad, int64_t begin, int64_t rows, int64_t first_entry = 0) {
  if (rows == 0) return;
  const RowsOf policy(logits), out(grad);
  const RowsOf reference(ref_logits.value_or(logits));
  ScoreBackwardArguments arguments{};
  arguments.type = type_of(logits.scalar_type());
  arguments.grad_type = type_of(grad.scalar_type());
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

// Both logits in one dtype that kernels read.
std::pair<Tensor, MaybeTensor> same_dtype(const Tensor& logits, const MaybeTensor& ref_logits) {
  Tensor policy = readable(logits);
  if (!ref_logits.has_value()) return {policy, MaybeTensor()};
  Tensor reference = readable(*ref_logits);
  const at::ScalarType common = at::promote_types(policy.scalar_type(), reference.scalar_type());
  return {policy.to(common), reference.to(common)};
}

// Inside an operator no gradients are recorded, and autocast must not round the products to half precision.
struct Plainly {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Memory that is about to be written completely.
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const Tensor memory = at::empty(sizes, options);
  if (memory.is_cpu()) prefer_huge_pages(memory.data_ptr(), static_cast<std::size_t>(memory.nbytes()));
  return memory;
}

Tensor flat(const Tensor& states) { return states.reshape({-1, states.size(-1)}); }

// The beginning of `memory` as a matrix.
Tensor matrix(const Tensor& memory, int64_t rows, int64_t columns) {
  return memory.narrow(0, 0, rows * columns).view({rows, columns});
}

// A language-model head and the hidden states that it turns into logits, which are float32 (float64) whatever the
// dtypes of the two.
class Head {
 public:
  Head(const Tensor& weight, const MaybeTensor& bias, const Tensor& hidden, at::ScalarType real)
      : weight_VH_(weight), hidden_NH_(flat(hidden)), bias_(dense(bias, real)) {
    // Where no half-precision product has a float32 result, the factors are widened.
    narrow_ = real == at::kFloat && hidden.scalar_type() == weight.scalar_type() && multiplies_into_float(weight);
    dtype_ = narrow_ ? weight.scalar_type() : real;
  }

  // The dtype of the factors of products.
  at::ScalarType dtype() const { return dtype_; }
  Tensor weight(int64_t first, int64_t columns) const { return weight_VH_.narrow(0, first, columns).to(dtype_); }
  Tensor hidden(int64_t begin, int64_t rows) const { return hidden_NH_.narrow(0, begin, rows).to(dtype_); }

  // The logits of `columns` entries of the vocabulary, from `first`, in `memory`.
  Tensor logits(const Tensor& hidden_RH, const Tensor& weight_CH, int64_t first, const Tensor& memory) const {
    const Tensor logits_RC = matrix(memory, hidden_RH.size(0), weight_CH.size(0));
    product(logits_RC, hidden_RH, weight_CH.t());
    if (bias_.has_value()) logits_RC.add_(bias_->narrow(0, first, weight_CH.size(0)));
    return logits_RC;
  }

  // In float32 (float64), like the logits.
  void product(Tensor result, const Tensor& left, const Tensor& right) const {
    narrow_ ? tlcr::product(result, left, right) : static_cast<void>(at::mm_out(result, left, right));
  }

  void add_product(const Tensor& sum, const Tensor& left, const Tensor& right) const {
    narrow_ ? tlcr::add_product(sum, left, right) : static_cast<void>(sum.addmm_(left, right));
  }

 private:
  Tensor weight_VH_, hidden_NH_;
  MaybeTensor bias_;
  bool narrow_ = false;
  at::ScalarType dtype_;
};

std::optional<Head> reference_of(const MaybeTensor& hidden, const MaybeTensor& weight, const MaybeTensor& bias,
                                 at::ScalarType real) {
  if (!hidden.has_value()) return std::nullopt;
  TORCH_CHECK_VALUE(weight.has_value(), "tlcr: score_hidden got ref_hidden without ref_weight, wanted both or neither");
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
  GradientSum(const Head& head, const Tensor& result, int64_t rows, bool one_product, at::ScalarType real)
      : head_(head), result_(result), one_product_(one_product) {
    direct_ = result.scalar_type() == real;
    if (!direct_) sum_ = fresh({one_product ? rows : result.size(0), result.size(1)}, result.options().dtype(real));
  }

  void add(int64_t begin, int64_t rows, bool is_first, const Tensor& left, const Tensor& right) {
    const Tensor sum = direct_ ? result_.narrow(0, begin, rows) : sum_.narrow(0, one_product_ ? 0 : begin, rows);
    is_first ? head_.product(sum, left, right) : head_.add_product(sum, left, right);
    if (one_product_ && !direct_) result_.narrow(0, begin, rows).copy_(sum);
  }

  void finish() {
    if (!one_product_ && !direct_) result_.copy_(sum_);
  }

 private:
  const Head& head_;
  Tensor result_, sum_;
  bool one_product_, direct_;
};

}  // namespace

Scores score_tokens(const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits, double temperature,
                    const MaybeTensor& temperatures) {
  const Plainly plainly;
  const at::ScalarType real = real_dtype({logits, ref_logits});
  const auto [policy, reference] = same_dtype(logits, ref_logits);
  const Tokens tokens(token_ids, temperature, temperatures, real, logits.size(-1));
  const Results out(token_ids.sizes(), logits.options().dtype(real), ref_logits.has_value());
  score_rows(policy, reference, tokens, out, 0, token_ids.numel());
  return out.scores();
}

Tensor score_tokens_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy, const MaybeTensor& g_kl,
                             const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits,
                             double temperature, const MaybeTensor& temperatures, const Tensor& entropy,
                             const Tensor& kl, const Tensor& stats, const Tensor& ref_stats) {
  const Plainly plainly;
  const auto [policy, reference] = same_dtype(logits, g_kl.has_value() ? ref_logits : MaybeTensor());
  const Tokens tokens(token_ids, temperature, temperatures, entropy.scalar_type(), logits.size(-1));
  const Incoming in(g_logprobs, g_entropy, g_kl, entropy, kl, stats, ref_stats);
  const Tensor grad = fresh(logits.sizes(), policy.options());
  score_rows_backward(policy, reference, tokens, in, grad, 0, token_ids.numel());
  return grad.to(logits.scalar_type());
}

Scores score_hidden(const Tensor& hidden, const Tensor& weight, const Tensor& token_ids, const MaybeTensor& bias,
                    const MaybeTensor& ref_hidden, const MaybeTensor& ref_weight, const MaybeTensor& ref_bias,
                    double temperature, const MaybeTensor& temperatures, int64_t chunk_tokens) {
  const Plainly plainly;
  const at::ScalarType real = real_dtype({hidden, weight, bias, ref_hidden, ref_weight, ref_bias});
  const int64_t count = token_ids.numel(), vocabulary = weight.size(0);
  const Tokens tokens(token_ids, temperature, temperatures, real, vocabulary);
  const Results out(token_ids.sizes(), hidden.options().dtype(real), ref_hidden.has_value());
  const Head head(weight, bias, hidden, real);
  const std::optional<Head> reference = reference_of(ref_hidden, ref_weight, ref_bias, real);
  const int64_t chunk = std::min(chunk_tokens, std::max<int64_t>(1, count));
  const Tensor weight_VH = head.weight(0, vocabulary), memory = fresh({chunk * vocabulary}, out.logprobs.options());
  Tensor ref_weight_VH, ref_memory;
  if (reference.has_value()) {
    ref_weight_VH = reference->weight(0, vocabulary);
    ref_memory = fresh({chunk * vocabulary}, out.logprobs.options());
  }
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
  const Plainly plainly;
  const at::ScalarType real = entropy.scalar_type();
  const int64_t count = token_ids.numel(), vocabulary = weight.size(0), width = weight.size(1);
  const Tokens tokens(token_ids, temperature, temperatures, real, vocabulary);
  const Incoming in(g_logprobs, g_entropy, g_kl, entropy, kl, stats, ref_stats);
  const Head head(weight, bias, hidden, real);
  const std::optional<Head> reference =
      reference_of(g_kl.has_value() ? ref_hidden : MaybeTensor(), ref_weight, ref_bias, real);

  const std::vector<int64_t> none{0};
  const auto gradient_of = [&](const Tensor& of, bool wanted) {
    const Tensor gradient = fresh(wanted ? of.sizes() : at::IntArrayRef(none), of.options());
    return count == 0 ? gradient.zero_() : gradient;
  };
  const Tensor grad_hidden = gradient_of(hidden, wants_hidden), grad_weight = gradient_of(weight, wants_weight);
  const Tensor grad_bias = at::zeros({wants_bias ? vocabulary : 0}, weight.options().dtype(real));

  // As many bytes as the logits of a chunk of the forward pass.
  const int64_t real_bytes = static_cast<int64_t>(at::elementSize(real)), models = ref_hidden.has_value() ? 2 : 1;
  const int64_t token_bytes = vocabulary * real_bytes * models;
  const int64_t memory_bytes = std::min(chunk_tokens, std::numeric_limits<int64_t>::max() / token_bytes) * token_bytes;
  const bool narrows = head.dtype() != real;
  const int64_t logit_bytes = real_bytes * (reference.has_value() ? 2 : 1) + (narrows ? weight.element_size() : 0);
  // Beside its logits, a column needs its part of the head, widened, and of the head's gradient, before it is rounded.
  const int64_t wide = (weight.scalar_type() != real ? 1 : 0) + (weight.scalar_type() != head.dtype() ? 1 : 0);
  const Part part(count, weight, wants_hidden, wants_weight, memory_bytes, logit_bytes, wide * width * real_bytes);
  const at::TensorOptions options = hidden.options().dtype(real);
  const int64_t part_logits = count == 0 ? 0 : part.rows * part.columns;
  const Tensor memory = fresh({part_logits}, options);
  const Tensor ref_memory = fresh({reference.has_value() ? part_logits : 0}, options);
  const Tensor narrow_memory = fresh({narrows ? part_logits : 0}, options.dtype(head.dtype()));
  std::optional<GradientSum> sum_hidden, sum_weight;
  if (wants_hidden) sum_hidden.emplace(head, flat(grad_hidden), part.rows, part.columns == vocabulary, real);
  if (wants_weight) sum_weight.emplace(head, grad_weight, part.columns, part.rows == count, real);

  Tensor counts_N1 = at::zeros({count, 1}, options.dtype(at::kBool));
  for (const MaybeTensor& g : {in.g_logprobs, in.g_entropy, in.g_kl})
    if (g.has_value()) counts_N1.logical_or_(g->reshape({-1, 1}) != 0);

  Tensor hidden_RH, ref_hidden_RH;
  for (int64_t first = 0; first < vocabulary; first += part.columns) {
    const int64_t columns = std::min(part.columns, vocabulary - first);
    const Tensor weight_CH = head.weight(first, columns);
    Tensor ref_weight_CH;
    if (reference.has_value()) ref_weight_CH = reference->weight(first, columns);
    for (int64_t begin = 0; begin < count; begin += part.rows) {
      const int64_t rows = std::min(part.rows, count - begin);
      if (first == 0) {
        // A row that takes no gradient must not add to the weight's gradient either: 0 * NaN would be NaN.
        const Tensor states_RH = head.hidden(begin, rows), zero = at::zeros({}, states_RH.options());
        hidden_RH = at::where(counts_N1.narrow(0, begin, rows), states_RH, zero);
        if (reference.has_value()) ref_hidden_RH = reference->hidden(begin, rows);
      }
      const Tensor logits_RC = head.logits(hidden_RH, weight_CH, first, memory);
      MaybeTensor ref_logits_RC;
      if (reference.has_value()) {
        ref_logits_RC = reference->logits(ref_hidden_RH, ref_weight_CH, first, ref_memory);
      }
      const Tensor grad_RC = narrows ? matrix(narrow_memory, rows, columns) : logits_RC;
      score_rows_backward(logits_RC, ref_logits_RC, tokens, in, grad_RC, begin, rows, first);
      if (wants_bias) grad_bias.narrow(0, first, columns).add_(grad_RC.sum(0, false, real));
      if (wants_hidden) sum_hidden->add(begin, rows, first == 0, grad_RC, weight_CH);
      if (wants_weight) sum_weight->add(first, columns, begin == 0, grad_RC.t(), hidden_RH);
    }
  }
  if (wants_hidden) sum_hidden->finish();
  if (wants_weight) sum_weight->finish();
  return {grad_hidden, grad_weight, grad_bias.to(bias.has_value() ? bias->scalar_type() : weight.scalar_type())};
}

}  // namespace tlcr
