#include "decode/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llava_fast::decode {

void prefer_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t first = (address + kHuge - 1) / kHuge * kHuge, last = (address + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace llava_fast::decode
