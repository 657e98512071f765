#include "sampler_update/sampler_update.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr int64_t kSpan = 16 * 1024;  // elements a task; a multiple of the 64 that a vector turn may take

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

}  // namespace

void sampler_update(const TensorView& x, const TensorView& model_output, const TensorView& history,
                    const TensorView& table, int64_t step, const TensorView& seeds, const TensorView& network_input,
                    int threads) {
  constexpr const char* kOp = "sampler_update";
  if (x.numel() == 0) return;
  check_images(kOp, x, "x");
  check_images(kOp, history, "history");
  require(same_shape(x, history), kOp, "history must have the shape of x");
  require(same_shape(x, model_output) && is_float(model_output) && is_nhwc(model_output), kOp,
          "model_output must be a float tensor of x's shape in NHWC order");
  require(!network_input || (same_shape(x, network_input) && is_float(network_input) && is_nhwc(network_input)), kOp,
          "network_input must be a float tensor of x's shape in NHWC order");
  require(table.ndim == 2 && table.shape[1] == 8 && table.dtype == DType::kFloat32 && is_contiguous(table), kOp,
          "table must be float32 [T, 8]");
  require(step >= 0 && step < table.shape[0], kOp, "step must be a row of table");
  check_seeds(kOp, seeds, x.shape[0]);

  SamplerRow row;
  std::memcpy(&row, table.as<const float>() + step * 8, sizeof row);
  const int64_t elements = x.numel() / x.shape[0];
  const int64_t spans = (elements + kSpan - 1) / kSpan;
  const int64_t output_bytes = element_size(model_output.dtype), input_bytes = element_size(network_input.dtype);
  const auto kernel = kernels().update[static_cast<int>(model_output.dtype)]
                                      [network_input ? static_cast<int>(network_input.dtype) : kFloatTypes];
  auto task = [&](int64_t index, int) {
    const int64_t n = index / spans, begin = index % spans * kSpan;
    SamplerSpan span{};
    span.x = x.as<float>() + n * elements;
    span.model_output = model_output.data + n * elements * output_bytes;
    span.history = history.as<float>() + n * elements;
    span.network_input = network_input ? network_input.data + n * elements * input_bytes : nullptr;
    span.begin = begin;
    span.end = std::min(begin + kSpan, elements);
    span.seed = static_cast<uint64_t>(seeds.as<const int64_t>()[n]);
    span.word2 = static_cast<uint32_t>(step + 1);
    kernel(row, span);
  };
  parallel_for(x.shape[0] * spans, threads, task);
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
