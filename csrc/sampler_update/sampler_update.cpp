#include "sampler_update/sampler_update.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr int64_t kSpan = 8 * 1024;  // elements a task; a multiple of the 64 that a vector turn may take
// Elements below which one worker alone is faster, without noise (10 us) and with it.
constexpr int64_t kWorth = 64 * 1024, kWorthNoise = 16 * 1024;

const SamplerKernels& kernels() {
  static constexpr const SamplerKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kSamplerKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

void check_images(const char* op, const TensorView& x, const char* name) {
  require(x.ndim == 4 && x.dtype == DType::kFloat32 && is_nhwc(x), op,
          std::string(name) + " must be a float32 tensor in NHWC order");
}

void check_seeds(const char* op, const TensorView& seeds, int64_t N) {
  require(seeds.ndim == 1 && seeds.dtype == DType::kInt64 && seeds.shape[0] == N && is_contiguous(seeds), op,
          "seeds must be int64 [N]");
}

// Distance between neighbouring positions of a tensor whose channels are dense and whose positions are evenly spaced;
// 0 for any other. Dimensions of size 1 say nothing.
int64_t position_stride(const TensorView& t) {
  const int64_t C = t.shape[1], H = t.shape[2], W = t.shape[3];
  if (C > 1 && t.stride[1] != 1) return 0;
  const int64_t pitch = W > 1 ? t.stride[3] : H > 1 ? t.stride[2] : t.shape[0] > 1 ? t.stride[0] : C;
  const bool even = pitch >= C && (H == 1 || t.stride[2] == W * pitch) && (t.shape[0] == 1 || t.stride[0] == H * W * pitch);
  return even ? pitch : 0;
}

// offsets[p]: where element p = w * C + c of an image's row 0 lies in the network's layout.
const int64_t* input_offsets(int64_t C, int64_t W, int64_t f, int64_t pitch) {
  thread_local std::vector<int64_t> offsets;
  offsets.resize(static_cast<size_t>(C * W));
  for (int64_t w = 0; w < W; ++w)
    for (int64_t c = 0; c < C; ++c) offsets[static_cast<size_t>(w * C + c)] = w / f * pitch + c * f * f + w % f;
  return offsets.data();
}

}  // namespace

void sampler_update(const TensorView& x, const TensorView& model_output, const TensorView& history,
                    const TensorView& table, int64_t step, const TensorView& seeds, const TensorView& network_input,
                    const TensorView& threshold, int64_t unshuffle, int threads) {
  constexpr const char* kOp = "sampler_update";
  if (x.numel() == 0) return;
  check_images(kOp, x, "x");
  check_images(kOp, history, "history");
  require(same_shape(x, history), kOp, "history must have the shape of x");
  require(same_shape(x, model_output) && is_float(model_output) && is_nhwc(model_output), kOp,
          "model_output must be a float tensor of x's shape in NHWC order");
  require(table.ndim == 2 && table.shape[1] == 8 && table.dtype == DType::kFloat32 && is_contiguous(table), kOp,
          "table must be float32 [T, 8]");
  require(step >= 0 && step < table.shape[0], kOp, "step must be a row of table");
  check_seeds(kOp, seeds, x.shape[0]);
  const int64_t N = x.shape[0], C = x.shape[1], H = x.shape[2], W = x.shape[3], f = unshuffle;
  require(!threshold || (threshold.ndim == 1 && threshold.dtype == DType::kFloat32 && threshold.shape[0] == N &&
                         is_contiguous(threshold)),
          kOp, "threshold must be float32 [N]");
  int64_t pitch = 0;
  if (network_input) {
    require(f >= 1 && H % f == 0 && W % f == 0, kOp, "unshuffle must divide the height and the width");
    const TensorView& t = network_input;
    require(t.ndim == 4 && is_float(t) && t.shape[0] == N && t.shape[1] == C * f * f && t.shape[2] == H / f &&
                t.shape[3] == W / f,
            kOp, "network_input must be a float tensor [N, C f^2, H / f, W / f]");
    pitch = position_stride(t);
    require(pitch > 0, kOp, "network_input must have dense channels and evenly spaced positions");
  }
  require(apart(x, history) && apart(x, model_output) && apart(history, model_output) && apart(network_input, x) &&
              apart(network_input, history) && apart(network_input, model_output),
          kOp, "x, history, model_output and network_input must not overlap");

  SamplerRow row;
  std::memcpy(&row, table.as<const float>() + step * 8, sizeof row);
  const int64_t elements = C * H * W;
  const int64_t spans = (elements + kSpan - 1) / kSpan;
  const int64_t output_bytes = element_size(model_output.dtype), input_bytes = element_size(network_input.dtype);
  const auto kernel = kernels().update[static_cast<int>(model_output.dtype)]
                                      [network_input ? static_cast<int>(network_input.dtype) : kFloatTypes];
  SamplerSpan common{};
  common.row = W * C;
  common.unshuffle = f;
  common.row_stride = f >= 1 ? W / f * pitch : 0;
  common.offsets = network_input && (f > 1 || pitch != C) ? input_offsets(C, W, f, pitch) : nullptr;
  common.word2 = static_cast<uint32_t>(step + 1);
  common.limit = row.clamp;
  common.rescale = static_cast<bool>(threshold);
  auto task = [&](int64_t index, int) {
    const int64_t n = index / spans, begin = index % spans * kSpan;
    SamplerSpan span = common;
    span.x = x.as<float>() + n * elements;
    span.model_output = model_output.data + n * elements * output_bytes;
    span.history = history.as<float>() + n * elements;
    span.network_input = network_input ? network_input.data + n * H * W / (f * f) * pitch * input_bytes : nullptr;
    span.begin = begin;
    span.end = std::min(begin + kSpan, elements);
    span.seed = static_cast<uint64_t>(seeds.as<const int64_t>()[n]);
    if (threshold) span.limit = threshold.as<const float>()[n];
    kernel(row, span);
  };
  const bool alone = N * elements <= (row.s != 0.0f ? kWorthNoise : kWorth);
  parallel_for(N * spans, alone ? 1 : threads, task);  // all or one: see common/threads.cpp on teams that change size
}

void philox_normal(const TensorView& out, const TensorView& seeds, int64_t step, int threads) {
  constexpr const char* kOp = "philox_normal";
  if (out.numel() == 0) return;
  check_images(kOp, out, "out");
  check_seeds(kOp, seeds, out.shape[0]);
  require(step >= -1 && step < 0xffffffffLL, kOp, "step must lie in [-1, 2^32 - 2]");
  const int64_t elements = out.numel() / out.shape[0];
  const int64_t spans = (elements + kSpan - 1) / kSpan;
  const auto kernel = kernels().normal;
  auto task = [&](int64_t index, int) {
    const int64_t n = index / spans, begin = index % spans * kSpan;
    SamplerSpan span{};
    span.x = out.as<float>() + n * elements;
    span.begin = begin;
    span.end = std::min(begin + kSpan, elements);
    span.seed = static_cast<uint64_t>(seeds.as<const int64_t>()[n]);
    span.word2 = static_cast<uint32_t>(step + 1);
    kernel(span);
  };
  parallel_for(out.shape[0] * spans, threads, task);
}

}  // namespace idm
