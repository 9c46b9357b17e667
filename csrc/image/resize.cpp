#include "image/resize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace llava_fast {

bool vertical_first(PillowOrder order, int in_height, int in_width, int out_height, int out_width) {
  const int64_t rows_lost = static_cast<int64_t>(in_height) - out_height;
  const int64_t columns_lost = static_cast<int64_t>(in_width) - out_width;
  if (rows_lost <= 0 || order == PillowOrder::kPillow12_1) return false;
  if (order == PillowOrder::kPillow12) return in_height > 100 * static_cast<int64_t>(in_width);
  return rows_lost > 2 * columns_lost;
}

Resizer::Resizer(const ImageView& src, int out_height, int out_width, Filter filter, PillowOrder order,
                 const KernelSet& kernels)
    : src_(src),
      kernels_(kernels),
      horizontal_(out_width != src.width),
      vertical_(out_height != src.height),
      vertical_first_(vertical_first(order, src.height, src.width, out_height, out_width)) {
  if (horizontal_) {
    x_axis_.taps = filter_taps(filter, src.width, out_width);
    kernels.prepare(x_axis_, 4);
  }
  if (vertical_) {
    y_axis_.taps = filter_taps(filter, src.height, out_height);
    kernels.prepare(y_axis_, 1);
  }
}

void Resizer::horizontal_pass(const ImageView& in, int rows, int x0, int x1, uint8_t* dst, ptrdiff_t stride,
                              uint8_t* scratch) const {
  for (int row = 0; row < rows; row += 4)
    kernels_.horizontal(in.data + row * in.stride, in.stride, std::min(4, rows - row), x_axis_, x0, x1,
                        dst + row * stride, stride, scratch);
}

void Resizer::vertical_pass(const uint8_t* in, ptrdiff_t in_stride, int in_row, int y0, int y1, int bytes, uint8_t* dst,
                            ptrdiff_t stride) const {
  const Taps& taps = y_axis_.taps;
  std::vector<const uint8_t*> rows(std::max(taps.width, 4 * y_axis_.groups));
  for (int y = y0; y < y1; ++y, dst += stride) {
    for (size_t k = 0; k < rows.size(); ++k) {
      const int row = taps.first[y] + std::min(static_cast<int>(k), taps.count[y] - 1);
      rows[k] = in + (row - in_row) * in_stride;
    }
    kernels_.vertical(rows.data(), y_axis_, y, bytes, dst);
  }
}

void Resizer::rows(int y0, int y1, int x0, int x1, uint8_t* dst, ptrdiff_t dst_stride, Buffer& scratch) const {
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
    horizontal_pass(in, in.height, x0, x1, dst, dst_stride, scratch.get(pack_bytes));
  } else if (!horizontal_) {
    vertical_pass(in.data + 3 * x0, in.stride, first_row, y0, y1, 3 * (x1 - x0), dst, dst_stride);
  } else if (vertical_first_) {
    const int bytes = 3 * src_.width;
    uint8_t* pack = scratch.get(pack_bytes + static_cast<size_t>(y1 - y0) * bytes);
    uint8_t* middle = pack + pack_bytes;
    vertical_pass(in.data, in.stride, first_row, y0, y1, bytes, middle, bytes);
    horizontal_pass({middle, y1 - y0, src_.width, bytes}, y1 - y0, x0, x1, dst, dst_stride, pack);
  } else {
    const ptrdiff_t stride = 3 * static_cast<ptrdiff_t>(x1 - x0) + kRowSlack;
    uint8_t* pack = scratch.get(pack_bytes + static_cast<size_t>(in.height) * stride);
    uint8_t* middle = pack + pack_bytes;
    horizontal_pass(in, in.height, x0, x1, middle, stride, pack);
    vertical_pass(middle, stride, first_row, y0, y1, 3 * (x1 - x0), dst, dst_stride);
  }
}

void resize(const ImageView& src, int out_height, int out_width, Filter filter, PillowOrder order,
            const KernelSet& kernels, int threads, uint8_t* out) {
  struct Scratch {
    Buffer pixels, middle;
  };
  const Resizer resizer(src, out_height, out_width, filter, order, kernels);
  const ptrdiff_t bytes = 3 * static_cast<ptrdiff_t>(out_width), stride = bytes + kRowSlack;
  parallel_for<Scratch>((out_height + kBandRows - 1) / kBandRows, threads, [&](int band, Scratch& scratch) {
    const int begin = band * kBandRows, end = std::min(begin + kBandRows, out_height);
    uint8_t* pixels = scratch.pixels.get(static_cast<size_t>(end - begin) * stride);
    resizer.rows(begin, end, 0, out_width, pixels, stride, scratch.middle);
    for (int y = begin; y < end; ++y) std::memcpy(out + y * bytes, pixels + (y - begin) * stride, bytes);
  });
}

}  // namespace llava_fast
