// Products with int8 and int4 weights, independent of the instruction set. A file for one set defines, in an anonymous
// namespace, TARGET, kTileVectors, kTileRows (4, or 1 if there are too few registers for four rows), and for 16 lanes:
//   Sixteen                  16 floats, with load16, splat16, multiply, multiply_add
//   Bytes                    64 bytes of weight codes, loaded by int8_codes(p)
//   Nibbles                  the `low` and the `high` ones of 64 bytes, each as Bytes, loaded by nibbles(p)
//   Int8Unit, Int4Unit       a unit of a vector (see kernels.h), from its codes and offsets; `alone`: no other vectors
//   dot(Bytes, Int8Unit)     the lanes' integer products, exact, as floats
//   dot(low, high, Int4Unit) the same, the weights' codes less 8
//   Four                     four floats, with load4, load2 (0, 0, 1, 1), load1 (the same four times), multiply
//   spread2(Four), spread4   the first (0 and 2) or all of them, each to as many neighbouring lanes
//   less_zeros(p)            8 less each of 16 zero points, bytes
//   sum_each16(a, b, c, d)   the sums of the lanes of each: lanes i and i + 8 first, then i and i + 2, i and i + 1,
//                            then the two halves
// Every float operation here is one multiplication, addition or fused multiply-add, so that all sets round alike.

struct Int8Codes {
  using Unit = Int8Unit;
  static constexpr Kind kKind = Kind::kInt8;
  Bytes codes;
  TARGET static Int8Codes load(const uint8_t* p) { return {int8_codes(p)}; }
  TARGET Sixteen products(const Unit& x) const { return dot(codes, x); }
};

struct Int4Codes {
  using Unit = Int4Unit;
  static constexpr Kind kKind = Kind::kInt4;
  Nibbles codes;
  TARGET static Int4Codes load(const uint8_t* p) { return {nibbles(p)}; }
  TARGET Sixteen products(const Unit& x) const { return dot(codes.low, codes.high, x); }
};

// Where R rows of a weight begin: their codes, scales and zero points.
template <int R>
struct Rows {
  const uint8_t* codes[R];
  const float* scale[R];
  const uint8_t* zero[R];
};

// The vectors of one call. `totals`, for zero points: the sums of a vector's elements over each group of the weight.
struct QuantisedVectors {
  const int8_t* codes;
  const int32_t* offsets;
  const float *scales, *totals;
  int64_t stride, offsets_stride, scales_stride, totals_stride;

  QuantisedVectors from(int64_t j) const {
    QuantisedVectors rest = *this;
    rest.codes += j * stride;
    rest.offsets += j * offsets_stride;
    rest.scales += j * scales_stride;
    rest.totals += j * totals_stride;
    return rest;
  }
};

// The lanes' scales for one unit: those of a vector times kScales consecutive ones of a row, or (0) the vector's alone.
template <Kind kKind, int kScales>
TARGET inline Sixteen factors(const float* of_row, const float* of_vector) {
  Four scales;
  if constexpr (kKind == Kind::kInt8)
    scales = load2(of_vector);
  else
    scales = load4(of_vector);
  if constexpr (kScales == 4) scales = multiply(scales, load4(of_row));
  if constexpr (kScales == 2) scales = multiply(scales, load2(of_row));
  if constexpr (kScales == 1) scales = multiply(scales, load1(of_row));
  if constexpr (kKind == Kind::kInt8) return spread2(scales);
  return spread4(scales);
}

constexpr int kAhead = 384;  // bytes fetched ahead in each row

// The contribution of unit number `unit`: R rows, where it is number `at` and its first scale number `scale`, by N
// vectors.
template <class Codes, int kScales, int R, int N>
TARGET inline void add_unit(const Rows<R>& rows, int64_t at, int64_t scale, int64_t unit, const QuantisedVectors& x,
                            Sixteen (&sums)[R][N]) {
  constexpr Kind kKind = Codes::kKind;
  Codes codes[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    __builtin_prefetch(rows.codes[i] + 64 * at + kAhead);
    codes[i] = Codes::load(rows.codes[i] + 64 * at);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const typename Codes::Unit of_vector(x.codes + j * x.stride + unit * unit_elements(kKind),
                                         x.offsets + j * x.offsets_stride + 16 * unit, N == 1);
    const float* const scales = x.scales + j * x.scales_stride + unit * unit_scales(kKind);
    const Sixteen shared = factors<kKind, 0>(nullptr, scales);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Sixteen own = kScales > 0 ? factors<kKind, kScales>(rows.scale[i] + scale, scales) : shared;
      sums[i][j] = multiply_add(codes[i].products(of_vector), own, sums[i][j]);
    }
  }
}

// The effect of zero points other than 8: for each group, its scale times 8 less the zero point, times the sum of the
// vector's elements.
template <int R, int N>
TARGET void add_zeros(const Rows<R>& rows, int64_t groups, const QuantisedVectors& x, Sixteen (&sums)[R][N]) {
  for (int i = 0; i < R; ++i)
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t left = groups - g;
      const float* scale = rows.scale[i] + g;
      const uint8_t* zero = rows.zero[i] + g;
      float last[16] = {};
      uint8_t last_zeros[16] = {};
      __builtin_prefetch(scale + groups);  // the next row's: they are all read before any codes are
      __builtin_prefetch(zero + groups);
      if (left < 16) {
        __builtin_memcpy(last, scale, left * sizeof(float));
        __builtin_memcpy(last_zeros, zero, left);
        scale = last;
        zero = last_zeros;
      }
      const Sixteen factor = multiply(load16(scale), less_zeros(zero));
      for (int j = 0; j < N; ++j)
        sums[i][j] = multiply_add(factor, load16(x.totals + j * x.totals_stride + g), sums[i][j]);
    }
}

// Rows `row`, row + step, ... (R of them) by N vectors, all sums in registers, into y. kScales: how many a unit has in
// a row; 1 also if several units share it, 0 if the row has a single one.
template <class Codes, int kScales, bool kZero, int R, int N>
TARGET void rows_by_vectors(const Linear& linear, int64_t row, int64_t step, const QuantisedVectors& x, float* y,
                            int64_t y_stride, bool accumulate) {
  constexpr int64_t kElements = unit_elements(Codes::kKind);
  const int64_t bytes = linear.in * 64 / kElements, full = bytes / 64, groups = linear.in / linear.group;
  Rows<R> rows;
  Sixteen sums[R][N];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    rows.codes[i] = static_cast<const uint8_t*>(linear.weight) + (row + i * step) * bytes;
    rows.scale[i] = linear.scale + (row + i * step) * groups;
    rows.zero[i] = kZero ? linear.zero + (row + i * step) * groups : nullptr;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = splat16(0);
  }
  if constexpr (kZero) add_zeros(rows, groups, x, sums);
  int64_t unit = 0, group = 0;
  for (int64_t shared = 0; unit < full; ++unit) {
    add_unit<Codes, kScales>(rows, unit, group, unit, x, sums);
    shared += kElements;
    group += shared >= linear.group ? kScales : 0;
    shared = shared >= linear.group ? 0 : shared;
  }
  if (const int64_t left = bytes % 64) {  // part of a unit: copies that may be read to their end
    alignas(64) uint8_t codes[R][64] = {};
    float scale[R][4] = {};
    Rows<R> copies;
    for (int i = 0; i < R; ++i) {
      for (int64_t k = 0; k < left; ++k) codes[i][k] = rows.codes[i][64 * unit + k];
      for (int64_t k = 0; k < std::min<int64_t>(groups - group, kScales); ++k) scale[i][k] = rows.scale[i][group + k];
      copies.codes[i] = codes[i];
      copies.scale[i] = scale[i];
    }
    add_unit<Codes, kScales>(copies, 0, 0, unit, x, sums);
  }
  for (int j = 0; j < N; ++j) {
    float totals[4];
    sum_each16(sums[0][j], sums[1 % R][j], sums[2 % R][j], sums[3 % R][j], totals);
    for (int i = 0; i < R; ++i) {
      const float value = kScales > 0 ? totals[i] : totals[i] * linear.scale[row + i * step];
      float& target = y[j * y_stride + row + i * step];
      target = accumulate ? target + value : value;
    }
  }
}

template <class Codes, int kScales, bool kZero, int R>
TARGET void rows_by_all(const Linear& linear, int64_t row, int64_t step, const QuantisedVectors& x, int64_t count,
                        float* y, int64_t y_stride, bool accumulate) {
  int64_t j = 0;
  for (; j + kTileVectors <= count; j += kTileVectors)
    rows_by_vectors<Codes, kScales, kZero, R, kTileVectors>(linear, row, step, x.from(j), y + j * y_stride, y_stride,
                                                            accumulate);
  for (; j < count; ++j)
    rows_by_vectors<Codes, kScales, kZero, R, 1>(linear, row, step, x.from(j), y + j * y_stride, y_stride, accumulate);
}

template <class Codes, int kScales, bool kZero>
TARGET void all_rows(const Linear& linear, int64_t begin, int64_t end, const Vectors& x, float* y, int64_t y_stride,
                     bool accumulate) {
  if (linear.bias != nullptr) {
    for (int64_t j = 0; j < x.count; ++j)
      for (int64_t r = begin; r < end; ++r)
        y[j * y_stride + r] = accumulate ? y[j * y_stride + r] + linear.bias[r] : linear.bias[r];
    accumulate = true;
  }
  const float* const totals =
      kZero ? x.totals + first_total(linear.group, units_of(Codes::kKind, linear.in)) : nullptr;
  const QuantisedVectors inputs = {static_cast<const int8_t*>(x.data), x.offsets,        x.scales,
                                   totals,                             x.stride,         x.offsets_stride,
                                   x.scales_stride,                    x.totals_stride};
  const auto one_row = [&](int64_t r) {
    rows_by_all<Codes, kScales, kZero, 1>(linear, begin + r, 0, inputs, x.count, y, y_stride, accumulate);
  };
  const Parts parts(end - begin, kTileRows);
  for (int64_t r = 0; r < parts.together; ++r)
    rows_by_all<Codes, kScales, kZero, kTileRows>(linear, begin + r, parts.step, inputs, x.count, y, y_stride,
                                                  accumulate);
  parts.each_left(one_row);
}

void int8_linear(const Linear& linear, int64_t begin, int64_t end, const Vectors& x, float* y, int64_t y_stride,
                 bool accumulate) {
  const auto rows = linear.group == linear.in ? all_rows<Int8Codes, 0, false>
                    : linear.group == 32      ? all_rows<Int8Codes, 2, false>
                                              : all_rows<Int8Codes, 1, false>;
  rows(linear, begin, end, x, y, y_stride, accumulate);
}

template <bool kZero>
void int4_rows(const Linear& linear, int64_t begin, int64_t end, const Vectors& x, float* y, int64_t y_stride,
               bool accumulate) {
  const auto rows = linear.group == 32   ? all_rows<Int4Codes, 4, kZero>
                    : linear.group == 64 ? all_rows<Int4Codes, 2, kZero>
                                         : all_rows<Int4Codes, 1, kZero>;
  rows(linear, begin, end, x, y, y_stride, accumulate);
}

void int4_linear(const Linear& linear, int64_t begin, int64_t end, const Vectors& x, float* y, int64_t y_stride,
                 bool accumulate) {
  (linear.zero != nullptr ? int4_rows<true> : int4_rows<false>)(linear, begin, end, x, y, y_stride, accumulate);
}
