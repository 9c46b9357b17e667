// Shared by all x86 sets. Include <immintrin.h> and define TARGET before this file.

typedef __m128 Four;
TARGET inline Four load4(const float* p) { return _mm_loadu_ps(p); }
TARGET inline Four load2(const float* p) {
  const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_unpacklo_ps(two, two);
}
TARGET inline Four load1(const float* p) { return _mm_set1_ps(*p); }
TARGET inline Four multiply(Four a, Four b) { return _mm_mul_ps(a, b); }
