// AVX-512 (VNNI) inner loops of the exact resize.
//
// vpdpbusd adds four products of unsigned and signed bytes to a 32-bit lane, without saturating. A weight is
// cut into three signed bytes (its magnitude stays below 1.3 * 2^22, so they hold it), one accumulator each:
// sum = a0 + 2^8 a1 + 2^16 a2 modulo 2^32, which is the sum the scalar kernel makes.
#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12 warns of its own undefined-value intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstring>

#include "image/kernels.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace llava_fast {
namespace {

constexpr int kWords = 3;        // per group of four taps: the low, middle and high bytes of the weights
constexpr int kChunkBytes = 64;  // four pixels of four rows, see pack
constexpr int kBlock = 64;       // bytes of a row that the vertical kernel makes at once

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

void split(const int32_t weights[4], int32_t* words) {
  uint32_t packed[kWords] = {0, 0, 0};
  for (int k = 0; k < 4; ++k) {
    int32_t rest = weights[k];
    for (int digit = 0; digit < kWords; ++digit) {
      const int32_t low = ((rest + 128) & 255) - 128;
      packed[digit] |= static_cast<uint32_t>(low & 255) << (8 * k);
      rest = (rest - low) >> 8;
    }
  }
  std::memcpy(words, packed, sizeof(packed));
}

void prepare(Axis& axis, int align) { group_taps(axis, align, kWords, split); }

size_t scratch_bytes(const Axis& axis) {  // whole chunks, and the zero-weighted ones past the end of a row
  return (static_cast<size_t>(axis.taps.in_size + 3) / 4 + axis.groups) * kChunkBytes + 64;
}

struct Sums {
  __m512i low, middle, high;
};

AVX512 inline Sums start() { return {_mm512_set1_epi32(kRounding), _mm512_setzero_si512(), _mm512_setzero_si512()}; }

AVX512 inline void add(Sums& sums, __m512i samples, const int32_t* words) {
  sums.low = _mm512_dpbusd_epi32(sums.low, samples, _mm512_set1_epi32(words[0]));
  sums.middle = _mm512_dpbusd_epi32(sums.middle, samples, _mm512_set1_epi32(words[1]));
  sums.high = _mm512_dpbusd_epi32(sums.high, samples, _mm512_set1_epi32(words[2]));
}

AVX512 inline __m512i finish(const Sums& sums) {  // 32-bit values, not clamped yet
  const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.middle);
  return _mm512_srai_epi32(_mm512_add_epi32(sums.low, _mm512_slli_epi32(upper, 8)), kPrecisionBits);
}

// Clamps four vectors of 32-bit values to bytes; within each 128 bits the four follow one another.
AVX512 inline __m512i clamp(__m512i a, __m512i b, __m512i c, __m512i d) {
  return _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

// 16 bytes of each of four rows to one vector, a row per 128 bits.
AVX512 inline __m512i four_rows(const uint8_t* const rows[4], ptrdiff_t offset) {
  const auto load = [&](int row)
                        AVX512 { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
  __m512i all = _mm512_castsi128_si512(load(0));
  all = _mm512_inserti32x4(all, load(1), 1);
  all = _mm512_inserti32x4(all, load(2), 2);
  return _mm512_inserti32x4(all, load(3), 3);
}

// Chunks [begin, end) of four rows: four pixels of a row become RRRR GGGG BBBB 0000 in its 128 bits.
AVX512 void pack(const uint8_t* const rows[4], int width, int begin, int end, uint8_t* packed) {
  const __m512i by_channel =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
  const int bytes = 3 * width;
  for (int c = begin; c < end; ++c) {
    __m512i pixels;
    if (12 * c + 16 <= bytes) {
      pixels = four_rows(rows, 12 * c);
    } else {  // the end of the row: nothing past it may be read
      uint8_t last[4][16] = {};
      for (int row = 0; row < 4 && 12 * c < bytes; ++row) std::memcpy(last[row], rows[row] + 12 * c, bytes - 12 * c);
      pixels = _mm512_loadu_si512(last);
    }
    _mm512_store_si512(packed + static_cast<size_t>(c) * kChunkBytes, _mm512_shuffle_epi8(pixels, by_channel));
  }
}

// One output pixel of four rows. kGroups is the number of groups where it is known (so that the loop unrolls), or 0.
template <int kGroups>
AVX512 inline __m512i dot(const uint8_t* chunk, const int32_t* words, int groups) {
  Sums sums = start();
#pragma GCC unroll 8
  for (int g = 0; g < (kGroups ? kGroups : groups); ++g)
    add(sums, _mm512_load_si512(chunk + g * kChunkBytes), words + g * kWords);
  return finish(sums);
}

template <int kGroups>
AVX512 void outputs(const uint8_t* packed, const Axis& axis, int x0, int x1, uint8_t* const out[4]) {
  const __m512i to_rgb = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const int groups = axis.groups;
  const int* first = axis.first.data();
  const int32_t* words = axis.words.data();
  uint8_t *out0 = out[0], *out1 = out[1], *out2 = out[2], *out3 = out[3];
  for (int x = x0; x < x1; x += 4) {
    const auto pixel = [&](int i) AVX512 {
      const size_t at = x + i < x1 ? x + i : x1 - 1;
      return dot<kGroups>(packed + static_cast<size_t>(first[at]) * (kChunkBytes / 4),
                          words + at * (kGroups ? kGroups : groups) * kWords, groups);
    };
    const __m512i rgb = _mm512_shuffle_epi8(clamp(pixel(0), pixel(1), pixel(2), pixel(3)), to_rgb);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out0), _mm512_castsi512_si128(rgb));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out1), _mm512_extracti32x4_epi32(rgb, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out2), _mm512_extracti32x4_epi32(rgb, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out3), _mm512_extracti32x4_epi32(rgb, 3));
    out0 += 12, out1 += 12, out2 += 12, out3 += 12;
  }
}

AVX512 void horizontal(const uint8_t* src, ptrdiff_t src_stride, int rows, const Axis& axis, int x0, int x1,
                       uint8_t* dst, ptrdiff_t dst_stride, uint8_t* scratch) {
  uint8_t* packed = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  const uint8_t* in[4];
  uint8_t* out[4];
  for (int row = 0; row < 4; ++row) {  // rows that are missing repeat the last one
    const int r = row < rows ? row : rows - 1;
    in[row] = src + r * src_stride;
    out[row] = dst + r * dst_stride;
  }
  pack(in, axis.taps.in_size, axis.first[x0] / 4, axis.first[x1 - 1] / 4 + axis.groups, packed);
  switch (axis.groups) {
    case 2:
      return outputs<2>(packed, axis, x0, x1, out);
    case 3:
      return outputs<3>(packed, axis, x0, x1, out);
    case 4:
      return outputs<4>(packed, axis, x0, x1, out);
    case 5:
      return outputs<5>(packed, axis, x0, x1, out);
    default:
      return outputs<0>(packed, axis, x0, x1, out);
  }
}

// 64 bytes of an output row, `at` bytes into the rows. Four sums, since the rows' bytes become 32-bit values.
template <int kGroups>
AVX512 inline __m512i vertical_block(const uint8_t* const* rows, ptrdiff_t at, const int32_t* words, int groups) {
  Sums s0 = start(), s1 = start(), s2 = start(), s3 = start();
#pragma GCC unroll 8
  for (int g = 0; g < (kGroups ? kGroups : groups); ++g) {
    const __m512i a = _mm512_loadu_si512(rows[4 * g] + at), b = _mm512_loadu_si512(rows[4 * g + 1] + at);
    const __m512i c = _mm512_loadu_si512(rows[4 * g + 2] + at), d = _mm512_loadu_si512(rows[4 * g + 3] + at);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    add(s0, _mm512_unpacklo_epi16(ab_low, cd_low), words + g * kWords);
    add(s1, _mm512_unpackhi_epi16(ab_low, cd_low), words + g * kWords);
    add(s2, _mm512_unpacklo_epi16(ab_high, cd_high), words + g * kWords);
    add(s3, _mm512_unpackhi_epi16(ab_high, cd_high), words + g * kWords);
  }
  return clamp(finish(s0), finish(s1), finish(s2), finish(s3));
}

template <int kGroups>
AVX512 void vertical_row(const uint8_t* const* rows, const int32_t* words, int groups, int bytes, uint8_t* dst) {
  for (int i = 0; i < bytes; i += kBlock) {
    const int at = i + kBlock <= bytes ? i : bytes - kBlock;  // the last block overlaps the one before it
    _mm512_storeu_si512(dst + at, vertical_block<kGroups>(rows, at, words, groups));
  }
}

AVX512 void vertical(const uint8_t* const* rows, const Axis& axis, int y, int bytes, uint8_t* dst) {
  if (bytes < kBlock) return scalar_kernels().vertical(rows, axis, y, bytes, dst);
  const int32_t* words = &axis.words[static_cast<size_t>(y) * axis.groups * kWords];
  switch (axis.groups) {
    case 1:
      return vertical_row<1>(rows, words, 1, bytes, dst);
    case 2:
      return vertical_row<2>(rows, words, 2, bytes, dst);
    case 3:
      return vertical_row<3>(rows, words, 3, bytes, dst);
    case 4:
      return vertical_row<4>(rows, words, 4, bytes, dst);
    default:
      return vertical_row<0>(rows, words, axis.groups, bytes, dst);
  }
}

}  // namespace

const KernelSet& avx512_kernels() {
  static const KernelSet set = {
      "avx512", supported, prepare, scratch_bytes, horizontal, vertical, avx2_kernels().planes};
  return set;
}

}  // namespace llava_fast
#endif
