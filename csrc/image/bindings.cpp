// The image functions of llava_fast._C. Arguments are checked here; the work runs without the GIL.
#include "image/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "image/tiles.h"

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

Bytes resize_image(const Bytes& image, int height, int width, const std::string& pillow, int threads) {
  const ImageView src = image_view(image);
  if (height < 1 || width < 1) throw std::invalid_argument("the new size must be at least 1x1");
  const PillowOrder order = pillow_order(pillow);
  const KernelSet& kernels = select_kernels();  // reads the environment, so under the GIL
  Bytes out({height, width, 3});
  uint8_t* dst = out.mutable_data();
  {
    const py::gil_scoped_release release;
    resize(src, height, width, order, kernels, threads, dst);
  }
  return out;
}

// (square, (height, width), (offset_y, offset_x), (canvas_height, canvas_width), (red, green, blue))
using ViewTuple = std::tuple<bool, std::tuple<int, int>, std::tuple<int, int>, std::tuple<int, int>,
                             std::tuple<uint8_t, uint8_t, uint8_t>>;

Bytes tiles(const Bytes& image, const std::vector<ViewTuple>& view_tuples, int tile, const std::string& pillow,
            int threads, bool patch_rows, int patch) {
  const ImageView src = image_view(image);
  if (tile < 1 || patch < 1 || (patch_rows && patch > tile))
    throw std::invalid_argument("the tile size must be at least 1 and at least the patch size");
  const TileLayout layout = {tile, patch_rows, patch};
  const PillowOrder order = pillow_order(pillow);
  const KernelSet& kernels = select_kernels();  // reads the environment, so under the GIL
  std::vector<TileView> views;
  py::ssize_t count = 0;
  for (const auto& [square, size, offset, canvas, fill] : view_tuples) {
    const auto [height, width] = size;
    const auto [offset_y, offset_x] = offset;
    const auto [canvas_height, canvas_width] = canvas;
    const auto [red, green, blue] = fill;
    views.push_back({square, height, width, offset_y, offset_x, canvas_height, canvas_width, {red, green, blue}});
    check_view(views.back(), layout);
    count += static_cast<py::ssize_t>(canvas_height / tile) * (canvas_width / tile);
  }
  const py::ssize_t side = layout.patches_per_side();
  Bytes out = patch_rows
                  ? Bytes({count, side * side, static_cast<py::ssize_t>(layout.row_bytes())})
                  : Bytes({count, py::ssize_t{3}, static_cast<py::ssize_t>(tile), static_cast<py::ssize_t>(tile)});
  uint8_t* dst = out.mutable_data();
  {
    const py::gil_scoped_release release;
    make_tiles(src, views, layout, order, kernels, threads, dst);
  }
  return out;
}

}  // namespace

void bind_image(py::module_& m) {
  m.def("simd_levels", &supported_kernel_names, "Instruction sets this machine can run, slowest first.");
  m.def("resize", &resize_image, py::arg("image").noconvert(), py::arg("height"), py::arg("width"), py::arg("pillow"),
        py::arg("threads"), "Pillow's bicubic resize of uint8 [H, W, 3]; see llava_fast.inputs.images.resize.");
  m.def("make_tiles", &tiles, py::arg("image").noconvert(), py::arg("views"), py::arg("tile"), py::arg("pillow"),
        py::arg("threads"), py::arg("patch_rows"), py::arg("patch"),
        "Tiles of uint8 [H, W, 3]; see llava_fast.inputs.images.make_tiles.");
}

}  // namespace llava_fast
