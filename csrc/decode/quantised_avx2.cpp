// Products with int8 and int4 weights with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,fma")))
#include "decode/quantised_avx2.h"

TARGET inline Bytes int8_codes(const uint8_t* p) { return {load_integers(p), load_integers(p + 32)}; }
// Sums of four products of unsigned and signed bytes, from 16-bit sums of two that must not saturate.
TARGET inline __m256i fours(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
struct Int8Unit {
  __m256i low, high;
  TARGET Int8Unit(const int8_t* p, const int32_t*, bool) : low(load_integers(p)), high(load_integers(p + 32)) {}
};
struct Int4Unit {
  __m256i even_low, even_high, odd_low, odd_high, offsets_low, offsets_high;
  TARGET Int4Unit(const int8_t* p, const int32_t* offsets, bool)
      : even_low(load_integers(p)),
        even_high(load_integers(p + 32)),
        odd_low(load_integers(p + 64)),
        odd_high(load_integers(p + 96)),
        offsets_low(load_integers(offsets)),
        offsets_high(load_integers(offsets + 8)) {}
};

// |w| by x with w's sign: at most 2 * 128 * 127 < 2^15.
TARGET inline __m256 dot_signed(__m256i w, __m256i x) {
  return _mm256_cvtepi32_ps(fours(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
}
TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) { return {dot_signed(w.low, x.low), dot_signed(w.high, x.high)}; }
// At most 4 * 15 * 127 in 16 bits.
TARGET inline __m256 dot_nibbles(__m256i low, __m256i high, __m256i even, __m256i odd, __m256i offsets) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(fours(pairs), offsets));
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  return {dot_nibbles(low.low, high.low, x.even_low, x.odd_low, x.offsets_low),
          dot_nibbles(low.high, high.high, x.even_high, x.odd_high, x.offsets_high)};
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& avx2_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, avx2_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
