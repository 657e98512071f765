// Radix select on the bits of |x0_hat|, which order as the values do. One block a sample; four bits of the wanted order
// statistic a pass. Sixteen counters of eight bits lie in two registers of each thread, so no atomics are needed, and
// counts are whole numbers, so the order of their sum does not matter. x0_hat is made anew in every pass: it lies in the
// L2 cache, a buffer for it would too.
#include "dynamic_threshold/dynamic_threshold.h"

#include "common/cuda.h"
#include "dynamic_threshold/contract.h"

namespace idm {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kDigitBits = 4, kDigits = 1 << kDigitBits;
constexpr int kMost = 255;  // elements that a counter of eight bits is safe for

template <class M>
__device__ __forceinline__ uint32_t magnitude(const float* x, const M* model_output, int64_t i, float k_x, float k_out) {
  return __float_as_uint(x[i] * k_x + to_float(model_output[i]) * k_out) & 0x7fffffffu;
}

// Sums of all threads' values, handed to every thread; `scratch` has room for kWarps.
__device__ __forceinline__ int64_t block_sum(int64_t value, int64_t* scratch) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullMask, value, lanes);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

template <bool LEAST>
__device__ __forceinline__ uint32_t block_extreme(uint32_t value, uint32_t* scratch) {
  const auto pick = [](uint32_t a, uint32_t b) { return LEAST == (a < b) ? a : b; };
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = pick(value, __shfl_xor_sync(kFullMask, value, lanes));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) value = pick(value, scratch[warp]);
  __syncthreads();
  return value;
}

template <class M>
__global__ void __launch_bounds__(kThreads)
    threshold_kernel(const float* x, const M* model_output, const float* table, const int64_t* counter, int64_t step,
                     int64_t rows, int64_t elements, QuantileRank rank, float* out) {
  __shared__ int64_t warps[kWarps][kDigits];
  __shared__ int64_t sums[kWarps];
  __shared__ uint32_t extremes[kWarps];
  const int64_t n = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x += n * elements;
  model_output += n * elements;
  if (counter != nullptr) step = max(int64_t{0}, min(*counter, rows - 1));
  const float k_x = table[step * 8], k_out = table[step * 8 + 1];

  uint32_t prefix = 0;      // the bits found so far
  int64_t left = rank.low;  // how many of those that agree with them lie below
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    int64_t mine[kDigits] = {};
    int64_t i = threadIdx.x;
    while (i < elements) {
      uint64_t low = 0, high = 0;
      for (int turn = 0; turn < kMost && i < elements; ++turn, i += kThreads) {
        const uint32_t u = magnitude(x, model_output, i, k_x, k_out);
        if ((uint64_t{u} >> (shift + kDigitBits)) != prefix) continue;
        const uint32_t digit = u >> shift & (kDigits - 1);
        const uint64_t one = uint64_t{1} << (digit % 8 * 8);
        low += digit < 8 ? one : 0;
        high += digit < 8 ? 0 : one;
      }
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        mine[d] += low >> (8 * d) & 0xff;
        mine[d + 8] += high >> (8 * d) & 0xff;
      }
    }
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      int64_t count = mine[d];
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) count += __shfl_xor_sync(kFullMask, count, lanes);
      if (lane == 0) warps[warp][d] = count;
    }
    __syncthreads();
    uint32_t found = 0;  // every thread finds the same
    for (; found < kDigits - 1; ++found) {
      int64_t count = 0;
      for (int w = 0; w < kWarps; ++w) count += warps[w][found];
      if (left < count) break;
      left -= count;
    }
    prefix = prefix << kDigitBits | found;
    __syncthreads();
  }

  // The next order statistic: the same value again, or the smallest one above it.
  int64_t same = 0;
  uint32_t above = 0x7fffffffu, largest = 0;
  for (int64_t i = threadIdx.x; i < elements; i += kThreads) {
    const uint32_t u = magnitude(x, model_output, i, k_x, k_out);
    same += u <= prefix;
    if (u > prefix) above = min(above, u);
    largest = max(largest, u);
  }
  same = block_sum(same, sums);
  above = block_extreme<true>(above, extremes);
  largest = block_extreme<false>(largest, extremes);
  if (threadIdx.x == 0) {
    const float a = __uint_as_float(prefix), b = same > rank.low + 1 ? a : __uint_as_float(above);
    float value = rank.weight < 0.5f ? a + rank.weight * (b - a) : b - (b - a) * (1.0f - rank.weight);
    if (a == b || rank.weight == 0.0f) value = a;  // also where both are infinite
    value = value < 1.0f ? 1.0f : value;
    out[n] = largest > 0x7f800000u ? __uint_as_float(0x7fc00000u) : value;
  }
}

}  // namespace

void dynamic_threshold_cuda(const TensorView& x, const TensorView& model_output, const TensorView& table, int64_t step,
                            const TensorView& counter, double quantile, const TensorView& out, uint64_t stream) {
  check_dynamic_threshold(x, model_output, table, step, quantile, out);
  require(!counter || (counter.dtype == DType::kInt64 && counter.numel() == 1), "dynamic_threshold", "counter must be int64 [1]");
  if (x.numel() == 0) return;
  require(x.shape[0] <= 0x7fffffffLL, "dynamic_threshold", "x must have fewer than 2^31 samples");
  const int64_t elements = x.numel() / x.shape[0];
  visit_float(model_output.dtype, [&](auto tag) {
    using M = typename decltype(tag)::type;
    launch(threshold_kernel<M>, static_cast<unsigned>(x.shape[0]), kThreads, 0, stream, x.as<const float>(),
           model_output.as<const M>(), table.as<const float>(), counter.as<const int64_t>(), step, table.shape[0], elements,
           quantile_rank(quantile, elements), out.as<float>());
  });
}

}  // namespace idm
