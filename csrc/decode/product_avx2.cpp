// Panels with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/product.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,fma")))
#include "decode/product_256.h"

// int4: codes of at most 15, by unsigned bytes. Two products are at most 2 * 255 * 15 in 16 bits. Adding them may wrap
// around, but the sums of a span, less the offset, are at most 16 * 127 * 15 and so exact.
struct Nibbles {
  static constexpr int kElements = 4;
  static constexpr int64_t kSpan = 32;
  TARGET static void add(__m256i& sums, __m256i x, __m256i w) {
    const __m256i products = _mm256_maddubs_epi16(x, w);
    asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
  }
  TARGET static __m256i subtract(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }
  TARGET static __m256i total(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

// int8: two products of bytes may be too large for 16 bits, so both are widened to words.
struct Words {
  static constexpr int kElements = 2;
  static constexpr int64_t kSpan = 0;
  TARGET static void add(__m256i& sums, __m256i x, __m256i w) {
    const __m256i products = _mm256_madd_epi16(x, w);
    asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
  }
  TARGET static __m256i total(__m256i sums) { return sums; }
};

void pack(const Linear& linear, const Part& part, int8_t* codes) {
  (linear.kind == Kind::kInt4 ? pack_by<4> : pack_by<2>)(linear, part, codes);
}

void multiply(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first) {
  (panel.kind == Kind::kInt4 ? multiply_by<Nibbles> : multiply_by<Words>)(panel, x, rows, y, y_stride, first);
}

}  // namespace

const PanelKernels& avx2_panel() {
  static const PanelKernels kernels = {pack, multiply};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
