// Runs a grid on the CPU: blocks one after another, the threads of a block as fibers of one real thread.
//
// A fiber runs until it waits. When all that a barrier or a warp collective is for have come, they go on; when nobody
// can go on and some have not returned, the block is stuck and that is an error which says who waits where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "common/cuda_on_cpu/types.h"

namespace idm {

constexpr size_t kMaxEmulatedShared = 227 * 1024;  // of a block on sm_90; static and dynamic

// Shared memory is full of NaN when a block starts. Raises std::runtime_error for a grid that no device takes, for a
// stuck block and for what a collective objects to. One grid runs at a time.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, void (*thread)(const void*), const void* context);

int emulated_multiprocessors();
void set_emulated_multiprocessors(int count);
// Blocks, and threads where they are free to, run in the opposite order, and each warp as far ahead of the others as it
// may: a result that changes depends on a race.
void set_reversed(bool reversed);
void set_last_only(bool last_only);  // of every grid: for tensors too large to fill

unsigned char* dynamic_shared();  // of the block that runs
size_t dynamic_shared_bytes();

// Blocks until `threads` threads have come to barrier `id` (0 .. 15).
void barrier(int id, int threads, const char* name, const char* file, int line);
// Blocks until all lanes of the warp have come with the same `name`; the last one runs leader(arguments of all lanes).
void collective(const char* name, void* mine, void (*leader)(void* const* lanes), const char* file, int line);

// What a thread has asked cp.async for and not yet waited for.
void copy_later(void* target, const void* source, size_t bytes, bool valid);
void close_copies();
void wait_copies(int groups_left);

int lane_id();
[[noreturn]] void kernel_error(const char* message, const char* file, int line);

}  // namespace idm

// The place of a call, for messages: default arguments are evaluated where the function is called.
#define IDM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define IDM_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::idm::dynamic_shared())

inline void __syncthreads(IDM_HERE) {
  ::idm::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), "__syncthreads", file, line);
}
