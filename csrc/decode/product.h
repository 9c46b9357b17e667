// Products of many vectors with quantised weights: the weights are repacked one panel at a time, which is then read
// from the cache for all vectors.
#pragma once

#include "decode/kernels.h"

namespace llava_fast::decode {

constexpr int kPanelRows = 32;  // rows of the weight side by side

// Part of kPanelRows rows of a weight, `groups` groups of `group` elements each (a multiple of 32).
//   codes   [groups, group / 4, kPanelRows, 4], unsigned: int8 values plus 128, or int4 codes.
//   scale, zero  [groups, kPanelRows]: w = (code - zero) * scale.
struct Panel {
  int64_t groups, group;
  const uint8_t* codes;
  const float* scale;
  const int32_t* zero;
};

// Vectors quantised to 8 bits with one scale per group: codes, scales and the sums of each group's codes, with the
// distance in elements between consecutive vectors.
struct QuantisedRows {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  int64_t codes_stride, groups_stride;
};

// y[m, r] += panel row r . x[m] for m in [0, rows); `first` sets y instead. Sums within groups are exact, and groups
// are added in order in float32: all sets give the same bits.
void scalar_panel(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first);
#if defined(__x86_64__)
void avx512vnni_panel(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first);
#endif

// y [count, out] = x [count, linear.in] times an int8 or int4 weight, plus the bias. x is rounded to 8 bits with one
// scale per group of the weight, or per 128 elements if a row has a single scale. The result does not depend on
// `threads`, nor a row's on the other rows.
void product(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
             PanelKernel kernel);

}  // namespace llava_fast::decode
