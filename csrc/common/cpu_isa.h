// Which instruction set the CPU kernels use: the best that this machine has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

namespace idm {

enum class CpuIsa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kCpuIsas = 4;

CpuIsa cpu_isa();                          // in use
std::string cpu_isa_name();                // "baseline", "avx2", "avx512" or "avx512bf16"
std::vector<std::string> cpu_isa_names();  // what this machine can run, best first
void set_cpu_isa(const std::string& name);  // "" is the best; throws std::invalid_argument for what cannot run here

}  // namespace idm

// {&baseline::name, &avx2::name, ...}, indexed by CpuIsa; null for a set that was not compiled, which is never in use.
#if defined(IDM_HAVE_avx2)
#define IDM_AVX2_TABLE(name) &avx2::name
#else
#define IDM_AVX2_TABLE(name) nullptr
#endif
#if defined(IDM_HAVE_avx512)
#define IDM_AVX512_TABLE(name) &avx512::name
#else
#define IDM_AVX512_TABLE(name) nullptr
#endif
#if defined(IDM_HAVE_avx512bf16)
#define IDM_AVX512BF16_TABLE(name) &avx512bf16::name
#else
#define IDM_AVX512BF16_TABLE(name) nullptr
#endif
#define IDM_ISA_TABLES(name) {&baseline::name, IDM_AVX2_TABLE(name), IDM_AVX512_TABLE(name), IDM_AVX512BF16_TABLE(name)}
