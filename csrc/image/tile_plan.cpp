#include "image/tile_plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>

namespace llava_fast {
namespace {

// Appends the tables of an axis, or finds those of an equal one. An axis that keeps its size gets the identity:
// one tap of weight 1, which returns each sample exactly.
class Tables {
 public:
  explicit Tables(std::vector<int32_t>& words) : words_(words) {}

  AxisTable add(Filter filter, int in_size, int out_size) {
    const auto [found, is_new] = known_.try_emplace({filter, in_size, out_size});
    if (is_new)
      found->second = append(in_size == out_size ? identity_taps(in_size) : filter_taps(filter, in_size, out_size));
    return found->second;
  }

 private:
  AxisTable append(const Taps& taps) {
    const auto at = [&](const std::vector<int32_t>& values) {
      const size_t begin = words_.size();
      if (begin + values.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
        throw std::length_error("plan_tiles: the filter tables of this batch are too large");
      words_.insert(words_.end(), values.begin(), values.end());
      return static_cast<int32_t>(begin);
    };
    return {at(taps.first), at(taps.count), at(taps.weights), taps.width};
  }

  std::vector<int32_t>& words_;
  std::map<std::tuple<Filter, int, int>, AxisTable> known_;
};

}  // namespace

TilePlan plan_tiles(const std::vector<std::pair<int, int>>& sizes, const std::vector<std::vector<TileView>>& views,
                    const TileLayout& layout, PillowOrder order) {
  TilePlan plan;
  plan.layout = layout;
  Tables tables(plan.words);
  int64_t source = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto [height, width] = sizes[i];
    for (const TileView& view : views[i]) {
      const int side = std::max(height, width);
      const int in_height = view.square ? side : height, in_width = view.square ? side : width;
      TileJob job = {};
      job.source = source;
      job.middle = plan.middle_bytes;
      job.tiles = plan.tiles * static_cast<int64_t>(layout.tile_bytes());
      job.height = height;
      job.width = width;
      job.top = (in_height - height) / 2;
      job.left = (in_width - width) / 2;
      job.vertical_first = vertical_first(order, in_height, in_width, view.height, view.width);
      job.middle_height = job.vertical_first ? view.height : in_height;
      job.middle_width = job.vertical_first ? in_width : view.width;
      job.out_height = view.height;
      job.out_width = view.width;
      job.offset_y = view.offset_y;
      job.offset_x = view.offset_x;
      job.canvas_height = view.canvas_height;
      job.canvas_width = view.canvas_width;
      job.x = tables.add(view.filter, in_width, view.width);
      job.y = tables.add(view.filter, in_height, view.height);
      std::copy(view.fill.begin(), view.fill.end(), job.fill);
      plan.jobs.push_back(job);

      const int64_t middle_pixels = static_cast<int64_t>(job.middle_height) * job.middle_width;
      const int64_t canvas_pixels = static_cast<int64_t>(job.canvas_height) * job.canvas_width;
      plan.middle_bytes += 3 * middle_pixels;
      plan.tiles += canvas_pixels / layout.tile / layout.tile;
      plan.first_pixels = std::max(plan.first_pixels, middle_pixels);
      plan.canvas_pixels = std::max(plan.canvas_pixels, canvas_pixels);
    }
    source += 3 * static_cast<int64_t>(height) * width;
  }
  return plan;
}

}  // namespace llava_fast
