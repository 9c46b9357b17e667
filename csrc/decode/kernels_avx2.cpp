// The loops of a decoding step with AVX2 and fused multiply-add.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/kernels.h"
#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,fma")))
typedef __m256 Vec;
typedef __m128 Four;
typedef int32_t IntVec __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

TARGET inline Vec splat(float x) { return _mm256_set1_ps(x); }
TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The first `count` (fewer than kLanes) floats, zeros behind them.
TARGET inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TARGET inline Vec load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
TARGET inline void store_first(float* p, Vec v, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
TARGET inline Vec widen(const BFloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
TARGET inline Vec widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <int H>
TARGET inline Vec half(const float* p) {
  const Vec mixed = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), H == 0 ? 0x88 : 0xdd);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
template <int H>
TARGET inline Vec half(const BFloat16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(H == 0 ? _mm256_slli_epi32(both, 16)
                                    : _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
// The sum of the lanes of each of four vectors.
TARGET inline Four sum_each(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const Vec abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  return _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#include "decode/kernels_body.h"

}  // namespace

const KernelSet& avx2_kernels() {
  static const KernelSet set = make_kernels("avx2", best_256_quantised());
  return set;
}

}  // namespace llava_fast::decode
#endif
