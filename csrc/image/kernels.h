// The inner loops of the exact resize, one set per instruction set, chosen at run time.
//
// Every set computes the same integers: a sum of uint8 samples times 22-bit weights, modulo 2^32, rounded,
// shifted and clamped to a byte. Pixels are interleaved RGB (3 bytes).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"
#include "image/taps.h"

namespace llava_fast {

// One axis prepared for a kernel set: taps in groups of four, weights split into the pieces that the
// instruction set multiplies. The scalar set uses only `taps`.
struct Axis {
  Taps taps;
  int groups = 0;              // groups of 4 taps per output, the same for every output
  std::vector<int> first;      // [out_size] first tap of the first group
  std::vector<int32_t> words;  // [out_size, groups, words of the kernel set]
};

// Bytes that a kernel may write past the end of an output row it is given.
constexpr int kRowSlack = 64;

struct KernelSet {
  const char* name;  // "scalar", "avx2", "avx512"
  bool (*supported)();
  // Fills groups, first and words from taps. Groups start at a multiple of `align` taps.
  void (*prepare)(Axis& axis, int align);
  // Bytes of scratch that `horizontal` needs for an input of this width.
  size_t (*scratch_bytes)(const Axis& axis);
  // One to four rows through a horizontal axis (prepared with align 4): outputs [x0, x1), written from the
  // start of each dst row, each of which has kRowSlack bytes to spare.
  void (*horizontal)(const uint8_t* src, ptrdiff_t src_stride, int rows, const Axis& axis, int x0, int x1, uint8_t* dst,
                     ptrdiff_t dst_stride, uint8_t* scratch);
  // Output row y of a vertical axis (prepared with align 1), `bytes` wide. `rows` are its input rows from
  // taps.first[y] on: as many as its taps, then (weight 0) any readable row up to 4 * groups.
  void (*vertical)(const uint8_t* const* rows, const Axis& axis, int y, int bytes, uint8_t* dst);
  // Splits `pixels` interleaved pixels into three planes; writes exactly `pixels` bytes to each.
  void (*planes)(const uint8_t* src, int pixels, uint8_t* red, uint8_t* green, uint8_t* blue);
};

const KernelSet& scalar_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

// The best set of this machine, or the one named by LLAVA_FAST_SIMD (scalar | avx2 | avx512); throws
// std::invalid_argument if that is unknown or not supported by this machine.
const KernelSet& select_kernels();
std::vector<const char*> supported_kernel_names();

// For `prepare`: lays the taps of each output out in groups of four from a multiple of `align`, zero-padded
// to the same number of groups, and lets `split` turn each group into `words` integers.
void group_taps(Axis& axis, int align, int words, void (*split)(const int32_t weights[4], int32_t* words));

LLAVA_FAST_DEVICE uint8_t clamp_to_byte(int32_t sum) {
  const int32_t value = sum >> kPrecisionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

}  // namespace llava_fast
