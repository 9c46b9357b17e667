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

void quantise(Kind kind, const float* x, int64_t in, int8_t* codes, float* scales) {
  const int64_t padded = units_of(kind, in) * unit_elements(kind);
  for (int64_t first = 0; first < padded; first += kGroup) {
    float group[kGroup] = {};
    std::copy_n(x + std::min(first, in), std::clamp<int64_t>(in - first, 0, kGroup), group);
    if (kind == Kind::kInt8) {
      *scales++ = quantise_group(group, kGroup, codes + first);
      continue;
    }
    int8_t mixed[kGroup];
    *scales++ = quantise_group(group, kGroup, mixed);
    int8_t* const even = codes + first / 128 * 128 + first % 128 / 2;
    for (int i = 0; i < kGroup / 2; ++i) {
      even[i] = mixed[2 * i];
      even[i + 64] = mixed[2 * i + 1];
    }
  }
}

}  // namespace llava_fast::decode
