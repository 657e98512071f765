// Memory that the C library has just got from the system costs a fault a page when it is first written: 2 to 7 us for 4 KiB,
// several times what a kernel that fills it takes. glibc keeps no block of 32 MiB or more for the next request.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace idm {

// Asks for pages of 2 MiB in [address, address + bytes): a hint, which the system may not follow and nobody else notices.
inline void huge_pages(uint64_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t kPage = 2 * 1024 * 1024;
  const uint64_t first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace idm
