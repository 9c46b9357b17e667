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

TARGET inline Sixteen load16(const void* p) { return _mm512_loadu_ps(p); }
TARGET inline Sixteen splat16(float x) { return _mm512_set1_ps(x); }
TARGET inline Sixteen multiply(Sixteen a, Sixteen b) { return _mm512_mul_ps(a, b); }
TARGET inline Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
#include "decode/quantised_four.h"

TARGET inline Sixteen spread2(Four v) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(v));
}
TARGET inline Sixteen spread4(Four v) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(v));
}
TARGET inline Sixteen less_zeros(const uint8_t* p) {
  const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), zeros));
}
// 64 bytes in a register: the compiler would read them from memory again for each of their uses, and one 64-byte load a
// cycle is then what limits the loop.
TARGET inline __m512i load_once(const void* p) {
  __m512i loaded = _mm512_loadu_si512(p);
  asm("" : "+v"(loaded));
  return loaded;
}
// Signed codes plus 128, unsigned.
TARGET inline Bytes int8_codes(const uint8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
struct Nibbles {
  Bytes low, high;
};
TARGET inline Nibbles nibbles(const uint8_t* p) {
  const __m512i bytes = load_once(p), mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
}
// Minus `factor` (at most 128) times the lanes' sums of codes, plus `from`. Offsets are found so for int8, as one
// instruction more is faster than reading them; and for int4 with one vector: that is bound by reading the weights, and
// stored offsets would take room from the codes in the first-level cache.
TARGET inline __m512i less_sums(int factor, __m512i codes, __m512i from) {
  const __m512i factors = _mm512_set1_epi8(static_cast<char>(factor));
  return _mm512_sub_epi32(from, _mm512_dpbusd_epi32(_mm512_setzero_si512(), factors, codes));
}
struct Int8Unit {
  __m512i codes, offsets;
  TARGET Int8Unit(const int8_t* p, const int32_t*, bool)
      : codes(load_once(p)), offsets(less_sums(128, codes, _mm512_setzero_si512())) {}
};
struct Int4Unit {
  __m512i even, odd, offsets;
  TARGET Int4Unit(const int8_t* p, const int32_t* stored, bool alone)
      : even(load_once(p)),
        odd(load_once(p + 64)),
        offsets(alone ? less_sums(8, even, less_sums(8, odd, _mm512_setzero_si512())) : load_once(stored)) {}
};

TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.offsets, w, x.codes));
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x.offsets, low, x.even), high, x.odd));
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
