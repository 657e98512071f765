// The vector code of group_norm_silu; compiled once per instruction set.
#include "common/simd.h"
#include "common/vector_math.h"
#include "group_norm_silu/group_norm_silu.h"

namespace idm {
namespace IDM_ISA {
namespace {

constexpr int64_t kFirstPiece = 16, kPieceGrowth = 4, kLargestPiece = 256;  // rows

// ---- statistics --------------------------------------------------------------------------------------------------
//
// Sums of differences from a shift, in float32, over pieces of rows; pieces merge in double. The first, short piece is
// read twice: its own mean is its shift. Later ones take the mean of all before them. Should that be far off (by D),
// the loss by cancellation is about eps * n * D^2, n rows in the piece; the step itself adds at least D^2 * n / 5 to
// the sum of squares, because a piece is at most four times what came before. So the relative error stays near eps.

// K vectors of channels; kPartial: K is 1 and only `lanes` channels exist. (mean, m2) are those of `seen` rows before.
template <class T, int K, bool kPartial>
void piece_stats(const T* x, int64_t rows, int64_t stride, int lanes, int64_t seen, double* mean, double* m2) {
  auto read = [&](int64_t r, int k) {
    return kPartial ? load_partial(x + r * stride, lanes) : load(x + r * stride + k * kWidth);
  };
  const int count = kPartial ? lanes : K * kWidth;
  vf shift[K] = {}, sum[K] = {}, squares[K] = {};
  if (seen == 0) {
    for (int64_t r = 0; r < rows; ++r)
      for (int k = 0; k < K; ++k) shift[k] += read(r, k);
    for (int k = 0; k < K; ++k) shift[k] *= 1.0f / static_cast<float>(rows);
  } else {
    float rounded[K * kWidth] = {};
    for (int c = 0; c < count; ++c) rounded[c] = static_cast<float>(mean[c]);
    std::memcpy(shift, rounded, sizeof shift);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < K; ++k) {
      const vf d = read(r, k) - shift[k];
      sum[k] += d;
      squares[k] += d * d;
    }

  float shift_lanes[K * kWidth], sum_lanes[K * kWidth], square_lanes[K * kWidth];
  std::memcpy(shift_lanes, shift, sizeof shift);
  std::memcpy(sum_lanes, sum, sizeof sum);
  std::memcpy(square_lanes, squares, sizeof squares);
  const double n = static_cast<double>(rows), before = static_cast<double>(seen);
  const double per_row = 1.0 / n, share = n / (before + n), cross = before * share;
  for (int c = 0; c < count; ++c) {
    const double s = sum_lanes[c];
    const double piece_mean = shift_lanes[c] + s * per_row;
    const double piece_m2 = square_lanes[c] - s * s * per_row;
    const double delta = piece_mean - mean[c];
    mean[c] += delta * share;
    m2[c] += (piece_m2 < 0.0 ? 0.0 : piece_m2) + delta * delta * cross;
  }
}

template <class T>
void block_stats(const char* data, int64_t rows, int64_t channels, BlockStats out) {
  const T* x = reinterpret_cast<const T*>(data);
  for (int64_t c = 0; c < channels; ++c) out.mean[c] = out.m2[c] = 0.0;
  int64_t piece = kFirstPiece;
  for (int64_t first = 0; first < rows;) {
    const int64_t n = rows - first < piece ? rows - first : piece;
    const T* p = x + first * channels;
    int64_t c = 0;
    for (; c + 4 * kWidth <= channels; c += 4 * kWidth)
      piece_stats<T, 4, false>(p + c, n, channels, kWidth, first, out.mean + c, out.m2 + c);
    for (; c + kWidth <= channels; c += kWidth)
      piece_stats<T, 1, false>(p + c, n, channels, kWidth, first, out.mean + c, out.m2 + c);
    if (c < channels)
      piece_stats<T, 1, true>(p + c, n, channels, static_cast<int>(channels - c), first, out.mean + c, out.m2 + c);
    first += n;
    piece = piece * kPieceGrowth < kLargestPiece ? piece * kPieceGrowth : kLargestPiece;
  }
}

// ---- statistics -> coefficients ----------------------------------------------------------------------------------

double element(const TensorView& t, int64_t index) {
  switch (t.dtype) {
    case DType::kFloat32:
      return t.as<const float>()[index];
    case DType::kBFloat16: {
      const uint32_t word = static_cast<uint32_t>(t.as<const bf16>()[index].bits) << 16;
      float value;
      std::memcpy(&value, &word, sizeof value);
      return value;
    }
    default:
      return load_partial(t.as<const fp16>() + index, 1)[0];
  }
}

void coefficients(const GroupNormShape& s, const double* stats, const AffineParams& affine, int64_t sample, double eps,
                  double* scratch, float* out) {
  const int64_t C = s.channels;
  const double rows = static_cast<double>(s.rows);
  double *mean = scratch, *m2 = scratch + C;
  for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0.0;
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int64_t left = s.rows - b * s.block_rows;
    const double n = static_cast<double>(left < s.block_rows ? left : s.block_rows);
    for (int64_t c = 0; c < C; ++c) mean[c] += stats[b * 2 * C + c] * (n / rows);
  }
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int64_t left = s.rows - b * s.block_rows;
    const double n = static_cast<double>(left < s.block_rows ? left : s.block_rows);
    for (int64_t c = 0; c < C; ++c) {
      const double delta = stats[b * 2 * C + c] - mean[c];
      m2[c] += stats[(b * 2 + 1) * C + c] + delta * delta * n;
    }
  }

  const int64_t width = C / s.groups;
  for (int64_t g = 0; g < s.groups; ++g) {
    double centre = 0.0, squares = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) centre += mean[c];
    centre /= static_cast<double>(width);
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      squares += m2[c] + (mean[c] - centre) * (mean[c] - centre) * rows;
    const double rstd = 1.0 / __builtin_sqrt(squares / (rows * static_cast<double>(width)) + eps);
    const float rounded = static_cast<float>(centre);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      double gain = affine.weight ? element(affine.weight, c) : 1.0;
      double offset = affine.bias ? element(affine.bias, c) : 0.0;
      if (affine.scale) {
        const double factor = 1.0 + element(affine.scale, sample * affine.scale.stride[0] + c);
        gain *= factor;
        offset = offset * factor + element(affine.shift, sample * affine.shift.stride[0] + c);
      }
      gain *= rstd;
      out[c] = rounded;
      out[C + c] = static_cast<float>(gain);
      out[2 * C + c] = static_cast<float>(offset + (rounded - centre) * gain);  // what rounding the mean left out
    }
  }
}

// ---- apply -------------------------------------------------------------------------------------------------------

template <bool kSilu, bool kCoarse>
inline vf finish(vf x, vf centre, vf gain, vf offset) {
  const vf y = (x - centre) * gain + offset;
  return kSilu ? silu<kCoarse>(y) : y;
}

template <class T, bool kSilu>
void apply_rows(const T* x, T* out, int64_t rows, int64_t channels, const float* coefficients) {
  constexpr bool kCoarse = kIsBf16<T>;
  const float *centre = coefficients, *gain = centre + channels, *offset = gain + channels;
  const int64_t whole = channels - channels % kWidth;
  const int lanes = static_cast<int>(channels - whole);
  for (int64_t r = 0; r < rows; ++r, x += channels, out += channels) {
    for (int64_t c = 0; c < whole; c += kWidth)
      store(out + c, finish<kSilu, kCoarse>(load(x + c), load(centre + c), load(gain + c), load(offset + c)));
    if (lanes)
      store_partial(out + whole,
                    finish<kSilu, kCoarse>(load_partial(x + whole, lanes), load_partial(centre + whole, lanes),
                                           load_partial(gain + whole, lanes), load_partial(offset + whole, lanes)),
                    lanes);
  }
}

template <class T>
void apply(const char* x, char* out, int64_t rows, int64_t channels, const float* coefficients, bool silu) {
  const T* source = reinterpret_cast<const T*>(x);
  T* target = reinterpret_cast<T*>(out);
  if (silu)
    apply_rows<T, true>(source, target, rows, channels, coefficients);
  else
    apply_rows<T, false>(source, target, rows, channels, coefficients);
}

}  // namespace

extern const GroupNormKernels kGroupNormKernels = {
    {block_stats<float>, block_stats<bf16>, block_stats<fp16>}, coefficients, {apply<float>, apply<bf16>, apply<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
