#include "common/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace idm {
namespace {

struct Job {
  int64_t tasks;
  Body body;
  void* context;
};

void run_share(const Job& job, int worker, int workers) {
  const int64_t share = job.tasks / workers, extra = job.tasks % workers;
  const int64_t begin = worker * share + (worker < extra ? worker : extra);
  const int64_t end = begin + share + (worker < extra ? 1 : 0);
  for (int64_t task = begin; task < end; ++task) job.body(job.context, task, worker);
}

// A child of fork() has the calling thread alone: the workers that its copies of libgomp's and of our own tables name do
// not run there, and waiting for them would never end. A process that forked before the first use starts its own.
std::atomic<bool> g_used{false}, g_workers_lost{false};

bool workers_lost() {
  static const int watch = pthread_atfork(nullptr, nullptr, [] {
    if (g_used) g_workers_lost = true;
  });
  (void)watch;
  g_used = true;
  return g_workers_lost;
}

// The entry points that compiled `#pragma omp parallel` calls; a stable ABI that libgomp and LLVM's runtime both serve.
// torch puts its runtime in the global scope, where dlsym finds that very copy.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
  bool ok() const { return parallel && thread_num && num_threads; }
};

const OpenMp& openmp() {
  static const OpenMp api = {
      reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
      reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  return api;
}

void openmp_region(void* job) {
  // The team may be smaller than asked for (a nested region has one thread), so its real size decides the shares.
  run_share(*static_cast<const Job*>(job), openmp().thread_num(), openmp().num_threads());
}

class Pool {
 public:
  // One job at a time: a second caller runs its own work alone rather than wait.
  void run(const Job& job, int workers) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner.owns_lock()) return run_share(job, 0, 1);
    while (static_cast<int>(threads_.size()) < workers - 1) {
      const int worker = static_cast<int>(threads_.size()) + 1;
      // A worker waits for the generation after the one it was started in; only the owner, who is here, changes it.
      threads_.emplace_back([this, worker, seen = generation_] { loop(worker, seen); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      workers_ = workers;
      left_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    run_share(job, 0, workers);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void loop(int worker, uint64_t seen) {
    for (;;) {
      const Job* job;
      int workers;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
        workers = workers_;
      }
      if (worker < workers) run_share(*job, worker, workers);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const Job* job_ = nullptr;
  int workers_ = 0, left_ = 0;
  uint64_t generation_ = 0;
};

}  // namespace

void parallel_for_impl(int64_t tasks, int threads, Body body, void* context) {
  Job job{tasks, body, context};
  if (tasks <= 1 || threads <= 1 || workers_lost()) return run_share(job, 0, 1);
  // All `threads` are called even where there are fewer tasks: libgomp ends the threads that a smaller team leaves out,
  // and torch's next operator would have to start them again.
  if (openmp().ok()) return openmp().parallel(openmp_region, &job, static_cast<unsigned>(threads), 0);
  static Pool* pool = new Pool;  // never destroyed: its workers sleep until the process ends
  pool->run(job, static_cast<int>(std::min<int64_t>(tasks, threads)));
}

const char* threads_runtime() { return openmp().ok() ? "openmp" : "std"; }

}  // namespace idm
