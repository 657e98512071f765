// The vector code of vq_nearest; compiled once per instruction set.
#include "vq_nearest/vq_nearest.h"

#include "common/simd.h"
#include "common/tile_product.h"

namespace idm {
namespace IDM_ISA {
namespace {

template <class T>
void pack(const Codebook& book, int64_t panel) {
  const int64_t first = panel * kPanel, rows = book.size - first < kPanel ? book.size - first : kPanel;
  uint32_t* packed = book.packed + first * book.width;
  pack_columns<Float>(reinterpret_cast<const T*>(book.rows) + first * book.width, book.width, rows, book.width, packed);
  for (int64_t column = 0; column < kPanel; column += kWidth) {
    vf sum = {};
    for (int64_t k = 0; k < book.width; ++k) {
      const vf c = bits<vf>(load_u32(packed + k * kPanel + column));
      sum += c * c;
    }
    store(book.squares + first + column, sum);
  }
  for (int64_t i = rows; i < kPanel; ++i) book.squares[first + i] = __builtin_inff();
}

// `rows` positions as float32, each `width` words.
template <class T>
void load_rows(const char* z, int64_t rows, int64_t width, uint32_t* left) {
  const T* source = reinterpret_cast<const T*>(z);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kWidth) {
      const vu v = row_words<Float>(source + r * width, width, c);
      const int64_t count = width - c < kWidth ? width - c : kWidth;
      std::memcpy(left + r * width + c, &v, static_cast<size_t>(count) * 4);
    }
}

inline float least_of(vf v) {  // of numbers
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps(bits<__m512>(v));
#else
  float least = v[0];
  for (int i = 1; i < kWidth; ++i) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

inline uint32_t least_of(vu v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epu32(bits<__m512i>(v));
#else
  uint32_t least = v[0];
  for (int i = 1; i < kWidth; ++i) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

// The least distance that each lane has met and what it met it at, for one position.
struct Lanes {
  vf least = splat(__builtin_inff());
  vu where = {};

  void meet(vf distance, vu at) {
    const vi better = distance < least;  // false for what is no number
    least = better ? distance : least;
    where = better ? at : where;
  }

  // Of the lanes with the least distance the lowest place; 0 where no distance was below infinity.
  uint32_t lowest() const {
    const float value = least_of(least);
    return value < __builtin_inff() ? least_of(least == splat(value) ? where : ~vu{}) : 0;
  }
};

// Those of a block of positions, in memory.
struct Best {
  float* least;
  uint32_t* where;

  Best(float* memory, int64_t rows)
      : least(memory), where(reinterpret_cast<uint32_t*>(memory + kPositionBlock * kWidth)) {
    for (int64_t r = 0; r < rows; ++r) keep(r, Lanes());
  }
  Lanes at(int64_t r) const {
    Lanes lanes;
    lanes.least = load(least + r * kWidth);
    lanes.where = load_u32(where + r * kWidth);
    return lanes;
  }
  void keep(int64_t r, const Lanes& lanes) const {
    store(least + r * kWidth, lanes.least);
    store_u32(where + r * kWidth, lanes.where);
  }
};

inline vu lane_numbers() {
  vu lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  return lane;
}

// ---- codes of many channels: products of a block of positions with a panel, then their comparison ------------------

int64_t scratch_words(int64_t width) { return kPositionBlock * (width + kPanel + 2 * kWidth); }

void search_wide(int64_t rows, const Codebook& book, int64_t* codes, uint32_t* left) {
  float* products = reinterpret_cast<float*>(left + kPositionBlock * book.width);
  const Best best(products + kPositionBlock * kPanel, rows);
  const vu lane = lane_numbers();
  for (int64_t first = 0; first < book.size; first += kPanel) {
    const uint32_t* panel = book.packed + first * book.width;
    product<Float>({left, book.width, panel, kPanel, book.width, products, kPanel, nullptr}, rows, kMaxVectors);
    for (int64_t r = 0; r < rows; ++r) {
      Lanes lanes = best.at(r);
      for (int n = 0; n < kMaxVectors; ++n) {
        const vf squares = load(book.squares + first + n * kWidth);
        lanes.meet(squares - 2.0f * load(products + r * kPanel + n * kWidth),
                   lane + static_cast<uint32_t>(first + n * kWidth));
      }
      best.keep(r, lanes);
    }
  }
  for (int64_t r = 0; r < rows; ++r) codes[r] = best.at(r).lowest();
}

// ---- codes of a few channels, as latents have them -----------------------------------------------------------------
//
// A product is then so short that storing and comparing it would take most of the time. Positions stay in registers,
// and only the least distance of a run of codes is kept; which of them it belongs to is asked once, of the best run.

constexpr int64_t kRun = 4 * kPanel;
constexpr int64_t kNear = 4 * kRun;  // codes that stay in the nearest cache while all positions meet them
constexpr int kFewChannels = 4;
#if defined(__AVX512F__)
constexpr int kFewRows = 4;  // 4 x 4 factors, 4 minima and a vector of codes in 32 registers
#else
constexpr int kFewRows = 2;
#endif

inline vf smaller(vf a, vf b) {  // b where either is no number
#if defined(__AVX512F__)
  return bits<vf>(_mm512_min_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(__AVX2__)
  return bits<vf>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

template <int D>
struct FewCodes {  // a vector of codes
  vf channel[D], squares;

  FewCodes(const Codebook& book, int64_t first) {
    const uint32_t* panel = book.packed + first / kPanel * kPanel * D + first % kPanel;
#pragma GCC unroll 4
    for (int k = 0; k < D; ++k) channel[k] = bits<vf>(load_u32(panel + k * kPanel));
    squares = load(book.squares + first);
  }

  // z comes times -2, which rounds nothing. The sum begins at zero, as that of a product of many channels does: each
  // rounding is the same, and so is the code that is chosen.
  vf distance(const vf* z) const {
    vf sum = {};
#pragma GCC unroll 4
    for (int k = 0; k < D; ++k) sum = channel[k] * z[k] + sum;
    return squares + sum;
  }
};

// A position in every lane, times -2.
template <int D>
inline void spread(const uint32_t* row, vf* z) {
#pragma GCC unroll 4
  for (int k = 0; k < D; ++k) z[k] = bits<vf>(row[k] + vu{}) * -2.0f;
}

inline int64_t end_of(int64_t first, int64_t length, int64_t end) {
  return first + length < end ? first + length : end;
}

// Codes [begin, end) and R positions from `row` on.
template <int D, int R>
void scan(const uint32_t* left, const Codebook& book, int64_t begin, int64_t end, const Best& best, int64_t row) {
  vf z[R][D];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) spread<D>(left + (row + r) * D, z[r]);
  for (int64_t run = begin; run < end; run += kRun) {
    vf least[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) least[r] = splat(__builtin_inff());
    const int64_t stop = end_of(run, kRun, end);
    for (int64_t first = run; first < stop; first += kWidth) {
      const FewCodes<D> few(book, first);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) least[r] = smaller(few.distance(z[r]), least[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Lanes lanes = best.at(row + r);
      lanes.meet(least[r], vu{} + static_cast<uint32_t>(run));
      best.keep(row + r, lanes);
    }
  }
}

template <int D>
void search_few(int64_t rows, const Codebook& book, int64_t* codes, uint32_t* left) {
  const Best best(reinterpret_cast<float*>(left + kPositionBlock * D), rows);
  const int64_t padded = (book.size + kPanel - 1) / kPanel * kPanel;
  for (int64_t near = 0; near < padded; near += kNear) {
    const int64_t end = end_of(near, kNear, padded);
    int64_t r = 0;
    for (; r + kFewRows <= rows; r += kFewRows) scan<D, kFewRows>(left, book, near, end, best, r);
    for (; r < rows; ++r) scan<D, 1>(left, book, near, end, best, r);
  }
  const vu lane = lane_numbers();
  for (int64_t r = 0; r < rows; ++r) {
    vf z[D];
    spread<D>(left + r * D, z);
    Lanes lanes;
    const int64_t run = best.at(r).lowest();
    for (int64_t first = run; first < end_of(run, kRun, padded); first += kWidth)
      lanes.meet(FewCodes<D>(book, first).distance(z), lane + static_cast<uint32_t>(first));
    codes[r] = lanes.lowest();
  }
}

template <class T>
void search(const char* z, int64_t rows, const Codebook& book, int64_t* codes, uint32_t* scratch) {
  static_assert(kFewChannels == 4, "one case each");
  load_rows<T>(z, rows, book.width, scratch);
  switch (book.width) {
    case 1: return search_few<1>(rows, book, codes, scratch);
    case 2: return search_few<2>(rows, book, codes, scratch);
    case 3: return search_few<3>(rows, book, codes, scratch);
    case 4: return search_few<4>(rows, book, codes, scratch);
    default: return search_wide(rows, book, codes, scratch);
  }
}

template <class T, class C>
void copy(const Codebook& book, int64_t code, char* out) {
  const C* row = reinterpret_cast<const C*>(book.rows) + code * book.width;
  T* target = reinterpret_cast<T*>(out);
  for (int64_t c = 0; c < book.width; c += kWidth) {
    const int count = static_cast<int>(book.width - c < kWidth ? book.width - c : kWidth);
    if (count == kWidth)
      store(target + c, load(row + c));
    else
      store_partial(target + c, load_partial(row + c, count), count);
  }
}

}  // namespace

extern const VqKernels kVqKernels = {
    kPanel,
    scratch_words,
    {pack<float>, pack<bf16>, pack<fp16>},
    {search<float>, search<bf16>, search<fp16>},
    {{copy<float, float>, copy<float, bf16>, copy<float, fp16>},
     {copy<bf16, float>, copy<bf16, bf16>, copy<bf16, fp16>},
     {copy<fp16, float>, copy<fp16, bf16>, copy<fp16, fp16>}},
};

}  // namespace IDM_ISA
}  // namespace idm
