#include "product.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>

#ifdef TLCR_CUDA
#include <cublas_v2.h>
#endif

#if defined(__linux__) && defined(__x86_64__)
// A function of MKL, which libtorch_cpu contains and exports if it was built with MKL; null elsewhere. torch itself has
// no product of bfloat16 with a float32 result on the CPU: its mm rounds the result, and logits need the digits.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int transpose_left, int transpose_right, int m,
                                                             int n, int k, float alpha, const void* left,
                                                             int left_stride, const void* right, int right_stride,
                                                             float beta, float* sum, int sum_stride);
#define TLCR_MKL_BFLOAT16 1
#endif

namespace tlcr {

namespace {

// A matrix in the form that BLAS takes: rows of adjacent elements, of the matrix or of its transpose. Any other is
// copied.
struct Factor {
  Tensor matrix;
  bool transposed = false;
  int stride = 0;

  explicit Factor(const Tensor& given) : matrix(given) {
    if (!fits(0, 1) && !fits(1, 0)) matrix = dense(given);
    transposed = !fits(0, 1);
    stride = static_cast<int>(std::max<int64_t>(1, matrix.stride(transposed ? 1 : 0)));
  }

 private:
  bool fits(int64_t rows, int64_t columns) const {
    return (matrix.stride(columns) == 1 || matrix.size(columns) == 1) && matrix.stride(rows) >= matrix.size(columns) &&
           matrix.stride(rows) <= std::numeric_limits<int>::max();
  }
};

// sum = left right + keep sum, in BLAS's order of columns, in which a matrix of rows is its own transpose:
// sum^T = right^T left^T + keep sum^T. So the right factor comes first, and each is as it lies in memory.
struct Product {
  Factor first, second;
  int m, n, k;
  float keep;
  void* sum;

  Product(const Tensor& sum, const Tensor& left, const Tensor& right, float keep)
      : first(right),
        second(left),
        m(static_cast<int>(right.size(1))),
        n(static_cast<int>(left.size(0))),
        k(static_cast<int>(left.size(1))),
        keep(keep),
        sum(sum.data_ptr()) {}
};

#ifdef TLCR_MKL_BFLOAT16
void multiply_by_mkl(const Product& p) {
  enum { kColumns = 102, kAsIs = 111, kTransposed = 112 };  // constants of cblas.h
  cblas_gemm_bf16bf16f32(kColumns, p.first.transposed ? kTransposed : kAsIs, p.second.transposed ? kTransposed : kAsIs,
                         p.m, p.n, p.k, 1.0f, p.first.matrix.data_ptr(), p.first.stride, p.second.matrix.data_ptr(),
                         p.second.stride, p.keep, static_cast<float*>(p.sum), p.m);
}
#endif

#ifdef TLCR_CUDA
// torch's addmm with a float32 result takes Scalars, which the stable ABI does not pass; cuBLAS is what it calls.
void multiply_by_cublas(const Product& p) {
  const torch::stable::accelerator::DeviceGuard device(p.first.matrix.get_device_index());
  void* handle = nullptr;  // of the device's current stream
  check(torch_get_current_cuda_blas_handle(&handle));
  const cudaDataType_t half = dtype_of(p.first.matrix) == kHalf ? CUDA_R_16F : CUDA_R_16BF;
  const float one = 1.0f;
  const cublasStatus_t status =
      cublasGemmEx(static_cast<cublasHandle_t>(handle), p.first.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                   p.second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.m, p.n, p.k, &one, p.first.matrix.data_ptr(),
                   half, p.first.stride, p.second.matrix.data_ptr(), half, p.second.stride, &p.keep, p.sum, CUDA_R_32F,
                   p.m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  require(status == CUBLAS_STATUS_SUCCESS, cublasGetStatusString(status));
}
#endif

// Whether the product was done without torch.
bool multiplied(const Tensor& sum, const Tensor& left, const Tensor& right, float keep) {
  if (dtype_of(left) == dtype_of(sum)) return false;
  const Product p(sum, left, right, keep);
#ifdef TLCR_CUDA
  if (sum.is_cuda()) return multiply_by_cublas(p), true;
#endif
#ifdef TLCR_MKL_BFLOAT16
  multiply_by_mkl(p);
#endif
  return true;
}

}  // namespace

bool cpu_multiplies_bfloat16() {
#ifdef TLCR_MKL_BFLOAT16
  // Without these instructions, and perhaps on processors of other makers, MKL takes longer than a float32 product.
  static const bool can =
      cblas_gemm_bf16bf16f32 != nullptr && __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bf16");
  return can;
#else
  return false;
#endif
}

bool multiplies_into_float(const Tensor& factor) {
  const Dtype dtype = dtype_of(factor);
  if (factor.is_cuda()) return dtype == kBFloat16 || dtype == kHalf;
  const bool fits = factor.numel() <= std::numeric_limits<int>::max();
  return factor.is_cpu() && dtype == kBFloat16 && fits && cpu_multiplies_bfloat16();
}

void product(const Tensor& result, const Tensor& left, const Tensor& right) {
  if (!multiplied(result, left, right, 0.0f)) call("aten::mm", "out", left, right, result);
}

void add_product(const Tensor& sum, const Tensor& left, const Tensor& right) {
  // addmm without its Scalars: a product to which a "bias" of any shape is added.
  if (!multiplied(sum, left, right, 1.0f)) call("aten::linear", "out", left, transposed(right), MaybeTensor(sum), sum);
}

}  // namespace tlcr
