// Vectors quantised to 8 bits: the same code, and so the same bits, for every instruction set.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decode/kernels.h"

namespace llava_fast::decode {

float quantise_group(const float* x, int64_t count, int8_t* codes) {
  float mosts[8] = {}, invalids[8] = {};
  for (int64_t i = 0; i < count; i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      const float size = std::fabs(x[i + lane]);
      mosts[lane] = size > mosts[lane] ? size : mosts[lane];
      invalids[lane] += size * 0;  // NaN where an element is not finite
    }
  float most = 0, invalid = 0;
  for (int lane = 0; lane < 8; ++lane) {
    most = std::max(most, mosts[lane]);
    invalid += invalids[lane];
  }
  const float inverse = 127 / most;
  if (invalid != 0 || !std::isfinite(inverse)) {
    std::fill_n(codes, count, int8_t{0});
    return invalid != 0 ? std::numeric_limits<float>::quiet_NaN() : 0;  // 0: zeros, or too small to divide by
  }
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int64_t i = 0; i < count; ++i)
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] * inverse + kRound) - kRound));
  return most / 127;
}

namespace {

int32_t sum4(const int8_t* codes) { return codes[0] + codes[1] + codes[2] + codes[3]; }

}  // namespace

void quantise(Kind kind, const float* x, int64_t in, int8_t* units, int32_t* offsets, float* scales,
              float* totals) {
  const int64_t elements = unit_elements(kind), count = units_of(kind, in);
  if (kind == Kind::kInt4) std::fill_n(totals, totals_of(count), 0.0f);
  for (int64_t unit = 0; unit < count; ++unit, units += elements, offsets += 16, scales += unit_scales(kind)) {
    const int64_t first = unit * elements;
    float padded[128] = {};
    int8_t codes[128];
    std::copy_n(x + first, std::min(elements, in - first), padded);
    for (int64_t start = 0; start < elements; start += kGroup)
      scales[start / kGroup] = quantise_group(padded + start, kGroup, codes + start);
    if (kind == Kind::kInt8) {
      std::copy_n(codes, elements, units);
      for (int64_t lane = 0; lane < 16; ++lane) offsets[lane] = -128 * sum4(units + 4 * lane);
    } else {
      for (int64_t i = 0; i < 64; ++i) {
        units[i] = codes[2 * i];
        units[i + 64] = codes[2 * i + 1];
      }
      for (int64_t lane = 0; lane < 16; ++lane)
        offsets[lane] = -8 * (sum4(units + 4 * lane) + sum4(units + 64 + 4 * lane));
      for (int64_t g = 0; g < 4; ++g) {
        const int32_t codes_total = offsets[4 * g] + offsets[4 * g + 1] + offsets[4 * g + 2] + offsets[4 * g + 3];
        const float total = static_cast<float>(codes_total / -8) * scales[g];
        totals[first_total(32, count) + 4 * unit + g] = total;
        totals[first_total(64, count) + 2 * unit + g / 2] += total;
        totals[first_total(128, count) + unit] += total;
      }
    }
  }
}

}  // namespace llava_fast::decode
