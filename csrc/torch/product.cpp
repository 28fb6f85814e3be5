#include "product.h"

#include <algorithm>
#include <limits>

#if defined(__linux__) && defined(__x86_64__)
// A function of MKL, which libtorch_cpu contains and exports if it was built with MKL; null elsewhere. torch itself has
// no product of bfloat16 with a float32 result on the CPU: at::mm rounds the result, and logits need the digits.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int transpose_left, int transpose_right, int m,
                                                             int n, int k, float alpha, const void* left,
                                                             int left_stride, const void* right, int right_stride,
                                                             float beta, float* sum, int sum_stride);
#define TLCR_MKL_BFLOAT16 1
#endif

namespace tlcr {

namespace {

#ifdef TLCR_MKL_BFLOAT16
enum { kRowMajor = 101, kAsIs = 111, kTransposed = 112 };  // constants of cblas.h

// Without these instructions, and perhaps on processors of other makers, MKL takes longer than a float32 product.
bool mkl_multiplies_bfloat16() {
  static const bool can =
      cblas_gemm_bf16bf16f32 != nullptr && __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bf16");
  return can;
}

// A matrix in the form that cblas takes: rows of adjacent elements, of the matrix or of its transpose. Any other is
// copied.
struct Factor {
  at::Tensor matrix;
  int transpose = kAsIs;
  int stride = 0;

  explicit Factor(const at::Tensor& given) : matrix(given) {
    if (!fits(0, 1) && !fits(1, 0)) matrix = given.contiguous();
    transpose = fits(0, 1) ? kAsIs : kTransposed;
    stride = static_cast<int>(std::max<int64_t>(1, matrix.stride(transpose == kAsIs ? 0 : 1)));
  }

 private:
  bool fits(int64_t rows, int64_t columns) const {
    return (matrix.stride(columns) == 1 || matrix.size(columns) == 1) && matrix.stride(rows) >= matrix.size(columns) &&
           matrix.stride(rows) <= std::numeric_limits<int>::max();
  }
};

void mkl_product(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right, float keep) {
  const Factor a(left), b(right);
  const int m = static_cast<int>(left.size(0)), k = static_cast<int>(left.size(1)), n = static_cast<int>(right.size(1));
  cblas_gemm_bf16bf16f32(kRowMajor, a.transpose, b.transpose, m, n, k, 1.0f, a.matrix.const_data_ptr(), a.stride,
                         b.matrix.const_data_ptr(), b.stride, keep, sum.mutable_data_ptr<float>(), n);
}
#endif

}  // namespace

bool multiplies_into_float(const at::Tensor& factor) {
  if (factor.is_cuda()) return factor.scalar_type() == at::kBFloat16 || factor.scalar_type() == at::kHalf;
#ifdef TLCR_MKL_BFLOAT16
  const bool fits = factor.numel() <= std::numeric_limits<int>::max();
  return factor.is_cpu() && factor.scalar_type() == at::kBFloat16 && fits && mkl_multiplies_bfloat16();
#else
  return false;
#endif
}

void product(at::Tensor result, const at::Tensor& left, const at::Tensor& right) {
#ifdef TLCR_MKL_BFLOAT16
  if (left.is_cpu()) return mkl_product(result, left, right, 0.0f);
#endif
  at::mm_out(result, left, right, at::kFloat);
}

void add_product(at::Tensor sum, const at::Tensor& left, const at::Tensor& right) {
#ifdef TLCR_MKL_BFLOAT16
  if (left.is_cpu()) return mkl_product(sum, left, right, 1.0f);
#endif
  at::addmm_out(sum, sum, left, right, at::kFloat);
}

}  // namespace tlcr
