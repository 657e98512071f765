#include "common/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace idm {
namespace {

constexpr int kSpins = 4000;  // some 50 us

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct Job {
  TeamBody body;
  void* context;
  void run(int worker, int workers) const { body(context, worker, workers); }
};

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
  // The team may be smaller than asked for: a nested region has one thread.
  static_cast<const Job*>(job)->run(openmp().thread_num(), openmp().num_threads());
}

class Pool {
 public:
  // One job at a time: a second caller runs its own work alone rather than wait.
  void run(const Job& job, int workers) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner.owns_lock()) return job.run(0, 1);
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
    job.run(0, workers);
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
      if (worker < workers) job->run(worker, workers);
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

void Barrier::wait(int workers) {
  arrived_.fetch_add(1, std::memory_order_acq_rel);
  // The others are at work on as much as this one was. Who is still not here has lost its core: leave it ours.
  for (int spins = 0; arrived_.load(std::memory_order_acquire) < workers; ++spins) {
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

void parallel_team_impl(int threads, TeamBody body, void* context) {
  const Job job{body, context};
  if (threads <= 1 || workers_lost()) return job.run(0, 1);
  if (openmp().ok())
    return openmp().parallel(openmp_region, const_cast<Job*>(&job), static_cast<unsigned>(threads), 0);
  static Pool* pool = new Pool;  // never destroyed: its workers sleep until the process ends
  pool->run(job, threads);
}

void parallel_for_impl(int64_t tasks, int threads, Body body, void* context) {
  auto all = [=](int worker, int workers) {
    const Share share(tasks, worker, workers);
    for (int64_t task = share.begin; task < share.end; ++task) body(context, task, worker);
  };
  if (tasks <= 1) return all(0, 1);
  // libgomp ends the threads that a smaller team leaves out, and torch's next operator would have to start them again:
  // there all `threads` are called even where there are fewer tasks.
  parallel_team(openmp().ok() ? threads : static_cast<int>(std::min<int64_t>(tasks, threads)), all);
}

const char* threads_runtime() { return openmp().ok() ? "openmp" : "std"; }

}  // namespace idm
