#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/contract.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace idm {
namespace {

constexpr int64_t kAlone = 128 * 1024;  // multiplications that are sooner done than a second thread is called
constexpr int64_t kPackedWords = 4 * 1024 * 1024;  // 16 MiB of packed heads at a time

const AttentionKernels& kernels() {
  static constexpr const AttentionKernels* kTables[kCpuIsas] = IDM_ISA_TABLES(kAttentionKernels);
  return *kTables[static_cast<int>(cpu_isa())];
}

// Working memory of the calling thread, kept between calls.
uint32_t* workspace(int64_t words) {
  thread_local std::vector<uint32_t> memory;
  if (static_cast<int64_t>(memory.size()) < words) memory.resize(words);
  return memory.data();
}

// Which head each worker has packed: none yet.
std::vector<int64_t>& packed_units(int threads) {
  thread_local std::vector<int64_t> units;
  units.assign(static_cast<size_t>(threads), -1);
  return units;
}

}  // namespace

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, double scale,
               int threads) {
  if (q.numel() == 0) return;
  check_attention(q, k, v, out);
  const int64_t L = q.shape[1], heads = q.shape[2], d = q.shape[3], S = k.shape[1];

  const AttentionKernels& kernel = kernels();
  const int type = static_cast<int>(q.dtype);
  const AttentionSizes sizes = kernel.sizes[type](S, d);
  const int64_t bytes = element_size(q.dtype), units = q.shape[0] * heads;
  const int64_t packed_words = sizes.key_words + sizes.value_words;
  const int64_t panels = (S + sizes.panel_keys - 1) / sizes.panel_keys;
  const int64_t blocks = (L + kQueryBlock - 1) / kQueryBlock;
  threads = units * L * S * d <= kAlone ? 1 : std::max(threads, 1);

  auto head_of = [&](int64_t unit, uint32_t* packed) {
    const int64_t n = unit / heads, h = unit % heads;
    auto at = [&](const TensorView& t) { return t.data + (n * t.stride[0] + h * t.stride[2]) * bytes; };
    AttentionHead head{};
    head.q = at(q), head.k = at(k), head.v = at(v), head.out = out.data + (n * L * heads + h) * d * bytes;
    head.q_stride = q.stride[1], head.k_stride = k.stride[1], head.v_stride = v.stride[1], head.out_stride = heads * d;
    head.keys = S, head.width = d;
    head.sign = scale < 0.0 ? -1.0f : 1.0f;
    head.scale_log2 = static_cast<float>(std::fabs(scale) * 1.4426950408889634);
    head.packed_keys = packed, head.packed_values = packed + sizes.key_words;
    return head;
  };
  auto attend = [&](const AttentionHead& head, int64_t block, uint32_t* scratch) {
    const int64_t first = L * block / blocks;
    kernel.attend[type](head, first, L * (block + 1) / blocks - first, scratch);
  };

  // Each worker packs the heads that it meets: one or two more than its share, and nobody waits in between.
  if (threads * packed_words <= kPackedWords) {
    const int64_t per_worker = packed_words + sizes.block_words;
    uint32_t* memory = workspace(threads * per_worker);
    std::vector<int64_t>& packed = packed_units(threads);
    auto walk = [&](int64_t task, int worker) {
      const int64_t unit = task / blocks;
      uint32_t* mine = memory + worker * per_worker;
      const AttentionHead head = head_of(unit, mine);
      if (packed[worker] != unit)
        for (int64_t p = 0; p < panels; ++p) kernel.pack[type](head, p);
      packed[worker] = unit;
      attend(head, task % blocks, mine + packed_words);
    };
    return parallel_for(units * blocks, threads, walk);
  }

  // Long images on many cores: they share what is packed.
  const int64_t group = std::clamp<int64_t>(kPackedWords / packed_words, 1, units);
  uint32_t* memory = workspace(group * packed_words + threads * sizes.block_words);
  uint32_t* scratch = memory + group * packed_words;
  for (int64_t first = 0; first < units; first += group) {
    const int64_t count = std::min(group, units - first);
    auto pack = [&](int64_t task, int) {
      const int64_t u = task / panels;
      kernel.pack[type](head_of(first + u, memory + u * packed_words), task % panels);
    };
    auto walk = [&](int64_t task, int worker) {
      const int64_t u = task / blocks;
      attend(head_of(first + u, memory + u * packed_words), task % blocks, scratch + worker * sizes.block_words);
    };
    parallel_for(count * panels, threads, pack);
    parallel_for(count * blocks, threads, walk);
  }
}

}  // namespace idm
