// Products with int8 and int4 weights with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2")))
#include "decode/quantised_avx2.h"

TARGET inline Bytes int8_codes(const uint8_t* p) { return {load_integers(p), load_integers(p + 32)}; }
// Sums of four products of unsigned and signed bytes, from 16-bit sums of two that must not saturate.
TARGET inline __m256i fours(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
struct Int8Unit {
  __m256i low, high;
  TARGET explicit Int8Unit(const int8_t* p) : low(load_integers(p)), high(load_integers(p + 32)) {}
};
struct Int4Unit {
  __m256i even_low, even_high, odd_low, odd_high;
  __m256i sum_low, sum_high;  // of the lanes' codes
  TARGET explicit Int4Unit(const int8_t* p)
      : even_low(load_integers(p)),
        even_high(load_integers(p + 32)),
        odd_low(load_integers(p + 64)),
        odd_high(load_integers(p + 96)),
        sum_low(sum_codes(even_low, odd_low)),
        sum_high(sum_codes(even_high, odd_high)) {}
  TARGET static __m256i sum_codes(__m256i even, __m256i odd) {
    const __m256i ones = _mm256_set1_epi8(1);
    return fours(_mm256_add_epi16(_mm256_maddubs_epi16(ones, even), _mm256_maddubs_epi16(ones, odd)));
  }
};

// |w| by x with w's sign: at most 2 * 128 * 127 < 2^15.
TARGET inline __m256 dot_signed(__m256i w, __m256i x) {
  return _mm256_cvtepi32_ps(fours(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
}
TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) { return {dot_signed(w.low, x.low), dot_signed(w.high, x.high)}; }
// At most 4 * 15 * 127 in 16 bits.
TARGET inline __m256 dot_nibbles(__m256i low, __m256i high, __m256i even, __m256i odd, __m256i sum) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(fours(pairs), _mm256_slli_epi32(sum, 3)));
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  return {dot_nibbles(low.low, high.low, x.even_low, x.odd_low, x.sum_low),
          dot_nibbles(low.high, high.high, x.even_high, x.odd_high, x.sum_high)};
}
TARGET inline Sixteen sums(const Int4Unit& x) {
  return {_mm256_cvtepi32_ps(x.sum_low), _mm256_cvtepi32_ps(x.sum_high)};
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& avx2_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, avx2_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
