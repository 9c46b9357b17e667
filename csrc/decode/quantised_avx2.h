// Shared by AVX2 and AVX-VNNI. Include <immintrin.h> and define TARGET before this file.

constexpr int kTileVectors = 2, kTileRows = 4;
struct Sixteen {
  __m256 low, high;
};
struct Bytes {
  __m256i low, high;
};

TARGET inline __m256i load_integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TARGET inline Sixteen splat16(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TARGET inline Sixteen add(Sixteen a, Sixteen b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
TARGET inline Sixteen multiply(Sixteen a, Sixteen b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
TARGET inline Sixteen subtract(Sixteen a, Sixteen b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
TARGET inline Sixteen spread2(const float* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
TARGET inline Sixteen spread_four(__m256 twice) {
  return {_mm256_permutevar8x32_ps(twice, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
          _mm256_permutevar8x32_ps(twice, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
}
TARGET inline Sixteen spread4(const float* p) {
  return spread_four(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
}
TARGET inline Sixteen spread_zeros4(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const __m256 zeros = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
  return spread_four(_mm256_sub_ps(zeros, _mm256_set1_ps(8)));
}
TARGET inline Sixteen spread_zeros2(const uint8_t* p) {
  return {_mm256_set1_ps(static_cast<float>(p[0]) - 8), _mm256_set1_ps(static_cast<float>(p[1]) - 8)};
}
TARGET inline Bytes low_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(load_integers(p), mask), _mm256_and_si256(load_integers(p + 32), mask)};
}
TARGET inline Bytes high_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(load_integers(p), 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(load_integers(p + 32), 4), mask)};
}
TARGET inline void sum_each16(Sixteen a, Sixteen b, Sixteen c, Sixteen d, float* totals) {
  const __m256 as = _mm256_add_ps(a.low, a.high), bs = _mm256_add_ps(b.low, b.high);
  const __m256 cs = _mm256_add_ps(c.low, c.high), ds = _mm256_add_ps(d.low, d.high);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(as, bs), _mm256_unpackhi_ps(as, bs));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(cs, ds), _mm256_unpackhi_ps(cs, ds));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
