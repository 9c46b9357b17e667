// Portable inner loops of the exact resize: the plain statement of what the others compute.
#include "image/kernels.h"

namespace llava_fast {
namespace {

bool always() { return true; }

void prepare(Axis&, int) {}  // works on the taps as they are

size_t scratch_bytes(const Axis&) { return 0; }

void horizontal(const uint8_t* src, ptrdiff_t src_stride, int rows, const Axis& axis, int x0, int x1, uint8_t* dst,
                ptrdiff_t dst_stride, uint8_t*) {
  const Taps& taps = axis.taps;
  for (int row = 0; row < rows; ++row) {
    const uint8_t* in = src + row * src_stride;
    uint8_t* out = dst + row * dst_stride;
    for (int x = x0; x < x1; ++x, out += 3) {
      const int32_t* weights = &taps.weights[static_cast<size_t>(x) * taps.width];
      const uint8_t* pixel = in + 3 * static_cast<ptrdiff_t>(taps.first[x]);
      int32_t red = kRounding, green = kRounding, blue = kRounding;
      for (int k = 0; k < taps.count[x]; ++k, pixel += 3) {
        red += weights[k] * pixel[0];
        green += weights[k] * pixel[1];
        blue += weights[k] * pixel[2];
      }
      out[0] = clamp_to_byte(red);
      out[1] = clamp_to_byte(green);
      out[2] = clamp_to_byte(blue);
    }
  }
}

void vertical(const uint8_t* const* rows, const Axis& axis, int y, int bytes, uint8_t* dst) {
  constexpr int kBlock = 256;  // sums kept on the stack, so that the inner loop runs along a row
  const Taps& taps = axis.taps;
  const int32_t* weights = &taps.weights[static_cast<size_t>(y) * taps.width];
  for (int begin = 0; begin < bytes; begin += kBlock) {
    const int size = bytes - begin < kBlock ? bytes - begin : kBlock;
    int32_t sums[kBlock];
    for (int i = 0; i < size; ++i) sums[i] = kRounding;
    for (int k = 0; k < taps.count[y]; ++k) {
      const uint8_t* in = rows[k] + begin;
      for (int i = 0; i < size; ++i) sums[i] += weights[k] * in[i];
    }
    for (int i = 0; i < size; ++i) dst[begin + i] = clamp_to_byte(sums[i]);
  }
}

void planes(const uint8_t* src, int pixels, uint8_t* red, uint8_t* green, uint8_t* blue) {
  for (int i = 0; i < pixels; ++i) {
    red[i] = src[3 * i];
    green[i] = src[3 * i + 1];
    blue[i] = src[3 * i + 2];
  }
}

}  // namespace

const KernelSet& scalar_kernels() {
  static const KernelSet set = {"scalar", always, prepare, scratch_bytes, horizontal, vertical, planes};
  return set;
}

}  // namespace llava_fast
