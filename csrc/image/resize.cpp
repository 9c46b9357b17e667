#include "image/resize.h"

#include <algorithm>
#include <cstring>

namespace llava_fast {

bool vertical_first(PillowOrder order, int in_height, int in_width, int out_height, int out_width) {
  const int64_t rows_lost = static_cast<int64_t>(in_height) - out_height;
  const int64_t columns_lost = static_cast<int64_t>(in_width) - out_width;
  return order == PillowOrder::kPillow13 && rows_lost > 0 && rows_lost > 2 * columns_lost;
}

Resizer::Resizer(const ImageView& src, int out_height, int out_width, PillowOrder order,
                 const KernelSet& kernels)
    : src_(src),
      kernels_(kernels),
      horizontal_(out_width != src.width),
      vertical_(out_height != src.height),
      vertical_first_(vertical_first(order, src.height, src.width, out_height, out_width)) {
  if (horizontal_) {
    x_axis_.taps = bicubic_taps(src.width, out_width);
    kernels.prepare(x_axis_, 4);
  }
  if (vertical_) {
    y_axis_.taps = bicubic_taps(src.height, out_height);
    kernels.prepare(y_axis_, 1);
  }
}

void Resizer::horizontal_pass(const ImageView& in, int rows, int x0, int x1, uint8_t* dst, ptrdiff_t stride,
                              uint8_t* scratch) const {
  for (int row = 0; row < rows; row += 4)
    kernels_.horizontal(in.data + row * in.stride, in.stride, std::min(4, rows - row), x_axis_, x0, x1,
                        dst + row * stride, stride, scratch);
}

void Resizer::rows(int y0, int y1, int x0, int x1, uint8_t* dst, ptrdiff_t dst_stride,
                   std::vector<uint8_t>& scratch) const {
  if (y0 >= y1 || x0 >= x1) return;
  const size_t pack_bytes = horizontal_ ? kernels_.scratch_bytes(x_axis_) : 0;
  int first_row = y0, last_row = y1;  // input rows that this band reads
  if (vertical_) {
    const Taps& taps = y_axis_.taps;
    first_row = taps.first[y0];
    last_row = taps.first[y1 - 1] + taps.count[y1 - 1];
  }
  const ImageView in = {src_.data + first_row * src_.stride, last_row - first_row, src_.width, src_.stride};

  if (!vertical_ && !horizontal_) {
    for (int y = y0; y < y1; ++y)
      std::memcpy(dst + (y - y0) * dst_stride, src_.data + y * src_.stride + 3 * x0, 3 * (x1 - x0));
  } else if (!vertical_) {
    scratch.resize(pack_bytes);
    horizontal_pass(in, in.height, x0, x1, dst, dst_stride, scratch.data());
  } else if (!horizontal_) {
    for (int y = y0; y < y1; ++y)
      kernels_.vertical(in.data + 3 * x0, in.stride, first_row, y_axis_, y, 3 * (x1 - x0),
                        dst + (y - y0) * dst_stride);
  } else if (vertical_first_) {
    const int bytes = 3 * src_.width;
    scratch.resize(pack_bytes + static_cast<size_t>(y1 - y0) * bytes);
    uint8_t* middle = scratch.data() + pack_bytes;
    for (int y = y0; y < y1; ++y)
      kernels_.vertical(in.data, in.stride, first_row, y_axis_, y, bytes,
                        middle + static_cast<size_t>(y - y0) * bytes);
    horizontal_pass({middle, y1 - y0, src_.width, bytes}, y1 - y0, x0, x1, dst, dst_stride, scratch.data());
  } else {
    const ptrdiff_t stride = 3 * static_cast<ptrdiff_t>(x1 - x0) + kRowSlack;
    scratch.resize(pack_bytes + static_cast<size_t>(in.height) * stride);
    uint8_t* middle = scratch.data() + pack_bytes;
    horizontal_pass(in, in.height, x0, x1, middle, stride, scratch.data());
    for (int y = y0; y < y1; ++y)
      kernels_.vertical(middle, stride, first_row, y_axis_, y, 3 * (x1 - x0), dst + (y - y0) * dst_stride);
  }
}

}  // namespace llava_fast
