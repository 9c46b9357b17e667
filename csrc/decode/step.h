// One pass of a Llama-family decoder for one new row of each of several sequences, on the CPU. Weights as described in
// kernels.h, all sums in float32; the cache as in CacheKind.
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
  int64_t window;  // rows that a row attends to, itself included; 0: all
};

// Consecutive cache blocks of one sequence. Its rows of (layer, keys 0 or values 1, key head) are
// rows of row_bytes(cache kind, head_dim) bytes, ((layer * 2 + which) * kv_heads + head) * plane bytes from first on.
struct Run {
  char* first;
  int64_t plane, rows;
};

// The cache of one sequence: `before` rows are cached, and the runs have room for one more.
struct Sequence {
  int64_t before;
  std::vector<Run> runs;
};

struct Decoder {
  std::vector<Layer> layers;
  const float* norm;
  int64_t width, intermediate, heads, kv_heads, head_dim;
  float eps;
  CacheKind cache;
};

// Bytes of weights that a step reads, which determine its time.
int64_t weight_bytes(const Decoder& decoder);

// x [count, width]: the new rows' embeddings in, their final hidden states out. Row i becomes row before of sequence
// i, where its keys and values are written. cos, sin [count, head_dim]; the first half of sin is negated.
// The result does not depend on `threads`, nor a row's on the other rows or on the placement of its blocks.
void step(const Decoder& decoder, const std::vector<Sequence>& sequences, const float* cos, const float* sin, float* x,
          int threads, const KernelSet& kernels);

}  // namespace llava_fast::decode
