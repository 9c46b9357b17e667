// Products with int8 and int4 weights with AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#include "decode/quantised_avx2.h"

// Signed codes plus 128, unsigned.
TARGET inline Bytes int8_codes(const uint8_t* p) {
  const __m256i top = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(load_integers(p), top), _mm256_xor_si256(load_integers(p + 32), top)};
}
struct Int8Unit {
  __m256i low, high, offsets_low, offsets_high;
  TARGET Int8Unit(const int8_t* p, const int32_t* offsets, bool)
      : low(load_integers(p)),
        high(load_integers(p + 32)),
        offsets_low(load_integers(offsets)),
        offsets_high(load_integers(offsets + 8)) {}
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

TARGET inline Sixteen dot(Bytes w, const Int8Unit& x) {
  return {_mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(x.offsets_low, w.low, x.low)),
          _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(x.offsets_high, w.high, x.high))};
}
TARGET inline Sixteen dot(Bytes low, Bytes high, const Int4Unit& x) {
  const __m256i first = _mm256_dpbusd_avx_epi32(x.offsets_low, low.low, x.even_low);
  const __m256i second = _mm256_dpbusd_avx_epi32(x.offsets_high, low.high, x.even_high);
  return {_mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(first, high.low, x.odd_low)),
          _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(second, high.high, x.odd_high))};
}
bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avxvnni");
}

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& avxvnni_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, avxvnni_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
