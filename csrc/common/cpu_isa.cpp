#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace idm {
namespace {

struct Entry {
  CpuIsa isa;
  const char* name;
};

#if defined(IDM_HAVE_avx512) || defined(IDM_HAVE_avx512bf16)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<Entry> usable_isas() {
  std::vector<Entry> found;
#if defined(IDM_HAVE_avx512bf16)
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    found.push_back({CpuIsa::kAvx512Bf16, "avx512bf16"});
#endif
#if defined(IDM_HAVE_avx512)
  if (has_avx512()) found.push_back({CpuIsa::kAvx512, "avx512"});
#endif
#if defined(IDM_HAVE_avx2)
  // No CPU has AVX2 and FMA without F16C, and GCC 12 has no name for F16C here.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back({CpuIsa::kAvx2, "avx2"});
#endif
  found.push_back({CpuIsa::kBaseline, "baseline"});
  return found;
}

const std::vector<Entry>& isas() {
  static const std::vector<Entry> found = usable_isas();
  return found;
}

const Entry& find_isa(const std::string& name) {
  if (name.empty()) return isas().front();
  std::string known;
  for (const Entry& entry : isas()) {
    if (name == entry.name) return entry;
    known += known.empty() ? entry.name : std::string(", ") + entry.name;
  }
  throw std::invalid_argument("cpu_isa: name must be one that this machine runs = " + known + ", got " + name);
}

// IDM_FAST_CPU_ISA is read once, at the first use. A name that cannot run here is an error, not a quiet fallback.
std::atomic<int>& chosen() {
  static std::atomic<int> isa{[] {
    const char* wanted = std::getenv("IDM_FAST_CPU_ISA");
    return static_cast<int>(find_isa(wanted ? wanted : "").isa);
  }()};
  return isa;
}

}  // namespace

CpuIsa cpu_isa() { return static_cast<CpuIsa>(chosen().load(std::memory_order_relaxed)); }

std::string cpu_isa_name() {
  for (const Entry& entry : isas())
    if (entry.isa == cpu_isa()) return entry.name;
  return "";
}

std::vector<std::string> cpu_isa_names() {
  std::vector<std::string> names;
  for (const Entry& entry : isas()) names.emplace_back(entry.name);
  return names;
}

void set_cpu_isa(const std::string& name) { chosen().store(static_cast<int>(find_isa(name).isa)); }

}  // namespace idm
