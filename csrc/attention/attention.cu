// Attention on tensor cores. A block holds 16 queries a warp and walks the keys with an online softmax; scores, weights
// and sums stay in registers, where the product of one is laid out as the factor of the next.
// Source: Milakov & Gimelshein (arXiv 1805.02867) for the softmax, Dao (arXiv 2307.08691) for the loop.
#include "attention/attention_cuda.h"

#include <cmath>

#include "attention/contract.h"
#include "common/cuda.h"
#include "common/mma.cuh"

namespace idm {
namespace {

constexpr float kLowest = -3.0e38f;  // not infinity, which times a scale of zero is no number
constexpr int kVector = 8;           // elements in 16 bytes

struct AttentionArguments {
  const void *q, *k, *v;
  void* out;
  int64_t length, keys, heads;
  int64_t q_n, q_l, q_h, k_n, k_l, k_h, v_n, v_l, v_h;  // strides in elements
  int d;
  float sign, scale_log2;
};

// WIDTH: d rounded up. VALUES: channels of v in one block; where they are fewer than WIDTH, neighbouring blocks make the
// same scores, because the sums of a wide head do not fit the registers.
template <int WIDTH>
struct Tile {
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

template <class T, int WIDTH, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp) attention_kernel(AttentionArguments p) {
  using S = Tile<WIDTH>;
  constexpr int kThreads = WARPS * kWarp, kQueries = 16 * WARPS;
  constexpr int kSteps = WIDTH / 16, kKeyTiles = S::kKeys / 8, kValueTiles = S::kValues / 8;
  IDM_DYNAMIC_SHARED(T, queries);
  T* keys = queries + kQueries * S::kRow;
  T* values = keys + S::kKeys * S::kRow;

  const int64_t chunks = (p.d + S::kValues - 1) / S::kValues, tiles = (p.length + kQueries - 1) / kQueries;
  const int64_t block = blockIdx.x, unit = block / chunks / tiles;
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
  fetch<T, S::kKeys, WIDTH, kThreads>(keys, k, p.k_l, 0, p.keys, 0, p.d);
  cp_async_commit();

  uint32_t held[S::kHoldQuery ? kSteps : 1][4];
  float sums[kValueTiles][4] = {};
  // Of the two rows of this lane, lane / 4 and lane / 4 + 8; total is this lane's share.
  float highest[2] = {kLowest, kLowest}, total[2] = {};
  for (int64_t start = 0; start < p.keys; start += S::kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the values of the round before
    fetch<T, S::kKeys, S::kValues, kThreads>(values, v, p.v_l, start, p.keys, channel, p.d);
    cp_async_commit();
    if (S::kHoldQuery && start == 0) {
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
    if (start + S::kKeys < p.keys)
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
    const float share = 1.0f / all;
    const int64_t row = first_query + warp * 16 + lane / 4 + 8 * half;
    T* out = static_cast<T*>(p.out) + ((n * p.length + row) * p.heads + head) * p.d;
#pragma unroll
    for (int tile = 0; tile < kValueTiles; ++tile) {
      const int column = channel + tile * 8 + lane % 4 * 2;
      if (row < p.length && column < p.d) {
        const uint32_t pair = pack2<T>(sums[tile][2 * half] * share, sums[tile][2 * half + 1] * share);
        *reinterpret_cast<uint32_t*>(out + column) = pair;
      }
    }
  }
}

template <class T, int WIDTH, int WARPS>
void start(const AttentionArguments& p, int64_t units, uint64_t stream) {
  const int64_t tiles = (p.length + 16 * WARPS - 1) / (16 * WARPS);
  const int64_t blocks = units * tiles * ((p.d + Tile<WIDTH>::kValues - 1) / Tile<WIDTH>::kValues);
  require(blocks <= INT32_MAX, kAttention, "there must be at most 2^31 - 1 blocks of queries");
  launch(attention_kernel<T, WIDTH, WARPS>, static_cast<unsigned>(blocks), WARPS * kWarp, shared_bytes<WIDTH, WARPS>(),
         stream, p);
}

// Tall blocks read keys and values less often; low ones are more, for a small image on a large device.
template <class T, int WIDTH>
void start(const AttentionArguments& p, int64_t units, uint64_t stream) {
  const int64_t chunks = (p.d + Tile<WIDTH>::kValues - 1) / Tile<WIDTH>::kValues;
  if (units * ((p.length + 63) / 64) * chunks >= multiprocessors())
    start<T, WIDTH, 4>(p, units, stream);
  else
    start<T, WIDTH, 2>(p, units, stream);
}

bool aligned(const TensorView& t) {
  bool ok = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) ok = ok && (t.shape[i] == 1 || t.stride[i] % kVector == 0);
  return ok;
}

}  // namespace

void attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, double scale,
                    uint64_t stream) {
  if (q.numel() == 0) return;
  check_attention(q, k, v, out);
  const int64_t d = q.shape[3];
  require(q.dtype != DType::kFloat32, kAttention, "q must be float16 or bfloat16");
  require(d % kVector == 0 && d <= 512, kAttention, "d must be a multiple of 8 and at most 512");
  require(aligned(q) && aligned(k) && aligned(v), kAttention, "q, k and v must have rows aligned to 16 bytes");
  const AttentionArguments p{q.data,
                             k.data,
                             v.data,
                             out.data,
                             q.shape[1],
                             k.shape[1],
                             q.shape[2],
                             q.stride[0],
                             q.stride[1],
                             q.stride[2],
                             k.stride[0],
                             k.stride[1],
                             k.stride[2],
                             v.stride[0],
                             v.stride[1],
                             v.stride[2],
                             static_cast<int>(d),
                             scale < 0.0 ? -1.0f : 1.0f,
                             static_cast<float>(std::fabs(scale) * 1.4426950408889634)};
  const int64_t units = q.shape[0] * q.shape[2];
  visit_half(q.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (d <= 32) return start<T, 32>(p, units, stream);
    if (d <= 64) return start<T, 64>(p, units, stream);
    if (d <= 96) return start<T, 96>(p, units, stream);
    if (d <= 128) return start<T, 128>(p, units, stream);
    if (d <= 256) return start<T, 256>(p, units, stream);
    start<T, 512>(p, units, stream);
  });
}

}  // namespace idm
