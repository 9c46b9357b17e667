#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of its own undefined-value intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "decode/product.h"

namespace llava_fast::decode {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vnni")))
constexpr int kTileVectors = 6;  // 6 by 2 sums of integers and of floats fit the registers

// The effect of kOffset on a group's sums: minus kOffset times the sum of its codes, for each row of a panel.
typedef int32_t Offsets[kBlockElements / kGroup][kPanelRows];

TARGET void find_offsets(const Panel& panel, Offsets& offsets) {
  const __m512i factors = _mm512_set1_epi8(static_cast<char>(kOffset));
  const int8_t* codes = panel.codes;
  for (int64_t g = 0; g < panel.groups; ++g) {
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int64_t k = 0; k < panel.group; k += 4, codes += 4 * kPanelRows) {
      low = _mm512_dpbusd_epi32(low, factors, _mm512_loadu_si512(codes));
      high = _mm512_dpbusd_epi32(high, factors, _mm512_loadu_si512(codes + 64));
    }
    _mm512_storeu_si512(offsets[g], _mm512_sub_epi32(_mm512_setzero_si512(), low));
    _mm512_storeu_si512(offsets[g] + 16, _mm512_sub_epi32(_mm512_setzero_si512(), high));
  }
}

// sums += the lanes' products of four unsigned and four signed codes, as _mm512_dpbusd_epi32, for which GCC 12 copies
// every accumulator of a loop twice a pass.
TARGET inline void add_dot(__m512i& sums, __m512i unsigned_codes, __m512i signed_codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_codes), "v"(signed_codes));
}

template <int M>
TARGET void tile(const Panel& panel, const Offsets& offsets, const QuantisedRows& x, float* y, int64_t y_stride,
                 bool first) {
  __m512 sums[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      sums[m][h] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + m * y_stride + 16 * h);
  const int8_t* codes = panel.codes;
  for (int64_t g = 0; g < panel.groups; ++g) {
    __m512i dots[M][2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i offset = _mm512_loadu_si512(offsets[g] + 16 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) dots[m][h] = offset;
    }
    const uint8_t* const mine = x.codes + g * panel.group;
    for (int64_t k = 0; k < panel.group; k += 4, codes += 4 * kPanelRows) {
      const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 64);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        int32_t four;
        __builtin_memcpy(&four, mine + m * x.codes_stride + k, sizeof(four));
        const __m512i all = _mm512_set1_epi32(four);
        add_dot(dots[m][0], all, low);
        add_dot(dots[m][1], all, high);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 scale = _mm512_loadu_ps(panel.scale + g * kPanelRows + 16 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[m * x.groups_stride + g]));
        sums[m][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[m][h]), both, sums[m][h]);
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(y + m * y_stride + 16 * h, sums[m][h]);
}

// 64 codes of a row from element `at` on, less their zero points.
TARGET inline __m512i signed_codes(const Linear& linear, int64_t at) {
  if (linear.kind == Kind::kInt8) return _mm512_loadu_si512(static_cast<const int8_t*>(linear.weight) + at);
  const uint8_t* const stored = static_cast<const uint8_t*>(linear.weight) + at / 2;
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
  const __m512i spread = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
  const __m512i codes = _mm512_and_si512(spread, _mm512_set1_epi8(15));
  if (linear.zero == nullptr) return _mm512_sub_epi8(codes, _mm512_set1_epi8(8));
  const __m256i low = _mm256_set1_epi8(static_cast<char>(linear.zero[at / linear.group]));
  const __m256i high = _mm256_set1_epi8(static_cast<char>(linear.zero[(at + 32) / linear.group]));
  return _mm512_sub_epi8(codes, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// Rows and columns of 16 by 16 integers exchanged.
TARGET inline void transpose(__m512i (&m)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows
    t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // fours: m[4 * i + c] has column c of each quarter
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      m[4 * i + 2 * c] = _mm512_unpacklo_epi64(t[4 * i + c], t[4 * i + 2 + c]);
      m[4 * i + 2 * c + 1] = _mm512_unpackhi_epi64(t[4 * i + c], t[4 * i + 2 + c]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // quarters of registers, 4 by 4
    const __m512i even01 = _mm512_shuffle_i32x4(m[c], m[4 + c], 0x88), odd01 = _mm512_shuffle_i32x4(m[c], m[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(m[8 + c], m[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(m[8 + c], m[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) m[i] = t[i];
}

TARGET void pack(const Linear& linear, const Part& part, int8_t* codes) {
  if (part.rows < kPanelRows || part.count < part.padded || part.padded % 64 != 0)
    return scalar_panel().pack(linear, part, codes);
  for (int64_t k = 0; k < part.padded; k += 64, codes += 64 * kPanelRows)
    for (int64_t first = 0; first < kPanelRows; first += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < 16; ++r)
        block[r] = signed_codes(linear, (part.row + first + r) * linear.in + part.start + k);
      transpose(block);
#pragma GCC unroll 16
      for (int64_t c = 0; c < 16; ++c) _mm512_storeu_si512(codes + (c * kPanelRows + first) * 4, block[c]);
    }
}

void multiply(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first) {
  Offsets offsets;
  find_offsets(panel, offsets);
  QuantisedRows at = x;
  const auto step = [&](int64_t count) {
    at.codes += count * x.codes_stride;
    at.scales += count * x.groups_stride;
    y += count * y_stride;
  };
  for (; rows >= kTileVectors; rows -= kTileVectors, step(kTileVectors))
    tile<kTileVectors>(panel, offsets, at, y, y_stride, first);
  for (; rows > 0; --rows, step(1)) tile<1>(panel, offsets, at, y, y_stride, first);
}

}  // namespace

const PanelKernels& avx512vnni_panel() {
  static const PanelKernels kernels = {pack, multiply};
  return kernels;
}

}  // namespace llava_fast::decode
#endif
