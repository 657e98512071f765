// The storage types of 16-bit floats. Only loads, stores and conversions know them; all arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace idm {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;  // without `inline` clang makes it a symbol of every file

}  // namespace idm
