// The implicit GEMM: a block walks the chunks of channels of all sources and, inside each, the taps.
//
// A patch of input positions lies in shared memory once for all taps: nine taps read it, shifted, by ldmatrix, and the
// prologue is computed once for each of its values rather than once a tap. Per step of 32 channels of one tap only the
// weights are new. Copies run ahead: weights by two steps, patches by three, so that the prologue of a patch can run in
// place, by the threads that copied it, one step before its first use, beside the products.
#pragma once

#include "conv2d/cuda_finish.cuh"
#include "conv2d/cuda_load.cuh"

namespace idm {
namespace conv {

constexpr int kWeightStages = 3;  // weights of steps s .. s + 2
constexpr int kPatchStages = 4;   // chunks of steps s .. s + 3, which differ where a source has one tap

template <class TILE, int SIDE, int STRIDE>
struct Shared {
  static constexpr int kPatch = Patch<TILE, SIDE, STRIDE>::kPositions * kBlockK, kWeights = TILE::kN * kBlockK;  // values
  static constexpr size_t kBytes = 2 * (size_t{kPatchStages} * kPatch + size_t{kWeightStages} * kWeights);
};

template <class T, class TILE, int SIDE, int STRIDE>
__device__ __forceinline__ void products(const Source& s, int tap, const T* patch, const T* weights,
                                         const int (&windows)[TILE::kFrags], float (&acc)[TILE::kFrags][4][4]) {
  using PATCH = Patch<TILE, SIDE, STRIDE>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_m = warp % TILE::kWarpsM, warp_n = warp / TILE::kWarpsM;
  const int shift = tap / SIDE * PATCH::kColumns + tap % SIDE;
#pragma unroll
  for (int k = 0; k < kBlockK / 16; ++k) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // fragments 2 j and 2 j + 1, each k 0-7 and 8-15
      const int row = warp_n * kWarpColumns + column_of(2 * j + lane / 16, lane % 8);
      ldmatrix_x4(b[j], weights + weight_slot(row, 2 * k + lane / 8 % 2) * kPiece);
    }
#pragma unroll
    for (int f = 0; f < TILE::kFrags; ++f) {
      const int m = (warp_m * TILE::kFrags + f) * 16 + lane % 16;
      const int position = s.flat ? m : windows[f] + shift;
      uint32_t a[4];
      ldmatrix_x4(a, patch + patch_slot(position, 2 * k + lane / 16) * kPiece);
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(acc[f][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <class T, class TILE, int SIDE, int STRIDE>
__global__ void __launch_bounds__(TILE::kThreads, 512 / TILE::kThreads) conv_kernel(const IDM_GRID_CONSTANT Params p) {
  IDM_DYNAMIC_SHARED(T, shared);
  using SHARED = Shared<TILE, SIDE, STRIDE>;
  T* const weight_stages = shared + kPatchStages * SHARED::kPatch;
  const Loader<T, TILE, SIDE, STRIDE> load{p, work_of<TILE>(p)};
  const int first = blockIdx.z * p.split_chunks, chunks = min(p.split_chunks, p.chunks - first);

  int windows[TILE::kFrags];
#pragma unroll
  for (int f = 0; f < TILE::kFrags; ++f)
    windows[f] = Patch<TILE, SIDE, STRIDE>::window((threadIdx.x / kWarp % TILE::kWarpsM * TILE::kFrags + f) * 16 +
                                                   threadIdx.x % 16);
  float acc[TILE::kFrags][4][4] = {};
  const auto patch_of = [&](const Cursor& c) { return shared + c.number % kPatchStages * SHARED::kPatch; };
  const auto weights_of = [&](int step) { return weight_stages + step % kWeightStages * SHARED::kWeights; };

  // Cursors of steps s, s + 1, s + 2, s + 3; the first three start late. Every step ends one group of copies.
  Cursor now = cursor_at(p, first), next = now, weights = now, patch = now;
  for (int step = -3; now.number < chunks; ++step) {
    if (step >= 0) {
      cp_async_wait<1>();  // the weights of this step and the patch of the next have come
      __syncthreads();     // for all threads, and nobody reads the stages that are written below
    }
    if (step >= -2 && weights.number < chunks) load.weights(weights, weights_of(step + 2));
    if (patch.tap == 0 && patch.number < chunks) load.patch(patch, patch_of(patch));
    cp_async_commit();
    if (step >= -1) {
      if (step < 0) cp_async_wait<2>();
      if (next.tap == 0 && next.number < chunks) load.prologue(next, patch_of(next));
      advance(p, next);
    }
    if (step >= 0) {
      products<T, TILE, SIDE, STRIDE>(p.sources[now.source], now.tap, patch_of(now), weights_of(step), windows, acc);
      advance(p, now);
    }
    if (step >= -2) advance(p, weights);
    advance(p, patch);
  }
  cp_async_wait<0>();
  __syncthreads();
  finish<T, TILE>(p, load.work, acc, reinterpret_cast<float*>(shared));
}

// ---- splits -------------------------------------------------------------------------------------------------------

constexpr int kSplitRows = 8, kSplitThreads = kWarp * kSplitRows;  // 32 channels x 8 positions at a time

template <class TILE>
struct Narrow : TILE {
  static constexpr int kN = kWarp;
};

// The parts of one tile x 32 channels, added in the order of the splits. p.column_tiles counts tiles of 32 here.
template <class T, class TILE>
__global__ void __launch_bounds__(kSplitThreads) split_kernel(const IDM_GRID_CONSTANT Params p, int splits) {
  __shared__ float sums[2][kSplitRows][kWarp];
  constexpr int kTurns = TILE::kM / kSplitRows;
  const Work work = work_of<Narrow<TILE>>(p);
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp, c = work.first_cout + lane;
  const bool in_channels = c < p.cout;
  const int64_t places = int64_t{p.rows} * p.columns * p.phases, part = p.samples * places * p.cout;
  float base = 0.0f;
  if (in_channels && p.bias != nullptr) base = parameter<T>(p.bias, p.bias_float, c);
  if (in_channels && p.time_shift != nullptr)
    base += parameter<T>(p.time_shift, p.time_float, work.sample * p.time_stride + c);
  float values[kTurns];
  bool inside[kTurns];
  float rough = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int m = i * kSplitRows + group, row = work.row + m / TILE::kColumns, col = work.column + m % TILE::kColumns;
    inside[i] = in_channels && row < p.rows && col < p.columns;
    values[i] = 0.0f;
    if (!inside[i]) continue;
    const int64_t at =
        offset_of(work.sample, places, place_of(row, col, p.columns, p.upsample, work.phase), p.cout, c);
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += p.workspace[s * part + at];
    sum += base;
    if (p.residual != nullptr) sum += to_float(static_cast<const T*>(p.residual)[at]);
    const T stored = from_float<T>(sum);
    static_cast<T*>(p.out)[at] = stored;
    values[i] = to_float(stored);
    rough += values[i];
  }
  if (p.partials == nullptr) return;  // the whole block
  const int seen = min(p.rows - work.row, TILE::kRows) * min(p.columns - work.column, TILE::kColumns);
  const float share = 1.0f / static_cast<float>(seen);
  sums[0][group][lane] = rough;
  __syncthreads();
  rough = 0.0f;
  for (int g = 0; g < kSplitRows; ++g) rough += sums[0][g][lane];
  rough *= share;
  float rest = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kTurns; ++i)
    if (inside[i]) {
      rest += values[i] - rough;
      squares += (values[i] - rough) * (values[i] - rough);
    }
  __syncthreads();
  sums[0][group][lane] = rest;
  sums[1][group][lane] = squares;
  __syncthreads();
  if (group != 0 || !in_channels) return;
  rest = squares = 0.0f;
  for (int g = 0; g < kSplitRows; ++g) {
    rest += sums[0][g][lane];
    squares += sums[1][g][lane];
  }
  const int pieces = p.phases * p.tile_rows * p.tile_columns;
  float* target = p.partials + (work.sample * pieces + work.piece) * 2 * p.cout + c;
  target[0] = rough + rest * share;
  target[p.cout] = squares - rest * rest * share;
  if (work.sample == 0 && c == 0) p.counts[work.piece] = static_cast<float>(seen);
}

}  // namespace conv
}  // namespace idm
