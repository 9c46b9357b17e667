// Where weights lie.
#pragma once

#include <cstdint>

namespace llava_fast::decode {

// Asks for pages of 2 MiB for memory that has not been written yet. Weights are read from those about a third faster.
void prefer_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace llava_fast::decode
