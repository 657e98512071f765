// x0_hat = clamp(k_x * x + k_out * (model_output + base), -clamp, clamp);  clamp <= 0: no clamp
//          with a threshold t of the sample, instead: clamp(..., -t, t) / t
// x      = a * x + b * x0_hat + c * history + s * noise;          then history = x0_hat, network_input = cast(x)
//
//   x, history        [N, C, H, W] in NHWC order, float32, updated in place
//   model_output      same shape and order, float32, bfloat16 or float16; or [N, C f^2, H / f, W / f] in NHWC order for
//                     unshuffle f, as a network of that kind stores it
//   base              null, or as x: what a residual network's output is added to, in float32
//   table             [T, 8] float32, row = (k_x, k_out, a, b, c, s, clamp, 0); `step` picks the row, or `counter`: null, or
//                     int64 [1] where tensors are that says it when the call runs; outside the table it is the nearest row
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
                    const TensorView& table, int64_t step, const TensorView& counter, const TensorView& seeds,
                    const TensorView& network_input, const TensorView& threshold, const TensorView& base,
                    int64_t unshuffle, int threads);

// out [N, C, H, W] float32 NHWC = the standard normal noise of `step` (-1: the initial noise).
void philox_normal(const TensorView& out, const TensorView& seeds, int64_t step, int threads);

// The same on a device.
void sampler_update_cuda(const TensorView& x, const TensorView& model_output, const TensorView& history,
                         const TensorView& table, int64_t step, const TensorView& counter, const TensorView& seeds,
                         const TensorView& network_input, const TensorView& threshold, const TensorView& base,
                         int64_t unshuffle, uint64_t stream);
void philox_normal_cuda(const TensorView& out, const TensorView& seeds, int64_t step, uint64_t stream);

struct SamplerRow {
  float k_x, k_out, a, b, c, s, clamp, reserved;
};

// Elements [begin, end) of one image whose element 0 the pointers point to; begin is a multiple of 64.
struct SamplerSpan {
  float* x;
  const char* model_output;
  float* history;
  const float* base;  // or null
  char* network_input;
  int64_t begin, end;
  uint64_t seed;
  uint32_t word2;
  float limit;   // of x0_hat; none where it is not above 0 and `rescale` is off
  bool rescale;  // divide by the limit
  // Where network_input or model_output are not laid out as x: element p of image row h lies at
  // offsets[p] + (h / f) * stride + (h % f) * f.
  struct Places {
    const int64_t* offsets;  // [row], or null
    int64_t stride;
  };
  Places input, output;
  int64_t row, unshuffle;
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
