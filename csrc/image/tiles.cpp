#include "image/tiles.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "parallel.h"

namespace llava_fast {
namespace {

// `image` in the middle of a square of its longer side (Source: expand2square in haotian-liu/LLaVA).
std::vector<uint8_t> squared(const ImageView& image, const std::array<uint8_t, 3>& fill) {
  const int side = std::max(image.height, image.width);
  const int top = (side - image.height) / 2, left = (side - image.width) / 2;
  std::vector<uint8_t> square(3 * static_cast<size_t>(side) * side);
  for (size_t i = 0; i < square.size(); i += 3) std::memcpy(&square[i], fill.data(), 3);
  for (int y = 0; y < image.height; ++y)
    std::memcpy(&square[3 * (static_cast<size_t>(top + y) * side + left)], image.data + y * image.stride,
                3 * static_cast<size_t>(image.width));
  return square;
}

// memcpy of a patch's row: for 8 to 16 bytes, the usual patches, without a call.
inline void copy_few(uint8_t* dst, const uint8_t* src, int count) {
  if (count < 8 || count > 16) {
    std::memcpy(dst, src, count);
    return;
  }
  std::memcpy(dst, src, 8);
  std::memcpy(dst + count - 8, src + count - 8, 8);
}

// One view's place in the output, and the writing of canvas rows into its tiles.
class TileWriter {
 public:
  TileWriter(const TileView& view, const TileLayout& layout, const KernelSet& kernels, uint8_t* out)
      : view_(view), layout_(layout), kernels_(kernels), out_(out), row_(3 * layout.tile) {}

  // Canvas row y; pixels [x0, x1) of the canvas come from `rgb`, the rest is filled.
  void row(int y, const uint8_t* rgb, int x0, int x1) {
    const int tile = layout_.tile, per_row = view_.canvas_width / tile;
    for (int column = 0; column < per_row; ++column) {
      uint8_t* target = out_ + (static_cast<size_t>(y / tile) * per_row + column) * layout_.tile_bytes();
      const int begin = std::clamp(x0 - column * tile, 0, tile), end = std::clamp(x1 - column * tile, begin, tile);
      const uint8_t* pixels = rgb + 3 * static_cast<ptrdiff_t>(column * tile + begin - x0);
      if (layout_.patch_rows) {
        planes(pixels, begin, end, row_.data(), tile);
        scatter_patches(y % tile, target);
      } else {
        planes(pixels, begin, end, target + static_cast<size_t>(y % tile) * tile, static_cast<size_t>(tile) * tile);
      }
    }
  }

 private:
  // One row of a tile to three planes `step` bytes apart; columns outside [begin, end) are filled.
  void planes(const uint8_t* pixels, int begin, int end, uint8_t* target, size_t step) const {
    for (int c = 0; c < 3; ++c) {
      std::memset(target + c * step, view_.fill[c], begin);
      std::memset(target + c * step + end, view_.fill[c], layout_.tile - end);
    }
    if (begin < end)
      kernels_.planes(pixels, end - begin, target + begin, target + step + begin, target + 2 * step + begin);
  }

  // The planes of tile row y (in row_) to the patches it crosses; also the zero padding of their ends.
  void scatter_patches(int y, uint8_t* target) const {
    const int patch = layout_.patch, side = layout_.patches_per_side(), bytes = layout_.row_bytes();
    if (y >= side * patch) return;  // rows left over when the patch does not divide the tile
    for (int x = 0; x < side; ++x) {
      uint8_t* row = target + (static_cast<size_t>(y / patch) * side + x) * bytes;
      for (int c = 0; c < 3; ++c)
        copy_few(row + (c * patch + y % patch) * patch, &row_[c * layout_.tile + x * patch], patch);
      if (y % patch == 0) std::memset(row + 3 * patch * patch, 0, bytes - 3 * patch * patch);
    }
  }

  const TileView& view_;
  const TileLayout& layout_;
  const KernelSet& kernels_;
  uint8_t* out_;
  std::vector<uint8_t> row_;  // three planes of one tile row
};

struct Job {  // everything about one view that its bands share
  std::vector<uint8_t> square;
  std::unique_ptr<Resizer> resizer;
  uint8_t* out;
};

struct Band {
  int view, begin, end;  // canvas rows
};

struct Scratch {  // of one thread
  Buffer pixels, middle;
};

void run_band(const TileView& view, const Job& job, const TileLayout& layout, const KernelSet& kernels, int begin,
              int end, Scratch& scratch) {
  // The part of the resized image that the canvas shows, in the resized image's own coordinates.
  const int x0 = std::clamp(-view.offset_x, 0, view.width);
  const int x1 = std::clamp(view.canvas_width - view.offset_x, x0, view.width);
  const int y0 = std::clamp(begin - view.offset_y, 0, view.height);
  const int y1 = std::clamp(end - view.offset_y, y0, view.height);
  const ptrdiff_t stride = 3 * static_cast<ptrdiff_t>(x1 - x0) + kRowSlack;
  uint8_t* pixels = scratch.pixels.get(static_cast<size_t>(y1 - y0) * stride);
  job.resizer->rows(y0, y1, x0, x1, pixels, stride, scratch.middle);

  TileWriter writer(view, layout, kernels, job.out);
  for (int y = begin; y < end; ++y) {
    const int source = y - view.offset_y;
    if (x0 < x1 && y0 <= source && source < y1)
      writer.row(y, pixels + (source - y0) * stride, view.offset_x + x0, view.offset_x + x1);
    else
      writer.row(y, nullptr, 0, 0);
  }
}

}  // namespace

void check_view(const TileView& view, const TileLayout& layout) {
  if (view.height < 1 || view.width < 1) throw std::invalid_argument("make_tiles: a view's size must be at least 1x1");
  if (view.canvas_height < layout.tile || view.canvas_width < layout.tile || view.canvas_height % layout.tile ||
      view.canvas_width % layout.tile)
    throw std::invalid_argument("make_tiles: a view's canvas must be a positive multiple of the tile size");
}

void make_tiles(const ImageView& image, const std::vector<TileView>& views, const TileLayout& layout, PillowOrder order,
                const KernelSet& kernels, int threads, uint8_t* out) {
  std::vector<Job> jobs;
  std::vector<Band> bands;
  for (const TileView& view : views) {
    Job job;
    ImageView source = image;
    if (view.square && image.height != image.width) {
      job.square = squared(image, view.fill);
      const int side = std::max(image.height, image.width);
      source = {job.square.data(), side, side, 3 * static_cast<ptrdiff_t>(side)};
    }
    job.resizer = std::make_unique<Resizer>(source, view.height, view.width, view.filter, order, kernels);
    job.out = out;
    out += layout.tile_bytes() * (view.canvas_height / layout.tile) * (view.canvas_width / layout.tile);
    for (int y = 0; y < view.canvas_height; y += kBandRows)
      bands.push_back({static_cast<int>(jobs.size()), y, std::min(y + kBandRows, view.canvas_height)});
    jobs.push_back(std::move(job));
  }
  parallel_for<Scratch>(static_cast<int>(bands.size()), threads, [&](int i, Scratch& scratch) {
    const Band& band = bands[i];
    run_band(views[band.view], jobs[band.view], layout, kernels, band.begin, band.end, scratch);
  });
}

}  // namespace llava_fast
