// The tiles of a batch of images as plain data, from which a GPU makes them in two launches: all sizes, filter
// weights and positions as integers computed on the host. It has no addresses, so DataLoader workers can make it.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "image/tiles.h"

namespace llava_fast {

// A filter along one axis: positions of its tables among the plan's words.
struct AxisTable {
  int32_t first, count, weights;  // [out_size], [out_size], [out_size, width]
  int32_t width;
};

// One view of one image. Its source is the image on a virtual canvas of `fill` (larger only for a square view).
// The first pass filters along one axis to `middle`; the second along the other, into the tiles.
struct TileJob {
  int64_t source;                    // byte of the first pixel among the batch's pixels
  int64_t middle;                    // byte of the middle rows in the scratch memory
  int64_t tiles;                     // byte of the first tile in the output
  int32_t height, width, top, left;  // the image and its place on the virtual canvas
  int32_t middle_height, middle_width;
  int32_t out_height, out_width;        // the resized image ...
  int32_t offset_y, offset_x;           // ... its place ...
  int32_t canvas_height, canvas_width;  // ... and the canvas that is cut
  int32_t vertical_first;
  AxisTable x, y;
  uint8_t fill[4];
};

struct TilePlan {
  TileLayout layout;
  std::vector<TileJob> jobs;
  std::vector<int32_t> words;  // the tables of all axes, each once
  int64_t middle_bytes = 0;    // scratch memory for all jobs
  int64_t tiles = 0;           // tiles of the whole batch
  int64_t first_pixels = 0;    // most middle pixels of a job: the extent of the first launch
  int64_t canvas_pixels = 0;   // most canvas pixels of a job: the extent of the second
};

// `sizes` are (height, width) of images that are concatenated as interleaved RGB; `views` must be checked already.
TilePlan plan_tiles(const std::vector<std::pair<int, int>>& sizes, const std::vector<std::vector<TileView>>& views,
                    const TileLayout& layout, PillowOrder order);

}  // namespace llava_fast
