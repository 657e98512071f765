// One launch after channel_stats: a block takes whole groups of channels over some rows, merges the partials of its
// groups, and applies. For small images it makes the statistics too; for many pieces norm_coefficients ran before.
#include "group_norm_silu/group_norm_silu.h"

#include "common/cuda.h"
#include "group_norm_silu/contract.h"
#include "group_norm_silu/tiles.h"
#include "norm_coefficients/coefficients.cuh"

namespace idm {
namespace {

constexpr const char* kOp = "group_norm_silu";
constexpr int kTogether = 4;  // vectors that a thread has under way

enum Source { kPieces, kTable, kRows };  // where the coefficients come from

struct ApplyArgs {
  const void *x, *skip;
  void* out;
  const float* table;  // [N, 3, C]
  StatsPart stats, skip_stats;
  Affine affine;
  GroupTile tile;
  RowTiles rows;
  float eps;
};

// How 256 threads stand over a tile: `lanes` vectors side by side, `depth` rows at a time; a few may be left over.
struct Standing {
  int vectors, lanes, depth;
  __host__ __device__ Standing(int channels, int vector)
      : vectors(channels / vector), lanes(vectors < kNormThreads ? vectors : kNormThreads), depth(kNormThreads / lanes) {}
};

template <class T>
__device__ __forceinline__ float silu(float y) {
  const float e = sizeof(T) == 4 ? expf(-y) : __expf(-y);
  return y / (1.0f + e);
}

// Two blocks at least: left to itself ptxas spills a few registers for the sake of a fourth.
template <class T, int V, Source SOURCE, bool SILU>
__global__ void __launch_bounds__(kNormThreads, 2) apply_kernel(ApplyArgs a) {
  IDM_DYNAMIC_SHARED(float, shared);
  const RowTiles& t = a.rows;
  const int64_t n = t.sample(blockIdx.x), first = t.first_channel(blockIdx.y), channels = t.channels();
  const int64_t first_row = t.first_row(blockIdx.x), last_row = t.last_row(blockIdx.x);
  const Standing standing(a.tile.channels, V);
  const int lane = threadIdx.x % standing.lanes, depth = threadIdx.x / standing.lanes;
  const bool stands = depth < standing.depth;

  if (SOURCE == kRows) {
    // Partials of this block alone, [depth][2][tile channels], and counts [depth], behind the coefficients; their means
    // less the first value of their group.
    float* partials = shared + a.tile.shared_floats();
    float* counts = partials + standing.depth * 2 * a.tile.channels;
    const auto part = [&](int64_t c) { return static_cast<const T*>(t.in_x(c) ? a.x : a.skip) + t.input_offset(n, 0, c); };
    const auto pivot_of = [&](int local) { return to_float(*part(first + local)); };
    for (int v = lane; stands && v < standing.vectors; v += standing.lanes) {
      const int64_t c = first + v * V;
      float pivot[V] = {}, mean[V] = {}, m2[V] = {}, count = 0.0f;
      if (c < channels) {
#pragma unroll
        for (int k = 0; k < V; ++k) pivot[k] = pivot_of((v * V + k) / a.tile.width * a.tile.width);
        count = row_moments<T, V>(part(c), t.input_stride(c), depth, t.rows, standing.depth, pivot, mean, m2);
      }
      float* target = partials + depth * 2 * a.tile.channels + v * V;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        target[k] = mean[k];
        target[a.tile.channels + k] = m2[k];
      }
      if (v == 0) counts[depth] = count;
    }
    __syncthreads();
    const int64_t pieces = min(static_cast<int64_t>(standing.depth), t.rows);  // those beyond have no row
    group_coefficients(shared, a.tile, channels, n, first, a.affine, a.eps, pivot_of,
                       [&](int local, float, int slice, int slices) {
                         const int64_t each = (pieces + slices - 1) / slices, begin = min(slice * each, pieces);
                         return merge_pieces(partials + local, counts, a.tile.channels, begin, min(begin + each, pieces),
                                             0.0f);
                       });
  } else if (SOURCE == kPieces) {
    coefficients_of_parts(shared, a.tile, {a.stats, a.skip_stats, n, first}, channels, a.affine, a.eps);
  }

  for (int v = lane; stands && v < standing.vectors; v += standing.lanes) {
    const int64_t c = first + v * V;
    if (c >= channels) break;
    float centre[V], gain[V], offset[V];
    const float* from = SOURCE == kTable ? a.table + n * 3 * channels + c : shared + v * V;
    const int64_t row_stride = SOURCE == kTable ? channels : a.tile.channels;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      centre[k] = from[k];
      gain[k] = from[row_stride + k];
      offset[k] = from[2 * row_stride + k];
    }
    const T* source = static_cast<const T*>(t.in_x(c) ? a.x : a.skip) + t.input_offset(n, 0, c);
    T* target = static_cast<T*>(a.out) + t.output_offset(n, 0, c);
    const int64_t in_stride = t.input_stride(c);
    for (int64_t r = first_row + depth; r < last_row; r += kTogether * standing.depth) {
      Vector<T, V> values[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int64_t row = r + j * standing.depth;
        values[j].load(source + (row < last_row ? row : r) * in_stride);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int64_t row = r + j * standing.depth;
        if (row >= last_row) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float y = (to_float(values[j].lanes[k]) - centre[k]) * gain[k] + offset[k];
          values[j].lanes[k] = from_float<T>(SILU ? silu<T>(y) : y);
        }
        values[j].store(target + row * channels);
      }
    }
  }
}

template <class T, int V, Source SOURCE>
void run(ApplyArgs a, int64_t samples, bool silu, size_t floats, uint64_t stream) {
  const int64_t blocks = samples * a.rows.row_blocks, tiles = a.tile.tiles(a.rows.channels());
  const size_t bytes = floats * sizeof(float);
  require(blocks <= 0x7fffffffLL && tiles <= 65535, kOp, "x must have fewer rows and channels");
  require(bytes <= max_shared_per_block(), kOp, "groups must be narrower");
  launch(silu ? apply_kernel<T, V, SOURCE, true> : apply_kernel<T, V, SOURCE, false>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles)), dim3(kNormThreads), bytes, stream, a);
}

template <class T, int V>
void choose(ApplyArgs a, int64_t samples, int64_t groups, bool silu, uint64_t stream) {
  const int64_t rows = a.rows.rows, c1 = a.rows.channels1, c2 = a.rows.channels2, c = c1 + c2;
  const bool alone = a.table == nullptr && a.stats.partials == nullptr;
  a.tile = group_tile(c, groups, V, alone ? 32 / static_cast<int>(sizeof(T)) : 64);
  const Standing standing(a.tile.channels, V);
  a.rows = row_tiles(samples, rows, c1, c2, a.tile.channels, standing.depth, alone ? 1 : 2 * multiprocessors());
  if (alone)
    run<T, V, kRows>(a, samples, silu,
                     a.tile.shared_floats() + static_cast<size_t>(standing.depth) * (2 * a.tile.channels + 1), stream);
  else if (a.table)
    run<T, V, kTable>(a, samples, silu, 1, stream);
  else
    run<T, V, kPieces>(a, samples, silu, a.tile.shared_floats(), stream);
}

}  // namespace

void group_norm_silu_cuda(const TensorView& x, const TensorView& out, const TensorView& weight, const TensorView& bias,
                          const TensorView& scale, const TensorView& shift, const TensorView& skip,
                          const TensorView& partials, const TensorView& counts, const TensorView& skip_partials,
                          const TensorView& skip_counts, const TensorView& table, int64_t groups, double eps, bool silu,
                          uint64_t stream) {
  const AffineParams affine{weight, bias, scale, shift};
  check_group_norm_silu(x, out, affine, skip, partials, counts, skip_partials, skip_counts, groups);
  if (out.numel() == 0) return;
  require(!skip || static_cast<bool>(partials) == static_cast<bool>(skip_partials), kOp,
          "stats must be given for both tensors or for none");
  require(!table || (table.dtype == DType::kFloat32 && is_contiguous(table) && table.numel() == x.shape[0] * 3 * out.shape[1]),
          kOp, "table must be contiguous float32 [N, 3, C]");
  ApplyArgs a{};
  a.x = x.data;
  a.skip = skip.data;
  a.out = out.data;
  a.table = table.as<const float>();
  a.stats = stats_part(partials, counts);
  a.skip_stats = stats_part(skip_partials, skip_counts);
  a.affine = affine_of(affine);
  a.rows.rows = x.shape[2] * x.shape[3];
  a.rows.channels1 = x.shape[1];
  a.rows.channels2 = skip ? skip.shape[1] : 0;
  a.eps = static_cast<float>(eps);
  const auto in_words = [](const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  visit_float(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = kVector<T>;
    const bool words = a.rows.channels1 % V == 0 && a.rows.channels2 % V == 0 && in_words(x) && in_words(skip) && in_words(out);
    if (words)
      choose<T, V>(a, x.shape[0], groups, silu, stream);
    else
      choose<T, 1>(a, x.shape[0], groups, silu, stream);
  });
}

}  // namespace idm
