// x0_hat = clamp(k_x * x + k_out * model_output, -clamp, clamp);  clamp <= 0: no clamp
//          with a threshold t of the sample, instead: clamp(..., -t, t) / t
// x      = a * x + b * x0_hat + c * history + s * noise;          then history = x0_hat, network_input = cast(x)
//
//   x, history        [N, C, H, W] in NHWC order, float32, updated in place
//   model_output      same shape and order, float32, bfloat16 or float16
//   table             [T, 8] float32, row = (k_x, k_out, a, b, c, s, clamp, 0); `step` picks the row
//   seeds             [N] int64; the noise is that of common/philox.h at `step`
//   network_input     null, or [N, C f^2, H / f, W / f] for unshuffle f, any of the three types: dense channels, and
//                     evenly spaced positions, so that it may be some of the channels of a wider NHWC tensor;
//                     channel (c * f + i) * f + j holds the elements (c, f h + i, f w + j), as torch's pixel_unshuffle
//   threshold         null, or [N] float32
//
// c == 0 does not read history (it may hold anything at the first step); s == 0 draws no noise.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Both raise std::invalid_argument before anything is written.
void sampler_update(const TensorView& x, const TensorView& model_output, const TensorView& history,
                    const TensorView& table, int64_t step, const TensorView& seeds, const TensorView& network_input,
                    const TensorView& threshold, int64_t unshuffle, int threads);

// out [N, C, H, W] float32 NHWC = the standard normal noise of `step` (-1: the initial noise).
void philox_normal(const TensorView& out, const TensorView& seeds, int64_t step, int threads);

// The same on a device. `counter`: null, or int64 [1] on the device that says the step instead; outside the table it is
// the nearest row.
void sampler_update_cuda(const TensorView& x, const TensorView& model_output, const TensorView& history,
                         const TensorView& table, int64_t step, const TensorView& counter, const TensorView& seeds,
                         const TensorView& network_input, const TensorView& threshold, int64_t unshuffle, uint64_t stream);
void philox_normal_cuda(const TensorView& out, const TensorView& seeds, int64_t step, uint64_t stream);

struct SamplerRow {
  float k_x, k_out, a, b, c, s, clamp, reserved;
};

// Elements [begin, end) of one image whose element 0 the pointers point to; begin is a multiple of 64.
struct SamplerSpan {
  float* x;
  const char* model_output;
  float* history;
  char* network_input;
  int64_t begin, end;
  uint64_t seed;
  uint32_t word2;
  float limit;   // of x0_hat; none where it is not above 0 and `rescale` is off
  bool rescale;  // divide by the limit
  // Where network_input is not laid out as x: element p of image row h lies at offsets[p] + (h / f) * row_stride + (h % f) * f.
  const int64_t* offsets;  // [row], or null
  int64_t row, row_stride, unshuffle;
};

struct SamplerKernels {
  // [model_output type][network_input type, the last is "none"]
  void (*update[kFloatTypes][kFloatTypes + 1])(const SamplerRow& row, const SamplerSpan& span);
  void (*normal)(const SamplerSpan& span);  // fills x
};

namespace baseline {
extern const SamplerKernels kSamplerKernels;
}
namespace avx2 {
extern const SamplerKernels kSamplerKernels;
}
namespace avx512 {
extern const SamplerKernels kSamplerKernels;
}
namespace avx512bf16 {
extern const SamplerKernels kSamplerKernels;
}

}  // namespace idm
