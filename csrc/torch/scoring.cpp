// score_tokens and score_hidden, forward and backward, for every device: the same code around the device's kernel.
#include "scoring.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "memory.h"
#include "product.h"
#include "run.h"

namespace tlcr {

namespace {

// Number of logits that exist at once in score_hidden. On the CPU they fit in the last-level cache. On a GPU (512 MiB
// in float32) a chunk has so many rows that arithmetic limits the product, and not the reading of the head for every
// chunk.
constexpr int64_t kChunkLogitsCPU = int64_t{1} << 20, kChunkLogitsCUDA = int64_t{1} << 27;
// Every chunk reads the head and adds to its gradient. Chunks of a few tokens would spend nearly all their time on
// that.
constexpr int64_t kLeastChunk = 256;

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

// Writes the gradient into `grad`, which may be `logits` itself. The reference is used only if the KL is.
void score_rows_backward(const Tensor& logits, const MaybeTensor& ref_logits, const Tokens& tokens, const Incoming& in,
                         const Tensor& grad, int64_t begin, int64_t rows) {
  if (rows == 0) return;
  const RowsOf policy(logits), out(grad);
  const RowsOf reference(ref_logits.value_or(logits));
  ScoreBackwardArguments arguments{};
  arguments.type = type_of(logits.scalar_type());
  arguments.vocabulary = logits.size(-1);
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

// A language-model head, and room for the logits of one chunk: float32 (float64) whatever the head's dtype.
class Head {
 public:
  Head(const Tensor& weight, const MaybeTensor& bias, const Tensor& hidden, at::ScalarType real, int64_t chunk)
      : bias_(dense(bias, real)) {
    // Where no half-precision product has a float32 result, the factors are widened, once per pass.
    narrow_ = real == at::kFloat && hidden.scalar_type() == weight.scalar_type() && multiplies_into_float(weight);
    weight_VH_ = narrow_ ? weight : weight.to(real);
    logits_ = fresh({chunk, weight.size(0)}, weight.options().dtype(real));
  }

  at::ScalarType dtype() const { return weight_VH_.scalar_type(); }
  const Tensor& weight_VH() const { return weight_VH_; }

  // Overwritten by the next call.
  Tensor logits(const Tensor& hidden_RH) const {
    const Tensor logits_RV = logits_.narrow(0, 0, hidden_RH.size(0));
    product(hidden_RH.to(dtype()), weight_VH_.t(), logits_RV);
    if (bias_.has_value()) logits_RV.add_(*bias_);
    return logits_RV;
  }

  // In float32 (float64), like the logits.
  void product(const Tensor& left, const Tensor& right, Tensor result) const {
    narrow_ ? tlcr::product(result, left, right) : static_cast<void>(at::mm_out(result, left, right));
  }

  void add_product(const Tensor& sum, const Tensor& left, const Tensor& right) const {
    narrow_ ? tlcr::add_product(sum, left, right) : static_cast<void>(sum.addmm_(left, right));
  }

 private:
  MaybeTensor bias_;
  bool narrow_;
  Tensor weight_VH_, logits_;
};

int64_t chunk_rows(std::optional<int64_t> chunk_tokens, const Tensor& weight, int64_t tokens) {
  const int64_t budget = weight.is_cuda() ? kChunkLogitsCUDA : kChunkLogitsCPU;
  return std::min(chunk_tokens.value_or(std::max(kLeastChunk, budget / weight.size(0))), std::max<int64_t>(1, tokens));
}

Tensor flat(const Tensor& states) { return states.reshape({-1, states.size(-1)}); }

// The reference's head, and the hidden states that it turns into logits.
struct Reference {
  Head head;
  Tensor hidden_NH;

  Tensor logits(int64_t begin, int64_t rows) const { return head.logits(hidden_NH.narrow(0, begin, rows)); }
};

std::optional<Reference> reference_of(const MaybeTensor& hidden, const MaybeTensor& weight, const MaybeTensor& bias,
                                      at::ScalarType real, int64_t chunk) {
  if (!hidden.has_value()) return std::nullopt;
  TORCH_CHECK_VALUE(weight.has_value(), "tlcr: score_hidden got ref_hidden without ref_weight, wanted both or neither");
  return Reference{Head(*weight, bias, *hidden, real, chunk), flat(*hidden)};
}

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
                    double temperature, const MaybeTensor& temperatures, std::optional<int64_t> chunk_tokens) {
  const Plainly plainly;
  const at::ScalarType real = real_dtype({hidden, weight, bias, ref_hidden, ref_weight, ref_bias});
  const Tokens tokens(token_ids, temperature, temperatures, real, weight.size(0));
  const Results out(token_ids.sizes(), hidden.options().dtype(real), ref_hidden.has_value());
  const int64_t chunk = chunk_rows(chunk_tokens, weight, token_ids.numel());
  const Head head(weight, bias, hidden, real, chunk);
  const std::optional<Reference> reference = reference_of(ref_hidden, ref_weight, ref_bias, real, chunk);
  const Tensor hidden_NH = flat(hidden);
  for (int64_t begin = 0; begin < token_ids.numel(); begin += chunk) {
    const int64_t rows = std::min(chunk, token_ids.numel() - begin);
    const Tensor logits_RV = head.logits(hidden_NH.narrow(0, begin, rows));
    const MaybeTensor ref_logits_RV =
        reference.has_value() ? MaybeTensor(reference->logits(begin, rows)) : MaybeTensor();
    score_rows(logits_RV, ref_logits_RV, tokens, out, begin, rows);
  }
  return out.scores();
}

HiddenGradients score_hidden_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy,
                                      const MaybeTensor& g_kl, const Tensor& hidden, const Tensor& weight,
                                      const Tensor& token_ids, const MaybeTensor& bias, const MaybeTensor& ref_hidden,
                                      const MaybeTensor& ref_weight, const MaybeTensor& ref_bias, double temperature,
                                      const MaybeTensor& temperatures, std::optional<int64_t> chunk_tokens,
                                      const Tensor& entropy, const Tensor& kl, const Tensor& stats,
                                      const Tensor& ref_stats, bool wants_hidden, bool wants_weight, bool wants_bias) {
  const Plainly plainly;
  const at::ScalarType real = entropy.scalar_type();
  const at::TensorOptions options = hidden.options();
  const Tokens tokens(token_ids, temperature, temperatures, real, weight.size(0));
  const Incoming in(g_logprobs, g_entropy, g_kl, entropy, kl, stats, ref_stats);
  const int64_t chunk = chunk_rows(chunk_tokens, weight, token_ids.numel());
  const Head head(weight, bias, hidden, real, chunk);
  const std::optional<Reference> reference =
      reference_of(g_kl.has_value() ? ref_hidden : MaybeTensor(), ref_weight, ref_bias, real, chunk);

  Tensor counts_N1 = at::zeros({token_ids.numel(), 1}, options.dtype(at::kBool));
  for (const MaybeTensor& g : {in.g_logprobs, in.g_entropy, in.g_kl})
    if (g.has_value()) counts_N1.logical_or_(g->reshape({-1, 1}) != 0);

  const Tensor hidden_NH = flat(hidden);
  Tensor grad_hidden = wants_hidden ? at::empty(hidden.sizes(), options) : at::empty({0}, options);
  const std::vector<int64_t> none{0};
  const Tensor grad_weight =
      fresh(wants_weight ? weight.sizes() : at::IntArrayRef(none), weight.options().dtype(real)).zero_();
  Tensor grad_bias = at::zeros({wants_bias ? weight.size(0) : 0}, weight.options().dtype(real));
  const Tensor narrowed = fresh({head.dtype() == real ? 0 : chunk, weight.size(0)}, weight.options());
  const Tensor product_RH = at::empty({wants_hidden ? chunk : 0, weight.size(1)}, options.dtype(real));
  for (int64_t begin = 0; begin < token_ids.numel(); begin += chunk) {
    const int64_t rows = std::min(chunk, token_ids.numel() - begin);
    // A row that takes no gradient must not add to the weight's gradient either: 0 * NaN would be NaN.
    const Tensor states_RH = hidden_NH.narrow(0, begin, rows).to(head.dtype());
    const Tensor hidden_RH = at::where(counts_N1.narrow(0, begin, rows), states_RH, at::zeros({}, states_RH.options()));
    const Tensor logits_RV = head.logits(hidden_RH);
    const MaybeTensor ref_logits_RV =
        reference.has_value() ? MaybeTensor(reference->logits(begin, rows)) : MaybeTensor();
    score_rows_backward(logits_RV, ref_logits_RV, tokens, in, logits_RV, begin, rows);  // into the logits' storage
    if (wants_bias) grad_bias.add_(logits_RV.sum(0));
    const Tensor grad_RV = head.dtype() == real ? logits_RV : narrowed.narrow(0, 0, rows).copy_(logits_RV);
    if (wants_hidden) {
      const Tensor grad_RH = product_RH.narrow(0, 0, rows);
      head.product(grad_RV, head.weight_VH(), grad_RH);
      flat(grad_hidden).narrow(0, begin, rows).copy_(grad_RH);
    }
    if (wants_weight) head.add_product(grad_weight, grad_RV.t(), hidden_RH);
  }
  return {grad_hidden, grad_weight.to(weight.scalar_type()),
          grad_bias.to(bias.has_value() ? bias->scalar_type() : weight.scalar_type())};
}

}  // namespace tlcr
