// The vector code of conv2d; compiled once per instruction set.
#include "common/simd.h"
#include "common/vector_math.h"
#include "conv2d/conv2d.h"
#include "conv2d/prologue.h"
#include "conv2d/tile.h"

namespace idm {
namespace IDM_ISA {
namespace {

#if defined(__AVX512BF16__)
struct Bf16Dot {
  typedef vf Sum;
  static constexpr int64_t kChunk = 0;
  static vf start(const ConvTile&, int) { return vf{}; }
  static vu weights(const char* p) { return bits<vu>(_mm512_loadu_si512(p)); }
  static vu broadcast(const char* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return bits<vu>(_mm512_set1_epi32(word));
  }
  static vf dot(vf sum, vu a, vu b) {
    return bits<vf>(_mm512_dpbf16_ps(bits<__m512>(sum), (__m512bh)bits<__m512>(a), (__m512bh)bits<__m512>(b)));
  }
  static vf finish(const ConvTile&, vf sum, int) { return sum; }
};
typedef Bf16Dot DotOfBf16;
typedef bf16 WordOfBf16;
#else
typedef FloatDot DotOfBf16;
typedef float WordOfBf16;
#endif

// What a T is in the words that the product reads.
template <class T>
struct Traits {
  typedef FloatDot Dot;
  typedef float Word;
};
template <>
struct Traits<bf16> {
  typedef DotOfBf16 Dot;
  typedef WordOfBf16 Word;
};

// ---- prologue ----------------------------------------------------------------------------------------------------

// Rounds to T, as a tensor of the prologue's result would.
template <class T>
inline vf rounded(vf v) {
  T lanes[kWidth];
  store(lanes, v);
  return load(lanes);
}
template <>
inline vf rounded<float>(vf v) {
  return v;
}

template <class T>
inline void put(typename Traits<T>::Word* p, vf v) {
  if constexpr (sizeof(typename Traits<T>::Word) == sizeof(T))
    store(p, v);
  else
    store(p, rounded<T>(v));
}

template <class T, Prologue kind>
void prepare_pixels(const T* x, int64_t count, int64_t channels, const float* coefficients, int64_t all_channels,
                    typename Traits<T>::Word* target, int64_t pitch) {
  typedef typename Traits<T>::Word Word;
  if (kind == Prologue::kNone && sizeof(Word) == sizeof(T) && pitch == channels) {
    std::memcpy(target, x, static_cast<size_t>(count * channels) * sizeof(T));
    return;
  }
  const float *centre = coefficients, *gain = centre + all_channels, *offset = gain + all_channels;
  const int64_t whole = channels - channels % kWidth;
  const int lanes = static_cast<int>(channels - whole);
  const auto full = [&](const float* p, int64_t c) { return kind == Prologue::kNone ? vf{} : load(p + c); };
  const auto part = [&](const float* p) { return kind == Prologue::kNone ? vf{} : load_partial(p + whole, lanes); };
  const vf last[3] = {lanes ? part(centre) : vf{}, lanes ? part(gain) : vf{}, lanes ? part(offset) : vf{}};
  for (int64_t i = 0; i < count; ++i, x += channels, target += pitch) {
    for (int64_t c = 0; c < whole; c += kWidth)
      put<T>(target + c, prologue<kIsBf16<T>, kind>(load(x + c), full(centre, c), full(gain, c), full(offset, c)));
    if (lanes) {
      Word tail[kWidth];
      put<T>(tail, prologue<kIsBf16<T>, kind>(load_partial(x + whole, lanes), last[0], last[1], last[2]));
      std::memcpy(target + whole, tail, static_cast<size_t>(lanes) * sizeof(Word));
    }
  }
}

template <class T>
void prepare(const ConvPrepare& p) {
  typedef typename Traits<T>::Word Word;
  const int64_t channels = p.channels[0] + p.channels[1], pitch = p.pitch * 4 / static_cast<int64_t>(sizeof(Word));
  const size_t halo_bytes = static_cast<size_t>(p.halo * p.pitch * 4);
  Word* target = reinterpret_cast<Word*>(p.target);
  for (int64_t r = 0; r < p.rows; ++r, target += (p.width + 2 * p.halo) * pitch) {
    const int64_t row = p.first_row + r;
    if (row < 0 || row >= p.height) {
      std::memset(target, 0, static_cast<size_t>((p.width + 2 * p.halo) * p.pitch * 4));
      continue;
    }
    std::memset(target, 0, halo_bytes);
    Word* inner = target + p.halo * pitch;
    std::memset(inner + p.width * pitch, 0, halo_bytes);
    if (pitch > channels)
      for (int64_t i = 0; i < p.width; ++i)
        for (int64_t c = channels; c < pitch; ++c) inner[i * pitch + c] = Word{};
    int64_t first = 0;
    for (int s = 0; s < 2; ++s) {
      const int64_t count = p.channels[s];
      if (count == 0) continue;
      const T* x = reinterpret_cast<const T*>(p.source[s]) + row * p.width * count;
      if (!p.coefficients)
        prepare_pixels<T, Prologue::kNone>(x, p.width, count, nullptr, 0, inner + first, pitch);
      else if (p.silu)
        prepare_pixels<T, Prologue::kSilu>(x, p.width, count, p.coefficients + first, channels, inner + first, pitch);
      else
        prepare_pixels<T, Prologue::kAffine>(x, p.width, count, p.coefficients + first, channels, inner + first, pitch);
      first += count;
    }
  }
}

// ---- weights -----------------------------------------------------------------------------------------------------

// [cout][taps][channels] -> strips of [taps][words][output channel][channels of the word], padded with zeros.
template <class T>
void pack(const char* source, int64_t cout, int64_t taps, int64_t channels, char* packed) {
  typedef typename Traits<T>::Word Word;
  constexpr int64_t kPer = 4 / static_cast<int64_t>(sizeof(Word));
  const T* weight = reinterpret_cast<const T*>(source);
  Word* target = reinterpret_cast<Word*>(packed);
  for (int64_t strip_first = 0; strip_first < cout; strip_first += kStrip) {
    const int64_t left = cout - strip_first < kStrip ? cout - strip_first : kStrip;
    const int64_t padded = (left + kWidth - 1) / kWidth * kWidth;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; c += kPer)
        for (int64_t lane = 0; lane < padded; ++lane)
          for (int64_t i = 0; i < kPer; ++i, ++target) {
            Word value = {};
            if (lane < left && c + i < channels) {
              Word lanes[kWidth];
              store(lanes, load_partial(weight + ((strip_first + lane) * taps + tap) * channels + c + i, 1));
              value = lanes[0];
            }
            *target = value;
          }
  }
}

template <class T>
void add(const char* source, int64_t count, float* target) {
  const T* p = reinterpret_cast<const T*>(source);
  for (int64_t i = 0; i < count; i += kWidth) {
    const int lanes = static_cast<int>(count - i < kWidth ? count - i : kWidth);
    store_partial(target + i, load_partial(target + i, lanes) + load_partial(p + i, lanes), lanes);
  }
}

template <class T>
constexpr int64_t kPerWord = 4 / static_cast<int64_t>(sizeof(typename Traits<T>::Word));

}  // namespace

extern const Conv2dKernels kConv2dKernels = {
    kWidth,
    kStrip,
    {kPerWord<float>, kPerWord<bf16>, kPerWord<fp16>},
    {prepare<float>, prepare<bf16>, prepare<fp16>},
    {strip<Traits<float>::Dot, float>, strip<Traits<bf16>::Dot, bf16>, strip<Traits<fp16>::Dot, fp16>},
    {pack<float>, pack<bf16>, pack<fp16>},
    {add<float>, add<bf16>, add<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
