// The vector code of attention; compiled once per instruction set.
#include "attention/attention.h"
#include "common/simd.h"
#include "common/tile_product.h"
#include "common/vector_math.h"

namespace idm {
namespace IDM_ISA {
namespace {

constexpr int64_t kKeyBlock = 256;  // keys between two corrections of the running maximum; a multiple of every panel

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ---- the value channels, in chunks of vectors as equal as can be --------------------------------------------------

struct Chunks {
  int64_t vectors, count;
  explicit Chunks(int64_t width)
      : vectors((width + kWidth - 1) / kWidth), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t chunk) const { return vectors * chunk / count; }  // in vectors
};

template <class E>
AttentionSizes sizes(int64_t keys, int64_t width) {
  const int64_t padded_keys = round_up(keys, kPanel), padded_width = round_up(width, kWidth);
  const int64_t words = words_of(width, E::kPerWord);
  const int64_t block = kQueryBlock * (words + kKeyBlock + padded_width + 3);
  return {kPanel, padded_keys * words, padded_keys / E::kPerWord * padded_width, round_up(block, 16)};
}

// Keys become columns; values keep their order, [chunk][key or pair of keys][lanes of the chunk].
template <class E, class T>
void pack(const AttentionHead& head, int64_t panel) {
  const int64_t first = panel * kPanel;
  const int64_t rows = head.keys - first < kPanel ? head.keys - first : kPanel;
  const int64_t padded = round_up(head.keys, kPanel) / E::kPerWord;
  const T* k = reinterpret_cast<const T*>(head.k) + first * head.k_stride;
  const T* v = reinterpret_cast<const T*>(head.v) + first * head.v_stride;
  pack_columns<E>(k, head.k_stride, rows, head.width, head.packed_keys + first * words_of(head.width, E::kPerWord));

  auto row = [&](int64_t key, int64_t lane) { return row_words<Float>(v + key * head.v_stride, head.width, lane); };
  const Chunks chunks(head.width);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk) * kWidth, lanes = chunks.begin(chunk + 1) * kWidth - begin;
    uint32_t* out = head.packed_values + begin * padded + first / E::kPerWord * lanes;
    for (int64_t key = 0; key < kPanel; key += E::kPerWord, out += lanes)
      for (int64_t lane = 0; lane < lanes; lane += kWidth) {
        vu words = key < rows ? row(key, begin + lane) : vu{};
        if constexpr (E::kPerWord == 2)  // a bf16 widened to float32 is its bits in the upper half
          words = words >> 16 | (key + 1 < rows ? row(key + 1, begin + lane) : vu{});
        store_u32(out + lane, words);
      }
  }
}

// ---- softmax -----------------------------------------------------------------------------------------------------

// 2^t for t <= 0, zero where that is too small for a float. NaN stays NaN.
template <bool kCoarse>
inline vf exp2_negative(vf t) {
#if defined(__AVX512F__)
  const vf held = t < -160.0f ? splat(-160.0f) : t;
  const vf n = bits<vf>(_mm512_roundscale_ps(bits<__m512>(held), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return bits<vf>(_mm512_scalef_ps(bits<__m512>(exp2_fraction<kCoarse>(held - n)), bits<__m512>(n)));
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = t + kRound;
  const vf p = exp2_fraction<kCoarse>(t - (shifted - kRound));
  const vf power = bits<vf>(bits<vu>(p) + (bits<vu>(shifted) << 23));
  return t < -126.0f ? vf{} : t == t ? power : t;
#endif
}

inline float sum_lanes(vf v) {
  float lanes[kWidth], sum = 0.0f;
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
}

// The running softmax of one query.
struct Running {
  float *highest, *total, *keep;
};

// Scores of `keys` keys -> weights in their place (pairs of bf16 in the first half of it), up to a multiple of kWidth.
template <class E>
void soften(float* row, int64_t keys, float sign, float scale_log2, bool first, Running state) {
  const int64_t whole = keys - keys % kWidth;
  const int left = static_cast<int>(keys - whole);
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;

  const vf lowest = splat(-__builtin_inff());
  vf high = first ? lowest : splat(*state.highest);
  if (sign != 1.0f)
    for (int64_t i = 0; i < round_up(keys, kWidth); i += kWidth) store(row + i, load(row + i) * sign);
  for (int64_t i = 0; i < whole; i += kWidth) {
    const vf s = load(row + i);
    high = s > high ? s : high;
  }
  if (left) {
    const vf s = lane < left ? load(row + whole) : lowest;
    high = s > high ? s : high;
  }
  float highest = high[0];
  for (int i = 1; i < kWidth; ++i) highest = high[i] > highest ? high[i] : highest;

  auto weigh = [&](int64_t i) { return exp2_negative<(E::kPerWord == 2)>((load(row + i) - highest) * scale_log2); };
  auto write = [&](int64_t i, vf weight) {
    if constexpr (E::kPerWord == 2)
      store(reinterpret_cast<bf16*>(row) + i, weight);
    else
      store(row + i, weight);
  };
  vf sum = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const vf weight = weigh(i);
    sum += weight;
    write(i, weight);
  }
  if (left) {
    const vf weight = lane < left ? weigh(whole) : vf{};
    sum += weight;
    write(whole, weight);
  }
  *state.keep = first ? 0.0f : exp2_negative<false>(splat((*state.highest - highest) * scale_log2))[0];
  *state.total = first ? sum_lanes(sum) : *state.total * *state.keep + sum_lanes(sum);
  *state.highest = highest;
}

// ---- a block of queries ------------------------------------------------------------------------------------------

template <class E, class T>
void attend(const AttentionHead& head, int64_t first_query, int64_t rows, uint32_t* scratch) {
  const int64_t words = words_of(head.width, E::kPerWord), padded_width = round_up(head.width, kWidth);
  const int64_t padded_keys = round_up(head.keys, kPanel) / E::kPerWord;
  uint32_t* query = scratch;
  float* scores = reinterpret_cast<float*>(query + kQueryBlock * words);
  float* sums = scores + kQueryBlock * kKeyBlock;
  float *highest = sums + kQueryBlock * padded_width, *total = highest + kQueryBlock, *keep = total + kQueryBlock;

  for (int64_t r = 0; r < rows; ++r) {
    const T* source = reinterpret_cast<const T*>(head.q) + (first_query + r) * head.q_stride;
    for (int64_t word = 0; word < words; word += kWidth) {
      const vu v = row_words<E>(source, head.width, word);
      std::memcpy(query + r * words + word, &v, static_cast<size_t>(words - word < kWidth ? words - word : kWidth) * 4);
    }
  }

  const Chunks chunks(head.width);
  for (int64_t block = 0; block < head.keys; block += kKeyBlock) {
    const int64_t keys = head.keys - block < kKeyBlock ? head.keys - block : kKeyBlock;
    for (int64_t key = 0; key < keys; key += kPanel) {
      const uint32_t* panel = head.packed_keys + (block + key) * words;
      const int64_t width = keys - key < kPanel ? keys - key : kPanel;
      product<E>({query, words, panel, kPanel, words, scores + key, kKeyBlock, nullptr}, rows,
                 static_cast<int>((width + kWidth - 1) / kWidth));
    }
    for (int64_t r = 0; r < rows; ++r)
      soften<E>(scores + r * kKeyBlock, keys, head.sign, head.scale_log2, block == 0,
                {highest + r, total + r, keep + r});
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t begin = chunks.begin(chunk) * kWidth, lanes = chunks.begin(chunk + 1) * kWidth - begin;
      const uint32_t* values = head.packed_values + begin * padded_keys + block / E::kPerWord * lanes;
      product<E>({reinterpret_cast<const uint32_t*>(scores), kKeyBlock, values, lanes, words_of(keys, E::kPerWord),
                  sums + begin, padded_width, block == 0 ? nullptr : keep},
                 rows, static_cast<int>(lanes / kWidth));
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    T* out = reinterpret_cast<T*>(head.out) + (first_query + r) * head.out_stride;
    const vf share = splat(1.0f / total[r]);
    for (int64_t c = 0; c < head.width; c += kWidth) {
      const vf y = load(sums + r * padded_width + c) * share;
      if (head.width - c >= kWidth)
        store(out + c, y);
      else
        store_partial(out + c, y, static_cast<int>(head.width - c));
    }
  }
}

#if defined(__AVX512BF16__)
using Bf16 = Pairs;
#else
using Bf16 = Float;
#endif

}  // namespace

extern const AttentionKernels kAttentionKernels = {
    {sizes<Float>, sizes<Bf16>, sizes<Float>},
    {pack<Float, float>, pack<Bf16, bf16>, pack<Float, fp16>},
    {attend<Float, float>, attend<Bf16, bf16>, attend<Float, fp16>},
};

}  // namespace IDM_ISA
}  // namespace idm
