// Pillow's resize of 8-bit RGB, bit for bit, for any band of output rows and range of columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.h"
#include "image/kernels.h"

namespace llava_fast {

struct ImageView {  // interleaved RGB, not owned
  const uint8_t* data;
  int height;
  int width;
  ptrdiff_t stride;  // bytes between rows
};

// Which pass Pillow runs first. Up to 12.1 always the horizontal one. 12.2 and 12.3 (python-pillow PR 9524): the
// vertical one if the height shrinks and is more than 100 times the width. From 13 (PR 9549): the vertical one if
// the height shrinks, by more than twice as many rows as the width loses columns.
enum class PillowOrder { kPillow12_1, kPillow12, kPillow13 };
bool vertical_first(PillowOrder order, int in_height, int in_width, int out_height, int out_width);

// Output rows that a thread computes at a time: few enough that the intermediate rows stay in the cache.
constexpr int kBandRows = 64;

// A resize of one image to one size; `rows` may be called from several threads at once.
class Resizer {
 public:
  Resizer(const ImageView& src, int out_height, int out_width, Filter filter, PillowOrder order,
          const KernelSet& kernels);

  // Output rows [y0, y1), columns [x0, x1), into dst rows that have kRowSlack bytes to spare at their end.
  void rows(int y0, int y1, int x0, int x1, uint8_t* dst, ptrdiff_t dst_stride, Buffer& scratch) const;

 private:
  void horizontal_pass(const ImageView& in, int rows, int x0, int x1, uint8_t* dst, ptrdiff_t stride,
                       uint8_t* scratch) const;
  // Output rows [y0, y1), `bytes` wide; `in` is input row `in_row`.
  void vertical_pass(const uint8_t* in, ptrdiff_t in_stride, int in_row, int y0, int y1, int bytes, uint8_t* dst,
                     ptrdiff_t stride) const;

  ImageView src_;
  const KernelSet& kernels_;
  bool horizontal_, vertical_, vertical_first_;  // which passes are needed, and their order
  Axis x_axis_, y_axis_;
};

// The whole resized image, [out_height, out_width, 3], to `out`.
void resize(const ImageView& src, int out_height, int out_width, Filter filter, PillowOrder order,
            const KernelSet& kernels, int threads, uint8_t* out);

}  // namespace llava_fast
