// The input vectors of linear layers, converted on demand to the format that each kind of weight needs.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "decode/kernels.h"

namespace llava_fast::decode {

class Inputs {
 public:
  // Allocates for `count` vectors of up to `width` elements in the formats of these kinds of weights.
  Inputs(int64_t count, int64_t width, const std::vector<Kind>& kinds) : count_(count) {
    for (Quantised* each : {&int8_, &int4_})
      if (std::find(kinds.begin(), kinds.end(), each->kind) != kinds.end()) {
        const int64_t units = units_of(each->kind, width);
        each->codes.resize(count * units * unit_elements(each->kind) / sizeof(Line));
        each->offsets.resize(count * units);
        each->scales.resize(count * units * unit_scales(each->kind));
        if (each->kind == Kind::kInt4) each->totals.resize(count * totals_of(units));
      }
  }

  // Vectors [count, width], which must not change until the next call.
  void set(const float* x, int64_t width) {
    x_ = x;
    width_ = width;
    int8_.made = int4_.made = false;
  }

  Vectors of(Kind kind) {
    if (kind == Kind::kInt8) return made(int8_);
    if (kind == Kind::kInt4) return made(int4_);
    return {x_, width_, count_};
  }

 private:
  struct alignas(64) Line {
    int8_t codes[64];
  };
  struct alignas(64) Offsets {
    int32_t lanes[16];
  };
  struct Quantised {
    Kind kind;
    bool made = false;
    std::vector<Line> codes = {};
    std::vector<Offsets> offsets = {};
    std::vector<float> scales = {}, totals = {};
  };

  Vectors made(Quantised& to) {
    const int64_t units = units_of(to.kind, width_), stride = units * unit_elements(to.kind);
    const int64_t offsets_stride = 16 * units, scales_stride = units * unit_scales(to.kind);
    const int64_t totals_stride = totals_of(units);
    int8_t* const codes = to.codes.data()->codes;
    int32_t* const offsets = to.offsets.data()->lanes;
    float *const scales = to.scales.data(), *const totals = to.totals.data();
    if (!to.made)
      for (int64_t j = 0; j < count_; ++j)
        quantise(to.kind, x_ + j * width_, width_, codes + j * stride, offsets + j * offsets_stride,
                 scales + j * scales_stride, to.kind == Kind::kInt4 ? totals + j * totals_stride : nullptr);
    to.made = true;
    return {codes, stride, count_, offsets, scales, totals, offsets_stride, scales_stride, totals_stride};
  }

  int64_t count_;
  const float* x_ = nullptr;
  int64_t width_ = 0;
  Quantised int8_{Kind::kInt8}, int4_{Kind::kInt4};
};

}  // namespace llava_fast::decode
