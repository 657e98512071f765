#include "conv2d/driver.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr int64_t kBlockRows = 8;
constexpr int64_t kScratchBytes = 384 * 1024;  // prepared rows of a block: they and a strip's weights share an L2 cache
constexpr int64_t kCacheLine = 64;

// Prepared words of one worker, and which block they are of.
struct Scratch {
  int64_t block = -1;
  char *main, *shortcut;
};

struct Workspace {
  std::vector<char> bytes;
  std::vector<Scratch> scratch;
};

void check_tensor(const char* op, const char* name, const TensorView& t, DType dtype, int64_t n, int64_t c, int64_t h,
                  int64_t w) {
  const bool ok = t.ndim == 4 && t.dtype == dtype && t.shape[0] == n && (c < 0 || t.shape[1] == c) &&
                  t.shape[2] == h && t.shape[3] == w && is_nhwc(t);
  require(ok, op, std::string(name) + " must be of x's dtype, of the contract's shape and in NHWC order");
}

}  // namespace

ConvGrid check_conv(const char* op, const ConvInputs& in) {
  const TensorView &x = in.x, &out = in.out;
  require(x.ndim == 4 && is_float(x) && is_nhwc(x), op, "x must be a float tensor in NHWC order");
  require(in.kernel == 1 || in.kernel == 3, op, "the kernel must be 1x1 or 3x3");
  require(in.stride == 1 || (in.stride == 2 && in.kernel == 3), op, "stride must be 1, or 2 with a 3x3 kernel");
  require(!in.upsample || (in.kernel == 3 && in.stride == 1), op, "upsample needs a 3x3 kernel and stride 1");
  require(static_cast<bool>(in.coefficients) || !in.silu, op, "silu needs coefficients");
  require(static_cast<bool>(in.shortcut) || !in.shortcut_skip, op, "shortcut_skip needs a shortcut");
  const int64_t N = x.shape[0], H = x.shape[2], W = x.shape[3];
  ConvGrid g{};
  g.samples = N;
  g.rows = in.stride == 2 ? (H + 1) / 2 : H;
  g.cols = in.stride == 2 ? (W + 1) / 2 : W;
  g.phases = in.upsample ? 4 : 1;
  g.taps = in.upsample ? 4 : in.kernel * in.kernel;
  const int64_t up = in.upsample ? 2 : 1, Ho = g.rows * up, Wo = g.cols * up;
  g.channels = x.shape[1];
  if (in.skip) {
    check_tensor(op, "skip", in.skip, x.dtype, N, -1, H, W);
    g.channels += in.skip.shape[1];
  }
  if (in.shortcut) {
    check_tensor(op, "shortcut", in.shortcut, x.dtype, N, -1, Ho, Wo);
    g.shortcut_channels = in.shortcut.shape[1];
  }
  if (in.shortcut_skip) {
    check_tensor(op, "shortcut_skip", in.shortcut_skip, x.dtype, N, -1, Ho, Wo);
    g.shortcut_channels += in.shortcut_skip.shape[1];
  }
  check_tensor(op, "out", out, x.dtype, N, -1, Ho, Wo);
  g.cout = out.shape[1];
  if (in.residual) check_tensor(op, "residual", in.residual, x.dtype, N, g.cout, Ho, Wo);
  if (in.coefficients) {
    const TensorView& t = in.coefficients;
    const bool ok = t.ndim == 3 && t.dtype == DType::kFloat32 && t.shape[0] == N && t.shape[1] == 3 &&
                    t.shape[2] == g.channels && is_contiguous(t);
    require(ok, op, "coefficients must be a contiguous float32 tensor [N, 3, C]");
  }
  return g;
}

const Conv2dKernels& conv2d_kernels() {
  static constexpr const Conv2dKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kConv2dKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

void conv_base(const char* op, const ConvGrid& g, const TensorView& bias, const TensorView& time_shift,
               std::vector<float>& base) {
  const Conv2dKernels& k = conv2d_kernels();
  const int64_t padded = round_up(g.cout, k.width);
  base.assign(static_cast<size_t>(g.samples * padded), 0.0f);
  const auto add_rows = [&](const TensorView& t, const char* name, int ndim) {
    if (!t) return;
    const bool ok = t.ndim == ndim && is_float(t) && t.shape[ndim - 1] == g.cout &&
                    (g.cout == 1 || t.stride[ndim - 1] == 1) && (ndim == 1 || t.shape[0] == g.samples);
    require(ok, op, std::string(name) + " must be a float tensor of the contract's shape with dense rows");
    for (int64_t n = 0; n < g.samples; ++n)
      k.add[static_cast<int>(t.dtype)](t.data + (ndim == 2 ? n * t.stride[0] : 0) * element_size(t.dtype), g.cout,
                                       base.data() + n * padded);
  };
  add_rows(bias, "bias", 1);
  add_rows(time_shift, "time_shift", 2);
}

void check_stats(const char* op, const ConvInputs& in, const ConvGrid& g, int64_t per_word) {
  require(static_cast<bool>(in.partials) == static_cast<bool>(in.counts), op,
          "partials and counts must be given together");
  if (!in.partials) return;
  const TensorView& t = in.partials;
  const int64_t block = conv_block_rows(per_word, g.rows, g.cols, g.channels, in.kernel, in.stride);
  const int64_t pieces = block ? (g.rows + block - 1) / block * g.phases : 0;
  const bool ok = t.ndim == 4 && t.dtype == DType::kFloat32 && t.shape[0] == g.samples && t.shape[1] == pieces &&
                  t.shape[2] == 2 && t.shape[3] == g.cout && is_contiguous(t);
  require(ok, op, "partials must be a contiguous float32 tensor [N, P, 2, Cout]");
  const TensorView& counts = in.counts;
  require(counts.ndim == 1 && counts.dtype == DType::kFloat32 && counts.shape[0] == pieces && is_contiguous(counts), op,
          "counts must be a contiguous float32 tensor [P]");
}

int64_t conv_block_rows(int64_t per_word, int64_t rows, int64_t cols, int64_t channels, int64_t kernel,
                        int64_t stride) {
  const int64_t line = (cols * stride + 2) * round_up(channels, per_word) / per_word * 4;
  int64_t block = std::min(rows, kBlockRows);
  while (block > 1 && ((block - 1) * stride + kernel) * line > kScratchBytes) block = (block + 1) / 2;
  return block;
}

void run_conv(const ConvInputs& in, const ConvGrid& g, const ConvCode& code, int threads) {
  const int64_t element = element_size(in.x.dtype), halo = in.kernel / 2, up = in.upsample ? 2 : 1;
  const int64_t H = in.x.shape[2], W = in.x.shape[3], Ho = g.rows * up, Wo = g.cols * up;
  const int64_t words = round_up(g.channels, code.per_word) / code.per_word;
  const int64_t shortcut_words = round_up(g.shortcut_channels, code.per_word) / code.per_word;
  const int64_t block_rows = conv_block_rows(code.per_word, g.rows, g.cols, g.channels, in.kernel, in.stride);
  const int64_t blocks = (g.rows + block_rows - 1) / block_rows;
  const int64_t strips = (g.cout + code.strip - 1) / code.strip, padded = round_up(g.cout, code.width);
  const int64_t pitch = words * 4, line = (W + 2 * halo) * pitch;
  const int64_t shortcut_pitch = shortcut_words * 4, shortcut_line = Wo * shortcut_pitch;
  const int64_t main_bytes = round_up(((block_rows - 1) * in.stride + in.kernel) * line, kCacheLine);
  const int64_t shortcut_bytes = round_up(block_rows * up * shortcut_line, kCacheLine);
  threads = std::max(threads, 1);

  thread_local Workspace workspace;
  const int64_t needed = threads * (main_bytes + shortcut_bytes) + kCacheLine;
  if (static_cast<int64_t>(workspace.bytes.size()) < needed) workspace.bytes.resize(static_cast<size_t>(needed));
  workspace.scratch.assign(static_cast<size_t>(threads), Scratch{});
  char* memory = reinterpret_cast<char*>(
      round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace.bytes.data())), kCacheLine));
  for (Scratch& s : workspace.scratch) {
    s.main = memory;
    s.shortcut = memory + main_bytes;
    memory += main_bytes + shortcut_bytes;
  }
  Scratch* const scratch = workspace.scratch.data();

  // The taps of one row of the kernel lie side by side in the prepared rows, as their weights do: they are one run of
  // words, and what is shifted is a row. Position (0, 0) of a block lies at row 0, column 0 of the prepared rows, which
  // begin one row and one column before it where there is a halo. Phases differ in the row and column they begin at.
  const int64_t side = in.upsample ? 2 : in.kernel;
  int64_t shifts[4][3];
  const int64_t zero = 0;
  for (int64_t phase = 0; phase < g.phases; ++phase)
    for (int64_t row = 0; row < side; ++row) shifts[phase][row] = (row + phase / 2) * line + phase % 2 * pitch;

  const auto sample = [&](const TensorView& t, int64_t n) {
    return t ? t.data + n * t.shape[1] * t.shape[2] * t.shape[3] * element : nullptr;
  };
  const auto prepare_block = [&](int64_t n, int64_t first, int64_t rows, const Scratch& s) {
    ConvPrepare p{};
    p.source[0] = sample(in.x, n), p.channels[0] = in.x.shape[1];
    p.source[1] = sample(in.skip, n), p.channels[1] = in.skip ? in.skip.shape[1] : 0;
    p.height = H, p.width = W, p.halo = halo, p.pitch = words;
    p.first_row = first * in.stride - halo, p.rows = (rows - 1) * in.stride + in.kernel;
    p.coefficients = in.coefficients ? in.coefficients.as<const float>() + n * 3 * g.channels : nullptr;
    p.silu = in.silu;
    p.target = s.main;
    if (code.activation) {
      const float* activation = code.activation + n * code.activation_stride;
      p.inverse_step = 1.0f / activation[0], p.zero_point = activation[1];
    }
    code.prepare(p);
    if (!in.shortcut) return;
    ConvPrepare q{};
    q.source[0] = sample(in.shortcut, n), q.channels[0] = in.shortcut.shape[1];
    q.source[1] = sample(in.shortcut_skip, n), q.channels[1] = in.shortcut_skip ? in.shortcut_skip.shape[1] : 0;
    q.height = Ho, q.width = Wo, q.pitch = shortcut_words;
    q.first_row = first * up, q.rows = rows * up;
    q.target = s.shortcut;
    code.prepare_shortcut(q);
  };

  if (in.counts)
    for (int64_t piece = 0; piece < blocks * g.phases; ++piece) {
      const int64_t rows = std::min(block_rows, g.rows - piece / g.phases * block_rows);
      in.counts.as<float>()[piece] = static_cast<float>(rows * g.cols);
    }

  // Tasks of one block are neighbours, so that a worker mostly finds its rows prepared.
  const int64_t parts = strips * g.phases;
  auto task = [&](int64_t index, int worker) {
    const int64_t block = index / parts, n = block / blocks, b = block % blocks;
    const int64_t first = b * block_rows, rows = std::min(block_rows, g.rows - first);
    const int64_t strip = index % parts / g.phases, phase = index % g.phases;
    Scratch& s = scratch[worker];
    if (s.block != block) {
      prepare_block(n, first, rows, s);
      s.block = block;
    }
    const int64_t c = strip * code.strip, a = phase / 2, d = phase % 2;
    ConvTile t{};
    t.rows = rows, t.cols = g.cols, t.lanes = std::min(code.strip, g.cout - c);
    t.segments = in.shortcut ? 2 : 1;
    t.segment[0] = {s.main, in.stride * line, in.stride * pitch, shifts[phase], side, side * words,
                    code.weight + (phase * padded + c) * g.taps * words * 4};
    if (in.shortcut)
      t.segment[1] = {s.shortcut + a * shortcut_line + d * shortcut_pitch, up * shortcut_line, up * shortcut_pitch,
                      &zero, 1, shortcut_words, code.shortcut_weight + c * shortcut_words * 4};
    t.base = code.base + n * padded + c;
    t.start = code.start ? code.start + (n * g.phases + phase) * padded + c : nullptr;
    t.scale = code.scale ? code.scale + (n * g.phases + phase) * padded + c : nullptr;
    const int64_t at = (((first * up + a) * Wo + d) * g.cout + c) * element;
    t.out = sample(in.out, n) + at;
    t.residual = in.residual ? sample(in.residual, n) + at : nullptr;
    t.out_row = up * Wo * g.cout * element, t.out_col = up * g.cout * element;
    if (in.partials) {
      const int64_t piece = (n * blocks + b) * g.phases + phase;
      t.mean = in.partials.as<float>() + piece * 2 * g.cout + c;
      t.m2 = t.mean + g.cout;
    }
    code.tile(t);
  };
  parallel_for(g.samples * blocks * parts, threads, task);
}

}  // namespace idm
