// One pass: conversion, clamp or threshold, update, noise, and the cast into the network's own layout. A thread takes the
// four elements of one Philox counter.
#include "sampler_update/sampler_update.h"

#include "common/cuda.h"
#include "common/philox.cuh"
#include "sampler_update/contract.h"

namespace idm {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 4;

struct UpdateArgs {
  float* x;
  float* history;
  const float* base;  // or null
  const float* table;
  const int64_t* counter;  // or null
  const int64_t* seeds;
  const float* threshold;  // or null
  int64_t step, rows;
  int64_t elements, blocks;  // of one sample
  int64_t channels, width, pitch, unshuffle;
  bool plain;    // network_input is laid out as x
  bool shuffled;  // model_output is not
  bool aligned;  // four elements lie in one word of 16 or 8 bytes, everywhere
};

// Four neighbours as float32, those beyond `count` as zero.
template <class T>
__device__ __forceinline__ void load4(const T* p, bool aligned, int count, float to[kLanes]) {
  if (aligned) {
    T lanes[kLanes];
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(lanes) = *reinterpret_cast<const float4*>(p);
    else
      *reinterpret_cast<uint2*>(lanes) = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) to[j] = to_float(lanes[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) to[j] = j < count ? to_float(p[j]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store4(T* p, bool aligned, int count, const float from[kLanes]) {
  if (aligned) {
    T lanes[kLanes];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) lanes[j] = from_float<T>(from[j]);
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(lanes);
    else
      *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(lanes);
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (j < count) p[j] = from_float<T>(from[j]);
  }
}

// Where element e of sample n lies in the network's own layout, whose positions are `pitch` elements apart.
__device__ __forceinline__ int64_t unshuffled(const UpdateArgs& a, int64_t n, int64_t e, int64_t pitch) {
  const int64_t f = a.unshuffle, position = e / a.channels, channel = e - position * a.channels;
  const int64_t h = position / a.width, w = position - h * a.width;
  const int64_t image = a.elements / a.channels / (f * f);
  return (n * image + h / f * (a.width / f) + w / f) * pitch + (channel * f + h % f) * f + w % f;
}

template <class M, class I>
__global__ void __launch_bounds__(kThreads) update_kernel(UpdateArgs a, const M* model_output, I* network_input) {
  const int64_t n = blockIdx.x / a.blocks;
  const int64_t quad = (blockIdx.x - n * a.blocks) * kThreads + threadIdx.x, e = quad * kLanes;
  if (e >= a.elements) return;  // no barrier follows
  const int count = static_cast<int>(min(int64_t{kLanes}, a.elements - e));
  const int64_t at = n * a.elements + e;
  const int64_t step = a.counter == nullptr ? a.step : max(int64_t{0}, min(*a.counter, a.rows - 1));
  const float* row = a.table + step * 8;
  const float k_x = row[0], k_out = row[1], gain = row[2], b = row[3], c = row[4], s = row[5];
  const bool rescale = a.threshold != nullptr;
  const float limit = rescale ? a.threshold[n] : row[6];

  float old[kLanes], output[kLanes], past[kLanes] = {}, x0[kLanes], next[kLanes];
  load4(a.x + at, a.aligned, count, old);
  if (a.shuffled) {
    const int64_t pitch = a.channels * a.unshuffle * a.unshuffle;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) output[j] = j < count ? to_float(model_output[unshuffled(a, n, e + j, pitch)]) : 0.0f;
  } else {
    load4(model_output + at, a.aligned, count, output);
  }
  if (a.base != nullptr) {
    float base[kLanes];
    load4(a.base + at, a.aligned, count, base);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) output[j] += base[j];
  }
  if (c != 0.0f) load4(a.history + at, a.aligned, count, past);
  float4 noise = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (s != 0.0f)
    noise = philox_normals(static_cast<uint64_t>(quad), static_cast<uint64_t>(a.seeds[n]), static_cast<uint32_t>(step + 1));
  const float noises[kLanes] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    float v = old[j] * k_x + output[j] * k_out;
    if (rescale || limit > 0.0f) {  // comparisons that a NaN fails, so that it stays one
      v = v > limit ? limit : v;
      v = v < -limit ? -limit : v;
      if (rescale) v = v / limit;
    }
    x0[j] = v;
    next[j] = old[j] * gain + v * b + past[j] * c + noises[j] * s;
  }
  store4(a.x + at, a.aligned, count, next);
  store4(a.history + at, a.aligned, count, x0);
  if (network_input == nullptr) return;
  if (a.plain) {
    store4(network_input + at, a.aligned, count, next);
    return;
  }
#pragma unroll
  for (int j = 0; j < kLanes; ++j)
    if (j < count) network_input[unshuffled(a, n, e + j, a.pitch)] = from_float<I>(next[j]);
}

__global__ void __launch_bounds__(kThreads)
    normal_kernel(float* out, const int64_t* seeds, uint32_t word2, int64_t elements, int64_t blocks, bool aligned) {
  const int64_t n = blockIdx.x / blocks;
  const int64_t quad = (blockIdx.x - n * blocks) * kThreads + threadIdx.x, e = quad * kLanes;
  if (e >= elements) return;  // no barrier follows
  const float4 noise = philox_normals(static_cast<uint64_t>(quad), static_cast<uint64_t>(seeds[n]), word2);
  const float noises[kLanes] = {noise.x, noise.y, noise.z, noise.w};
  store4(out + n * elements + e, aligned, static_cast<int>(min(int64_t{kLanes}, elements - e)), noises);
}

int64_t blocks_of(int64_t elements) { return (elements + kThreads * kLanes - 1) / (kThreads * kLanes); }

unsigned grid_of(const char* op, int64_t blocks) {
  require(blocks <= 0x7fffffffLL, op, "the tensors must have fewer than 2^40 elements");
  return static_cast<unsigned>(blocks);
}

bool in_words(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) % (kLanes * element_size(t.dtype)) == 0; }

}  // namespace

void sampler_update_cuda(const TensorView& x, const TensorView& model_output, const TensorView& history,
                         const TensorView& table, int64_t step, const TensorView& counter, const TensorView& seeds,
                         const TensorView& network_input, const TensorView& threshold, const TensorView& base,
                         int64_t unshuffle, uint64_t stream) {
  if (x.numel() == 0) return;
  const auto [pitch, shuffled] = check_sampler_update(x, model_output, history, table, step, seeds, network_input,
                                                      threshold, base, unshuffle);
  require(!counter || (counter.dtype == DType::kInt64 && counter.numel() == 1), "sampler_update", "counter must be int64 [1]");
  UpdateArgs a{};
  a.x = x.as<float>();
  a.history = history.as<float>();
  a.base = base.as<const float>();
  a.table = table.as<const float>();
  a.counter = counter.as<const int64_t>();
  a.seeds = seeds.as<const int64_t>();
  a.threshold = threshold.as<const float>();
  a.step = step;
  a.rows = table.shape[0];
  a.elements = x.numel() / x.shape[0];
  a.blocks = blocks_of(a.elements);
  a.channels = x.shape[1];
  a.width = x.shape[3];
  a.pitch = pitch;
  a.unshuffle = unshuffle;
  a.plain = unshuffle == 1 && pitch == a.channels;
  a.shuffled = shuffled;
  a.aligned = a.elements % kLanes == 0 && in_words(x) && in_words(history) && (shuffled || in_words(model_output)) &&
              (!base || in_words(base)) && (!network_input || !a.plain || in_words(network_input));
  const unsigned grid = grid_of("sampler_update", x.shape[0] * a.blocks);
  visit_float(model_output.dtype, [&](auto output) {
    using M = typename decltype(output)::type;
    visit_float(network_input ? network_input.dtype : model_output.dtype, [&](auto input) {
      using I = typename decltype(input)::type;
      launch(update_kernel<M, I>, grid, kThreads, 0, stream, a, model_output.as<const M>(), network_input.as<I>());
    });
  });
}

void philox_normal_cuda(const TensorView& out, const TensorView& seeds, int64_t step, uint64_t stream) {
  if (out.numel() == 0) return;
  check_philox_normal(out, seeds, step);
  const int64_t elements = out.numel() / out.shape[0], blocks = blocks_of(elements);
  const bool aligned = elements % kLanes == 0 && in_words(out);
  launch(normal_kernel, grid_of("philox_normal", out.shape[0] * blocks), kThreads, 0, stream, out.as<float>(),
         seeds.as<const int64_t>(), static_cast<uint32_t>(step + 1), elements, blocks, aligned);
}

}  // namespace idm
