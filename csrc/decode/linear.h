// One linear layer for a few vectors, on several threads.
#pragma once

#include "decode/kernels.h"

namespace llava_fast::decode {

// The number of threads, at most `threads`, that is worth starting for this many bytes of weights.
int useful_threads(int64_t weight_bytes, int threads);

// y [count, out] = x [count, linear.in] times the weight, plus the bias. The result does not depend on `threads`.
void apply(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
           const KernelSet& kernels);

}  // namespace llava_fast::decode
