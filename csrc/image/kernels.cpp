// The choice between instruction sets, and the weight layout that the vector sets share.
#include "image/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace llava_fast {
namespace {

std::vector<const KernelSet*> supported_kernels() {  // slowest first
  std::vector<const KernelSet*> sets = {&scalar_kernels()};
#if defined(__x86_64__)
  for (const KernelSet* set : {&avx2_kernels(), &avx512_kernels()})
    if (set->supported()) sets.push_back(set);
#endif
  return sets;
}

}  // namespace

const KernelSet& select_kernels() {
  const std::vector<const KernelSet*> sets = supported_kernels();
  const char* wanted = std::getenv("LLAVA_FAST_SIMD");
  if (wanted == nullptr || *wanted == '\0') return *sets.back();
  for (const KernelSet* set : sets)
    if (std::strcmp(set->name, wanted) == 0) return *set;
  std::string names;
  for (const KernelSet* set : sets) names += (names.empty() ? "" : ", ") + std::string(set->name);
  throw std::invalid_argument("LLAVA_FAST_SIMD is " + std::string(wanted) + ", and this processor runs " + names);
}

std::vector<const char*> supported_kernel_names() {
  std::vector<const char*> names;
  for (const KernelSet* set : supported_kernels()) names.push_back(set->name);
  return names;
}

void group_taps(Axis& axis, int align, int words, void (*split)(const int32_t weights[4], int32_t* words)) {
  const Taps& taps = axis.taps;
  axis.first.resize(taps.out_size);
  axis.groups = 0;
  for (int i = 0; i < taps.out_size; ++i) {
    axis.first[i] = taps.first[i] / align * align;
    axis.groups = std::max(axis.groups, (taps.first[i] + taps.count[i] - axis.first[i] + 3) / 4);
  }
  axis.words.resize(static_cast<size_t>(taps.out_size) * axis.groups * words);
  std::vector<int32_t> padded(4 * static_cast<size_t>(axis.groups));
  int32_t* out = axis.words.data();
  for (int i = 0; i < taps.out_size; ++i) {
    const int32_t* weights = &taps.weights[static_cast<size_t>(i) * taps.width];
    std::fill(padded.begin(), padded.end(), 0);
    std::copy_n(weights, taps.count[i], padded.begin() + (taps.first[i] - axis.first[i]));
    for (int g = 0; g < axis.groups; ++g, out += words) split(&padded[4 * static_cast<size_t>(g)], out);
  }
}

}  // namespace llava_fast
