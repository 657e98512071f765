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

const Conv2dKernels& kernels() {
  static constexpr const Conv2dKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kConv2dKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

void check_packed(const char* name, const TensorView& t, int64_t bytes) {
  const bool ok = t.ndim == 1 && is_contiguous(t) && t.numel() * element_size(t.dtype) == bytes;
  require(ok, kOp, std::string(name) + " must be packed by conv2d_pack for this instruction set, dtype and shape");
}

int64_t words_of(int dtype) {
  require(dtype >= 0 && dtype < kFloatTypes, kOp, "the dtype must be a float type");
  return kernels().per_word[dtype];
}

}  // namespace

void conv2d(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
            const TensorView& weight, int64_t kernel, int64_t stride, bool upsample, const TensorView& bias,
            const TensorView& shortcut, const TensorView& shortcut_skip, const TensorView& shortcut_weight,
            const TensorView& time_shift, const TensorView& residual, const TensorView& out,
            const TensorView& partials, int threads) {
  const ConvInputs in{x,        skip, coefficients, shortcut, shortcut_skip, residual,
                      out, partials, silu,         upsample, kernel,        stride};
  const ConvGrid g = check_conv(kOp, in);
  const int type = static_cast<int>(x.dtype);
  check_packed("weight", weight, conv2d_packed_bytes(type, g.phases, g.cout, g.taps, g.channels));
  require(static_cast<bool>(shortcut) == static_cast<bool>(shortcut_weight), kOp,
          "shortcut and shortcut_weight must be given together");
  if (shortcut)
    check_packed("shortcut_weight", shortcut_weight, conv2d_packed_bytes(type, 1, g.cout, 1, g.shortcut_channels));
  const Conv2dKernels& k = kernels();
  if (partials) {
    const int64_t block = conv2d_block_rows(type, g.rows, g.cols, g.channels, kernel, stride);
    const int64_t pieces = block ? (g.rows + block - 1) / block * g.phases : 0;
    const bool ok = partials.ndim == 4 && partials.dtype == DType::kFloat32 && partials.shape[0] == g.samples &&
                    partials.shape[1] == pieces && partials.shape[2] == 2 && partials.shape[3] == g.cout &&
                    is_contiguous(partials);
    require(ok, kOp, "partials must be a contiguous float32 tensor [N, P, 2, Cout]");
  }

  const int64_t padded = round_up(g.cout, k.width);
  thread_local std::vector<float> base;
  base.assign(static_cast<size_t>(g.samples * padded), 0.0f);
  const auto add_rows = [&](const TensorView& t, const char* name, int ndim) {
    if (!t) return;
    const bool ok = t.ndim == ndim && is_float(t) && t.shape[ndim - 1] == g.cout &&
                    (g.cout == 1 || t.stride[ndim - 1] == 1) && (ndim == 1 || t.shape[0] == g.samples);
    require(ok, kOp, std::string(name) + " must be a float tensor of the contract's shape with dense rows");
    for (int64_t n = 0; n < g.samples; ++n)
      k.add[static_cast<int>(t.dtype)](t.data + (ndim == 2 ? n * t.stride[0] : 0) * element_size(t.dtype), g.cout,
                                       base.data() + n * padded);
  };
  add_rows(bias, "bias", 1);
  add_rows(time_shift, "time_shift", 2);
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
  const Conv2dKernels& k = kernels();
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
    kernels().pack[static_cast<int>(weight.dtype)](weight.data + m * source, cout, taps, channels,
                                                   packed.data + m * (bytes / matrices));
}

int64_t conv2d_block_rows(int dtype, int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride) {
  return conv_block_rows(words_of(dtype), rows, cols, channels, kernel, stride);
}

}  // namespace idm
