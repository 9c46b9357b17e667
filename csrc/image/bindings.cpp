// The image functions of llava_fast._C. Arguments are checked here; the work runs without the GIL.
#include "image/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "image/tile_pixels.h"
#include "image/tile_plan.h"
#include "image/tiles.h"
#include "image/tiles_cuda.h"

namespace py = pybind11;

namespace llava_fast {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

ImageView image_view(const Bytes& image) {
  if (image.ndim() != 3 || image.shape(2) != 3 || image.shape(0) < 1 || image.shape(1) < 1)
    throw std::invalid_argument("the image must be uint8 [height, width, 3] with at least one pixel");
  if (image.shape(0) > (1 << 24) || image.shape(1) > (1 << 24))
    throw std::invalid_argument("the image's sides must be at most 16777216 pixels");
  return {image.data(), static_cast<int>(image.shape(0)), static_cast<int>(image.shape(1)),
          static_cast<ptrdiff_t>(3 * image.shape(1))};
}

PillowOrder pillow_order(const std::string& pillow) {
  if (pillow == "12.1") return PillowOrder::kPillow12_1;
  if (pillow == "12") return PillowOrder::kPillow12;
  if (pillow == "13") return PillowOrder::kPillow13;
  throw std::invalid_argument("pillow must be \"12.1\", \"12\" or \"13\", not \"" + pillow + "\"");
}

Filter resize_filter(const std::string& name) {
  const char* const names[] = {"nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"};  // as Filter's values
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Filter>(i);
  throw std::invalid_argument("the filter must be nearest, box, bilinear, hamming, bicubic or lanczos, not \"" + name +
                              "\"");
}

Bytes resize_image(const Bytes& image, int height, int width, const std::string& filter_name, const std::string& pillow,
                   int threads) {
  const ImageView src = image_view(image);
  if (height < 1 || width < 1) throw std::invalid_argument("the new size must be at least 1x1");
  const Filter filter = resize_filter(filter_name);
  const PillowOrder order = pillow_order(pillow);
  const KernelSet& kernels = select_kernels();  // reads the environment, so under the GIL
  Bytes out({height, width, 3});
  uint8_t* dst = out.mutable_data();
  {
    const py::gil_scoped_release release;
    resize(src, height, width, filter, order, kernels, threads, dst);
  }
  return out;
}

// (square, (height, width), (offset_y, offset_x), (canvas_height, canvas_width), (red, green, blue), filter)
using ViewTuple = std::tuple<bool, std::tuple<int, int>, std::tuple<int, int>, std::tuple<int, int>,
                             std::tuple<uint8_t, uint8_t, uint8_t>, std::string>;

TileLayout tile_layout(int tile, bool patch_rows, int patch) {
  if (tile < 1 || patch < 1 || (patch_rows && patch > tile))
    throw std::invalid_argument("the tile size must be at least 1 and at least the patch size");
  return {tile, patch_rows, patch};
}

std::vector<TileView> tile_views(const std::vector<ViewTuple>& tuples, const TileLayout& layout) {
  std::vector<TileView> views;
  for (const auto& [square, size, offset, canvas, fill, filter] : tuples) {
    const auto [height, width] = size;
    const auto [offset_y, offset_x] = offset;
    const auto [canvas_height, canvas_width] = canvas;
    const auto [red, green, blue] = fill;
    views.push_back({square,
                     height,
                     width,
                     offset_y,
                     offset_x,
                     canvas_height,
                     canvas_width,
                     {red, green, blue},
                     resize_filter(filter)});
    check_view(views.back(), layout);
  }
  return views;
}

Bytes empty_tiles(int64_t count, const TileLayout& layout) {
  const py::ssize_t tile = layout.tile, side = layout.patches_per_side(), bytes = layout.row_bytes();
  return layout.patch_rows ? Bytes({static_cast<py::ssize_t>(count), side * side, bytes})
                           : Bytes({static_cast<py::ssize_t>(count), py::ssize_t{3}, tile, tile});
}

Bytes tiles(const Bytes& image, const std::vector<ViewTuple>& view_tuples, int tile, const std::string& pillow,
            int threads, bool patch_rows, int patch) {
  const ImageView src = image_view(image);
  const TileLayout layout = tile_layout(tile, patch_rows, patch);
  const PillowOrder order = pillow_order(pillow);
  const KernelSet& kernels = select_kernels();  // reads the environment, so under the GIL
  const std::vector<TileView> views = tile_views(view_tuples, layout);
  int64_t count = 0;
  for (const TileView& view : views)
    count += static_cast<int64_t>(view.canvas_height / tile) * (view.canvas_width / tile);
  Bytes out = empty_tiles(count, layout);
  uint8_t* dst = out.mutable_data();
  {
    const py::gil_scoped_release release;
    make_tiles(src, views, layout, order, kernels, threads, dst);
  }
  return out;
}

py::dict plan(const std::vector<std::pair<int, int>>& sizes, const std::vector<std::vector<ViewTuple>>& view_tuples,
              int tile, const std::string& pillow, bool patch_rows, int patch) {
  if (sizes.size() != view_tuples.size()) throw std::invalid_argument("plan_tiles: one list of views for each size");
  const TileLayout layout = tile_layout(tile, patch_rows, patch);
  std::vector<std::vector<TileView>> views;
  for (const auto& tuples : view_tuples) views.push_back(tile_views(tuples, layout));
  for (const auto& [height, width] : sizes)
    if (height < 1 || width < 1) throw std::invalid_argument("plan_tiles: an image has at least one pixel");
  const TilePlan made = plan_tiles(sizes, views, layout, pillow_order(pillow));

  Bytes jobs({static_cast<py::ssize_t>(made.jobs.size()), static_cast<py::ssize_t>(sizeof(TileJob))});
  std::memcpy(jobs.mutable_data(), made.jobs.data(), made.jobs.size() * sizeof(TileJob));
  py::dict result;
  result["jobs"] = jobs;
  result["words"] = py::array_t<int32_t>(static_cast<py::ssize_t>(made.words.size()), made.words.data());
  result["middle_bytes"] = made.middle_bytes;
  result["tiles"] = made.tiles;
  result["first_pixels"] = made.first_pixels;
  result["canvas_pixels"] = made.canvas_pixels;
  return result;
}

// Runs the CUDA kernels' threads sequentially on the host.
Bytes run_plan(const py::dict& plan, const Bytes& pixels, int tile, bool patch_rows, int patch) {
  const TileLayout layout = tile_layout(tile, patch_rows, patch);
  const auto jobs = plan["jobs"].cast<Bytes>();
  const auto words = plan["words"].cast<py::array_t<int32_t, py::array::c_style>>();
  Bytes out = empty_tiles(plan["tiles"].cast<int64_t>(), layout);
  std::vector<uint8_t> scratch(plan["middle_bytes"].cast<size_t>());
  for (py::ssize_t j = 0; j < jobs.shape(0); ++j) {
    TileJob job;
    std::memcpy(&job, jobs.data(j, 0), sizeof(job));
    const int64_t middle = static_cast<int64_t>(job.middle_height) * job.middle_width;
    const int64_t canvas = static_cast<int64_t>(job.canvas_height) * job.canvas_width;
    for (int64_t i = 0; i < middle; ++i) middle_pixel(job, words.data(), i, pixels.data(), scratch.data());
    for (int64_t i = 0; i < canvas; ++i) tile_pixel(job, layout, words.data(), i, scratch.data(), out.mutable_data());
  }
  return out;
}

#ifdef LLAVA_FAST_BUILT_WITH_CUDA
void run_plan_cuda(uintptr_t jobs, int job_count, uintptr_t words, int tile, bool patch_rows, int patch,
                   int64_t first_pixels, int64_t canvas_pixels, uintptr_t pixels, uintptr_t scratch, uintptr_t tiles,
                   uintptr_t stream) {
  make_tiles_cuda(reinterpret_cast<const TileJob*>(jobs), job_count, reinterpret_cast<const int32_t*>(words),
                  tile_layout(tile, patch_rows, patch), first_pixels, canvas_pixels,
                  reinterpret_cast<const uint8_t*>(pixels), reinterpret_cast<uint8_t*>(scratch),
                  reinterpret_cast<uint8_t*>(tiles), reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_image(py::module_& m) {
  m.def("simd_levels", &supported_kernel_names, "Instruction sets this machine can run, slowest first.");
  m.def("resize", &resize_image, py::arg("image").noconvert(), py::arg("height"), py::arg("width"), py::arg("filter"),
        py::arg("pillow"), py::arg("threads"),
        "Pillow's resize of uint8 [H, W, 3]; see llava_fast.inputs.images.resize.");
  m.def("make_tiles", &tiles, py::arg("image").noconvert(), py::arg("views"), py::arg("tile"), py::arg("pillow"),
        py::arg("threads"), py::arg("patch_rows"), py::arg("patch"),
        "Tiles of uint8 [H, W, 3]; see llava_fast.inputs.images.make_tiles.");
  m.def("plan_tiles", &plan, py::arg("sizes"), py::arg("views"), py::arg("tile"), py::arg("pillow"),
        py::arg("patch_rows"), py::arg("patch"),
        "The tiles of a batch as integers for make_tiles_cuda. sizes: (height, width) of images whose interleaved RGB "
        "pixels lie one after another; views: a list for each image, as in make_tiles. Returns jobs (uint8 [jobs, "
        "bytes]) "
        "and words (int32), to be copied to the device, and the sizes that make_tiles_cuda needs.");
  m.def("run_tile_plan", &run_plan, py::arg("plan"), py::arg("pixels"), py::arg("tile"), py::arg("patch_rows"),
        py::arg("patch"), "What make_tiles_cuda does, on the host, one thread after another: for its tests.");
#ifdef LLAVA_FAST_BUILT_WITH_CUDA
  m.def("make_tiles_cuda", &run_plan_cuda, py::arg("jobs"), py::arg("job_count"), py::arg("words"), py::arg("tile"),
        py::arg("patch_rows"), py::arg("patch"), py::arg("first_pixels"), py::arg("canvas_pixels"), py::arg("pixels"),
        py::arg("scratch"), py::arg("tiles"), py::arg("stream"),
        "Launches a plan on a stream of the current device. jobs, words, pixels, scratch (middle_bytes) and tiles are "
        "device addresses. Compiled for capability 8.0 and 9.0; checked on the host (run_tile_plan), not on a GPU.");
#endif
}

}  // namespace llava_fast
