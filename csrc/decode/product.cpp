#include "decode/product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace llava_fast::decode {
namespace {

// The codes of kBlockRows vectors fit the second-level cache together with a panel and the sums of kPanelsAtOnce.
constexpr int64_t kBlockRows = 512, kPanelsAtOnce = 4;

constexpr int64_t kLongest = 128;  // elements of a group

// x [count, in] quantised, padded to whole groups.
struct Codes {
  int64_t group, groups;
  std::vector<uint8_t> codes;
  std::vector<float> scales;

  Codes(int64_t count, int64_t in, int64_t elements)
      : group(elements),
        groups((in + elements - 1) / elements),
        codes(count * groups * group),
        scales(count * groups) {}

  void quantise_row(const float* x, int64_t row, int64_t in) {
    float padded[kLongest];
    int8_t found[kLongest];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = row * groups + g, left = std::min(group, in - g * group);
      std::copy_n(x + row * in + g * group, left, padded);
      std::fill(padded + left, padded + group, 0.0f);
      scales[at] = quantise_group(padded, group, found);
      for (int64_t i = 0; i < group; ++i) codes[at * group + i] = static_cast<uint8_t>(found[i] + kOffset);
    }
  }
};

// Memory of a panel, refilled for each block of elements.
struct PanelBuffer {
  std::vector<int8_t> codes;
  std::vector<float> scale;

  explicit PanelBuffer(int64_t group)
      : codes(kPanelRows * kBlockElements * kCodeBytes), scale(kPanelRows * kBlockElements / group) {}

  Panel fill(const Linear& linear, int64_t begin, int64_t rows, int64_t first, int64_t groups, int64_t group,
             const PanelKernels& kernels) {
    const int64_t stored = linear.in / linear.group, elements = groups * group, start = first * group;
    for (int64_t r = 0; r < kPanelRows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (begin + r) * stored + (stored > 1 ? first + g : 0);
        scale[g * kPanelRows + r] = r < rows ? linear.scale[at] : 0;
      }
    kernels.pack(linear, {begin, rows, start, std::min(elements, linear.in - start), elements}, codes.data());
    return {linear.kind, groups, group, codes.data(), scale.data()};
  }
};

void pack(const Linear& linear, const Part& part, int8_t* codes) {
  int8_t row[kBlockElements];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const int64_t count = r < part.rows ? part.count : 0, at = (part.row + r) * linear.in + part.start;
    if (linear.kind == Kind::kInt8) {
      std::copy_n(static_cast<const int8_t*>(linear.weight) + at, count, row);
    } else {
      const uint8_t* const stored = static_cast<const uint8_t*>(linear.weight) + at / 2;
      for (int64_t i = 0; i < count; i += 2) {
        const int zero = linear.zero != nullptr ? linear.zero[(at + i) / linear.group] : 8;
        row[i] = static_cast<int8_t>((stored[i / 2] & 15) - zero);
        row[i + 1] = static_cast<int8_t>((stored[i / 2] >> 4) - zero);
      }
    }
    std::fill(row + count, row + part.padded, int8_t{0});
    for (int64_t k = 0; k < part.padded / 4; ++k) std::memcpy(&codes[(k * kPanelRows + r) * 4], &row[4 * k], 4);
  }
}

void multiply(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < panel.groups; ++g) {
      int32_t sums[kPanelRows] = {};
      const int8_t* codes = panel.codes + g * panel.group * kPanelRows;
      const uint8_t* const mine = x.codes + m * x.codes_stride + g * panel.group;
      for (int64_t k = 0; k < panel.group; k += 4, codes += 4 * kPanelRows)
        for (int r = 0; r < kPanelRows; ++r)
          for (int i = 0; i < 4; ++i) sums[r] += codes[4 * r + i] * (mine[k + i] - kOffset);
      for (int r = 0; r < kPanelRows; ++r) {
        const float scale = panel.scale[g * kPanelRows + r] * x.scales[m * x.groups_stride + g];
        float& target = y[m * y_stride + r];
        target = std::fma(static_cast<float>(sums[r]), scale, first && g == 0 ? 0.0f : target);
      }
    }
}

}  // namespace

const PanelKernels& scalar_panel() {
  static const PanelKernels kernels = {pack, multiply};
  return kernels;
}

void product(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
             const PanelKernels& kernels) {
  struct None {};
  const int64_t group = linear.group == linear.in || linear.group > 128 ? 128 : linear.group;
  for (int64_t row = 0; row < count; row += kBlockRows, x += kBlockRows * linear.in, y += kBlockRows * out) {
    const int64_t rows = std::min(kBlockRows, count - row);
    Codes codes(rows, linear.in, group);
    parallel_for<None>(static_cast<int>(rows), threads,
                       [&](int i, None&) { codes.quantise_row(x, i, linear.in); });
    const int64_t panels = (out + kPanelRows - 1) / kPanelRows, parts = std::min<int64_t>(threads, panels);
    parallel_for<None>(static_cast<int>(parts), static_cast<int>(parts), [&](int part, None&) {
      PanelBuffer buffer(group);
      // Sums of a few panels, each panel's side by side: rows of y, a power of two apart, would share cache sets.
      std::vector<float> sums(kPanelsAtOnce * rows * kPanelRows);
      const int64_t groups_a_block = kBlockElements / group, last = panels * (part + 1) / parts;
      for (int64_t begin = panels * part / parts; begin < last; begin += kPanelsAtOnce) {
        const int64_t end = std::min(begin + kPanelsAtOnce, last);
        for (int64_t first = 0; first < codes.groups; first += groups_a_block) {
          const QuantisedRows block = {codes.codes.data() + first * group, codes.scales.data() + first,
                                       codes.groups * group, codes.groups};
          for (int64_t p = begin; p < end; ++p) {
            const int64_t row = p * kPanelRows;
            const Panel panel = buffer.fill(linear, row, std::min<int64_t>(kPanelRows, out - row), first,
                                            std::min(groups_a_block, codes.groups - first), group, kernels);
            kernels.multiply(panel, block, rows, &sums[(p - begin) * rows * kPanelRows], kPanelRows, first == 0);
          }
        }
        for (int64_t m = 0; m < rows; ++m)
          for (int64_t p = begin; p < end; ++p) {
            const float* const found = &sums[((p - begin) * rows + m) * kPanelRows];
            const int64_t row = p * kPanelRows, there = std::min<int64_t>(kPanelRows, out - row);
            for (int64_t r = 0; r < there; ++r)
              y[m * out + row + r] = linear.bias != nullptr ? found[r] + linear.bias[row + r] : found[r];
          }
      }
    });
  }
}

}  // namespace llava_fast::decode
