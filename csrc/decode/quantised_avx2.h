// Shared by AVX2 and AVX-VNNI. Include <immintrin.h> and define TARGET before this file.

constexpr int kTileVectors = 2, kTileRows = 4;
struct Sixteen {
  __m256 low, high;
};
struct Bytes {
  __m256i low, high;
};

TARGET inline __m256i load_integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TARGET inline Sixteen load16(const void* p) {
  const float* const lanes = static_cast<const float*>(p);
  return {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
}
TARGET inline Sixteen splat16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TARGET inline Sixteen multiply(Sixteen a, Sixteen b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TARGET inline Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
#include "decode/quantised_four.h"

TARGET inline Sixteen spread2(Four v) {
  return {_mm256_broadcastss_ps(v), _mm256_broadcastss_ps(_mm_movehl_ps(v, v))};
}
TARGET inline Sixteen spread4(Four v) {
  const __m256 four = _mm256_castps128_ps256(v);
  return {_mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
          _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
}
TARGET inline Sixteen less_zeros(const uint8_t* p) {
  const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i low = _mm256_cvtepu8_epi32(zeros), high = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(zeros, zeros));
  const __m256i eights = _mm256_set1_epi32(8);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(eights, low)), _mm256_cvtepi32_ps(_mm256_sub_epi32(eights, high))};
}
struct Nibbles {
  Bytes low, high;
};
TARGET inline Nibbles nibbles(const uint8_t* p) {
  const __m256i first = load_integers(p), second = load_integers(p + 32), mask = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(first, mask), _mm256_and_si256(second, mask)},
          {_mm256_and_si256(_mm256_srli_epi16(first, 4), mask), _mm256_and_si256(_mm256_srli_epi16(second, 4), mask)}};
}
TARGET inline void sum_each16(Sixteen a, Sixteen b, Sixteen c, Sixteen d, float* totals) {
  const __m256 as = _mm256_add_ps(a.low, a.high), bs = _mm256_add_ps(b.low, b.high);
  const __m256 cs = _mm256_add_ps(c.low, c.high), ds = _mm256_add_ps(d.low, d.high);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(as, bs), _mm256_unpackhi_ps(as, bs));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(cs, ds), _mm256_unpackhi_ps(cs, ds));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
