#include "decode/linear.h"

#include <algorithm>

#include "decode/inputs.h"
#include "parallel.h"

namespace llava_fast::decode {

int useful_threads(int64_t weight_bytes, int threads) {
  constexpr int64_t kBytesPerThread = 4 << 20;  // reading them takes several times as long as starting a thread
  return static_cast<int>(std::clamp<int64_t>(weight_bytes / kBytesPerThread, 1, std::max(threads, 1)));
}

void apply(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
           const KernelSet& kernels) {
  struct None {};
  Inputs inputs(count, linear.in, {linear.kind});
  inputs.set(x, linear.in);
  const Vectors vectors = inputs.of(linear.kind);
  const int64_t parts = useful_threads(out * linear.in * bits_of(linear.kind) / 8, threads);
  parallel_for<None>(static_cast<int>(parts), static_cast<int>(parts), [&](int part, None&) {
    kernels.linear(linear.kind)(linear, out * part / parts, out * (part + 1) / parts, vectors, y, out, false);
  });
}

}  // namespace llava_fast::decode
