#include "conv2d/conv2d.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "conv2d/driver.h"

namespace idm {
namespace {

constexpr const char* kOp = "conv2d";

void check_packed(const char* name, const TensorView& t, int64_t bytes) {
  const bool ok = t.ndim == 1 && is_contiguous(t) && t.numel() * element_size(t.dtype) == bytes;
  require(ok, kOp, std::string(name) + " must be packed by conv2d_pack for this instruction set, dtype and shape");
}

int64_t words_of(int dtype) {
  require(dtype >= 0 && dtype < kFloatTypes, kOp, "the dtype must be a float type");
  return conv2d_kernels().per_word[dtype];
}

}  // namespace

void conv2d(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
            const TensorView& weight, int64_t kernel, int64_t stride, bool upsample, const TensorView& bias,
            const TensorView& shortcut, const TensorView& shortcut_skip, const TensorView& shortcut_weight,
            const TensorView& time_shift, const TensorView& residual, const TensorView& out,
            const TensorView& partials, const TensorView& counts, int threads) {
  const ConvInputs in{x,   skip,     coefficients, shortcut, shortcut_skip, residual,
                      out, partials, counts,       silu,     upsample,      kernel, stride};
  const ConvGrid g = check_conv(kOp, in);
  const int type = static_cast<int>(x.dtype);
  check_packed("weight", weight, conv2d_packed_bytes(type, g.phases, g.cout, g.taps, g.channels));
  require(static_cast<bool>(shortcut) == static_cast<bool>(shortcut_weight), kOp,
          "shortcut and shortcut_weight must be given together");
  if (shortcut)
    check_packed("shortcut_weight", shortcut_weight, conv2d_packed_bytes(type, 1, g.cout, 1, g.shortcut_channels));
  const Conv2dKernels& k = conv2d_kernels();
  check_stats(kOp, in, g, k.per_word[type]);
  thread_local std::vector<float> base;
  conv_base(kOp, g, bias, time_shift, base);
  if (out.numel() == 0) return;

  ConvCode code{};
  code.prepare = code.prepare_shortcut = k.prepare[type];
  code.tile = k.tile[type];
  code.width = k.width, code.strip = k.strip, code.per_word = k.per_word[type];
  code.weight = weight.data;
  code.shortcut_weight = shortcut_weight.data;
  code.base = base.data();
  run_conv(in, g, code, threads);
}

int64_t conv2d_packed_bytes(int dtype, int64_t matrices, int64_t cout, int64_t taps, int64_t channels) {
  const Conv2dKernels& k = conv2d_kernels();
  const int64_t per_word = words_of(dtype);
  return matrices * round_up(cout, k.width) * taps * round_up(channels, per_word) / per_word * 4;
}

void conv2d_pack(const TensorView& weight, int64_t matrices, int64_t cout, int64_t taps, int64_t channels,
                 const TensorView& packed) {
  require(is_float(weight) && weight.numel() == matrices * cout * taps * channels, kOp,
          "weight must be a float tensor of matrices * cout * taps * channels elements");
  const int64_t bytes = conv2d_packed_bytes(static_cast<int>(weight.dtype), matrices, cout, taps, channels);
  check_packed("packed", packed, bytes);
  const int64_t source = cout * taps * channels * element_size(weight.dtype);
  for (int64_t m = 0; m < matrices; ++m)
    conv2d_kernels().pack[static_cast<int>(weight.dtype)](weight.data + m * source, cout, taps, channels,
                                                   packed.data + m * (bytes / matrices));
}

int64_t conv2d_block_rows(int dtype, int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride) {
  return conv_block_rows(words_of(dtype), rows, cols, channels, kernel, stride);
}

}  // namespace idm
