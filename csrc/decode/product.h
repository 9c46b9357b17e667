// Products of many vectors with quantised weights: the weights are repacked one panel at a time, which is then read
// from the cache for all vectors.
#pragma once

#include "decode/kernels.h"

namespace llava_fast::decode {

constexpr int kPanelRows = 32;  // rows of the weight side by side

constexpr int64_t kBlockElements = 1024;  // elements of a row that one panel has at most
constexpr int kCodeBytes = 2;  // of a code in a panel, at most
constexpr int kOffset = 128;  // added to the vectors' codes, which makes them unsigned, as the instructions want them

// Part of kPanelRows rows of a weight of `kind`, `groups` groups of `group` elements each (a multiple of 32).
//   codes   zero points subtracted, w = code * scale, in an order of each set's own. In that of the scalar and the
//           AVX-512 form, [groups, group / 4, kPanelRows, 4].
//   scale   [groups, kPanelRows].
struct Panel {
  Kind kind;
  int64_t groups, group;
  const int8_t* codes;
  const float* scale;
};

// Vectors quantised to 8 bits with one scale per group: codes plus kOffset and scales, with the distance in elements
// between consecutive vectors.
struct QuantisedRows {
  const uint8_t* codes;
  const float* scales;
  int64_t codes_stride, groups_stride;
};

// The part of a weight that a panel holds: rows [row, row + rows) of at most kPanelRows, elements
// [start, start + count), zero-padded to kPanelRows rows of `padded` elements (at most kBlockElements).
struct Part {
  int64_t row, rows, start, count, padded;
};

// pack: the codes of a part. multiply: y[m, r] += panel row r . x[m] for m in [0, rows); `first` sets y instead. Sums
// within groups are exact, and groups are added in order in float32, fused with the product of their scales: all sets
// give the same bits.
const PanelKernels& scalar_panel();
#if defined(__x86_64__)
const PanelKernels& avx2_panel();
const PanelKernels& avxvnni_panel();
const PanelKernels& avx512vnni_panel();
#endif

// y [count, out] = x [count, linear.in] times an int8 or int4 weight, plus the bias. x is rounded to 8 bits with one
// scale per group of the weight, or per 128 elements if a row has a single scale. The result does not depend on
// `threads`, nor a row's on the other rows.
void product(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
             const PanelKernels& kernels);

}  // namespace llava_fast::decode
