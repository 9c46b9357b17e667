// Panels in registers of 256 bits. A file for one instruction set includes <immintrin.h>, defines TARGET in an
// anonymous namespace, includes this, and multiplies by a form:
//   kElements        elements of a row side by side, whose products are summed in 32 bits of a register: 4 bytes (then
//                    vectors are unsigned, plus kOffset) or 2 words
//   kSpan            elements of a row that `add` can sum before `total`; 0: a whole group
//   add(sums, x, w)  adds the products of x, the same in each 32 bits, and w; in assembly, lest GCC 12 add in an order
//                    of its own, for which there are too few registers
//   subtract(a, b)   of such sums
//   total(sums)      as 32-bit integers
// `pack` lays a panel's codes out as [2, elements / kElements, 16 rows, kElements].

constexpr int kTileVectors = 6, kHalfRows = 16;  // 6 by 2 sums fit the registers
static_assert(kPanelRows == 2 * kHalfRows);

TARGET inline __m256i load_integers(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TARGET inline void store_integers(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Row `r` of a part, less its zero points, filled up with zeros.
TARGET inline void signed_codes(const Linear& linear, const Part& part, int64_t r, int8_t* row) {
  const int64_t count = r < part.rows ? part.count : 0, at = (part.row + r) * linear.in + part.start;
  for (int64_t i = count; i < part.padded; ++i) row[i] = 0;
  if (linear.kind == Kind::kInt8) {
    __builtin_memcpy(row, static_cast<const int8_t*>(linear.weight) + at, count);
    return;
  }
  for (int64_t i = 0; i < count; i += 32) {
    const uint8_t* const stored = static_cast<const uint8_t*>(linear.weight) + (at + i) / 2;
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored)));
    const __m256i spread = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
    const int zero = linear.zero != nullptr ? linear.zero[(at + i) / linear.group] : 8;
    const __m256i codes = _mm256_and_si256(spread, _mm256_set1_epi8(15));
    store_integers(row + i, _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(zero))));
  }
}

// Rows and columns of 8 by 8 integers exchanged.
TARGET inline void transpose(__m256i (&m)[8]) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // pairs of rows
    t[2 * i] = _mm256_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)  // fours: m[4 * i + c] has column c of each half
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      m[4 * i + 2 * h] = _mm256_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
      m[4 * i + 2 * h + 1] = _mm256_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2x128_si256(m[c], m[4 + c], 0x20);
    t[4 + c] = _mm256_permute2x128_si256(m[c], m[4 + c], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) m[i] = t[i];
}

template <int kElements>
TARGET void pack_by(const Linear& linear, const Part& part, int8_t* codes) {
  alignas(32) int8_t rows[8][kBlockElements];
  const int64_t units = part.padded / kElements;
  for (int64_t first = 0; first < kPanelRows; first += 8) {
    for (int64_t r = 0; r < 8; ++r) signed_codes(linear, part, first + r, rows[r]);
    int8_t* to = codes + (first / kHalfRows * units * kHalfRows + first % kHalfRows) * 4;
    for (int64_t k = 0; k < part.padded; k += 8 * kElements) {
      __m256i block[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
        block[r] = kElements == 4 ? load_integers(rows[r] + k)
                                  : _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<__m128i*>(rows[r] + k)));
      transpose(block);
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c, to += 4 * kHalfRows) store_integers(to, block[c]);
    }
  }
}

// Vectors of a tile, with the distance in bytes between their codes, and their part of y.
struct Tile {
  const char* codes;
  int64_t stride;
  const float* scales;
  int64_t scales_stride;
  float* y;
  int64_t y_stride;
  __m256i* totals;  // scratch: kTileVectors * 2
};

// Adds the products of M vectors with half a panel's rows to y. `start` has 2 registers of offsets for each span.
template <class Form, int M>
__attribute__((noinline))  // inlined, GCC 12 keeps the sums in memory
TARGET void
tile(const Panel& panel, int half, const __m256i* start, const Tile& tile, bool first) {
  const int64_t span = Form::kSpan > 0 ? Form::kSpan : panel.group, spans = panel.group / span;
  const int8_t* codes = panel.codes + half * panel.groups * panel.group / Form::kElements * 4 * kHalfRows;
  const char* x = tile.codes;
  const float* scale = panel.scale + half * kHalfRows;
  const float* own_scale = tile.scales;
  float* const y = tile.y + half * kHalfRows;
  const int64_t stride = tile.stride, scales_stride = tile.scales_stride, y_stride = tile.y_stride;
  for (int m = 0; m < M && first; ++m)
    for (int r = 0; r < kHalfRows; ++r) y[m * y_stride + r] = 0;
  int64_t in_group = 0;
  for (int64_t s = 0; s < panel.groups * spans; ++s) {
    __m256i sums[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) sums[m][h] = Form::kElements == 4 ? start[2 * s + h] : _mm256_setzero_si256();
    for (int64_t k = 0; k < span; k += 32)
#pragma GCC unroll 8
      for (int unit = 0; unit < 32 / Form::kElements; ++unit, codes += 4 * kHalfRows, x += 4) {
        const __m256i low = load_integers(codes), high = load_integers(codes + 32);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          int32_t own;
          __builtin_memcpy(&own, x + m * stride, sizeof(own));
          const __m256i all = _mm256_set1_epi32(own);
          Form::add(sums[m][0], all, low);
          Form::add(sums[m][1], all, high);
        }
      }
    if constexpr (Form::kSpan > 0) {
      if (in_group == 0) {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) sums[m][h] = Form::total(sums[m][h]);
      } else {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h)
            sums[m][h] = _mm256_add_epi32(Form::total(sums[m][h]), tile.totals[2 * m + h]);
      }
      if (++in_group < spans) {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) tile.totals[2 * m + h] = sums[m][h];
        continue;
      }
      in_group = 0;
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256 of_rows = _mm256_loadu_ps(scale + 8 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        float* const target = y + m * y_stride + 8 * h;
        const __m256 both = _mm256_mul_ps(of_rows, _mm256_set1_ps(own_scale[m * scales_stride]));
        const __m256 before = _mm256_loadu_ps(target);
        _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m][h]), both, before));
      }
    }
    scale += kPanelRows;
    ++own_scale;
  }
}

// The effect of kOffset on the sums of each span: minus kOffset times the sum of the codes.
template <class Form>
TARGET void find_offsets(const Panel& panel, __m256i* offsets) {
  const int64_t span = Form::kSpan > 0 ? Form::kSpan : panel.group, spans = panel.groups * panel.group / span;
  const __m256i factors = _mm256_set1_epi8(static_cast<char>(kOffset)), none = _mm256_setzero_si256();
  const int8_t* codes = panel.codes;
  for (int64_t s = 0; s < 2 * spans; ++s) {  // of the first half, then of the second
    __m256i low = none, high = none;
    for (int64_t k = 0; k < span; k += Form::kElements, codes += 4 * kHalfRows) {
      Form::add(low, factors, load_integers(codes));
      Form::add(high, factors, load_integers(codes + 32));
    }
    offsets[2 * s] = Form::subtract(none, low);
    offsets[2 * s + 1] = Form::subtract(none, high);
  }
}

// The codes of `count` vectors as words, without kOffset.
TARGET inline void widen(const QuantisedRows& x, int64_t count, int64_t elements, int16_t (*words)[kBlockElements]) {
  for (int64_t m = 0; m < count; ++m)
    for (int64_t k = 0; k < elements; k += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x.codes + m * x.codes_stride + k));
      store_integers(words[m] + k, _mm256_sub_epi16(_mm256_cvtepu8_epi16(codes), _mm256_set1_epi16(kOffset)));
    }
}

template <class Form>
TARGET void multiply_by(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride,
                        bool first) {
  constexpr bool kWords = Form::kElements == 2;
  const int64_t span = Form::kSpan > 0 ? Form::kSpan : panel.group, elements = panel.groups * panel.group;
  __m256i offsets[kWords ? 1 : 4 * kBlockElements / kGroup];
  alignas(32) int16_t words[kWords ? kTileVectors : 1][kBlockElements];
  if constexpr (!kWords) find_offsets<Form>(panel, offsets);
  __m256i totals[kTileVectors * 2];
  QuantisedRows at = x;
  const auto run = [&](auto run_tile, int64_t count) {
    for (; rows >= count; rows -= count) {
      if constexpr (kWords) widen(at, count, elements, words);
      const char* const codes = kWords ? reinterpret_cast<const char*>(words) : reinterpret_cast<const char*>(at.codes);
      const int64_t stride = kWords ? sizeof(words[0]) : at.codes_stride;
      const Tile tile = {codes, stride, at.scales, at.groups_stride, y, y_stride, totals};
      run_tile(panel, 0, offsets, tile, first);
      run_tile(panel, 1, kWords ? offsets : offsets + 2 * (elements / span), tile, first);
      at.codes += count * x.codes_stride;
      at.scales += count * x.groups_stride;
      y += count * y_stride;
    }
  };
  run(tile<Form, kTileVectors>, kTileVectors);
  run(tile<Form, 2>, 2);
  run(tile<Form, 1>, 1);
}
