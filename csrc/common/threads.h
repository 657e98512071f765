// parallel_for: `tasks` calls of body(task, worker), each worker taking one contiguous range of tasks.
//
// Where torch's OpenMP runtime is in the process its own team runs the work: a second pool would fight with torch's
// workers, which spin for a while after each of torch's operators. Otherwise a small std::thread pool is used.
// A forked child of a process that has run parallel work runs its own alone. Bodies must not throw. Ranges depend on (tasks, threads) only, so two passes over the same data meet it in the same
// core's cache.
#pragma once

#include <cstdint>

namespace idm {

using Body = void (*)(void* context, int64_t task, int worker);

void parallel_for_impl(int64_t tasks, int threads, Body body, void* context);
const char* threads_runtime();  // "openmp" or "std"

template <class F>
void parallel_for(int64_t tasks, int threads, F& f) {
  parallel_for_impl(
      tasks, threads, [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); }, &f);
}

}  // namespace idm
