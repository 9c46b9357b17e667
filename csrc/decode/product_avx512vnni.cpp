#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of its own undefined-value intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "decode/product.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
constexpr int kTileVectors = 6;  // 6 by 2 sums of integers and of floats fit the registers

template <int M>
TARGET void tile(const Panel& panel, const QuantisedRows& x, float* y, int64_t y_stride, bool first) {
  __m512 sums[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      sums[m][h] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + m * y_stride + 16 * h);
  const uint8_t* codes = panel.codes;
  for (int64_t g = 0; g < panel.groups; ++g) {
    __m512i dots[M][2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i zero = _mm512_loadu_si512(panel.zero + g * kPanelRows + 16 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
        dots[m][h] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-x.sums[m * x.groups_stride + g]));
    }
    const int8_t* const mine = x.codes + g * panel.group;
    for (int64_t k = 0; k < panel.group; k += 4, codes += 4 * kPanelRows) {
      const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 64);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t four;
        __builtin_memcpy(&four, mine + m * x.codes_stride + k, sizeof(four));
        const __m512i all = _mm512_set1_epi32(four);
        dots[m][0] = _mm512_dpbusd_epi32(dots[m][0], low, all);
        dots[m][1] = _mm512_dpbusd_epi32(dots[m][1], high, all);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 scale = _mm512_loadu_ps(panel.scale + g * kPanelRows + 16 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[m * x.groups_stride + g]));
        sums[m][h] = _mm512_add_ps(sums[m][h], _mm512_mul_ps(_mm512_cvtepi32_ps(dots[m][h]), both));
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(y + m * y_stride + 16 * h, sums[m][h]);
}

}  // namespace

void avx512vnni_panel(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride,
                      bool first) {
  QuantisedRows at = x;
  const auto step = [&](int64_t count) {
    at.codes += count * x.codes_stride;
    at.scales += count * x.groups_stride;
    at.sums += count * x.groups_stride;
    y += count * y_stride;
  };
  for (; rows >= kTileVectors; rows -= kTileVectors, step(kTileVectors))
    tile<kTileVectors>(panel, at, y, y_stride, first);
  for (; rows > 0; --rows, step(1)) tile<1>(panel, at, y, y_stride, first);
}

}  // namespace llava_fast::decode
#endif
