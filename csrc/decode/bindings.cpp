// llava_fast._C.decoder_step: sizes and addresses in, checked by llava_fast.ops.decoder_step.
#include "decode/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "decode/step.h"

namespace py = pybind11;

namespace llava_fast::decode {
namespace {

constexpr size_t kWeightsPerLayer = 16;
// A thread is worth starting for this many bytes of weights: reading them takes several times as long.
constexpr int64_t kBytesPerThread = 16 << 20;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The cache's tensors [layers, 2, kv_heads, blocks, block_rows, head_dim], one after the other: block numbers count
// through all of them.
struct Segments {
  const std::vector<uintptr_t>& addresses;
  const std::vector<int64_t>& blocks;
  int64_t block_rows, head_dim;

  Run run(int64_t first, int64_t count) const {
    int64_t start = 0;
    for (size_t i = 0; i < blocks.size(); start += blocks[i++])
      if (first >= start && count > 0 && count <= start + blocks[i] - first) {
        const int64_t block = block_rows * head_dim;
        return {at<float>(addresses[i]) + (first - start) * block, blocks[i] * block, count * block_rows};
      }
    throw std::invalid_argument("blocks " + std::to_string(first) + " to " + std::to_string(first + count - 1) +
                                " do not lie in one segment of the cache");
  }
};

void decoder_step(uintptr_t x, uintptr_t cos, uintptr_t sin, const std::vector<int64_t>& before,
                  const std::vector<std::vector<int64_t>>& tables, const std::vector<uintptr_t>& weights,
                  uintptr_t norm, const std::vector<int64_t>& windows, const std::vector<uintptr_t>& segments,
                  const std::vector<int64_t>& blocks, const std::array<int64_t, 6>& sizes, float eps, int threads) {
  const auto [width, intermediate, heads, kv_heads, head_dim, block_rows] = sizes;
  const size_t layers = windows.size();
  if (before.empty() || tables.size() != before.size() || weights.size() != kWeightsPerLayer * layers ||
      segments.size() != blocks.size())
    throw std::invalid_argument("decoder_step: lists of unequal length");
  Decoder decoder = {{}, at<const float>(norm), width, intermediate, heads, kv_heads, head_dim, eps};
  for (size_t i = 0; i < layers; ++i) {
    const uintptr_t* w = &weights[kWeightsPerLayer * i];
    const auto linear = [&](int k, int64_t in) { return Linear{at<const float>(w[k]), at<const float>(w[k + 1]), in}; };
    decoder.layers.push_back({at<const float>(w[0]), linear(1, width), linear(3, width), linear(5, width),
                              linear(7, heads * head_dim), at<const float>(w[9]), linear(10, width), linear(12, width),
                              linear(14, intermediate), windows[i]});
  }
  const Segments cache = {segments, blocks, block_rows, head_dim};
  std::vector<Sequence> sequences(before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    sequences[i].before = before[i];
    int64_t room = 0;
    for (size_t k = 0; k + 1 < tables[i].size(); k += 2) {
      sequences[i].runs.push_back(cache.run(tables[i][k], tables[i][k + 1]));
      room += sequences[i].runs.back().rows;
    }
    if (before[i] < 0 || before[i] >= room) throw std::invalid_argument("decoder_step: a table without room");
  }
  const KernelSet& kernels = select_kernels();
  const py::gil_scoped_release release;
  const int64_t useful = std::max<int64_t>(1, weight_bytes(decoder) / kBytesPerThread);
  step(decoder, sequences, at<const float>(cos), at<const float>(sin), at<float>(x),
       static_cast<int>(std::min<int64_t>(threads, useful)), kernels);
}

}  // namespace

void bind(py::module_& m) {
  m.def("decoder_step", &decoder_step, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("before"),
        py::arg("tables"), py::arg("weights"), py::arg("norm"), py::arg("windows"), py::arg("segments"),
        py::arg("blocks"), py::arg("sizes"), py::arg("eps"), py::arg("threads"),
        "One float32 decoder pass, in place in x; see llava_fast.ops.decoder_step, which checks what it passes.");
}

}  // namespace llava_fast::decode
