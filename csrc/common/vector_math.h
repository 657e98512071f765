// Elementary functions on vectors. The polynomials are minimax fits (Remez exchange); the error named is relative and
// leaves out the rounding of the float32 evaluation.
#pragma once

#include "common/simd.h"

namespace idm {
namespace IDM_ISA {

// 2^f on [-1/2, 1/2]: 7.5e-8, or 7.5e-5 for results that are stored as bf16 (half an ulp there is 2e-3).
template <bool kCoarse>
inline vf exp2_fraction(vf f) {
  if (kCoarse) return 0.999928074f + f * (0.693260985f + f * (0.242611122f + f * 0.0551716691f));
  return 1.00000007f +
         f * (0.693146967f + f * (0.240221197f + f * (0.0555071327f + f * (0.00967554133f + f * 0.0013276472f))));
}

#if defined(__AVX512F__)
inline vf reciprocal_coarse(vf v) { return bits<vf>(_mm512_rcp14_ps(bits<__m512>(v))); }  // 6.1e-5
#elif defined(__AVX2__)
inline vf reciprocal_coarse(vf v) {  // 3.7e-4, squared by one Newton step
  const vf r = bits<vf>(_mm256_rcp_ps(bits<__m256>(v)));
  return r * (2.0f - v * r);
}
#else
inline vf reciprocal_coarse(vf v) { return 1.0f / v; }
#endif

// e^-x for x >= -87: 2^t = 2^f 2^n with n the nearest integer. NaN may come out as anything.
template <bool kCoarse>
inline vf exp_minus(vf x) {
  const vf t = x * -1.44269504f;
#if defined(__AVX512F__)
  const vf n = bits<vf>(_mm512_roundscale_ps(bits<__m512>(t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return bits<vf>(_mm512_scalef_ps(bits<__m512>(exp2_fraction<kCoarse>(t - n)), bits<__m512>(n)));
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf held = t > -125.0f ? t : splat(-125.0f);
  const vf shifted = held + kRound;
  const vf p = exp2_fraction<kCoarse>(held - (shifted - kRound));
  return bits<vf>(bits<vu>(p) + (bits<vu>(shifted) << 23));
#endif
}

// silu(y) from t = -log2(e) y, which a linear map before it can give for nothing, on K vectors in place; for results
// that are stored as bf16. |y| must stay below 2e38. All take each step together: one vector's steps wait for each other
// for some sixty cycles, and the scheduler has no room for a dozen such chains one after the other.
template <int K>
inline void silu_coarse_of_scaled(vf* t) {
  constexpr float kMinusLog2E = -1.44269504f;
  vf e[K];
#if defined(__AVX512DQ__)
  // 2^t = 2^(t - floor t) * 2^floor t: the two instructions agree on the floor. 7.5e-5.
  vf f[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
    f[k] = bits<vf>(_mm512_reduce_ps(bits<__m512>(t[k]), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = 0.22606731f + f[k] * 0.07802443f;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = 0.69583347f + f[k] * e[k];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = 0.99992523f + f[k] * e[k];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = bits<vf>(_mm512_scalef_ps(bits<__m512>(e[k]), bits<__m512>(t[k])));
#else
  constexpr float kRound = 12582912.0f;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    vf held = t[k] > -125.0f ? t[k] : splat(-125.0f);
    held = held > 125.0f ? splat(125.0f) : held;
    const vf shifted = held + kRound;
    const vf p = exp2_fraction<true>(held - (shifted - kRound));
    e[k] = bits<vf>(bits<vu>(p) + (bits<vu>(shifted) << 23));
  }
#endif
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = reciprocal_coarse(kMinusLog2E * e[k] + kMinusLog2E);
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) t[k] *= e[k];
}

// silu(x) = x / (1 + e^-x); NaN in, NaN out.
template <bool kCoarse>
inline vf silu(vf x) {
#if !defined(__AVX512F__)  // there e^-x may be infinite; here what lies below -87 gives what -87 gives, -1e-36
  x = x < -87.0f ? splat(-87.0f) : x;
#endif
  const vf denominator = 1.0f + exp_minus<kCoarse>(x);
  return kCoarse ? x * reciprocal_coarse(denominator) : x / denominator;
}

#if defined(__AVX512F__)
inline vf vsqrt(vf v) { return bits<vf>(_mm512_sqrt_ps(bits<__m512>(v))); }
#elif defined(__AVX2__)
inline vf vsqrt(vf v) { return bits<vf>(_mm256_sqrt_ps(bits<__m256>(v))); }
#else
inline vf vsqrt(vf v) {
  vf r;
  for (int i = 0; i < kWidth; ++i) r[i] = __builtin_sqrtf(v[i]);
  return r;
}
#endif

// ln(u) for normal u > 0: u = 2^k (1 + t), 1 + t in [sqrt(1/2), sqrt(2)); ln(1+t) = t - t^2/2 + t^3 q(t), 2e-8.
inline vf log_normal(vf u) {
  const vi k = (bits<vi>(u) - 0x3f3504f3) >> 23;
  const vf t = bits<vf>(bits<vi>(u) - (k << 23)) - 1.0f;
  vf q = 0.127989416f - t * 0.0830548986f;
  q = 0.141902317f + t * (-0.129434029f + t * q);
  q = 0.200018801f + t * (-0.166434891f + t * q);
  q = 0.333333265f + t * (-0.250002808f + t * q);
  const vf tail = t * t * (t * q - 0.5f);
  return t + (tail + __builtin_convertvector(k, vf) * 0.693147181f);
}

// (cos, sin) of 2 pi u for u in [0, 1]: the quarter turn is split off exactly, |rest| <= 1/8; 3.3e-8.
inline void cos_sin_turns(vf u, vf* cosine, vf* sine) {
  constexpr float kRound = 12582912.0f;
  const vf shifted = u * 4.0f + kRound;
  const vf f = u - (shifted - kRound) * 0.25f;
  const vu quarter = bits<vu>(shifted);
  const vf z = f * f;
  const vf s = f * (6.28318529f + z * (-41.3416615f + z * (81.5923536f + z * -75.3935628f)));
  const vf c = 0.999999967f + z * (-19.7391466f + z * (64.9203064f + z * -83.552591f));
  const vf odd_c = (quarter & 1) != 0 ? s : c;
  const vf odd_s = (quarter & 1) != 0 ? c : s;
  *cosine = bits<vf>(bits<vu>(odd_c) ^ (((quarter + 1) & 2) << 30));
  *sine = bits<vf>(bits<vu>(odd_s) ^ ((quarter & 2) << 30));
}

}  // namespace IDM_ISA
}  // namespace idm
