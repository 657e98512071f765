// conv2d on 8-bit integers: the same pass, but the activation is quantised where conv2d rounds it.
//
//   q   = clamp(round(a / step + zero point), 0, 255), a the prologue's result; a border is the zero point
//   out = step * weight_scale[o] * sum((q - zero point) * weight) + bias + time_shift + residual
//
//   weight        packed by conv2d_int8_pack from int8 [Cout][k][k][C], or [4][Cout][2][2][C] where upsample is set
//   weight_scale  [Cout] float32, or [4, Cout] where upsample is set
//   activation    [1, 2] or [N, 2] float32: (step, zero point), the zero point a whole number in 0..255
//
// Everything else is as in conv2d.h. The sum is exact in int32, which bounds kernel * kernel * C by 66000.
#pragma once

#include "conv2d/conv2d.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void conv2d_int8(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
                 const TensorView& weight, const TensorView& weight_scale, const TensorView& activation, int64_t kernel,
                 int64_t stride, bool upsample, const TensorView& bias, const TensorView& time_shift,
                 const TensorView& residual, const TensorView& out, const TensorView& partials,
                 const TensorView& counts, int threads);

int64_t conv2d_int8_packed_bytes(int64_t matrices, int64_t cout, int64_t taps, int64_t channels);
void conv2d_int8_pack(const TensorView& weight, int64_t matrices, int64_t cout, int64_t taps, int64_t channels,
                      const TensorView& packed);
int64_t conv2d_int8_block_rows(int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride);

struct Conv2dInt8Kernels {
  int64_t width, strip;
  void (*prepare[kFloatTypes])(const ConvPrepare&);
  void (*tile[kFloatTypes])(const ConvTile&);
  // Strips as in conv2d.h, words of four channels; sums: [cout, padded] of each output channel's weights.
  void (*pack)(const int8_t* weight, int64_t cout, int64_t taps, int64_t channels, int8_t* packed, int32_t* sums);
};

namespace baseline {
extern const Conv2dInt8Kernels kConv2dInt8Kernels;
}
namespace avx2 {
extern const Conv2dInt8Kernels kConv2dInt8Kernels;
}
namespace avx512 {
extern const Conv2dInt8Kernels kConv2dInt8Kernels;
}
namespace avx512bf16 {
extern const Conv2dInt8Kernels kConv2dInt8Kernels;
}

}  // namespace idm
