#include "common/cuda_on_cpu/launch.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_on_cpu/fibers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace idm {
namespace {

constexpr int kBarriers = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in integers

struct Place {
  const char* name = nullptr;
  const char* file = nullptr;
  int line = 0;
};

std::string describe(const Place& p) {
  const std::string file = p.file;
  return std::string(p.name) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(p.line) + ")";
}

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  bool valid;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  Place place;
  bool returned = false;
  std::deque<std::vector<Copy>> copies;  // groups, oldest first; the last one is still open
};

struct Barrier {
  std::vector<int> waiting;
  int expected = 0;
};

struct Warp {
  void* lanes[warpSize] = {};
  int arrived = 0;
  const char* name = nullptr;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // kept for the next block with their stacks
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::deque<int> ready;
  Fiber scheduler;
  std::exception_ptr error;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes = 0;
  int current = -1, size = 0;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
};

std::mutex one_grid;
Block block;
int multiprocessor_count = 4;  // few, so that small cases are cut as large ones are on a device
bool reversed = false, last_only = false;

// Another place of the module's thread-local storage is never used while kernels run, so all of it may be overwritten.
thread_local char in_this_storage;

struct SharedVariables {
  char* begin = nullptr;
  size_t bytes = 0;
  std::vector<char> saved;

  SharedVariables() {
    in_this_storage = 1;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto begin = static_cast<char*>(info->dlpi_tls_data);
            const size_t bytes = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type != PT_TLS || begin == nullptr) continue;
            if (&in_this_storage < begin || &in_this_storage >= begin + bytes) continue;
            static_cast<SharedVariables*>(result)->begin = begin;
            static_cast<SharedVariables*>(result)->bytes = bytes;
          }
          return 0;
        },
        this);
    saved.assign(begin, begin + bytes);
  }
  ~SharedVariables() { std::copy(saved.begin(), saved.end(), begin); }
  SharedVariables(const SharedVariables&) = delete;
  SharedVariables& operator=(const SharedVariables&) = delete;
  void poison() { std::fill_n(begin, bytes, static_cast<char>(kPoison)); }
};

void suspend() {
  Thread& mine = *block.threads[block.current];
  Fiber::change(mine.fiber, block.scheduler);
}

// In order, warps keep step with each other. In the opposite order the warp that was woken last goes on first, so that
// it runs as far ahead of the others as the barriers let it.
void wake(const std::vector<int>& threads) {
  if (reversed)
    block.ready.insert(block.ready.begin(), threads.rbegin(), threads.rend());
  else
    block.ready.insert(block.ready.end(), threads.begin(), threads.end());
}

void thread_main() {
  Fiber::arrived();
  Thread& mine = *block.threads[block.current];
  try {
    block.body(block.context);
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  mine.returned = true;
  for (;;) suspend();
}

[[noreturn]] void stuck() {
  std::map<std::string, std::vector<int>> places;
  int returned = 0;
  for (int i = 0; i < block.size; ++i) {
    const Thread& t = *block.threads[i];
    if (t.returned)
      ++returned;
    else
      places[describe(t.place)].push_back(i);
  }
  std::string message = "a block is stuck: ";
  for (const auto& [place, threads] : places)
    message += std::to_string(threads.size()) + " threads from " + std::to_string(threads[0]) + " wait at " + place + ", ";
  throw std::runtime_error(message + std::to_string(returned) + " have returned");
}

void run_block(SharedVariables& variables) {
  variables.poison();
  std::fill_n(block.shared.get(), block.shared_bytes, kPoison);
  for (auto& barrier : block.barriers) barrier = {};
  block.warps.assign((block.size + warpSize - 1) / warpSize, {});
  block.ready.clear();
  block.error = nullptr;
  std::vector<int> all(block.size);
  for (int i = 0; i < block.size; ++i) {
    Thread& t = *block.threads[i];
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
    t.returned = false;
    t.copies.clear();
    t.fiber.start(thread_main);
    all[i] = i;
  }
  wake(all);
  int alive = block.size;
  while (!block.ready.empty()) {
    block.current = block.ready.front();
    block.ready.pop_front();
    Thread& t = *block.threads[block.current];
    threadIdx = t.index;
    Fiber::change(block.scheduler, t.fiber);
    if (block.error) std::rethrow_exception(block.error);  // the other stacks hold nothing that needs an end
    alive -= t.returned;
  }
  if (alive != 0) stuck();
}

void refuse(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("launch: " + message);
}

}  // namespace

void run_grid(dim3 grid, dim3 threads, size_t dynamic_shared, void (*thread)(const void*), const void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const uint64_t size = uint64_t{threads.x} * threads.y * threads.z;
  refuse(size >= 1 && size <= 1024 && size % warpSize == 0 && threads.z <= 64,
         "threads of a block must be a multiple of 32 up to 1024, got " + std::to_string(size));
  refuse(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535,
         "grid must be at most 2^31 - 1, 65535, 65535, got " + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
             ", " + std::to_string(grid.z));
  refuse(dynamic_shared <= kMaxEmulatedShared, "dynamic shared memory must be at most " +
                                                   std::to_string(kMaxEmulatedShared) + " bytes, got " +
                                                   std::to_string(dynamic_shared));
  const std::lock_guard<std::mutex> lock(one_grid);
  gridDim = grid;
  blockDim = threads;
  block.size = static_cast<int>(size);
  block.body = thread;
  block.context = context;
  while (block.threads.size() < size) block.threads.push_back(std::make_unique<Thread>());
  // Exactly as long as was asked for, so that a sanitizer sees what lies beyond.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, dynamic_shared) != 0) throw std::bad_alloc();
  block.shared.reset(static_cast<unsigned char*>(shared));
  block.shared_bytes = dynamic_shared;
  SharedVariables variables;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = last_only ? blocks - 1 : 0; i < blocks; ++i) {
    const uint64_t b = reversed && !last_only ? blocks - 1 - i : i;
    blockIdx = {static_cast<uint32_t>(b % grid.x), static_cast<uint32_t>(b / grid.x % grid.y),
                static_cast<uint32_t>(b / grid.x / grid.y)};
    run_block(variables);
  }
}

int emulated_multiprocessors() { return multiprocessor_count; }
void set_emulated_multiprocessors(int count) { multiprocessor_count = count; }
void set_reversed(bool value) { reversed = value; }
void set_last_only(bool value) { last_only = value; }

unsigned char* dynamic_shared() { return block.shared.get(); }
size_t dynamic_shared_bytes() { return block.shared_bytes; }
int lane_id() { return block.current % warpSize; }

void kernel_error(const char* message, const char* file, int line) {
  throw std::runtime_error(std::string(message) + describe({"", file, line}));
}

void barrier(int id, int threads, const char* name, const char* file, int line) {
  Barrier& b = block.barriers[id];
  block.threads[block.current]->place = {name, file, line};
  if (b.waiting.empty()) b.expected = threads;
  if (b.expected != threads) kernel_error("a barrier is waited for by different numbers of threads", file, line);
  b.waiting.push_back(block.current);
  if (static_cast<int>(b.waiting.size()) == threads) {
    std::vector<int> all;
    all.swap(b.waiting);
    std::sort(all.begin(), all.end());
    wake(all);
  }
  suspend();
}

void collective(const char* name, void* mine, void (*leader)(void* const*), const char* file, int line) {
  const int first = block.current / warpSize * warpSize;
  Warp& warp = block.warps[block.current / warpSize];
  block.threads[block.current]->place = {name, file, line};
  if (warp.arrived == 0) warp.name = name;
  if (warp.name != name && std::string(warp.name) != name)
    kernel_error((std::string("lanes of one warp meet in ") + warp.name + " and in " + name).c_str(), file, line);
  warp.lanes[block.current - first] = mine;
  if (++warp.arrived == warpSize) {
    leader(warp.lanes);
    warp.arrived = 0;
    std::vector<int> all(warpSize);
    for (int i = 0; i < warpSize; ++i) all[i] = first + i;
    wake(all);
  }
  suspend();
}

void copy_later(void* target, const void* source, size_t bytes, bool valid) {
  auto& groups = block.threads[block.current]->copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({target, source, bytes, valid});
  std::memset(target, kPoison, bytes);  // so that a read before the wait is seen
}

void close_copies() {
  auto& groups = block.threads[block.current]->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int groups_left) {
  auto& groups = block.threads[block.current]->copies;
  // The open group at the end is not waited for.
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& c : groups.front()) {
      if (c.valid)
        std::memcpy(c.target, c.source, c.bytes);
      else
        std::memset(c.target, 0, c.bytes);
    }
    groups.pop_front();
  }
}

}  // namespace idm
