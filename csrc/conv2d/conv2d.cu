#include "conv2d/conv2d_cuda.h"

#include <algorithm>
#include <limits>

#include "common/checks.h"
#include "conv2d/cuda_kernel.cuh"

namespace idm {
namespace {

using namespace conv;

constexpr const char* kOp = "conv2d";
constexpr int kTiles = 4, kMaxSplits = 32, kLeastChunks = 8;  // kLeastChunks: of one tap, in a split

using Wide = Tile<8, 16, 128, 2>;
using Middle = Tile<8, 16, 64, 4>;
using Small = Tile<8, 8, 64, 2>;
using Slim = Tile<8, 16, 32, 4>;
constexpr int kSmall = 2, kSlim = 3;

// f(Tag<Tile>{}) for the number of a tile.
template <class F>
void visit_tile(int64_t tile, F&& f) {
  if (tile == 0) return f(Tag<Wide>{});
  if (tile == 1) return f(Tag<Middle>{});
  if (tile == kSmall) return f(Tag<Small>{});
  if (tile == kSlim) return f(Tag<Slim>{});
  require(false, kOp, "tile must be 0 .. " + std::to_string(kTiles - 1));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t blocks_of(int64_t tile, int64_t samples, int64_t phases, int64_t rows, int64_t columns, int64_t cout) {
  int64_t width = 0;
  visit_tile(tile, [&](auto tag) { width = decltype(tag)::type::kN; });
  return samples * conv2d_cuda_pieces(tile, phases, rows, columns) * ceil_div(cout, width);
}

bool aligned(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

void check_image(const TensorView& t, const char* name, const TensorView& x, int64_t channels, int64_t rows, int64_t columns) {
  if (!t) return;
  const bool shape = t.ndim == 4 && t.shape[0] == x.shape[0] && (channels < 0 || t.shape[1] == channels) &&
                     t.shape[2] == rows && t.shape[3] == columns;
  require(shape && t.dtype == x.dtype && is_nhwc(t), kOp, std::string(name) + " must be an NHWC tensor of the contract's shape and dtype");
}

void check_vector(const TensorView& t, const char* name, const TensorView& x, int64_t rows, int64_t cout) {
  if (!t) return;
  const bool shape = rows < 0 ? t.ndim == 1 && t.shape[0] == cout : t.ndim == 2 && t.shape[0] == rows && t.shape[1] == cout;
  require(shape && (t.dtype == x.dtype || t.dtype == DType::kFloat32) && (cout == 1 || t.stride[t.ndim - 1] == 1), kOp,
          std::string(name) + " must have dense rows, of the contract's shape and dtype");
}

void check_floats(const TensorView& t, const char* name, int64_t numel) {
  if (!t) return;
  require(t.dtype == DType::kFloat32 && t.numel() == numel && is_contiguous(t), kOp,
          std::string(name) + " must be dense float32 of the contract's shape");
}

template <class TILE, class T, int SIDE, int STRIDE>
void run(Params p, int64_t splits, uint64_t stream) {
  p.tile_rows = static_cast<int>(ceil_div(p.rows, TILE::kRows));
  p.tile_columns = static_cast<int>(ceil_div(p.columns, TILE::kColumns));
  p.column_tiles = static_cast<int>(ceil_div(p.cout, TILE::kN));
  const int64_t tiles = int64_t{p.samples} * p.phases * p.tile_rows * p.tile_columns;
  require(tiles * ceil_div(p.cout, kWarp) <= std::numeric_limits<int>::max(), kOp, "x must be of at most 2^31 tiles");
  const dim3 grid(static_cast<unsigned>(tiles * p.column_tiles), 1, static_cast<unsigned>(splits));
  launch(conv_kernel<T, TILE, SIDE, STRIDE>, grid, TILE::kThreads, Shared<TILE, SIDE, STRIDE>::kBytes, stream, p);
  if (splits == 1) return;
  p.column_tiles = static_cast<int>(ceil_div(p.cout, kWarp));
  launch(split_kernel<T, TILE>, static_cast<unsigned>(tiles * p.column_tiles), kSplitThreads, 0, stream, p,
         static_cast<int>(splits));
}

}  // namespace

int64_t conv2d_cuda_pieces(int64_t tile, int64_t phases, int64_t rows, int64_t columns) {
  int64_t tiles = 0;
  visit_tile(tile, [&](auto tag) {
    using TILE = typename decltype(tag)::type;
    tiles = ceil_div(rows, TILE::kRows) * ceil_div(columns, TILE::kColumns);
  });
  return phases * tiles;
}

std::array<int64_t, 2> conv2d_cuda_plan(int64_t samples, int64_t phases, int64_t rows, int64_t columns, int64_t cout,
                                        int64_t chunks, int64_t side, int64_t stride) {
  const int64_t units = multiprocessors();
  const auto blocks = [&](int64_t tile) { return blocks_of(tile, samples, phases, rows, columns, cout); };
  if (stride == 1 && side == 3 && cout <= Slim::kN && blocks(kSlim) >= units) return {kSlim, 1};
  if (stride == 1)
    for (int64_t tile = cout > Middle::kN ? 0 : 1; tile < kSmall; ++tile)
      if (blocks(tile) >= units) return {tile, 1};
  const int64_t least = std::max<int64_t>(1, kLeastChunks / (side * side));
  const int64_t wanted = std::min<int64_t>(2 * units / std::max<int64_t>(blocks(kSmall), 1), kMaxSplits);
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, chunks / least));
  return {kSmall, ceil_div(chunks, ceil_div(chunks, splits))};  // none is left without work
}

void conv2d_cuda(const TensorView& x, const TensorView& skip, const TensorView& coefficients, bool silu,
                 const TensorView& weight, int64_t stride, bool upsample, const TensorView& bias,
                 const TensorView& shortcut, const TensorView& shortcut_skip, const TensorView& shortcut_weight,
                 const TensorView& time_shift, const TensorView& residual, const TensorView& out,
                 const TensorView& partials, const TensorView& counts, const TensorView& workspace, int64_t tile,
                 int64_t splits, uint64_t stream) {
  const bool half = x.dtype == DType::kFloat16 || x.dtype == DType::kBFloat16;
  require(x.ndim == 4 && half && is_nhwc(x) && x.numel() > 0, kOp, "x must be a float16 or bfloat16 tensor in NHWC order");
  const int64_t N = x.shape[0], H = x.shape[2], W = x.shape[3], c2 = skip ? skip.shape[1] : 0, C = x.shape[1] + c2;
  check_image(skip, "skip", x, -1, H, W);
  require(weight.ndim == (upsample ? 5 : 4) && weight.dtype == x.dtype, kOp, "weight must be of x's dtype");
  const int64_t cout = weight.shape[upsample ? 1 : 0], side = weight.shape[upsample ? 4 : 3];
  const int64_t phases = upsample ? 4 : 1;
  require(weight.numel() == phases * cout * C * side * side && (upsample ? side == 2 && stride == 1 : side == 1 || side == 3) &&
              (stride == 1 || (stride == 2 && side == 3)),
          kOp, "weight and stride must be those of the contract");
  const int64_t rows = (H - 1) / stride + 1, columns = (W - 1) / stride + 1, ho = upsample ? 2 * H : rows, wo = upsample ? 2 * W : columns;
  require(ho * wo <= std::numeric_limits<int>::max() && cout <= (1 << 24) && C <= (1 << 24), kOp, "x must be of at most 2^31 positions a sample");
  check_image(out, "out", x, cout, ho, wo);
  require(static_cast<bool>(out), kOp, "out must be given");
  check_image(residual, "residual", x, cout, ho, wo);
  check_image(shortcut, "shortcut", x, -1, ho, wo);
  check_image(shortcut_skip, "shortcut_skip", x, -1, ho, wo);
  check_vector(bias, "bias", x, -1, cout);
  check_vector(time_shift, "time_shift", x, N, cout);
  check_floats(coefficients, "coefficients", N * 3 * C);
  const int64_t cs1 = shortcut ? shortcut.shape[1] : 0, cs2 = shortcut_skip ? shortcut_skip.shape[1] : 0;
  require(static_cast<bool>(shortcut) == static_cast<bool>(shortcut_weight) && (shortcut || !shortcut_skip) &&
              (!shortcut || (shortcut_weight.dtype == x.dtype && shortcut_weight.numel() == cout * (cs1 + cs2) && is_contiguous(shortcut_weight))),
          kOp, "shortcut_weight must be [Cout, Cs], given with shortcut");
  const int64_t pieces = conv2d_cuda_pieces(tile, phases, rows, columns);
  require(static_cast<bool>(partials) == static_cast<bool>(counts), kOp, "partials and counts must be given together");
  check_floats(partials, "partials", N * pieces * 2 * cout);
  check_floats(counts, "counts", pieces);
  require((splits > 1) == static_cast<bool>(workspace), kOp, "workspace must be given with splits");
  check_floats(workspace, "workspace", splits * N * ho * wo * cout);

  Params p{};
  const auto add = [&](const TensorView& t, const TensorView& w, int64_t first, int64_t all, bool flat) {
    if (!t) return;
    const int64_t taps = flat ? 1 : side * side;
    Source& s = p.sources[p.source_count++];
    s.data = t.data;
    s.weight = w.data + first * element_size(x.dtype);
    if (coefficients && !flat) s.coefficients = coefficients.as<const float>() + first;
    s.pixels = flat ? ho * wo : H * W;
    s.weight_row = taps * all;
    s.tap_stride = s.table = all;
    s.channels = static_cast<int>(t.shape[1]);
    s.chunks = static_cast<int>(ceil_div(t.shape[1], kBlockK));
    s.side = static_cast<int>(flat ? 1 : side);
    s.flat = flat;
    p.chunks += s.chunks;
  };
  add(x, weight, 0, C, false);
  add(skip, weight, x.shape[1], C, false);
  add(shortcut, shortcut_weight, 0, cs1 + cs2, true);
  add(shortcut_skip, shortcut_weight, cs1, cs1 + cs2, true);
  require(splits >= 1 && splits <= p.chunks, kOp, "splits must be 1 .. chunks of the sum");
  p.split_chunks = static_cast<int>(ceil_div(p.chunks, splits));
  require(ceil_div(p.chunks, p.split_chunks) == splits, kOp, "splits must leave none without work");
  p.bias = bias.data;
  p.bias_float = bias.dtype == DType::kFloat32;
  p.time_shift = time_shift.data;
  p.time_float = time_shift.dtype == DType::kFloat32;
  p.time_stride = time_shift ? time_shift.stride[0] : 0;
  p.residual = residual.data;
  p.phase_weights = cout * side * side * C;
  p.out = out.data;
  p.partials = partials.as<float>();
  p.counts = counts.as<float>();
  p.workspace = workspace.as<float>();
  p.samples = static_cast<int>(N);
  p.height = static_cast<int>(H);
  p.width = static_cast<int>(W);
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  p.cout = static_cast<int>(cout);
  p.phases = static_cast<int>(phases);
  p.upsample = upsample;
  p.silu = silu;
  p.wide_in = x.shape[1] % kPiece == 0 && c2 % kPiece == 0 && cs1 % kPiece == 0 && cs2 % kPiece == 0 && aligned(x) &&
              aligned(skip) && aligned(weight) && aligned(coefficients) && aligned(shortcut) && aligned(shortcut_skip) &&
              aligned(shortcut_weight);
  p.wide_out = cout % kPiece == 0 && aligned(out) && aligned(residual) && aligned(workspace);

  visit_half(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    visit_tile(tile, [&](auto tag) {
      using TILE = typename decltype(tag)::type;
      if constexpr (std::is_same_v<TILE, Small>)
        if (stride == 2) return run<TILE, T, 3, 2>(p, splits, stream);
      require(stride == 1, kOp, "tile must be 2 for stride 2");
      if constexpr (!std::is_same_v<TILE, Slim>) {
        if (side == 1) return run<TILE, T, 1, 1>(p, splits, stream);
        if (side == 2) return run<TILE, T, 2, 1>(p, splits, stream);
      }
      require(side == 3, kOp, "tile 3 must be used for 3x3 weights");
      run<TILE, T, 3, 1>(p, splits, stream);
    });
  });
}

int64_t conv2d_cuda_map(const std::string& name, std::array<int64_t, 5> n) {
  const auto i = [&](int k) { return static_cast<int>(n[static_cast<size_t>(k)]); };
  if (name == "patch") return patch_slot(i(0), i(1));
  if (name == "weight") return weight_slot(i(0), i(1));
  if (name == "column") return column_of(i(0), i(1));
  if (name == "pixel") return pixel_of(i(0), i(1), i(2), i(3));
  if (name == "place") return place_of(i(0), i(1), i(2), i(3) != 0, i(4));
  require(name == "offset", kOp, "the map must be one of cuda_geometry.h");
  return offset_of(n[0], n[1], n[2], n[3], n[4]);
}

}  // namespace idm
