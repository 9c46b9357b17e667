// The loops of a decoding step with AVX-512.
#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of its own undefined-value intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "decode/kernels.h"
#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx512f")))
typedef __m512 Vec;
typedef __m128 Four;
typedef int32_t IntVec __attribute__((vector_size(64)));
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

TARGET inline Vec splat(float x) { return _mm512_set1_ps(x); }
TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The first `count` (fewer than kLanes) floats, zeros behind them.
TARGET inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
TARGET inline Vec load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
TARGET inline void store_first(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
TARGET inline Vec widen(const BFloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
TARGET inline Vec widen(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <int H>
TARGET inline Vec half(const float* p) {
  const __m512i which = _mm512_add_epi32(
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), _mm512_set1_epi32(H));
  return _mm512_permutex2var_ps(_mm512_loadu_ps(p), which, _mm512_loadu_ps(p + 16));
}
template <int H>
TARGET inline Vec half(const BFloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return _mm512_castsi512_ps(H == 0 ? _mm512_slli_epi32(both, 16)
                                    : _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// The sum of the lanes of each of four vectors.
TARGET inline Four sum_each(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const Vec abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const Vec folded = abcd + _mm512_shuffle_f32x4(abcd, abcd, 0x4e);
  return _mm512_castps512_ps128(folded) + _mm512_extractf32x4_ps(folded, 1);
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
}

#include "decode/kernels_body.h"

}  // namespace

const KernelSet& avx512_kernels() {
  const QuantisedKernels& vnni = avx512vnni_quantised();
  static const KernelSet set = make_kernels("avx512", vnni.supported() ? vnni : best_256_quantised());
  return set;
}

}  // namespace llava_fast::decode
#endif
