// The work of one thread of the tile kernels, for device and host. The arithmetic is in integers and the same on both,
// so the tests run it on the host, pixel by pixel, and compare it with the CPU path.
#pragma once

#include "image/tile_plan.h"

namespace llava_fast {

struct Pixel {
  uint8_t channel[3];
};

// A sum of weighted samples along one axis; at(k) is the pixel under tap k.
template <class At>
LLAVA_FAST_DEVICE Pixel filter(const int32_t* words, const AxisTable& axis, int out, const At& at) {
  const int first = words[axis.first + out], count = words[axis.count + out];
  const int32_t* weights = words + axis.weights + static_cast<int64_t>(out) * axis.width;
  int32_t red = kRounding, green = kRounding, blue = kRounding;
  for (int k = 0; k < count; ++k) {
    const int32_t weight = weights[k];
    const Pixel pixel = at(first + k);
    red += weight * pixel.channel[0];
    green += weight * pixel.channel[1];
    blue += weight * pixel.channel[2];
  }
  return {{clamp_to_byte(red), clamp_to_byte(green), clamp_to_byte(blue)}};
}

LLAVA_FAST_DEVICE Pixel load_pixel(const uint8_t* p) { return {{p[0], p[1], p[2]}}; }

// Pixel `i` of a job's intermediate rows, from the batch's source pixels.
LLAVA_FAST_DEVICE void middle_pixel(const TileJob& job, const int32_t* words, int64_t i, const uint8_t* pixels,
                                    uint8_t* scratch) {
  const int y = static_cast<int>(i / job.middle_width), x = static_cast<int>(i % job.middle_width);
  const auto source = [&](int canvas_y, int canvas_x) {
    const int row = canvas_y - job.top, column = canvas_x - job.left;
    if (row < 0 || row >= job.height || column < 0 || column >= job.width) return load_pixel(job.fill);
    return load_pixel(pixels + job.source + 3 * (static_cast<int64_t>(row) * job.width + column));
  };
  const Pixel value = job.vertical_first ? filter(words, job.y, y, [&](int k) { return source(k, x); })
                                         : filter(words, job.x, x, [&](int k) { return source(y, k); });
  uint8_t* target = scratch + job.middle + 3 * i;
  for (int c = 0; c < 3; ++c) target[c] = value.channel[c];
}

// Pixel `i` of a job's canvas, from its intermediate rows, to its place in the tiles.
LLAVA_FAST_DEVICE void tile_pixel(const TileJob& job, const TileLayout& layout, const int32_t* words, int64_t i,
                                  const uint8_t* scratch, uint8_t* tiles) {
  const int y = static_cast<int>(i / job.canvas_width), x = static_cast<int>(i % job.canvas_width);
  const int row = y - job.offset_y, column = x - job.offset_x;
  const uint8_t* middle = scratch + job.middle;
  const auto at = [&](int middle_y, int middle_x) {
    return load_pixel(middle + 3 * (static_cast<int64_t>(middle_y) * job.middle_width + middle_x));
  };
  Pixel value = load_pixel(job.fill);
  if (row >= 0 && row < job.out_height && column >= 0 && column < job.out_width)
    value = job.vertical_first ? filter(words, job.x, column, [&](int k) { return at(row, k); })
                               : filter(words, job.y, row, [&](int k) { return at(k, column); });

  const int tile = layout.tile, patch = layout.patch;
  const int64_t number = static_cast<int64_t>(y / tile) * (job.canvas_width / tile) + x / tile;
  const int tile_y = y % tile, tile_x = x % tile;
  if (!layout.patch_rows) {
    const int64_t plane = static_cast<int64_t>(tile) * tile;
    uint8_t* target = tiles + job.tiles + 3 * number * plane + static_cast<int64_t>(tile_y) * tile + tile_x;
    for (int c = 0; c < 3; ++c) target[c * plane] = value.channel[c];
    return;
  }
  const int side = tile / patch, area = patch * patch, bytes = (3 * area + 15) / 16 * 16;
  if (tile_y >= side * patch || tile_x >= side * patch) return;  // beyond the last whole patch
  const int64_t patch_number = number * side * side + tile_y / patch * side + tile_x / patch;
  uint8_t* target = tiles + job.tiles + patch_number * bytes;
  const int within = tile_y % patch * patch + tile_x % patch;
  for (int c = 0; c < 3; ++c) target[c * area + within] = value.channel[c];
  for (int end = 3 * area + within; end < bytes; end += area) target[end] = 0;  // the row's padding
}

}  // namespace llava_fast
