// The weights of Pillow's resize filters along one axis, as the 8-bit fixed-point integers Pillow uses.
//
// Source of the method: Pillow's src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc) and, for
// the nearest neighbour, Geometry.c (ImagingScaleAffine). Everything is computed in double with contraction off
// (-ffp-contract=off), once, on the host. GPUs use the same integers, so every device gives the same pixels.
#pragma once

#include <cstdint>
#include <vector>

namespace llava_fast {

constexpr int kPrecisionBits = 32 - 8 - 2;                // fraction bits of a weight
constexpr int32_t kRounding = 1 << (kPrecisionBits - 1);  // one half

enum class Filter { kNearest, kLanczos, kBilinear, kBicubic, kBox, kHamming };  // in Pillow's numbers, 0 to 5

struct Taps {
  int in_size = 0;
  int out_size = 0;
  int width = 0;                 // weights stored per output; the unused ones are 0
  std::vector<int> first;        // [out_size] first input sample of each output
  std::vector<int> count;        // [out_size] how many samples it reads, at least 1
  std::vector<int32_t> weights;  // [out_size, width]
};

// in_size and out_size are at least 1; throws std::length_error when the table would not fit an int.
Taps filter_taps(Filter filter, int in_size, int out_size);

// Every sample as it is: what an axis that keeps its size does under any filter.
Taps identity_taps(int size);

}  // namespace llava_fast
