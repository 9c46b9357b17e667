// Products with int8 and int4 weights with AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,avxvnni")))
#include "decode/quantised_avx2.h"

// Signed codes plus 128, unsigned: the effect of the offset is subtracted before the products are added.
TARGET inline Bytes int8_codes(const uint8_t* p) {
  const __m256i top = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(load_integers(p), top), _mm256_xor_si256(load_integers(p + 32), top)};
}
// Minus `factor` (at most 128) times the lanes' sums of codes.
TARGET inline __m256i less(int factor, __m256i codes) {
  const __m256i factors = _mm256_set1_epi8(static_cast<char>(factor));
  return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), factors, codes));
}
struct Int8Unit {
  __m256i low, high, offset_low, offset_high;
  TARGET explicit Int8Unit(const int8_t* p)
      : low(load_integers(p)), high(load_integers(p + 32)), offset_low(less(128, low)), offset_high(less(128, high)) {}
};
struct Int4Unit {
  __m256i even_low, even_high, odd_low, odd_high, offset_low, offset_high;
  TARGET explicit Int4Unit(const int8_t* p)
      : even_low(load_integers(p)),
        even_high(load_integers(p + 32)),
        odd_low(load_integers(p + 64)),
        odd_high(load_integers(p + 96)),
        offset_low(_mm256_add_epi32(less(8, even_low), less(8, odd_low))),
        offset_high(_mm256_add_epi32(less(8, even_high), less(8, odd_high))) {}
};

TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) {
  return {_mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(x.offset_low, w.low, x.low)),
          _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(x.offset_high, w.high, x.high))};
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  const __m256i first = _mm256_dpbusd_avx_epi32(x.offset_low, low.low, x.even_low);
  const __m256i second = _mm256_dpbusd_avx_epi32(x.offset_high, low.high, x.even_high);
  return {_mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(first, high.low, x.odd_low)),
          _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(second, high.high, x.odd_high))};
}
TARGET inline Sixteen sums(const Int4Unit& x) {
  const Sixteen eights = {_mm256_cvtepi32_ps(x.offset_low), _mm256_cvtepi32_ps(x.offset_high)};
  return multiply(eights, splat16(-0.125f));
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
}

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& avxvnni_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, avxvnni_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
