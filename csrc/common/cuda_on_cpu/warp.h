// Warp collectives: all 32 lanes meet, the last one to come hands out the values. Masks must be full.
#pragma once

#include "common/cuda_on_cpu/launch.h"

namespace idm {

inline void full(unsigned mask, const char* file, int line) {
  if (mask != 0xffffffffu) kernel_error("the mask of a warp collective must be 0xffffffff", file, line);
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, const char* file, int line) {
  full(mask, file, line);
  struct Mine {
    T value, result;
    int source;
  } mine{value, value, source};
  collective(
      name, &mine,
      [](void* const* lanes) {
        for (int i = 0; i < warpSize; ++i) {
          Mine* lane = static_cast<Mine*>(lanes[i]);
          lane->result = static_cast<Mine*>(lanes[lane->source])->value;
        }
      },
      file, line);
  return mine.result;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, const char* file, int line) {
  full(mask, file, line);
  struct Mine {
    unsigned predicate, result;
  } mine{predicate, 0};
  collective(
      name, &mine,
      [](void* const* lanes) {
        unsigned bits = 0;
        for (int i = 0; i < warpSize; ++i) bits |= static_cast<Mine*>(lanes[i])->predicate << i;
        for (int i = 0; i < warpSize; ++i) static_cast<Mine*>(lanes[i])->result = bits;
      },
      file, line);
  return mine.result;
}

}  // namespace idm

// The lane that a lane reads stays inside its segment of `width` lanes; outside of it a lane keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, IDM_HERE) {
  const int first = idm::lane_id() & ~(width - 1);
  return idm::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, IDM_HERE) {
  const int lane = idm::lane_id(), source = lane ^ lanes;
  // PTX: a source beyond the end of the segment is out of range; one in a segment before is not.
  return idm::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, IDM_HERE) {
  const int lane = idm::lane_id(), source = lane + static_cast<int>(lanes);
  return idm::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, IDM_HERE) {
  const int lane = idm::lane_id(), source = lane - static_cast<int>(lanes);
  return idm::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, IDM_HERE) {
  return idm::ballot("__ballot_sync", mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, IDM_HERE) {
  return idm::ballot("__any_sync", mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, IDM_HERE) {
  return idm::ballot("__all_sync", mask, predicate != 0, file, line) == 0xffffffffu;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, IDM_HERE) {
  idm::full(mask, file, line);
  idm::collective("__syncwarp", nullptr, [](void* const*) {}, file, line);
}
