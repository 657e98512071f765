// 3x3 and 1x1 convolution as an implicit GEMM on NHWC tensors, with everything around it in the same pass:
//
//   a   = silu((concat(x, skip) - centre) * gain + offset)      the prologue, rounded to x's dtype, then zero padding
//   out = conv(a, weight) + shortcut_weight * concat(shortcut, shortcut_skip) + bias + time_shift + residual
//
//   x, skip          [N, C1, H, W], [N, C2, H, W] or null; C = C1 + C2
//   coefficients     [N, 3, C] float32 (centre, gain, offset) or null
//   weight           packed by conv2d_pack from [Cout][k][k][C], or from [4][Cout][2][2][C] where upsample is set
//   kernel, stride   1 or 3, 1 or 2; padding kernel / 2
//   upsample         nearest 2x, then the 3x3 convolution, as four 2x2 convolutions: phase 2 * (row & 1) + (column & 1)
//   shortcut         [N, Cs1, Ho, Wo], shortcut_skip [N, Cs2, Ho, Wo] or null; shortcut_weight packed from [Cout][Cs]
//   bias [Cout], time_shift [N, Cout] with dense rows; each of any float type. residual, out [N, Cout, Ho, Wo]
//   partials         [N, P, 2, Cout] float32 or null: (mean, sum of squared differences from it) of what was stored,
//                    per piece: a block of conv2d_block_rows rows of the (not upsampled) grid, and phase in it
//   counts           [P] float32, given with partials: positions in each piece
//
// Products of bfloat16 pairs where the instruction set has them, float32 products otherwise; sums in float32. How an
// image is cut depends on its shape alone: the result is the same bits for every number of threads.
#pragma once

#include "common/tensor_view.h"

namespace idm {

// Raises std::invalid_argument before anything is written.
void conv2d(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
            const TensorView& weight, int64_t kernel, int64_t stride, bool upsample, const TensorView& bias,
            const TensorView& shortcut, const TensorView& shortcut_skip, const TensorView& shortcut_weight,
            const TensorView& time_shift, const TensorView& residual, const TensorView& out,
            const TensorView& partials, const TensorView& counts, int threads);

// Bytes of a packed weight of [matrices][Cout][taps][C] for the instruction set in use.
int64_t conv2d_packed_bytes(int dtype, int64_t matrices, int64_t cout, int64_t taps, int64_t channels);
void conv2d_pack(const TensorView& weight, int64_t matrices, int64_t cout, int64_t taps, int64_t channels,
                 const TensorView& packed);

// Rows of the convolution's grid in one block; the last block of an image may have fewer.
int64_t conv2d_block_rows(int dtype, int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride);

// ---- what the vector code sees -----------------------------------------------------------------------------------
//
// Activations and weights are read in 4-byte words: one float, two bfloat16 or four bytes of consecutive channels.

// Brings `rows` rows, from first_row on (it may lie outside), into [rows][halo + width + halo][pitch words].
struct ConvPrepare {
  const char* source[2];  // one sample of each tensor
  int64_t channels[2];    // the second may be 0
  int64_t height, width, first_row, rows, halo;
  const float* coefficients;  // [3][C] of this sample or null
  bool silu;
  char* target;
  int64_t pitch;
  float inverse_step, zero_point;  // bytes: round(a * inverse_step + zero_point)
};

// One product of a tile: `taps` runs of `steps` words, each at its own shift.
struct ConvSegment {
  const char* data;       // words of the tile's first position
  int64_t row, col;       // bytes from one output row, or column, to the next
  const int64_t* shifts;  // [taps] bytes
  int64_t taps, steps;
  const char* weights;  // of the strip: [taps][steps][lanes, padded][4 bytes]
};

// One strip of output channels on one block of positions.
struct ConvTile {
  ConvSegment segment[2];
  int segments;
  int64_t rows, cols, lanes;
  const void* start;   // [lanes, padded] int32: what an integer sum starts from; float sums start from 0
  const float* scale;  // [lanes, padded]: what an integer sum is multiplied with
  const float* base;   // [lanes, padded]: bias + time shift
  const char* residual;  // or null; strides as out
  char* out;
  int64_t out_row, out_col;  // bytes
  float *mean, *m2;          // [lanes] or null
};

struct Conv2dKernels {
  int64_t width, strip;            // floats in a vector; output channels of a full strip
  int64_t per_word[kFloatTypes];   // channels in a word, for each dtype of x
  void (*prepare[kFloatTypes])(const ConvPrepare&);
  void (*tile[kFloatTypes])(const ConvTile&);
  void (*pack[kFloatTypes])(const char* weight, int64_t cout, int64_t taps, int64_t channels, char* packed);
  void (*add[kFloatTypes])(const char* source, int64_t count, float* target);  // target += source
};

namespace baseline {
extern const Conv2dKernels kConv2dKernels;
}
namespace avx2 {
extern const Conv2dKernels kConv2dKernels;
}
namespace avx512 {
extern const Conv2dKernels kConv2dKernels;
}
namespace avx512bf16 {
extern const Conv2dKernels kConv2dKernels;
}

}  // namespace idm
