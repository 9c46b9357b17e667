// Panels with AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/product.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#include "decode/product_256.h"

struct Bytes {
  static constexpr int kElements = 4;
  static constexpr int64_t kSpan = 0;
  // As _mm256_dpbusd_avx_epi32, for which GCC 12 copies every accumulator of a loop twice a pass.
  TARGET static void add(__m256i& sums, __m256i x, __m256i w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
  }
  TARGET static __m256i subtract(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  TARGET static __m256i total(__m256i sums) { return sums; }
};

}  // namespace

const PanelKernels& avxvnni_panel() {
  static const PanelKernels kernels = {pack_by<4>, multiply_by<Bytes>};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
