// One pass of a Llama-family decoder for one new row in each of the first cache slots, float32, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/kernels.h"

namespace llava_fast::decode {

struct Layer {
  const float* input_norm;
  Linear q, k, v, o;
  const float* post_norm;
  Linear gate, up, down;
  float *keys, *values;  // [slots, kv_heads, capacity, head_dim]
  int64_t window;        // rows that a row looks back on, itself included; 0: all
};

struct Decoder {
  std::vector<Layer> layers;
  const float* norm;
  int64_t width, intermediate, heads, kv_heads, head_dim, capacity;
  float eps;
};

// Bytes of weights that a step reads: what its time is made of.
int64_t weight_bytes(const Decoder& decoder);

// x [count, width]: the new rows' embeddings in, their final hidden states out. Row i is at index before[i] of
// slot i, where its keys and values are written. cos, sin [count, head_dim], sin with the sign of its first half
// folded in. The result does not depend on `threads`, nor a row's on the other rows.
void step(const Decoder& decoder, const std::vector<int64_t>& before, const float* cos, const float* sin, float* x,
          int threads, const KernelSet& kernels);

}  // namespace llava_fast::decode
