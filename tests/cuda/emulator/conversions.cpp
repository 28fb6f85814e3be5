// The stand-in's conversions between float and its halves, for comparison with torch's.
#include "cuda_bf16.h"
#include "cuda_fp16.h"

extern "C" void convert(int count, const float* x, uint16_t* bfloat16, uint16_t* half) {
  for (int i = 0; i < count; ++i) {
    bfloat16[i] = __float2bfloat16_rn(x[i]).bits;
    half[i] = __float2half_rn(x[i]).bits;
  }
}

extern "C" void convert_back(int count, const uint16_t* bits, float* from_bfloat16, float* from_half) {
  for (int i = 0; i < count; ++i) {
    from_bfloat16[i] = __bfloat162float(__nv_bfloat16{bits[i]});
    from_half[i] = __half2float(__half{bits[i]});
  }
}
