// IDM_HOST_DEVICE marks small inline maths that nvcc compiles for both sides and a C++ compiler for the CPU.
#pragma once

#if defined(__CUDACC__)
#define IDM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IDM_HOST_DEVICE inline
#endif
