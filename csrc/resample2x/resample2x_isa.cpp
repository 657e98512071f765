// The vector code of resample2x; compiled once per instruction set.
#include "resample2x/resample2x.h"

#include "common/simd.h"

namespace idm {
namespace IDM_ISA {
namespace {

// Quarters first: a sum of four could leave float32.
inline vf mean(vf a, vf b, vf c, vf d) { return (a * 0.25f + b * 0.25f) + (c * 0.25f + d * 0.25f); }

template <class T>
void down_row(const char* upper, const char* lower, char* out, int64_t width, int64_t C) {
  for (int64_t w = 0; w < width; ++w) {
    const T* a = reinterpret_cast<const T*>(upper) + 2 * w * C;
    const T* c = reinterpret_cast<const T*>(lower) + 2 * w * C;
    T* to = reinterpret_cast<T*>(out) + w * C;
    int64_t i = 0;
    for (; i + kWidth <= C; i += kWidth) store(to + i, mean(load(a + i), load(a + C + i), load(c + i), load(c + C + i)));
    if (i == C) continue;
    const int left = static_cast<int>(C - i);
    store_partial(to + i, mean(load_partial(a + i, left), load_partial(a + C + i, left), load_partial(c + i, left),
                               load_partial(c + C + i, left)), left);
  }
}

}  // namespace

extern const ResampleKernels kResampleKernels = {{down_row<float>, down_row<bf16>, down_row<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
