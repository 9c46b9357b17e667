// The inner loops of a decoding step, one set per instruction set, chosen at run time.
//
// Every set adds in an order that depends neither on the number of vectors nor on the thread, so a sequence's result
// is bit-identical alone and in a batch. Products with int8 and int4 weights are bit-identical in all sets; others
// differ between sets only in rounding.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llava_fast::decode {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float32
};

// How the elements of a weight are stored; the numbers are those of llava_fast.ops.decoder_step.
enum class Kind : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

inline bool is_quantised(Kind kind) { return kind == Kind::kInt8 || kind == Kind::kInt4; }
// Bits of an element, without its share of scales and zero points.
inline int64_t bits_of(Kind kind) {
  return kind == Kind::kFloat32 ? 32 : kind == Kind::kBFloat16 ? 16 : kind == Kind::kInt8 ? 8 : 4;
}

// Rows of a row-major weight [rows, in], with an optional bias [rows].
//   int8   w = value * scale.
//   int4   two elements per byte, the even one in its low nibble; w = (code - zero) * scale, code and zero 0..15.
// Elements g * group to (g + 1) * group of a row share scale [rows, in / group] and zero. `group` divides `in`. It is
// 32, 64, 128 or (int8) `in`.
struct Linear {
  Kind kind;
  const void* weight;
  const float* bias;  // or null
  int64_t in;
  const float* scale = nullptr;
  const uint8_t* zero = nullptr;  // null: 8
  int64_t group = 0;
};

// Vectors are quantised to 8 bits for products with quantised weights, in groups of kGroup elements that share a scale:
// x = code * scale. Codes are stored in units of as many elements as 64 bytes of weights hold, zero-padded at the end.
//   int8   a unit has 64 elements in order.
//   int4   a unit has 128 elements: 64 even ones (0, 2, 4, ...), then 64 odd ones.
// Lane l of 16 is what bytes 4l to 4l + 3 of a weight's 64 bytes contribute. A lane's offset is the sum of its codes
// times -128 (int8) or -8 (int4): the effect of the number that makes a weight's codes unsigned.
constexpr int64_t kGroup = 32;
constexpr int64_t unit_elements(Kind kind) { return kind == Kind::kInt4 ? 128 : 64; }
constexpr int64_t unit_scales(Kind kind) { return unit_elements(kind) / kGroup; }
constexpr int64_t units_of(Kind kind, int64_t in) { return (in + unit_elements(kind) - 1) / unit_elements(kind); }

// For int4 with zero points: the sums of a vector's elements over groups of 32, 64 and 128, each padded with zeros.
constexpr int64_t whole_sixteens(int64_t count) { return (count + 15) / 16 * 16; }
constexpr int64_t totals_of(int64_t units) { return 7 * whole_sixteens(units); }
constexpr int64_t first_total(int64_t group, int64_t units) {
  return (group == 32 ? 0 : group == 64 ? 4 : 6) * whole_sixteens(units);
}

// One vector [in] to units, their lanes' offsets, scales, and (int4) totals. A group with an element that is not finite
// has scale NaN.
void quantise(Kind kind, const float* x, int64_t in, int8_t* units, int32_t* offsets, float* scales, float* totals);

// `count` elements (a multiple of 8) to codes; returns their scale, NaN if one is not finite.
float quantise_group(const float* x, int64_t count, int8_t* codes);

// `count` vectors in the format that one kind of weight needs: float32 (for float32 and bfloat16 weights), each
// `stride` elements after the previous one; or codes in units, offsets and scales, each with a stride of its own.
struct Vectors {
  const void* data;
  int64_t stride, count;
  const int32_t* offsets = nullptr;
  const float *scales = nullptr, *totals = nullptr;
  int64_t offsets_stride = 0, scales_stride = 0, totals_stride = 0;
};

// The order in which the rows [0, rows) of a weight are read: `parts` at a time, one from each of as many equal parts.
// Some long streams are faster than one, and much faster than neighbouring rows, whose short streams share pages. The
// distance between long parts is an odd number of rows: with a power of two, all streams would use the same banks.
// Row r of [0, together) is read with r + step, r + 2 * step, ...; the remaining rows are read one by one.
struct Parts {
  int64_t rows, parts, step, together;

  Parts(int64_t count, int64_t number)
      : rows(count), parts(number), step(count >= 16 * number ? count / number | 1 : count / number) {
    together = std::min(rows - (parts - 1) * step, step);
  }

  template <class Visit>
  void each_left(const Visit& visit) const {
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t r = together; r < (part < parts - 1 ? step : rows - (parts - 1) * step); ++r) visit(part * step + r);
  }
};

// How a row of `size` keys or values is cached: float32 or bfloat16 elements, or in 8 bits: int8 codes, then their
// scale in float32 (element = code * scale). The numbers are those of llava_fast.ops.decoder_step.
enum class CacheKind : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
constexpr int64_t row_bytes(CacheKind kind, int64_t size) {
  return kind == CacheKind::kFloat32    ? size * static_cast<int64_t>(sizeof(float))
         : kind == CacheKind::kBFloat16 ? size * static_cast<int64_t>(sizeof(BFloat16))
                                        : size + static_cast<int64_t>(sizeof(float));
}
constexpr int64_t kCachedBlock = 32;  // cached rows that stay in the first-level cache for every head of a group

// Consecutive cached rows [rows, size] of one key head.
struct Piece {
  const void *keys, *values;
  int64_t rows;
};

// y[j, r] = weight[r] . x[j] + bias[r] for r in [begin, end) and j in [0, count); `add` adds it to y instead.
// Each weight is read from memory once for all vectors.
using LinearKernel = void (*)(const Linear& linear, int64_t begin, int64_t end, const Vectors& x, float* y,
                              int64_t y_stride, bool add);
// Attention of `group` query heads [group, size], already scaled, to their keys and values, `rows` in all pieces
// together; out [group, size]. `scores` is scratch for group * padded_rows(rows) + kCachedBlock * size floats. The
// result does not depend on how rows are cut into pieces; for rows in 8 bits it equals that of the float32 rows that
// they represent.
using AttendKernel = void (*)(const float* query, int64_t group, const Piece* pieces, int64_t count, int64_t rows,
                              int64_t size, float* scores, float* out);

struct Panel;
struct QuantisedRows;
struct Part;
// Of product.h: the codes of a panel, and many vectors by a panel.
struct PanelKernels {
  void (*pack)(const Linear& linear, const Part& part, int8_t* codes);
  void (*multiply)(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first);
};

struct KernelSet {
  const char* name;  // "scalar", "avx2", "avx512"
  bool (*supported)();
  LinearKernel float32, bfloat16, int8, int4;
  PanelKernels panel;  // portable if there are no instructions for it
  // out = x / rms(x) * weight.
  void (*rms_norm)(const float* x, const float* weight, int64_t width, float eps, float* out);
  // gate = silu(gate) * up.
  void (*swiglu)(float* gate, const float* up, int64_t width);
  AttendKernel attend_float32, attend_bfloat16, attend_int8;

  AttendKernel attend(CacheKind kind) const {
    return kind == CacheKind::kFloat32 ? attend_float32 : kind == CacheKind::kBFloat16 ? attend_bfloat16 : attend_int8;
  }
  LinearKernel linear(Kind kind) const {
    return kind == Kind::kFloat32 ? float32 : kind == Kind::kBFloat16 ? bfloat16 : kind == Kind::kInt8 ? int8 : int4;
  }
};

constexpr int64_t padded_rows(int64_t rows) { return whole_sixteens(rows); }  // whole vectors of any set

const KernelSet& scalar_kernels();
#if defined(__x86_64__)
// With AVX-VNNI or AVX-512 VNNI instructions for integers where the processor has them.
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

// The best set of this machine, or the one named by LLAVA_FAST_SIMD (scalar | avx2 | avx512); throws
// std::invalid_argument if that is unknown or not supported by this machine.
const KernelSet& select_kernels();

}  // namespace llava_fast::decode
