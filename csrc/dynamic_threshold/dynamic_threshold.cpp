#include "dynamic_threshold/dynamic_threshold.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_isa.h"
#include "common/step.h"
#include "common/threads.h"
#include "dynamic_threshold/contract.h"

namespace idm {
namespace {

constexpr int64_t kSpan = 8 * 1024;  // elements a task
constexpr int kShift = 19;           // 12 bits of a magnitude pick its bin: exponent and four bits of the mantissa
constexpr size_t kBins = size_t{1} << (31 - kShift);
constexpr uint32_t kInfinity = 0x7f800000u;

const ThresholdKernels& kernels() {
  static constexpr const ThresholdKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kThresholdKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

float from_bits(uint32_t u) {
  float value;
  std::memcpy(&value, &u, sizeof value);
  return value;
}

// Working memory, kept between calls.
struct Workspace {
  std::vector<uint32_t> magnitudes;  // of one sample
  std::vector<uint32_t> candidates;
  std::vector<int64_t> counts;  // [workers, kBins + 1]; the last: how many are NaN
};

// The quantile of magnitudes whose bins are counted: only the bins that hold the two order statistics are sorted.
float select(const std::vector<uint32_t>& magnitudes, int64_t count, const int64_t* counts, QuantileRank rank,
             std::vector<uint32_t>& candidates) {
  size_t first = 0;
  int64_t before = 0;
  while (before + counts[first] <= rank.low) before += counts[first++];
  size_t last = first;
  int64_t up_to = before + counts[first];
  while (up_to <= std::min(rank.low + 1, count - 1)) up_to += counts[++last];
  candidates.clear();
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = magnitudes[static_cast<size_t>(i)];
    if (u >> kShift >= first && u >> kShift <= last) candidates.push_back(u);
  }
  const auto low = candidates.begin() + (rank.low - before);
  std::nth_element(candidates.begin(), low, candidates.end());
  const auto next = std::min_element(low + 1, candidates.end());
  const float a = from_bits(*low), b = next == candidates.end() ? a : from_bits(*next);
  if (rank.weight == 0.0f || a == b) return a;  // also where both are infinite
  return rank.weight < 0.5f ? a + rank.weight * (b - a) : b - (b - a) * (1.0f - rank.weight);
}

}  // namespace

void dynamic_threshold(const TensorView& x, const TensorView& model_output, const TensorView& table, int64_t step,
                       const TensorView& counter, double quantile, const TensorView& out, int threads) {
  check_dynamic_threshold(x, model_output, table, step, quantile, out);
  step = counted_row("dynamic_threshold", step, counter, table.shape[0]);
  if (x.numel() == 0) return;
  const int64_t elements = x.numel() / x.shape[0], spans = (elements + kSpan - 1) / kSpan;
  const int64_t output_bytes = element_size(model_output.dtype);
  const float k_x = table.as<const float>()[step * 8], k_out = table.as<const float>()[step * 8 + 1];
  const auto magnitudes = kernels().magnitudes[static_cast<int>(model_output.dtype)];
  const QuantileRank rank = quantile_rank(quantile, elements);
  threads = x.numel() <= 2 * kSpan ? 1 : std::max(threads, 1);  // waking a worker takes longer than so few

  auto sample = [&](int64_t n, int workers, Workspace& w) {
    w.magnitudes.resize(static_cast<size_t>(elements));
    w.counts.assign(static_cast<size_t>(workers) * (kBins + 1), 0);
    auto task = [&](int64_t index, int worker) {
      const int64_t begin = index * kSpan, count = std::min(kSpan, elements - begin), at = n * elements + begin;
      uint32_t* to = w.magnitudes.data() + begin;
      magnitudes(x.as<const float>() + at, model_output.data + at * output_bytes, k_x, k_out, to, count);
      int64_t* counts = w.counts.data() + static_cast<size_t>(worker) * (kBins + 1);
      for (int64_t i = 0; i < count; ++i) {
        ++counts[to[i] >> kShift];
        counts[kBins] += to[i] > kInfinity;
      }
    };
    if (workers > 1) {
      parallel_for(spans, workers, task);
    } else {
      for (int64_t index = 0; index < spans; ++index) task(index, 0);
    }
    for (size_t bin = 0; bin <= kBins; ++bin)
      for (size_t worker = 1; worker < static_cast<size_t>(workers); ++worker)
        w.counts[bin] += w.counts[worker * (kBins + 1) + bin];
    const bool nan = w.counts[kBins] > 0;
    const float value = nan ? from_bits(0x7fc00000u) : select(w.magnitudes, elements, w.counts.data(), rank, w.candidates);
    out.as<float>()[n] = value < 1.0f ? 1.0f : value;  // a NaN stays
  };

  thread_local std::vector<Workspace> kept;
  std::vector<Workspace>& spaces = kept;  // a worker that names `kept` would get its own
  if (static_cast<int>(spaces.size()) < threads) spaces.resize(static_cast<size_t>(threads));
  if (x.shape[0] >= threads) {  // whole samples a worker
    auto task = [&](int64_t n, int worker) { sample(n, 1, spaces[static_cast<size_t>(worker)]); };
    return parallel_for(x.shape[0], threads, task);
  }
  for (int64_t n = 0; n < x.shape[0]; ++n) sample(n, threads, spaces[0]);
}

}  // namespace idm
