// The choice between instruction sets.
#include "decode/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace llava_fast::decode {

const KernelSet& select_kernels() {
  const char* wanted = std::getenv("LLAVA_FAST_SIMD");
  const bool any = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__)
  const KernelSet* const sets[] = {&avx512_kernels(), &avx2_kernels(), &scalar_kernels()};  // fastest first
#else
  const KernelSet* const sets[] = {&scalar_kernels()};
#endif
  for (const KernelSet* set : sets)
    if (set->supported() && (any || std::strcmp(set->name, wanted) == 0)) return *set;
  throw std::invalid_argument("LLAVA_FAST_SIMD is " + std::string(wanted) +
                              ": this processor has no such kernels (scalar, avx2, avx512)");
}

}  // namespace llava_fast::decode
