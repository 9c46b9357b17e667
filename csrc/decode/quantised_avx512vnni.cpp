// Products with int8 and int4 weights with AVX-512 VNNI.
#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of its own undefined-value intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vnni")))
constexpr int kTileVectors = 4, kTileRows = 4;
typedef __m512 Sixteen;
typedef __m512i Bytes;

TARGET inline Sixteen splat16(float x) { return _mm512_set1_ps(x); }
TARGET inline Sixteen add(Sixteen a, Sixteen b) { return _mm512_add_ps(a, b); }
TARGET inline Sixteen multiply(Sixteen a, Sixteen b) { return _mm512_mul_ps(a, b); }
TARGET inline Sixteen subtract(Sixteen a, Sixteen b) { return _mm512_sub_ps(a, b); }
TARGET inline Sixteen spread2(const float* p) {
  return _mm512_insertf32x8(_mm512_set1_ps(p[0]), _mm256_set1_ps(p[1]), 1);
}
TARGET inline Sixteen spread_four(__m128 four) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
}
TARGET inline Sixteen spread4(const float* p) { return spread_four(_mm_loadu_ps(p)); }
TARGET inline Sixteen spread_zeros4(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const __m128 zeros = _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
  return spread_four(_mm_sub_ps(zeros, _mm_set1_ps(8)));
}
TARGET inline Sixteen spread_zeros2(const uint8_t* p) {
  const float zeros[2] = {static_cast<float>(p[0]) - 8, static_cast<float>(p[1]) - 8};
  return spread2(zeros);
}
// Signed codes plus 128, unsigned: the effect of the offset is subtracted before the products are added.
TARGET inline Bytes int8_codes(const uint8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
TARGET inline Bytes low_nibbles(const uint8_t* p) {
  return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
}
TARGET inline Bytes high_nibbles(const uint8_t* p) {
  return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}
// Minus `factor` (at most 128) times the lanes' sums of codes.
TARGET inline __m512i less(int factor, __m512i codes) {
  const __m512i factors = _mm512_set1_epi8(static_cast<char>(factor));
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(_mm512_setzero_si512(), factors, codes));
}
struct Int8Unit {
  __m512i codes, offset;
  TARGET explicit Int8Unit(const int8_t* p) : codes(_mm512_loadu_si512(p)), offset(less(128, codes)) {}
};
struct Int4Unit {
  __m512i even, odd, offset;
  TARGET explicit Int4Unit(const int8_t* p)
      : even(_mm512_loadu_si512(p)),
        odd(_mm512_loadu_si512(p + 64)),
        offset(_mm512_add_epi32(less(8, even), less(8, odd))) {}
};

TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.offset, w, x.codes));
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x.offset, low, x.even), high, x.odd));
}
TARGET inline Sixteen sums(const Int4Unit& x) {
  return multiply(_mm512_cvtepi32_ps(x.offset), splat16(-0.125f));
}
TARGET inline __m256 halves(Sixteen v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
TARGET inline void sum_each16(Sixteen a, Sixteen b, Sixteen c, Sixteen d, float* totals) {
  const __m256 as = halves(a), bs = halves(b), cs = halves(c), ds = halves(d);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(as, bs), _mm256_unpackhi_ps(as, bs));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(cs, ds), _mm256_unpackhi_ps(cs, ds));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(totals, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& avx512vnni_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, avx512vnni_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
