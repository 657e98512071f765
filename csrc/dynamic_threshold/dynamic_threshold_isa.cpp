// The vector code of dynamic_threshold; compiled once per instruction set.
#include "dynamic_threshold/dynamic_threshold.h"

#include "common/simd.h"

namespace idm {
namespace IDM_ISA {
namespace {

template <class M>
void magnitudes(const float* x, const char* model_output, float k_x, float k_out, uint32_t* to, int64_t count) {
  const M* output = reinterpret_cast<const M*>(model_output);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const vu u = bits<vu>(load(x + i) * k_x + load(output + i) * k_out) & 0x7fffffffu;
    std::memcpy(to + i, &u, sizeof u);
  }
  const int left = static_cast<int>(count - i);
  if (left == 0) return;
  const vu u = bits<vu>(load_partial(x + i, left) * k_x + load_partial(output + i, left) * k_out) & 0x7fffffffu;
  std::memcpy(to + i, &u, static_cast<size_t>(left) * sizeof(uint32_t));
}

}  // namespace

extern const ThresholdKernels kThresholdKernels = {{magnitudes<float>, magnitudes<bf16>, magnitudes<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
