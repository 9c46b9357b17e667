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
    for (Codes* codes : {&int8_, &int4_})
      if (std::find(kinds.begin(), kinds.end(), codes->kind) != kinds.end()) {
        const int64_t room = count * units_of(codes->kind, width) * unit_elements(codes->kind);
        codes->lines.resize(room / 64);
        codes->scales.resize(room / kGroup);
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
    return {x_, nullptr, width_, count_};
  }

 private:
  struct alignas(64) Line {
    int8_t codes[64];
  };
  struct Codes {
    Kind kind;
    bool made = false;
    std::vector<Line> lines = {};
    std::vector<float> scales = {};
  };

  Vectors made(Codes& codes) {
    const int64_t stride = units_of(codes.kind, width_) * unit_elements(codes.kind);
    int8_t* const first = codes.lines.data()->codes;
    if (!codes.made)
      for (int64_t j = 0; j < count_; ++j)
        quantise(codes.kind, x_ + j * width_, width_, first + j * stride, &codes.scales[j * (stride / kGroup)]);
    codes.made = true;
    return {first, codes.scales.data(), stride, count_};
  }

  int64_t count_;
  const float* x_ = nullptr;
  int64_t width_ = 0;
  Codes int8_{Kind::kInt8}, int4_{Kind::kInt4};
};

}  // namespace llava_fast::decode
