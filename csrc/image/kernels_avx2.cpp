// AVX2 inner loops of the exact resize.
//
// vpmaddwd adds two products of 16-bit integers to a 32-bit lane. A weight is cut at bit 12 into a high and a
// low part that both fit 16 bits, one accumulator each: sum = low + 2^12 high modulo 2^32, which is the sum the
// scalar kernel makes. Samples come as groups of four bytes (taps 0 to 3 of one channel): taps 0 and 2 are their
// even bytes, taps 1 and 3 the odd ones.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "image/kernels.h"

#define AVX2 __attribute__((target("avx2")))

namespace llava_fast {
namespace {

constexpr int kWords = 4;        // per group of four taps: low 0|2, low 1|3, high 0|2, high 1|3
constexpr int kSplit = 12;       // bits of the low part
constexpr int kChunkBytes = 64;  // four pixels of four rows, see pack
constexpr int kBlock = 32;       // bytes of a row that the vertical kernel makes at once

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

void split(const int32_t weights[4], int32_t* words) {
  const auto pair = [](int32_t first, int32_t second) {
    return static_cast<int32_t>((first & 0xffff) | (static_cast<uint32_t>(second) << 16));
  };
  int32_t low[4], high[4];
  for (int k = 0; k < 4; ++k) {
    low[k] = weights[k] & ((1 << kSplit) - 1);
    high[k] = weights[k] >> kSplit;
  }
  words[0] = pair(low[0], low[2]);
  words[1] = pair(low[1], low[3]);
  words[2] = pair(high[0], high[2]);
  words[3] = pair(high[1], high[3]);
}

void prepare(Axis& axis, int align) { group_taps(axis, align, kWords, split); }

size_t scratch_bytes(const Axis& axis) {  // whole chunks, and the zero-weighted ones past the end of a row
  return (static_cast<size_t>(axis.taps.in_size + 3) / 4 + axis.groups) * kChunkBytes + 32;
}

struct Weights {
  __m256i low_even, low_odd, high_even, high_odd;
};

AVX2 inline Weights broadcast(const int32_t* words) {
  return {_mm256_set1_epi32(words[0]), _mm256_set1_epi32(words[1]), _mm256_set1_epi32(words[2]),
          _mm256_set1_epi32(words[3])};
}

struct Sums {
  __m256i low, high;
};

AVX2 inline Sums start() { return {_mm256_set1_epi32(kRounding), _mm256_setzero_si256()}; }

AVX2 inline void add(Sums& sums, __m256i samples, const Weights& weights) {
  const __m256i even = _mm256_and_si256(samples, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(samples, 8);
  sums.low = _mm256_add_epi32(
      sums.low, _mm256_add_epi32(_mm256_madd_epi16(even, weights.low_even), _mm256_madd_epi16(odd, weights.low_odd)));
  sums.high = _mm256_add_epi32(sums.high, _mm256_add_epi32(_mm256_madd_epi16(even, weights.high_even),
                                                           _mm256_madd_epi16(odd, weights.high_odd)));
}

AVX2 inline __m256i finish(const Sums& sums) {  // 32-bit values, not clamped yet
  return _mm256_srai_epi32(_mm256_add_epi32(sums.low, _mm256_slli_epi32(sums.high, kSplit)), kPrecisionBits);
}

// Clamps four vectors of 32-bit values to bytes; within each 128 bits the four follow one another.
AVX2 inline __m256i clamp(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

// Chunks [begin, end) of four rows: four pixels of a row become RRRR GGGG BBBB 0000, 16 bytes a row.
AVX2 void pack(const uint8_t* const rows[4], int width, int begin, int end, uint8_t* packed) {
  const __m128i by_channel = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
  const int bytes = 3 * width;
  for (int c = begin; c < end; ++c) {
    for (int row = 0; row < 4; ++row) {
      __m128i pixels;
      if (12 * c + 16 <= bytes) {
        pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 12 * c));
      } else {  // the end of the row: nothing past it may be read
        uint8_t last[16] = {};
        if (12 * c < bytes) std::memcpy(last, rows[row] + 12 * c, bytes - 12 * c);
        pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(last));
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(packed + static_cast<size_t>(c) * kChunkBytes + 16 * row),
                      _mm_shuffle_epi8(pixels, by_channel));
    }
  }
}

// Output pixels of four rows, four at a time. kGroups is the number of groups where it is known, or 0.
template <int kGroups>
AVX2 void outputs(const uint8_t* packed, const Axis& axis, int x0, int x1, uint8_t* const out[4]) {
  const __m256i to_rgb =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const int groups = kGroups ? kGroups : axis.groups;
  for (int x = x0; x < x1; x += 4) {
    __m256i upper[4], lower[4];  // rows 0 and 1, rows 2 and 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const size_t at = x + i < x1 ? x + i : x1 - 1;
      const uint8_t* chunk = packed + static_cast<size_t>(axis.first[at]) * (kChunkBytes / 4);
      const int32_t* words = axis.words.data() + at * groups * kWords;
      Sums first = start(), second = start();
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g) {
        const Weights weights = broadcast(words + g * kWords);
        add(first, _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk + g * kChunkBytes)), weights);
        add(second, _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk + g * kChunkBytes + 32)), weights);
      }
      upper[i] = finish(first);
      lower[i] = finish(second);
    }
    const ptrdiff_t offset = 3 * static_cast<ptrdiff_t>(x - x0);
    const auto store = [&](int row, const __m256i value[4]) AVX2 {
      const __m256i rgb = _mm256_shuffle_epi8(clamp(value[0], value[1], value[2], value[3]), to_rgb);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[row] + offset), _mm256_castsi256_si128(rgb));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[row + 1] + offset), _mm256_extracti128_si256(rgb, 1));
    };
    store(0, upper);
    store(2, lower);
  }
}

AVX2 void horizontal(const uint8_t* src, ptrdiff_t src_stride, int rows, const Axis& axis, int x0, int x1, uint8_t* dst,
                     ptrdiff_t dst_stride, uint8_t* scratch) {
  uint8_t* packed = scratch + (32 - reinterpret_cast<uintptr_t>(scratch) % 32) % 32;
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

// 32 bytes of an output row, `at` bytes into the rows. Four sums, since the rows' bytes become 32-bit values.
template <int kGroups>
AVX2 inline __m256i vertical_block(const uint8_t* const* rows, ptrdiff_t at, const int32_t* words, int groups) {
  Sums s0 = start(), s1 = start(), s2 = start(), s3 = start();
  const auto load = [&](int row) AVX2 { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[row] + at)); };
#pragma GCC unroll 8
  for (int g = 0; g < (kGroups ? kGroups : groups); ++g) {
    const __m256i a = load(4 * g), b = load(4 * g + 1), c = load(4 * g + 2), d = load(4 * g + 3);
    const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    const Weights weights = broadcast(words + g * kWords);
    add(s0, _mm256_unpacklo_epi16(ab_low, cd_low), weights);
    add(s1, _mm256_unpackhi_epi16(ab_low, cd_low), weights);
    add(s2, _mm256_unpacklo_epi16(ab_high, cd_high), weights);
    add(s3, _mm256_unpackhi_epi16(ab_high, cd_high), weights);
  }
  return clamp(finish(s0), finish(s1), finish(s2), finish(s3));
}

template <int kGroups>
AVX2 void vertical_row(const uint8_t* const* rows, const int32_t* words, int groups, int bytes, uint8_t* dst) {
  for (int i = 0; i < bytes; i += kBlock) {
    const int at = i + kBlock <= bytes ? i : bytes - kBlock;  // the last block overlaps the one before it
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + at), vertical_block<kGroups>(rows, at, words, groups));
  }
}

AVX2 void vertical(const uint8_t* const* rows, const Axis& axis, int y, int bytes, uint8_t* dst) {
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

// Sixteen pixels: every third byte of each of three vectors is one channel's, at places that differ by one, so two
// blends gather a channel and one shuffle puts it in order.
AVX2 void planes(const uint8_t* src, int pixels, uint8_t* red, uint8_t* green, uint8_t* blue) {
  constexpr int kPixels = 16;
  if (pixels < kPixels) return scalar_kernels().planes(src, pixels, red, green, blue);
  const __m128i third[3] = {_mm_setr_epi8(-1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1),
                            _mm_setr_epi8(0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0),
                            _mm_setr_epi8(0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, 0)};
  const __m128i order[3] = {_mm_setr_epi8(0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14, 1, 4, 7, 10, 13),
                            _mm_setr_epi8(1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14),
                            _mm_setr_epi8(2, 5, 8, 11, 14, 1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15)};
  uint8_t* const out[3] = {red, green, blue};
  for (int i = 0; i < pixels; i += kPixels) {
    const int at = i + kPixels <= pixels ? i : pixels - kPixels;  // the last block overlaps the one before it
    const auto load = [&](int part) AVX2 {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + 3 * static_cast<ptrdiff_t>(at) + 16 * part));
    };
    const __m128i part[3] = {load(0), load(1), load(2)};
    for (int c = 0; c < 3; ++c) {
      // Byte j of part p belongs to channel (16 p + j) % 3.
      const __m128i two = _mm_blendv_epi8(part[0], part[1], third[(c + 2) % 3]);
      const __m128i all = _mm_blendv_epi8(two, part[2], third[(c + 1) % 3]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[c] + at), _mm_shuffle_epi8(all, order[c]));
    }
  }
}

}  // namespace

const KernelSet& avx2_kernels() {
  static const KernelSet set = {"avx2", supported, prepare, scratch_bytes, horizontal, vertical, planes};
  return set;
}

}  // namespace llava_fast
#endif
