// token_pack on the CPU and on CUDA. Pointers are host memory in the first, device memory in the second.
#pragma once

#include <cstdint>

#include "pack/rows.h"

namespace llava_fast::pack {

enum class Type { kFloat32, kFloat64, kFloat16, kBfloat16 };  // CPU sums: the first two; CUDA sums: all but float64

// Number of partial sums of a constant row's gradient, which are then added in order.
constexpr int64_t kConstantParts = 64;

struct PackArguments {
  Tables<uint8_t> tables;  // words are bytes
  uint8_t* out;            // [rows, tables.words]
  int64_t rows;
};

struct TakeArguments {
  const uint8_t* rows;
  const int32_t* place;  // [count]
  uint8_t* out;          // [count, row_bytes]
  int64_t count, row_bytes;
};

// out[target[s]] = the sum of segment s, in the type of the rows. `target` null: out[s].
struct SumArguments {
  const void* rows;
  Segments segments;
  const int32_t* target;
  void* out;
  int64_t count, width;
  Type type;
};

void pack_rows(const PackArguments& arguments, int threads);
void take_rows(const TakeArguments& arguments, int threads);
void sum_segments(const SumArguments& arguments, int threads);

// On a stream of the current device, without synchronisation; throw std::runtime_error if a launch fails. `scratch`
// (null, or float [count, kConstantParts, width]): sum in parts, for few long segments.
void pack_rows_cuda(const PackArguments& arguments, void* stream);
void take_rows_cuda(const TakeArguments& arguments, void* stream);
void sum_segments_cuda(const SumArguments& arguments, float* scratch, void* stream);

}  // namespace llava_fast::pack
