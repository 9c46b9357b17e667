// One image to a stack of uint8 tiles: per view a resize, a place on a canvas, and a cut into tiles.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "image/resize.h"

namespace llava_fast {

struct TileView {
  bool square;                      // first place the image in the middle of a `fill` square of its longer side
  int height, width;                // then resize to this
  int offset_y, offset_x;           // then place here (negative: crop) ...
  int canvas_height, canvas_width;  // ... on a canvas of this size, both multiples of the tile
  std::array<uint8_t, 3> fill;      // colour of the rest
  Filter filter;                    // of the resize
};

struct TileLayout {
  int tile;         // side of a tile in pixels
  bool patch_rows;  // false: [3, tile, tile] planes; true: [(tile/patch)^2, row_bytes] patches
  int patch;        // side of a patch
  int patches_per_side() const { return tile / patch; }
  int row_bytes() const { return (3 * patch * patch + 15) / 16 * 16; }  // a patch, zero-padded
  size_t tile_bytes() const {
    return patch_rows ? static_cast<size_t>(patches_per_side()) * patches_per_side() * row_bytes()
                      : 3 * static_cast<size_t>(tile) * tile;
  }
};

// Throws std::invalid_argument for a view that does not fit the layout.
void check_view(const TileView& view, const TileLayout& layout);

// Writes every byte of `out`: the tiles of each view (checked) in turn, row-major.
void make_tiles(const ImageView& image, const std::vector<TileView>& views, const TileLayout& layout, PillowOrder order,
                const KernelSet& kernels, int threads, uint8_t* out);

}  // namespace llava_fast
