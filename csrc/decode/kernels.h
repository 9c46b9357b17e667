// The inner loops of a decoding step in float32, one set per instruction set, chosen at run time.
//
// Every set adds in an order that depends on neither the number of vectors nor the thread: a sequence gets the
// same bits alone and in a batch. Sets differ from one another in rounding alone.
#pragma once

#include <cstdint>

namespace llava_fast::decode {

// Rows of a row-major weight [rows, in] to be applied, with an optional bias [rows].
struct Linear {
  const float* weight;
  const float* bias;  // or null
  int64_t in;
};

// Consecutive cached rows [rows, size] of one key head.
struct Piece {
  const float *keys, *values;
  int64_t rows;
};

struct KernelSet {
  const char* name;  // "scalar", "avx2", "avx512"
  bool (*supported)();
  // y[j, r] = weight[r] . x[j] + bias[r] for r in [begin, end) and j in [0, count); `add` adds it to y instead.
  // Each weight is read from memory once for all vectors.
  void (*linear)(const Linear& linear, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t count,
                 float* y, int64_t y_stride, bool add);
  // out = x / rms(x) * weight.
  void (*rms_norm)(const float* x, const float* weight, int64_t width, float eps, float* out);
  // gate = silu(gate) * up.
  void (*swiglu)(float* gate, const float* up, int64_t width);
  // `group` query heads [group, size], already scaled, over the keys and values that they share, `rows` in all
  // pieces together; out [group, size]. `scores` is scratch for group * padded_rows(rows) floats. The result does not
  // depend on how rows are cut into pieces.
  void (*attend)(const float* query, int64_t group, const Piece* pieces, int64_t count, int64_t rows, int64_t size,
                 float* scores, float* out);
};

constexpr int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }  // whole vectors of any set

const KernelSet& scalar_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

// The best set of this machine, or the one named by LLAVA_FAST_SIMD (scalar | avx2 | avx512); throws
// std::invalid_argument when that is unknown or this machine cannot run it.
const KernelSet& select_kernels();

}  // namespace llava_fast::decode
