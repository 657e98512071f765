// How a convolution is cut into tasks, for every kind of word. Shared by conv2d and conv2d_int8.
#pragma once

#include <vector>

#include "conv2d/conv2d.h"

namespace idm {

struct ConvInputs {
  TensorView x, skip, coefficients, shortcut, shortcut_skip, residual, out, partials, counts;
  bool silu, upsample;
  int64_t kernel, stride;
};

// The vector code of one dtype and the operands that it understands.
struct ConvCode {
  void (*prepare)(const ConvPrepare&);
  void (*prepare_shortcut)(const ConvPrepare&);
  void (*tile)(const ConvTile&);
  int64_t width, strip, per_word;
  const char* weight;           // packed: [phase] of strips of [tap][word][output channel][4 bytes]
  const char* shortcut_weight;  // or null
  const float* base;            // [N][Cout, padded to width]
  const int32_t* start;         // [N][phase][Cout, padded] or null
  const float* scale;           // [N][phase][Cout, padded] or null
  const float* activation;      // [N] rows of (step, zero point), activation_stride floats apart, or null
  int64_t activation_stride;
};

// Checks shapes, types and layouts of everything but weights and vectors. Returns the grid that is cut into blocks.
struct ConvGrid {
  int64_t samples, rows, cols, channels, shortcut_channels, cout, phases, taps;
};
ConvGrid check_conv(const char* op, const ConvInputs& in);

// bias [Cout] + time_shift [N, Cout], either of them or both absent: [N][Cout, padded to a vector].
void conv_base(const char* op, const ConvGrid& grid, const TensorView& bias, const TensorView& time_shift,
               std::vector<float>& base);
void check_stats(const char* op, const ConvInputs& in, const ConvGrid& grid, int64_t per_word);

const Conv2dKernels& conv2d_kernels();  // of the instruction set in use
int64_t conv_block_rows(int64_t per_word, int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride);
void run_conv(const ConvInputs& in, const ConvGrid& grid, const ConvCode& code, int threads);

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace idm
