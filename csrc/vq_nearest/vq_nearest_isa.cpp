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

int64_t scratch_words(int64_t width) { return kPositionBlock * (width + kPanel + 2 * kWidth); }

// Each lane keeps the best of the codes that it has met, in order; at the end the lanes are compared.
template <class T>
void search(const char* z, int64_t rows, const Codebook& book, int64_t* codes, uint32_t* scratch) {
  uint32_t* left = scratch;
  float* products = reinterpret_cast<float*>(left + kPositionBlock * book.width);
  float* best = products + kPositionBlock * kPanel;
  uint32_t* chosen = reinterpret_cast<uint32_t*>(best + kPositionBlock * kWidth);
  const T* source = reinterpret_cast<const T*>(z);
  vu lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);

  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < book.width; c += kWidth) {
      const vu v = row_words<Float>(source + r * book.width, book.width, c);
      const int64_t count = book.width - c < kWidth ? book.width - c : kWidth;
      std::memcpy(left + r * book.width + c, &v, static_cast<size_t>(count) * 4);
    }
    store(best + r * kWidth, splat(__builtin_inff()));
    store_u32(chosen + r * kWidth, vu{});
  }
  for (int64_t first = 0; first < book.size; first += kPanel) {
    const uint32_t* panel = book.packed + first * book.width;
    product<Float>({left, book.width, panel, kPanel, book.width, products, kPanel, nullptr}, rows, kMaxVectors);
    for (int64_t r = 0; r < rows; ++r) {
      vf least = load(best + r * kWidth);
      vu code = load_u32(chosen + r * kWidth);
      for (int n = 0; n < kMaxVectors; ++n) {
        const vf squares = load(book.squares + first + n * kWidth);
        const vf distance = squares - 2.0f * load(products + r * kPanel + n * kWidth);
        const vi better = distance < least;  // false for what is no number
        least = better ? distance : least;
        code = better ? lane + static_cast<uint32_t>(first + n * kWidth) : code;
      }
      store(best + r * kWidth, least);
      store_u32(chosen + r * kWidth, code);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float least = __builtin_inff();
    uint32_t code = 0;
    for (int i = 0; i < kWidth; ++i) {
      const float value = best[r * kWidth + i];
      const uint32_t mine = chosen[r * kWidth + i];
      if (value < least || (value == least && value < __builtin_inff() && mine < code)) least = value, code = mine;
    }
    codes[r] = code;
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
