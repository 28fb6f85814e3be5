// Runs the emulated kernels on memory that is exactly as large as it must be, for a build with sanitizers: the stand-in
// for compute-sanitizer. With the argument "overrun" one row is a token shorter than the kernels are told.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernels.h"

extern "C" const char* emulator_fault();

namespace {

using tlcr::Rows;
using tlcr::Type;

void check(int status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "a kernel failed: %s\n", emulator_fault());
  std::exit(1);
}

float random_number() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) * 8 - 4; }

void set(float& to, float x) { to = x; }
void set(double& to, float x) { to = x; }
void set(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
void set(__half& to, float x) { to = __float2half_rn(x); }

// Memory of its own, freed at the end, with nothing before or behind it that may be touched.
template <typename T>
struct Memory {
  T* data;

  explicit Memory(int64_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    for (int64_t i = 0; i < count; ++i) set(data[i], random_number());
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

// `rows` rows with `gap` elements between, the first after `offset` elements, the last up to the end of the memory.
template <typename T>
struct Matrix {
  Memory<T> memory;
  Rows rows;

  Matrix(int64_t count, int64_t width, int64_t offset, int64_t gap)
      : memory(offset + count * width + (count - 1) * gap), rows{memory.data + offset, count, 0, width + gap} {}
};

template <typename T, typename real>
void score(Type type, int64_t vocabulary, int64_t offset, int64_t ref_offset, int64_t overrun) {
  constexpr int64_t kRows = 3;
  Matrix<T> logits(kRows, vocabulary, offset, 1), ref_logits(kRows, vocabulary, ref_offset, 2);
  Matrix<T> grad(kRows, vocabulary, offset, 5);
  Matrix<__half> narrow_grad(kRows, vocabulary, offset, 5);  // or of the other type of 2 bytes
  std::vector<int64_t> ids = {0, vocabulary - 1, vocabulary / 2};
  Memory<real> logprobs(kRows), entropy(kRows), ref_logprobs(kRows), kl(kRows), temperatures(kRows);
  Memory<real> stats(2 * kRows), ref_stats(2 * kRows), g(kRows);
  for (int i = 0; i < kRows; ++i) temperatures.data[i] = 1 + static_cast<real>(i);
  g.data[1] = 0;
  const int64_t told = vocabulary + overrun;
  for (bool reference : {false, true}) {
    const Rows ref_rows = reference ? ref_logits.rows : Rows{};
    const tlcr::ScoreArguments forward{type,
                                       kRows,
                                       told,
                                       logits.rows,
                                       ref_rows,
                                       ids.data(),
                                       1,
                                       temperatures.data,
                                       logprobs.data,
                                       entropy.data,
                                       ref_logprobs.data,
                                       kl.data,
                                       stats.data,
                                       ref_stats.data};
    check(tlcr::cuda::score(forward, nullptr));
    const auto backward = [&](Type grad_type, const Rows& out) {
      const tlcr::ScoreBackwardArguments arguments{type,
                                                   grad_type,
                                                   kRows,
                                                   told,
                                                   0,
                                                   logits.rows,
                                                   ref_rows,
                                                   ids.data(),
                                                   1,
                                                   temperatures.data,
                                                   g.data,
                                                   g.data,
                                                   reference ? g.data : nullptr,
                                                   entropy.data,
                                                   kl.data,
                                                   stats.data,
                                                   ref_stats.data,
                                                   out};
      check(tlcr::cuda::score_backward(arguments, nullptr));
    };
    backward(type, grad.rows);
    if (type == Type::kFloat) {
      backward(Type::kBFloat16, narrow_grad.rows);
      backward(Type::kHalf, narrow_grad.rows);
    }
    backward(type, logits.rows);
  }
}

template <typename T, typename real>
void hidden_reward(Type type, int64_t width, int64_t offset, int64_t classes) {
  constexpr int64_t kBatch = 3, kLength = 5, kTokens = kBatch * kLength;
  Matrix<T> hidden(kTokens, width, offset, offset);
  Memory<real> weight(classes * width), bias(classes), kl(kTokens), terminal(kBatch), rewards(kTokens);
  // Of exact size as well, which a vector is not to the sanitizer.
  auto* mask = static_cast<uint8_t*>(std::malloc(kTokens));
  for (int i = 0; i < kTokens; ++i) mask[i] = i % 3 != 0;
  const tlcr::RewardOptions options{1, 1, std::numeric_limits<double>::infinity(), 0.1, 0, false};
  check(tlcr::cuda::hidden_reward({type, kBatch, kLength, width, classes, hidden.rows, weight.data, bias.data, mask,
                                   kl.data, terminal.data, options, rewards.data},
                                  nullptr));
  std::free(mask);
}

template <typename T, typename real>
void run(Type type, int64_t overrun) {
  for (int64_t vocabulary : {1, 2, 7, 33, 256, 2048, 2049, 4097}) {
    for (int64_t offset : {0, 1, 3}) score<T, real>(type, vocabulary, offset, offset == 3 ? 0 : offset, overrun);
  }
  for (int64_t width : {1, 8, 31, 256, 520}) {
    for (int64_t offset : {0, 1}) {
      hidden_reward<T, real>(type, width, offset, 2);
      hidden_reward<T, real>(type, width, offset, 3);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t overrun = count > 1 && std::strcmp(arguments[1], "overrun") == 0;
  run<float, float>(Type::kFloat, overrun);
  run<double, double>(Type::kDouble, overrun);
  run<__nv_bfloat16, float>(Type::kBFloat16, overrun);
  run<__half, float>(Type::kHalf, overrun);
  std::puts("all kernels ran");
}
