// The twins of mma.cuh: the same fragment layouts, the product in float32 sums of exact products.
#pragma once

#include "common/cuda_on_cpu/launch.h"
#include "common/cuda_on_cpu/types.h"

namespace idm {

inline float element(const __half*, uint32_t pair, int which) {
  return __half2float({static_cast<uint16_t>(pair >> 16 * which)});
}
inline float element(const __nv_bfloat16*, uint32_t pair, int which) {
  return __bfloat162float({static_cast<uint16_t>(pair >> 16 * which)});
}

template <class T>
struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
void mma_leader(void* const* lanes) {
  constexpr const T* kType = nullptr;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < warpSize; ++lane) {
    const auto& mine = *static_cast<const MmaLane<T>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = element(kType, mine.a[0], i);
      a[g + 8][2 * t + i] = element(kType, mine.a[1], i);
      a[g][2 * t + 8 + i] = element(kType, mine.a[2], i);
      a[g + 8][2 * t + 8 + i] = element(kType, mine.a[3], i);
      b[2 * t + i][g] = element(kType, mine.b[0], i);
      b[2 * t + 8 + i][g] = element(kType, mine.b[1], i);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < 8; ++col) sums[col] += a[row][k] * b[k][col];
    for (int col = 0; col < 8; ++col)
      static_cast<const MmaLane<T>*>(lanes[row % 8 * 4 + col / 2])->d[row / 8 * 2 + col % 2] += sums[col];
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, IDM_HERE) {
  MmaLane<T> mine{d, a, {b0, b1}};
  collective("mma_m16n8k16", &mine, mma_leader<T>, file, line);
}

struct LoadLane {
  uint32_t* r;
  const void* row;
};

template <int COUNT, bool TRANS>
void load_leader(void* const* lanes) {
  for (int i = 0; i < COUNT; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) memcpy(matrix[row], static_cast<LoadLane*>(lanes[8 * i + row])->row, 16);
    for (int lane = 0; lane < warpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = TRANS ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = TRANS ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<LoadLane*>(lanes[lane])->r[i] = low | high << 16;
    }
  }
}

inline void aligned(const void* p, unsigned bytes, const char* what, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) kernel_error(what, file, line);
}

template <int COUNT, bool TRANS>
void load_matrices(const char* name, uint32_t* r, const void* row, const char* file, int line) {
  if (lane_id() < 8 * COUNT) aligned(row, 16, "ldmatrix: a row must be aligned to 16 bytes", file, line);
  LoadLane mine{r, row};
  collective(name, &mine, load_leader<COUNT, TRANS>, file, line);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, IDM_HERE) {
  load_matrices<4, false>("ldmatrix_x4", r, row, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, IDM_HERE) {
  load_matrices<4, true>("ldmatrix_x4_trans", r, row, file, line);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, IDM_HERE) {
  load_matrices<2, false>("ldmatrix_x2", r, row, file, line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, IDM_HERE) {
  load_matrices<2, true>("ldmatrix_x2_trans", r, row, file, line);
}

// The copies happen as late as they may: at the wait.
inline void cp_async16(void* shared, const void* global, bool valid = true, IDM_HERE) {
  aligned(shared, 16, "cp.async: the target must be aligned to 16 bytes", file, line);
  aligned(global, 16, "cp.async: the source must be aligned to 16 bytes", file, line);
  copy_later(shared, global, 16, valid);
}
inline void cp_async4(void* shared, const void* global, bool valid = true, IDM_HERE) {
  aligned(shared, 4, "cp.async: the target must be aligned to 4 bytes", file, line);
  aligned(global, 4, "cp.async: the source must be aligned to 4 bytes", file, line);
  copy_later(shared, global, 4, valid);
}
inline void cp_async_commit() { close_copies(); }
template <int N>
void cp_async_wait() { wait_copies(N); }

inline void named_barrier(int id, int threads, IDM_HERE) { barrier(id, threads, "named_barrier", file, line); }

}  // namespace idm
