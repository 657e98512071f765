// The vector code of sampler_update; compiled once per instruction set.
#include "sampler_update/sampler_update.h"

#include "common/philox.h"
#include "common/simd.h"

namespace idm {
namespace IDM_ISA {
namespace {

constexpr int kStride = 4 * kWidth;  // elements per turn: kWidth counters of four normals

constexpr int64_t kPrefetch = 512;  // elements ahead

struct None {};

template <class I>
inline void store_input(I* p, vf v) {
  store(p, v);
}
inline void store_input(None*, vf) {}

// One turn: kStride elements at x, model_output, base (or null), history, input; `counter` is the number of the first
// element / 4.
template <class M, class I, bool kStream>
inline void turn(const SamplerRow& row, const SamplerSpan& span, uint64_t counter, float* x, const M* model_output,
                 const float* base, float* history, I* input) {
  vf noise[4];
  if (row.s != 0.0f) normals(counter, PhiloxStream{span.seed, span.word2}, noise);
  for (int i = 0; i < 4; ++i) {
    const int at = i * kWidth;
    const vf old = load(x + at);
    vf output = load(model_output + at);
    if (base) output += load(base + at);
    vf x0 = old * row.k_x + output * row.k_out;
    if (span.rescale || span.limit > 0.0f) {  // comparisons that a NaN fails, so that it stays one
      x0 = x0 > span.limit ? splat(span.limit) : x0;
      x0 = x0 < -span.limit ? splat(-span.limit) : x0;
      if (span.rescale) x0 = x0 / span.limit;
    }
    vf next = old * row.a + x0 * row.b;
    if (row.c != 0.0f) next += load(history + at) * row.c;
    if (row.s != 0.0f) next += noise[i] * row.s;
    store(x + at, next);
    if constexpr (kStream)
      stream(history + at, x0);
    else
      store(history + at, x0);
    store_input(input + at, next);
  }
}

// body(first element of the image row in the network's own layout, offsets from there, how many, how many before) for
// each piece of an image row that elements [e, e + count) have.
template <class F>
inline void each_row(const SamplerSpan& span, const SamplerSpan::Places& places, int64_t e, int64_t count, const F& body) {
  int64_t h = e / span.row, p = e % span.row, done = 0;
  while (done < count) {
    const int64_t here = count - done < span.row - p ? count - done : span.row - p;
    body(h / span.unshuffle * places.stride + h % span.unshuffle * span.unshuffle, places.offsets + p, here, done);
    done += here;
    ++h;
    p = 0;
  }
}

// Element e and those after it go to their places in the network's own layout.
template <class I>
inline void scatter(const SamplerSpan& span, int64_t e, const I* values, int64_t count) {
  I* input = reinterpret_cast<I*>(span.network_input);
  each_row(span, span.input, e, count, [&](int64_t first, const int64_t* offsets, int64_t here, int64_t done) {
    for (int64_t i = 0; i < here; ++i) input[first + offsets[i]] = values[done + i];
  });
}
inline void scatter(const SamplerSpan&, int64_t, const None*, int64_t) {}

// The way back: model_output's elements from their places.
template <class M>
inline void gather(const SamplerSpan& span, int64_t e, M* values, int64_t count) {
  const M* output = reinterpret_cast<const M*>(span.model_output);
  each_row(span, span.output, e, count, [&](int64_t first, const int64_t* offsets, int64_t here, int64_t done) {
    for (int64_t i = 0; i < here; ++i) values[done + i] = output[first + offsets[i]];
  });
}

// kStream: the history is written past the caches.
template <class M, class I, bool kStream>
void update_as(const SamplerRow& row, const SamplerSpan& span) {
  const M* model_output = reinterpret_cast<const M*>(span.model_output);
  I* input = reinterpret_cast<I*>(span.network_input);
  I cast[kStride] = {};
  M gathered[kStride] = {};
  int64_t e = span.begin;
  for (; e + kStride <= span.end; e += kStride) {
    I* target = span.input.offsets ? cast : input + e;
    // The network has driven these out of the caches between two updates: ask for them early.
    for (int64_t ahead = kPrefetch; ahead < kPrefetch + kStride; ahead += 16) {
      __builtin_prefetch(span.x + e + ahead, 1);
      if (!kStream) __builtin_prefetch(span.history + e + ahead, 1);
      if (span.base) __builtin_prefetch(span.base + e + ahead);
      if (ahead % (64 / sizeof(M)) == 0) __builtin_prefetch(model_output + e + ahead);
    }
    if (span.output.offsets) gather(span, e, gathered, kStride);
    turn<M, I, kStream>(row, span, static_cast<uint64_t>(e) / 4, span.x + e,
                        span.output.offsets ? gathered : model_output + e, span.base ? span.base + e : nullptr, span.history + e, target);
    if (span.input.offsets) scatter(span, e, cast, kStride);
  }
  if (kStream) stream_done();
  if (e == span.end) return;

  const size_t left = static_cast<size_t>(span.end - e);
  float x[kStride] = {}, history[kStride] = {}, base[kStride] = {};
  std::memcpy(x, span.x + e, left * sizeof(float));
  if (span.base) std::memcpy(base, span.base + e, left * sizeof(float));
  if (span.output.offsets)
    gather(span, e, gathered, span.end - e);
  else
    std::memcpy(gathered, model_output + e, left * sizeof(M));
  std::memcpy(history, span.history + e, left * sizeof(float));
  turn<M, I, false>(row, span, static_cast<uint64_t>(e) / 4, x, gathered, span.base ? base : nullptr, history, cast);
  std::memcpy(span.x + e, x, left * sizeof(float));
  std::memcpy(span.history + e, history, left * sizeof(float));
  if (span.input.offsets) {
    scatter(span, e, cast, span.end - e);
  } else if (input) {
    std::memcpy(input + e, cast, left * sizeof(I));
  }
}

// A history that this step does not read, no later one may either, or only after the network has filled the caches. To
// write it the usual way would be to read it first.
template <class M, class I>
void update(const SamplerRow& row, const SamplerSpan& span) {
  if (row.c == 0.0f && reinterpret_cast<uintptr_t>(span.history) % 64 == 0)
    update_as<M, I, true>(row, span);
  else
    update_as<M, I, false>(row, span);
}

void normal(const SamplerSpan& span) {
  const PhiloxStream stream{span.seed, span.word2};
  for (int64_t e = span.begin; e < span.end; e += kStride) {
    vf noise[4];
    normals(static_cast<uint64_t>(e) / 4, stream, noise);
    const int64_t left = span.end - e < kStride ? span.end - e : kStride;
    std::memcpy(span.x + e, noise, static_cast<size_t>(left) * sizeof(float));
  }
}

#define IDM_ROW(M) {update<M, float>, update<M, bf16>, update<M, fp16>, update<M, None>}

}  // namespace

extern const SamplerKernels kSamplerKernels = {{IDM_ROW(float), IDM_ROW(bf16), IDM_ROW(fp16)}, normal};

}  // namespace IDM_ISA
}  // namespace idm
