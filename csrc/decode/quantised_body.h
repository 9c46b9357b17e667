// Products with int8 and int4 weights, independent of the instruction set. A file for one set defines, in an anonymous
// namespace, TARGET, kTileVectors, kTileRows (4, or 1 if there are too few registers for four rows), and for 16 lanes:
//   Sixteen                  16 floats, with splat16, add, multiply
//   Bytes                    64 bytes of weight codes, loaded by int8_codes(p), low_nibbles(p), high_nibbles(p)
//   Int8Unit, Int4Unit       a unit of a vector, prepared from its codes
//   dot(Bytes, Int8Unit)     the lanes' integer products, exact, as floats
//   dot(low, high, Int4Unit) the same, the weights' codes less 8
//   sums(Int4Unit)           the lanes' sums of the vector's codes, as floats
//   spread2, spread4         2 or 4 floats, each to as many neighbouring lanes
//   spread_zeros2, 4         the same for zero points, bytes, less 8
//   sum_each16(a, b, c, d)   the sums of the lanes of each: lanes i and i + 8 first, then i and i + 2, i and i + 1,
//                            then the two halves
// Every float operation here is one multiplication or addition, so that all sets round alike.

struct Int8Codes {
  using Unit = Int8Unit;
  static constexpr Kind kKind = Kind::kInt8;
  Bytes codes;
  TARGET static Int8Codes load(const uint8_t* p) { return {int8_codes(p)}; }
  TARGET Sixteen products(const Unit& x) const { return dot(codes, x); }
  TARGET static Sixteen spread_own(const float* scales) { return spread2(scales); }
  TARGET static Sixteen sums_of(const Unit&) { return splat16(0); }
};

struct Int4Codes {
  using Unit = Int4Unit;
  static constexpr Kind kKind = Kind::kInt4;
  Bytes low, high;
  TARGET static Int4Codes load(const uint8_t* p) { return {low_nibbles(p), high_nibbles(p)}; }
  TARGET Sixteen products(const Unit& x) const { return dot(low, high, x); }
  TARGET static Sixteen spread_own(const float* scales) { return spread4(scales); }
  TARGET static Sixteen sums_of(const Unit& x) { return sums(x); }
};

// The lanes' scales, or zero points less 8, from kScales consecutive ones.
template <int kScales>
TARGET inline Sixteen spread(const float* p) {
  if constexpr (kScales == 4) return spread4(p);
  if constexpr (kScales == 2) return spread2(p);
  return splat16(*p);
}
template <int kScales>
TARGET inline Sixteen spread_zeros(const uint8_t* p) {
  if constexpr (kScales == 4) return spread_zeros4(p);
  if constexpr (kScales == 2) return spread_zeros2(p);
  return splat16(static_cast<float>(*p) - 8);
}

constexpr int kAhead = 384;  // bytes fetched ahead in each row

// R rows of a weight where a unit begins: 64 bytes of codes, kScales scales and zero points each.
template <int R>
struct Place {
  const uint8_t* codes[R];
  const float* scale[R];
  const uint8_t* zero[R];
};

// The contribution of one unit: R rows by N vectors, whose codes and scales of the unit are at `x` and `scales`.
// kScales 0: one scale per row, applied by the caller.
template <class Codes, int kScales, bool kZero, int R, int N>
TARGET inline void add_unit(const Place<R>& place, const int8_t* x, const float* scales, int64_t x_stride,
                            int64_t scales_stride, Sixteen (&sums)[R][N]) {
  Codes codes[R];
  Sixteen of_row[R], zeros[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    __builtin_prefetch(place.codes[i] + kAhead);
    codes[i] = Codes::load(place.codes[i]);
    if constexpr (kScales > 0) of_row[i] = spread<kScales>(place.scale[i]);
    if constexpr (kZero) zeros[i] = spread_zeros<kScales>(place.zero[i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const typename Codes::Unit unit(x + j * x_stride);
    const Sixteen of_vector = Codes::spread_own(scales + j * scales_stride);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      Sixteen products = codes[i].products(unit);
      if constexpr (kZero) products = subtract(products, multiply(zeros[i], Codes::sums_of(unit)));  // exact
      products = multiply(products, of_vector);
      if constexpr (kScales > 0) products = multiply(products, of_row[i]);
      sums[i][j] = add(sums[i][j], products);
    }
  }
}

// Rows `row`, row + step, ... (R of them) by N vectors, all sums in registers, into y.
template <class Codes, int kScales, bool kZero, int R, int N>
TARGET void rows_by_vectors(const Linear& linear, int64_t row, int64_t step, const int8_t* x, const float* scales,
                            int64_t x_stride, float* y, int64_t y_stride, bool accumulate) {
  constexpr int64_t kElements = unit_elements(Codes::kKind), kScalesAhead = kElements / kGroup;
  const int64_t bytes = linear.in * 64 / kElements, groups = linear.in / linear.group, full = bytes / 64;
  const int64_t scales_stride = x_stride / kGroup;
  Place<R> place;
  Sixteen sums[R][N];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    place.codes[i] = static_cast<const uint8_t*>(linear.weight) + (row + i * step) * bytes;
    place.scale[i] = linear.scale + (row + i * step) * groups;
    place.zero[i] = kZero ? linear.zero + (row + i * step) * groups : nullptr;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = splat16(0);
  }
  const int64_t units_a_group = kScales == 1 ? linear.group / kElements : 1;
  int64_t in_group = 0;
  for (int64_t unit = 0; unit < full; ++unit, x += kElements, scales += kScalesAhead) {
    add_unit<Codes, kScales, kZero>(place, x, scales, x_stride, scales_stride, sums);
    const int64_t next = ++in_group == units_a_group ? kScales : 0;
    in_group = next > 0 ? 0 : in_group;
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      place.codes[i] += 64;
      place.scale[i] += next;
      if constexpr (kZero) place.zero[i] += next;
    }
  }
  if (const int64_t left = bytes % 64) {  // part of a unit: copies that may be read to their end
    alignas(64) uint8_t codes[R][64] = {};
    float of_row[R][4] = {};
    uint8_t zeros[R][4] = {};
    const int64_t groups_left = kScales > 1 ? groups % kScales : 1;
    for (int i = 0; i < R; ++i) {
      for (int64_t k = 0; k < left; ++k) codes[i][k] = place.codes[i][k];
      for (int64_t k = 0; k < groups_left && kScales > 0; ++k) of_row[i][k] = place.scale[i][k];
      for (int64_t k = 0; k < groups_left && kZero; ++k) zeros[i][k] = place.zero[i][k];
      place.codes[i] = codes[i];
      place.scale[i] = of_row[i];
      place.zero[i] = zeros[i];
    }
    add_unit<Codes, kScales, kZero>(place, x, scales, x_stride, scales_stride, sums);
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
TARGET void rows_by_all(const Linear& linear, int64_t row, int64_t step, const Vectors& x, float* y, int64_t y_stride,
                        bool accumulate) {
  const int8_t* codes = static_cast<const int8_t*>(x.data);
  const float* scales = x.scales;
  int64_t j = 0;
  for (; j + kTileVectors <= x.count; j += kTileVectors)
    rows_by_vectors<Codes, kScales, kZero, R, kTileVectors>(linear, row, step, codes + j * x.stride,
                                                            scales + j * (x.stride / kGroup), x.stride,
                                                            y + j * y_stride, y_stride, accumulate);
  for (; j < x.count; ++j)
    rows_by_vectors<Codes, kScales, kZero, R, 1>(linear, row, step, codes + j * x.stride,
                                                 scales + j * (x.stride / kGroup), x.stride, y + j * y_stride,
                                                 y_stride, accumulate);
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
  const auto one_row = [&](int64_t r) {
    rows_by_all<Codes, kScales, kZero, 1>(linear, begin + r, 0, x, y, y_stride, accumulate);
  };
  if constexpr (kTileRows == 1) {
    for (int64_t r = 0; r < end - begin; ++r) one_row(r);
  } else {
    const Quarters quarters(end - begin);
    for (int64_t r = 0; r < quarters.fours; ++r)
      rows_by_all<Codes, kScales, kZero, 4>(linear, begin + r, quarters.step, x, y, y_stride, accumulate);
    quarters.each_left(one_row);
  }
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
