// Attention on tensor cores. A block holds 16 queries a warp and walks the keys with an online softmax; scores, weights
// and sums stay in registers, where the product of one is laid out as the factor of the next. Where that makes too few
// blocks for the device, several share the queries, each with a part of the keys, and a second kernel adds up.
// Source: Milakov & Gimelshein (arXiv 1805.02867) for the softmax, Dao (arXiv 2307.08691) for the loop.
#include "attention/attention_cuda.h"

#include <algorithm>
#include <cmath>

#include "attention/contract.h"
#include "common/cuda.h"
#include "common/mma.cuh"

namespace idm {
namespace {

constexpr float kLowest = -3.0e38f;  // not infinity, which times a scale of zero is no number
constexpr int kVector = 8;           // elements in 16 bytes
constexpr int kCombineThreads = 256;
constexpr int64_t kLongLoop = 8;  // rounds of keys that are worth a second kernel

struct AttentionArguments {
  const void *q, *k, *v;
  void* out;
  int64_t samples, length, keys, heads;
  int64_t q_n, q_l, q_h, k_n, k_l, k_h, v_n, v_l, v_h;  // strides in elements
  int d;
  float sign, scale_log2;
  float* partial;         // [splits][N * L * heads][d + 2]: sums not divided yet, highest score, total; null: one split
  int64_t share;          // keys of a split, a multiple of a round's
  unsigned splits;
};

// WIDTH: d rounded up. VALUES: channels of v in one block; where they are fewer than WIDTH, neighbouring blocks make the
// same scores, because the sums of a wide head do not fit the registers.
template <int WIDTH>
struct Tile {
  static constexpr int kWidth = WIDTH;
  static constexpr int kValues = WIDTH <= 128 ? WIDTH : WIDTH / 2;
  static constexpr int kKeys = WIDTH <= 128 ? 64 : 32;
  static constexpr bool kHoldQuery = WIDTH <= 128;  // its fragments fit the registers
  // Rows are 16 bytes longer than needed, an odd number of vectors: ldmatrix meets all banks.
  static constexpr int kRow = WIDTH + kVector, kValueRow = kValues + kVector;
};

template <int WIDTH, int WARPS>
constexpr size_t shared_bytes() {
  using S = Tile<WIDTH>;
  return 2 * size_t{16 * WARPS * S::kRow + S::kKeys * (S::kRow + S::kValueRow)};
}

// Rows [first, first + ROWS) of `source`, channels [channel, channel + WIDTH), to shared memory; zero beyond the ends.
template <class T, int ROWS, int WIDTH, int THREADS>
__device__ __forceinline__ void fetch(T* target, const T* source, int64_t stride, int64_t first, int64_t end,
                                      int channel, int d) {
  constexpr int kVectors = WIDTH / kVector;
  for (int i = threadIdx.x; i < ROWS * kVectors; i += THREADS) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    const bool there = first + row < end && channel + column < d;
    cp_async16(target + row * (WIDTH + kVector) + column,
               there ? source + (first + row) * stride + channel + column : source, there);
  }
}

__device__ __forceinline__ int64_t rows_of(const AttentionArguments& p) { return p.samples * p.length * p.heads; }

template <class T, int WIDTH, int WARPS, bool SPLIT>
__global__ void __launch_bounds__(WARPS* kWarp) attention_kernel(AttentionArguments p) {
  using S = Tile<WIDTH>;
  constexpr int kThreads = WARPS * kWarp, kQueries = 16 * WARPS;
  constexpr int kSteps = WIDTH / 16, kKeyTiles = S::kKeys / 8, kValueTiles = S::kValues / 8;
  IDM_DYNAMIC_SHARED(T, queries);
  T* keys = queries + kQueries * S::kRow;
  T* values = keys + S::kKeys * S::kRow;

  const int64_t chunks = (p.d + S::kValues - 1) / S::kValues, tiles = (p.length + kQueries - 1) / kQueries;
  const unsigned split = SPLIT ? blockIdx.x % p.splits : 0;
  const int64_t block = SPLIT ? blockIdx.x / p.splits : blockIdx.x, unit = block / chunks / tiles;
  const int64_t begin = SPLIT ? split * p.share : 0, end = SPLIT ? min(p.keys, begin + p.share) : p.keys;
  const int channel = static_cast<int>(block % chunks) * S::kValues;
  const int64_t first_query = block / chunks % tiles * kQueries, n = unit / p.heads, head = unit % p.heads;
  const T* q = static_cast<const T*>(p.q) + n * p.q_n + head * p.q_h;
  const T* k = static_cast<const T*>(p.k) + n * p.k_n + head * p.k_h;
  const T* v = static_cast<const T*>(p.v) + n * p.v_n + head * p.v_h;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int matrix = lane / 8, matrix_row = lane % 8;  // what this lane names to ldmatrix
  const T* my_query = queries + (warp * 16 + lane % 16) * S::kRow + lane / 16 * 8;
  const T* my_key = keys + (matrix / 2 * 8 + matrix_row) * S::kRow + matrix % 2 * 8;
  const T* my_value = values + (matrix % 2 * 8 + matrix_row) * S::kValueRow + matrix / 2 * 8;

  fetch<T, kQueries, WIDTH, kThreads>(queries, q, p.q_l, first_query, p.length, 0, p.d);
  fetch<T, S::kKeys, WIDTH, kThreads>(keys, k, p.k_l, begin, p.keys, 0, p.d);
  cp_async_commit();

  uint32_t held[S::kHoldQuery ? kSteps : 1][4];
  float sums[kValueTiles][4] = {};
  // Of the two rows of this lane, lane / 4 and lane / 4 + 8; total is this lane's share.
  float highest[2] = {kLowest, kLowest}, total[2] = {};
  for (int64_t start = begin; start < end; start += S::kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the values of the round before
    fetch<T, S::kKeys, S::kValues, kThreads>(values, v, p.v_l, start, p.keys, channel, p.d);
    cp_async_commit();
    if (S::kHoldQuery && start == begin) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) ldmatrix_x4(held[S::kHoldQuery ? step : 0], my_query + step * 16);
    }

    float scores[kKeyTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t query[4];
      if (S::kHoldQuery) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = held[S::kHoldQuery ? step : 0][i];
      } else {
        ldmatrix_x4(query, my_query + step * 16);
      }
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; tile += 2) {
        uint32_t key[4];
        ldmatrix_x4(key, my_key + tile * 8 * S::kRow + step * 16);
        mma_m16n8k16<T>(scores[tile], query, key[0], key[1]);
        mma_m16n8k16<T>(scores[tile + 1], query, key[2], key[3]);
      }
    }

    const int64_t left = p.keys - start;  // keys of this round that exist
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = highest[half];
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[tile][2 * half + i];
          score = tile * 8 + lane % 4 * 2 + i < left ? score * p.sign : kLowest;
          high = fmaxf(high, score);
        }
      high = fmaxf(high, __shfl_xor_sync(kFullMask, high, 1));
      high = fmaxf(high, __shfl_xor_sync(kFullMask, high, 2));
      const float keep = exp2f((highest[half] - high) * p.scale_log2);
      float sum = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Subtract, then scale: the difference of near scores is exact, however large they are.
          float& score = scores[tile][2 * half + i];
          const float weight = exp2f((score - high) * p.scale_log2);
          score = tile * 8 + lane % 4 * 2 + i < left ? weight : 0.0f;
          sum += score;
        }
      total[half] = total[half] * keep + sum;
      highest[half] = high;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        sums[tile][2 * half] *= keep;
        sums[tile][2 * half + 1] *= keep;
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (start + S::kKeys < end)
      fetch<T, S::kKeys, WIDTH, kThreads>(keys, k, p.k_l, start + S::kKeys, p.keys, 0, p.d);
    cp_async_commit();
#pragma unroll
    for (int step = 0; step < S::kKeys / 16; ++step) {
      const uint32_t weight[4] = {pack2<T>(scores[2 * step][0], scores[2 * step][1]),
                                  pack2<T>(scores[2 * step][2], scores[2 * step][3]),
                                  pack2<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]),
                                  pack2<T>(scores[2 * step + 1][2], scores[2 * step + 1][3])};
#pragma unroll
      for (int tile = 0; tile < kValueTiles; tile += 2) {
        uint32_t value[4];
        ldmatrix_x4_trans(value, my_value + step * 16 * S::kValueRow + tile * 8);
        mma_m16n8k16<T>(sums[tile], weight, value[0], value[1]);
        mma_m16n8k16<T>(sums[tile + 1], weight, value[2], value[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float all = total[half] + __shfl_xor_sync(kFullMask, total[half], 1);
    all += __shfl_xor_sync(kFullMask, all, 2);
    const int64_t row = first_query + warp * 16 + lane / 4 + 8 * half;
    const int64_t at = (n * p.length + row) * p.heads + head;
    if (row >= p.length) continue;
    if constexpr (SPLIT) {
      float* out = p.partial + (split * rows_of(p) + at) * (p.d + 2);
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        const int column = channel + tile * 8 + lane % 4 * 2;
        if (column < p.d)
          *reinterpret_cast<float2*>(out + column) = make_float2(sums[tile][2 * half], sums[tile][2 * half + 1]);
      }
      if (channel == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(out + p.d) = make_float2(highest[half], all);
    } else {
      const float share = 1.0f / all;
      T* out = static_cast<T*>(p.out) + at * p.d;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        const int column = channel + tile * 8 + lane % 4 * 2;
        if (column < p.d)
          *reinterpret_cast<uint32_t*>(out + column) = pack2<T>(sums[tile][2 * half] * share, sums[tile][2 * half + 1] * share);
      }
    }
  }
}

// Adds up the splits, always in their order. A thread makes two channels.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(AttentionArguments p) {
  const int64_t rows = rows_of(p), i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  const int64_t row = i / (p.d / 2);
  const int column = static_cast<int>(i % (p.d / 2)) * 2;
  if (row >= rows) return;
  const float* part = p.partial + row * (p.d + 2);
  const int64_t next = rows * (p.d + 2);
  float highest = kLowest;
  for (unsigned s = 0; s < p.splits; ++s) highest = fmaxf(highest, part[s * next + p.d]);
  float total = 0.0f, low = 0.0f, high = 0.0f;
  for (unsigned s = 0; s < p.splits; ++s, part += next) {
    const float keep = exp2f((part[p.d] - highest) * p.scale_log2);
    const float2 sums = *reinterpret_cast<const float2*>(part + column);
    total += part[p.d + 1] * keep;
    low += sums.x * keep;
    high += sums.y * keep;
  }
  const float share = 1.0f / total;
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * p.d + column) = pack2<T>(low * share, high * share);
}

// Blocks of `queries` queries and `values` channels.
int64_t blocks_of(int64_t units, int64_t length, int64_t d, int64_t queries, int64_t values) {
  return units * ((length + queries - 1) / queries) * ((d + values - 1) / values);
}

template <class T, int WIDTH, int WARPS, bool SPLIT>
void start(AttentionArguments p, uint64_t stream) {
  using S = Tile<WIDTH>;
  const int64_t rounds = (p.keys + S::kKeys - 1) / S::kKeys;
  p.share = (rounds + p.splits - 1) / p.splits * S::kKeys;
  const int64_t blocks = blocks_of(p.samples * p.heads, p.length, p.d, 16 * WARPS, S::kValues) * p.splits;
  const int64_t pairs = p.samples * p.length * p.heads * (p.d / 2);
  const int64_t combine_blocks = (pairs + kCombineThreads - 1) / kCombineThreads;
  require(std::max(blocks, combine_blocks) <= INT32_MAX, kAttention, "there must be at most 2^31 - 1 blocks of queries");
  launch(attention_kernel<T, WIDTH, WARPS, SPLIT>, static_cast<unsigned>(blocks), WARPS * kWarp, shared_bytes<WIDTH, WARPS>(),
         stream, p);
  if (SPLIT) launch(combine_kernel<T>, static_cast<unsigned>(combine_blocks), kCombineThreads, 0, stream, p);
}

// Tall blocks read keys and values less often; low ones are more, for a small image on a large device.
template <class T, int WIDTH>
void start(const AttentionArguments& p, uint64_t stream) {
  if (p.partial != nullptr)
    start<T, WIDTH, 2, true>(p, stream);
  else if (blocks_of(p.samples * p.heads, p.length, p.d, 64, Tile<WIDTH>::kValues) >= multiprocessors())
    start<T, WIDTH, 4, false>(p, stream);
  else
    start<T, WIDTH, 2, false>(p, stream);
}

template <class F>
void visit_width(int64_t d, F&& f) {
  if (d <= 32) return f(Tile<32>{});
  if (d <= 64) return f(Tile<64>{});
  if (d <= 96) return f(Tile<96>{});
  if (d <= 128) return f(Tile<128>{});
  if (d <= 256) return f(Tile<256>{});
  f(Tile<512>{});
}

bool aligned(const TensorView& t) {
  bool ok = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) ok = ok && (t.shape[i] == 1 || t.stride[i] % kVector == 0);
  return ok;
}

}  // namespace

int64_t attention_cuda_splits(int64_t samples, int64_t length, int64_t heads, int64_t d, int64_t keys) {
  int64_t splits = 1;
  visit_width(d, [&](auto tile) {
    using S = decltype(tile);
    const int64_t blocks = blocks_of(samples * heads, length, d, 32, S::kValues), rounds = (keys + S::kKeys - 1) / S::kKeys;
    if (blocks == 0 || rounds < kLongLoop) return;
    splits = std::clamp<int64_t>(multiprocessors() / blocks, 1, rounds / 2);
    const int64_t share = (rounds + splits - 1) / splits;
    splits = (rounds + share - 1) / share;  // none without keys
  });
  return splits;
}

void attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                    const TensorView& workspace, double scale, uint64_t stream) {
  if (q.numel() == 0) return;
  check_attention(q, k, v, out);
  const int64_t d = q.shape[3];
  require(q.dtype != DType::kFloat32, kAttention, "q must be float16 or bfloat16");
  require(d % kVector == 0 && d <= 512, kAttention, "d must be a multiple of 8 and at most 512");
  require(aligned(q) && aligned(k) && aligned(v), kAttention, "q, k and v must have rows aligned to 16 bytes");
  const TensorView& w = workspace;
  require(!w || (w.ndim == 5 && w.dtype == DType::kFloat32 && is_contiguous(w) && w.shape[0] >= 1 &&
                 w.shape[1] == q.shape[0] && w.shape[2] == q.shape[1] && w.shape[3] == q.shape[2] && w.shape[4] == d + 2),
          kAttention, "workspace must be float32 [splits, N, L, heads, d + 2], contiguous");
  AttentionArguments p{};
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data;
  p.samples = q.shape[0], p.length = q.shape[1], p.keys = k.shape[1], p.heads = q.shape[2];
  p.q_n = q.stride[0], p.q_l = q.stride[1], p.q_h = q.stride[2];
  p.k_n = k.stride[0], p.k_l = k.stride[1], p.k_h = k.stride[2];
  p.v_n = v.stride[0], p.v_l = v.stride[1], p.v_h = v.stride[2];
  p.d = static_cast<int>(d);
  p.sign = scale < 0.0 ? -1.0f : 1.0f;
  p.scale_log2 = static_cast<float>(std::fabs(scale) * 1.4426950408889634);
  p.partial = w.as<float>();
  p.splits = w ? static_cast<unsigned>(w.shape[0]) : 1;
  visit_half(q.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_width(d, [&](auto tile) { start<T, decltype(tile)::kWidth>(p, stream); });
  });
}

}  // namespace idm
