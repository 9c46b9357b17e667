// llava_fast._C.decoder_step and linear: sizes and addresses in, checked by llava_fast.ops.decoder_step and
// llava_fast.ops.quantised_linear.
#include "decode/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "decode/linear.h"
#include "decode/memory.h"
#include "decode/product.h"
#include "decode/step.h"

namespace py = pybind11;

namespace llava_fast::decode {
namespace {

constexpr size_t kLinears = 7, kLinearFields = 6, kLayerFields = 2 + kLinears * kLinearFields;
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Weights of norms, and biases: used in place if they are float32, else converted and kept here.
class Floats {
 public:
  explicit Floats(bool bfloat16) : bfloat16_(bfloat16) {}

  const float* of(int64_t address, int64_t count) {
    if (address == 0 || !bfloat16_) return at<const float>(static_cast<uintptr_t>(address));
    std::vector<float>& wide = kept_.emplace_back(count);
    const BFloat16* const narrow = at<const BFloat16>(static_cast<uintptr_t>(address));
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(narrow[i].bits) << 16;
      std::memcpy(&wide[i], &bits, sizeof(bits));
    }
    return wide.data();
  }

 private:
  const bool bfloat16_;
  std::deque<std::vector<float>> kept_;
};

// Fields of a linear layer: kind, weight, scale, zero, group, bias.
Linear linear_of(const int64_t* fields, int64_t in, int64_t out, Floats& floats) {
  return {static_cast<Kind>(fields[0]),
          at<const void>(static_cast<uintptr_t>(fields[1])),
          floats.of(fields[5], out),
          in,
          at<const float>(static_cast<uintptr_t>(fields[2])),
          at<const uint8_t>(static_cast<uintptr_t>(fields[3])),
          fields[4]};
}

// The cache's tensors [layers, 2, kv_heads, blocks, block_rows, a row]; block numbers continue from one to the next.
struct Segments {
  const std::vector<uintptr_t>& addresses;
  const std::vector<int64_t>& blocks;
  int64_t block_rows, row_bytes;

  Run run(int64_t first, int64_t count) const {
    int64_t start = 0;
    for (size_t i = 0; i < blocks.size(); start += blocks[i++])
      if (first >= start && count > 0 && count <= start + blocks[i] - first) {
        const int64_t block = block_rows * row_bytes;
        return {at<char>(addresses[i]) + (first - start) * block, blocks[i] * block, count * block_rows};
      }
    throw std::invalid_argument("blocks " + std::to_string(first) + " to " + std::to_string(first + count - 1) +
                                " do not lie in one segment of the cache");
  }
};

void decoder_step(uintptr_t x, uintptr_t cos, uintptr_t sin, const std::vector<int64_t>& before,
                  const std::vector<std::vector<int64_t>>& tables, uintptr_t layers, uintptr_t norm,
                  const std::vector<int64_t>& windows, const std::vector<uintptr_t>& segments,
                  const std::vector<int64_t>& blocks, const std::array<int64_t, 6>& sizes,
                  bool bfloat16, int64_t cache_kind, float eps, int threads) {
  const auto [width, intermediate, heads, kv_heads, head_dim, block_rows] = sizes;
  if (before.empty() || tables.size() != before.size() || segments.size() != blocks.size())
    throw std::invalid_argument("decoder_step: lists of unequal length");
  if (cache_kind < 0 || cache_kind > static_cast<int64_t>(CacheKind::kInt8))
    throw std::invalid_argument("decoder_step: an unknown kind of cache");
  Floats floats(bfloat16);
  Decoder decoder = {{},    floats.of(norm, width), width, intermediate, heads, kv_heads, head_dim, eps,
                     static_cast<CacheKind>(cache_kind)};
  for (size_t i = 0; i < windows.size(); ++i) {
    const int64_t* const fields = at<const int64_t>(layers) + i * kLayerFields;
    const auto linear = [&](size_t k, int64_t in, int64_t out) {
      return linear_of(fields + 2 + k * kLinearFields, in, out, floats);
    };
    decoder.layers.push_back({floats.of(fields[0], width), linear(0, width, heads * head_dim),
                              linear(1, width, kv_heads * head_dim), linear(2, width, kv_heads * head_dim),
                              linear(3, heads * head_dim, width), floats.of(fields[1], width),
                              linear(4, width, intermediate), linear(5, width, intermediate),
                              linear(6, intermediate, width), windows[i]});
  }
  const Segments cache = {segments, blocks, block_rows, row_bytes(decoder.cache, head_dim)};
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
  step(decoder, sequences, at<const float>(cos), at<const float>(sin), at<float>(x),
       useful_threads(weight_bytes(decoder), threads), kernels);
}

// y [count, out] = x [count, in] times a weight with these fields, float32.
void linear(uintptr_t x, int64_t count, const std::array<int64_t, kLinearFields>& fields, int64_t in, int64_t out,
            uintptr_t y, int threads) {
  Floats floats(false);
  const Linear linear = linear_of(fields.data(), in, out, floats);
  const KernelSet& kernels = select_kernels();
  const py::gil_scoped_release release;
  apply(linear, out, at<const float>(x), count, at<float>(y), threads, kernels);
}

// The same for many rows and a quantised weight; faster only if fast_product() is true.
void product_of(uintptr_t x, int64_t count, const std::array<int64_t, kLinearFields>& fields, int64_t in, int64_t out,
                uintptr_t y, int threads) {
  Floats floats(false);
  const Linear linear = linear_of(fields.data(), in, out, floats);
  const KernelSet& kernels = select_kernels();
  const py::gil_scoped_release release;
  product(linear, out, at<const float>(x), count, at<float>(y), threads, kernels.panel);
}

bool fast_product() { return select_kernels().panel.multiply != scalar_panel().multiply; }

// Of products of many rows in PyTorch: without the instructions it widens each element for itself.
bool fast_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return &select_kernels() == &avx512_kernels() && __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

}  // namespace

void bind(py::module_& m) {
  m.def("decoder_step", &decoder_step, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("before"),
        py::arg("tables"), py::arg("layers"), py::arg("norm"), py::arg("windows"), py::arg("segments"),
        py::arg("blocks"), py::arg("sizes"), py::arg("bfloat16"), py::arg("cache_kind"), py::arg("eps"),
        py::arg("threads"),
        "One decoder pass, in place in float32 x; see llava_fast.ops.decoder_step, which checks what it passes.");
  m.def("linear", &linear, py::arg("x"), py::arg("count"), py::arg("fields"), py::arg("in_features"),
        py::arg("out_features"), py::arg("y"), py::arg("threads"),
        "A linear layer of few rows of float32; see llava_fast.ops.quantised_linear, which checks what it passes.");
  m.def("product", &product_of, py::arg("x"), py::arg("count"), py::arg("fields"), py::arg("in_features"),
        py::arg("out_features"), py::arg("y"), py::arg("threads"),
        "A quantised linear layer of many rows of float32; see llava_fast.ops.quantised_linear.");
  m.def("fast_product", &fast_product, "Whether this machine has instructions that make `product` fast.");
  m.def("fast_bfloat16", &fast_bfloat16, "Whether PyTorch has instructions for products of bfloat16 here; x86 only.");
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"),
        "Ask for pages of 2 MiB for memory that has not been written yet.");
}

}  // namespace llava_fast::decode
