#include "decode/product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace llava_fast::decode {
namespace {

constexpr int64_t kBlockRows = 512;       // vectors whose codes fit the second-level cache together with a panel,
constexpr int64_t kBlockElements = 1024;  // with this many elements of each

// x [count, in] quantised, padded to whole groups.
struct Codes {
  int64_t group, groups;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Codes(int64_t count, int64_t in, int64_t elements)
      : group(elements),
        groups((in + elements - 1) / elements),
        codes(count * groups * group),
        scales(count * groups),
        sums(count * groups) {}

  void quantise_row(const float* x, int64_t row, int64_t in) {
    std::vector<float> padded(group);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = row * groups + g, left = std::min(group, in - g * group);
      std::copy_n(x + row * in + g * group, left, padded.begin());
      std::fill(padded.begin() + left, padded.end(), 0.0f);
      scales[at] = quantise_group(padded.data(), group, &codes[at * group]);
      int32_t sum = 0;
      for (int64_t i = 0; i < group; ++i) sum += codes[at * group + i];
      sums[at] = sum;
    }
  }
};

// Memory of a panel, refilled for each block of elements.
struct PanelBuffer {
  std::vector<uint8_t> codes, row;
  std::vector<float> scale;
  std::vector<int32_t> zero;

  PanelBuffer(int64_t elements, int64_t group)
      : codes(kPanelRows * elements),
        row(elements),
        scale(kPanelRows * elements / group),
        zero(kPanelRows * elements / group) {}

  // Groups [first, first + groups) of rows `begin` on, of which `rows` exist.
  Panel fill(const Linear& linear, int64_t begin, int64_t rows, int64_t first, int64_t groups, int64_t group) {
    const int64_t stored = linear.in / linear.group, elements = groups * group, start = first * group;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const bool there = r < rows;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (begin + r) * stored + (stored > 1 ? first + g : 0);
        scale[g * kPanelRows + r] = there ? linear.scale[at] : 0;
        zero[g * kPanelRows + r] = linear.kind == Kind::kInt8 ? 128 : there && linear.zero ? linear.zero[at] : 8;
      }
      const int64_t left = std::min(elements, linear.in - start);
      if (there) unsigned_codes(linear, (begin + r) * linear.in + start, left, elements);
      for (int64_t k = 0; k < elements / 4; ++k) std::memcpy(&codes[(k * kPanelRows + r) * 4], &row[4 * k], 4);
    }
    return {groups, group, codes.data(), scale.data(), zero.data()};
  }

  // `count` codes of the weight from element `from` on to `row`; arbitrary values up to `padded`.
  void unsigned_codes(const Linear& linear, int64_t from, int64_t count, int64_t padded) {
    const uint8_t* const stored = static_cast<const uint8_t*>(linear.weight);
    if (linear.kind == Kind::kInt8) {
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<uint8_t>(stored[from + i] ^ 0x80);
    } else {
      for (int64_t i = 0; i < count / 2; ++i) {
        row[2 * i] = stored[from / 2 + i] & 15;
        row[2 * i + 1] = stored[from / 2 + i] >> 4;
      }
    }
    std::fill(row.begin() + count, row.begin() + padded, uint8_t{0});
  }
};

}  // namespace

void scalar_panel(const Panel& panel, const QuantisedRows& x, int64_t rows, float* y, int64_t y_stride, bool first) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < panel.groups; ++g) {
      int32_t sums[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r)
        sums[r] = -panel.zero[g * kPanelRows + r] * x.sums[m * x.groups_stride + g];
      const uint8_t* codes = panel.codes + g * panel.group * kPanelRows;
      const int8_t* const mine = x.codes + m * x.codes_stride + g * panel.group;
      for (int64_t k = 0; k < panel.group; k += 4, codes += 4 * kPanelRows)
        for (int r = 0; r < kPanelRows; ++r)
          for (int i = 0; i < 4; ++i) sums[r] += codes[4 * r + i] * mine[k + i];
      for (int r = 0; r < kPanelRows; ++r) {
        const float scale = panel.scale[g * kPanelRows + r] * x.scales[m * x.groups_stride + g];
        float& target = y[m * y_stride + r];
        target = (first && g == 0 ? 0.0f : target) + static_cast<float>(sums[r]) * scale;
      }
    }
}

void product(const Linear& linear, int64_t out, const float* x, int64_t count, float* y, int threads,
             PanelKernel kernel) {
  struct None {};
  const int64_t group = linear.group == linear.in || linear.group > 128 ? 128 : linear.group;
  for (int64_t row = 0; row < count; row += kBlockRows, x += kBlockRows * linear.in, y += kBlockRows * out) {
    const int64_t rows = std::min(kBlockRows, count - row);
    Codes codes(rows, linear.in, group);
    parallel_for<None>(static_cast<int>(rows), threads,
                       [&](int i, None&) { codes.quantise_row(x, i, linear.in); });
    const int64_t panels = (out + kPanelRows - 1) / kPanelRows, parts = std::min<int64_t>(threads, panels);
    parallel_for<None>(static_cast<int>(parts), static_cast<int>(parts), [&](int part, None&) {
      PanelBuffer buffer(kBlockElements, group);
      std::vector<float> edge(out % kPanelRows != 0 && part + 1 == parts ? rows * kPanelRows : 0);
      const int64_t groups_a_block = kBlockElements / group;
      for (int64_t first = 0; first < codes.groups; first += groups_a_block) {
        const QuantisedRows block = {codes.codes.data() + first * group, codes.scales.data() + first,
                                     codes.sums.data() + first, codes.groups * group, codes.groups};
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
          const int64_t begin = p * kPanelRows, there = std::min<int64_t>(kPanelRows, out - begin);
          const Panel panel = buffer.fill(linear, begin, there, first, std::min(groups_a_block, codes.groups - first),
                                          group);
          const bool whole = there == kPanelRows;
          kernel(panel, block, rows, whole ? y + begin : edge.data(), whole ? out : kPanelRows, first == 0);
        }
      }
      if (!edge.empty())
        for (int64_t m = 0; m < rows; ++m)
          std::copy_n(&edge[m * kPanelRows], out % kPanelRows, y + m * out + out / kPanelRows * kPanelRows);
    });
    if (linear.bias != nullptr)
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < out; ++r) y[m * out + r] += linear.bias[r];
  }
}

}  // namespace llava_fast::decode
