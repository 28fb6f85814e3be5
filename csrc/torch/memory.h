// Asks the operating system for large pages for memory that a result is about to be written to.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tlcr {

// A gradient of the size of the logits is fresh memory, and the first access to every 4 KiB page of it causes a page
// fault. All these faults take longer than the kernel that fills it. Linux gives pages of 2 MiB on request. The call is
// advice and may fail.
inline void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kPage = 4096, kHugePage = std::size_t{1} << 21;
  if (bytes < 2 * kHugePage) return;
  const std::size_t past = reinterpret_cast<std::uintptr_t>(data) % kPage, skipped = past == 0 ? 0 : kPage - past;
  static_cast<void>(madvise(static_cast<char*>(data) + skipped, bytes - skipped, MADV_HUGEPAGE));
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace tlcr
