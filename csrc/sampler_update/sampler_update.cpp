#include "sampler_update/sampler_update.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_isa.h"
#include "common/step.h"
#include "common/threads.h"
#include "sampler_update/contract.h"

namespace idm {
namespace {

constexpr int64_t kSpan = 8 * 1024;  // elements a task; a multiple of the 64 that a vector turn may take
// Elements below which one worker alone is faster, without noise (4 us) and with it.
constexpr int64_t kWorth = 32 * 1024, kWorthNoise = 8 * 1024;

const SamplerKernels& kernels() {
  static constexpr const SamplerKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kSamplerKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// Kept from call to call: the same image comes again at every step.
struct Offsets {
  int64_t C = 0, W = 0, f = 0, pitch = 0;
  std::vector<int64_t> of;  // where element p = w * C + c of an image's row 0 lies in the network's layout
};

SamplerSpan::Places places(Offsets& known, int64_t C, int64_t W, int64_t f, int64_t pitch) {
  if (known.C != C || known.W != W || known.f != f || known.pitch != pitch) {
    known.C = 0;  // until it is whole
    known.of.resize(static_cast<size_t>(C * W));
    for (int64_t w = 0; w < W; ++w)
      for (int64_t c = 0; c < C; ++c) known.of[static_cast<size_t>(w * C + c)] = w / f * pitch + c * f * f + w % f;
    known.C = C, known.W = W, known.f = f, known.pitch = pitch;
  }
  return {known.of.data(), W / f * pitch};
}

}  // namespace

void sampler_update(const TensorView& x, const TensorView& model_output, const TensorView& history,
                    const TensorView& table, int64_t step, const TensorView& counter, const TensorView& seeds,
                    const TensorView& network_input, const TensorView& threshold, const TensorView& base,
                    int64_t unshuffle, int threads) {
  if (x.numel() == 0) return;
  const auto [pitch, shuffled] = check_sampler_update(x, model_output, history, table, step, seeds, network_input,
                                                      threshold, base, unshuffle);
  step = counted_row("sampler_update", step, counter, table.shape[0]);
  const int64_t N = x.shape[0], C = x.shape[1], H = x.shape[2], W = x.shape[3], f = unshuffle;

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
  thread_local Offsets of_input, of_output;
  if (network_input && (f > 1 || pitch != C)) common.input = places(of_input, C, W, f, pitch);
  if (shuffled) common.output = places(of_output, C, W, f, C * f * f);
  common.word2 = static_cast<uint32_t>(step + 1);
  common.limit = row.clamp;
  common.rescale = static_cast<bool>(threshold);
  auto task = [&, pitch = pitch](int64_t index, int) {
    const int64_t n = index / spans, begin = index % spans * kSpan;
    SamplerSpan span = common;
    span.x = x.as<float>() + n * elements;
    span.model_output = model_output.data + n * elements * output_bytes;
    span.history = history.as<float>() + n * elements;
    if (base) span.base = base.as<const float>() + n * elements;
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
  if (out.numel() == 0) return;
  check_philox_normal(out, seeds, step);
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
