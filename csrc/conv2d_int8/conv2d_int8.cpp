#include "conv2d_int8/conv2d_int8.h"

#include <cmath>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "conv2d/driver.h"

namespace idm {
namespace {

constexpr const char* kOp = "conv2d_int8";
constexpr int64_t kPerWord = 4;
constexpr int64_t kLongestSum = 66000;  // * 255 * 127 stays below 2^31

const Conv2dInt8Kernels& kernels() {
  static constexpr const Conv2dInt8Kernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kConv2dInt8Kernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// Words of one matrix; behind all matrices lie their sums, int32 [matrices][cout, padded].
int64_t matrix_bytes(int64_t cout, int64_t taps, int64_t channels) {
  return round_up(cout, kernels().width) * taps * round_up(channels, kPerWord);
}

void check_packed(const TensorView& t, int64_t bytes) {
  const bool ok = t.ndim == 1 && t.dtype == DType::kInt8 && is_contiguous(t) && t.numel() == bytes;
  require(ok, kOp, "weight must be packed by conv2d_int8_pack for this instruction set and shape");
}

void check_activation(const TensorView& t, int64_t samples) {
  const bool ok = t.ndim == 2 && t.dtype == DType::kFloat32 && (t.shape[0] == 1 || t.shape[0] == samples) &&
                  t.shape[1] == 2 && is_contiguous(t);
  require(ok, kOp, "activation must be a contiguous float32 tensor [1, 2] or [N, 2]");
  for (int64_t n = 0; n < t.shape[0]; ++n) {
    const float step = t.as<const float>()[2 * n], zero = t.as<const float>()[2 * n + 1];
    require(std::isfinite(step) && std::isnormal(1.0f / step) && step > 0.0f, kOp,
            "activation must hold a finite step above 0");
    require(zero >= 0.0f && zero <= 255.0f && std::floor(zero) == zero, kOp,
            "activation must hold a zero point that is a whole number in 0..255");
  }
}

}  // namespace

void conv2d_int8(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
                 const TensorView& weight, const TensorView& weight_scale, const TensorView& activation, int64_t kernel,
                 int64_t stride, bool upsample, const TensorView& bias, const TensorView& time_shift,
                 const TensorView& residual, const TensorView& out, const TensorView& partials,
                 const TensorView& counts, int threads) {
  const TensorView none{};
  const ConvInputs in{x, skip, coefficients, none, none, residual, out, partials, counts, silu, upsample, kernel, stride};
  const ConvGrid g = check_conv(kOp, in);
  const Conv2dInt8Kernels& k = kernels();
  const int64_t padded = round_up(g.cout, k.width);
  require(g.taps * g.channels <= kLongestSum, kOp, "the sum over taps and channels must fit int32");
  check_packed(weight, conv2d_int8_packed_bytes(g.phases, g.cout, g.taps, g.channels));
  const int scale_dims = upsample ? 2 : 1;
  const bool scale_ok = weight_scale.ndim == scale_dims && weight_scale.dtype == DType::kFloat32 &&
                        weight_scale.shape[scale_dims - 1] == g.cout && is_contiguous(weight_scale) &&
                        weight_scale.numel() == g.phases * g.cout;
  require(scale_ok, kOp, "weight_scale must be a contiguous float32 tensor [Cout], or [4, Cout] with upsample");
  check_activation(activation, g.samples);
  check_stats(kOp, in, g, kPerWord);
  thread_local std::vector<float> base, scale;
  thread_local std::vector<int32_t> start;
  conv_base(kOp, g, bias, time_shift, base);
  if (out.numel() == 0) return;

  const int64_t bytes = matrix_bytes(g.cout, g.taps, g.channels), rows = activation.shape[0] == 1 ? 0 : 2;
  scale.assign(static_cast<size_t>(g.samples * g.phases * padded), 0.0f);
  start.assign(scale.size(), 0);
  const int32_t* sums = reinterpret_cast<const int32_t*>(weight.data + g.phases * bytes);
  for (int64_t n = 0; n < g.samples; ++n) {
    const float* a = activation.as<const float>() + n * rows;
    for (int64_t phase = 0; phase < g.phases; ++phase)
      for (int64_t c = 0; c < g.cout; ++c) {
        const size_t at = static_cast<size_t>((n * g.phases + phase) * padded + c);
        scale[at] = a[0] * weight_scale.as<const float>()[phase * g.cout + c];
        start[at] = -static_cast<int32_t>(a[1]) * sums[phase * padded + c];
      }
  }

  ConvCode code{};
  code.prepare = k.prepare[static_cast<int>(x.dtype)];
  code.tile = k.tile[static_cast<int>(x.dtype)];
  code.width = k.width, code.strip = k.strip, code.per_word = kPerWord;
  code.weight = weight.data;
  code.base = base.data(), code.start = start.data(), code.scale = scale.data();
  code.activation = activation.as<const float>(), code.activation_stride = rows;
  run_conv(in, g, code, threads);
}

int64_t conv2d_int8_packed_bytes(int64_t matrices, int64_t cout, int64_t taps, int64_t channels) {
  return matrices * (matrix_bytes(cout, taps, channels) + round_up(cout, kernels().width) * 4);
}

void conv2d_int8_pack(const TensorView& weight, int64_t matrices, int64_t cout, int64_t taps, int64_t channels,
                      const TensorView& packed) {
  require(weight.dtype == DType::kInt8 && weight.numel() == matrices * cout * taps * channels, kOp,
          "weight must be an int8 tensor of matrices * cout * taps * channels elements");
  check_packed(packed, conv2d_int8_packed_bytes(matrices, cout, taps, channels));
  const int64_t bytes = matrix_bytes(cout, taps, channels), padded = round_up(cout, kernels().width);
  int32_t* sums = reinterpret_cast<int32_t*>(packed.data + matrices * bytes);
  for (int64_t m = 0; m < matrices; ++m)
    kernels().pack(weight.as<const int8_t>() + m * cout * taps * channels, cout, taps, channels,
                   packed.as<int8_t>() + m * bytes, sums + m * padded);
}

int64_t conv2d_int8_block_rows(int64_t rows, int64_t cols, int64_t channels, int64_t kernel, int64_t stride) {
  return conv_block_rows(kPerWord, rows, cols, channels, kernel, stride);
}

}  // namespace idm
