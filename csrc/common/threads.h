// parallel_for: `tasks` calls of body(task, worker), each worker taking one contiguous range of tasks.
//
// Where torch's OpenMP runtime is in the process its own team runs the work: a second pool would fight with torch's
// workers, which spin for a while after each of torch's operators. Otherwise a small std::thread pool is used.
// A forked child of a process that has run parallel work runs its own alone. Bodies must not throw. Ranges depend on
// (tasks, threads) only, so two passes over the same data meet it in the same core's cache.
//
// parallel_team: one call of body(worker, workers) by each of the team, for work in phases: to start a team twice costs
// more than to meet once at a Barrier. The team may be smaller than asked for; `workers` is its real size.
#pragma once

#include <atomic>
#include <cstdint>

namespace idm {

// Where a team meets, once. What was written before is seen after.
class Barrier {
 public:
  void wait(int workers);

 private:
  std::atomic<int> arrived_{0};
};

// Share `worker` of `workers` is the tasks [begin, end).
struct Share {
  int64_t begin, end;
  Share(int64_t tasks, int worker, int workers) {
    const int64_t each = tasks / workers, extra = tasks % workers;
    begin = worker * each + (worker < extra ? worker : extra);
    end = begin + each + (worker < extra ? 1 : 0);
  }
};

using TeamBody = void (*)(void* context, int worker, int workers);

void parallel_team_impl(int threads, TeamBody body, void* context);

template <class F>
void parallel_team(int threads, F& f) {
  parallel_team_impl(
      threads, [](void* context, int worker, int workers) { (*static_cast<F*>(context))(worker, workers); }, &f);
}

using Body = void (*)(void* context, int64_t task, int worker);

void parallel_for_impl(int64_t tasks, int threads, Body body, void* context);
const char* threads_runtime();  // "openmp" or "std"

template <class F>
void parallel_for(int64_t tasks, int threads, F& f) {
  parallel_for_impl(
      tasks, threads, [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); }, &f);
}

}  // namespace idm
