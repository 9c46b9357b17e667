// token_pack on CUDA: one block per row, 16-byte words if rows are aligned; sums with one thread per column, in order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "pack/pack.h"

namespace llava_fast::pack {
namespace {

constexpr int kThreads = 256;

template <class Word>
__global__ void __launch_bounds__(kThreads) pack_kernel(Tables<Word> tables, Word* out) {
  const int64_t at = blockIdx.x;
  for (int64_t word = threadIdx.x; word < tables.words; word += kThreads)
    out[at * tables.words + word] = packed_word(tables, at, word);
}

template <class Word>
__global__ void __launch_bounds__(kThreads)
    take_kernel(const Word* rows, const int32_t* place, int64_t words, Word* out) {
  const int64_t at = blockIdx.x;
  for (int64_t word = threadIdx.x; word < words; word += kThreads)
    out[at * words + word] = taken_word(rows, place, words, at, word);
}

// out[target] [part]: one part of one segment; with parts > 1 the out type is float.
template <class Value, class Out>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Value* rows, Segments segments, const int32_t* target, int64_t width, int64_t parts, Out* out) {
  const int64_t segment = blockIdx.x, part = blockIdx.z;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= width) return;
  const float total = summed_column<Value, float>(rows, segments, width, segment, part, parts, column);
  const int64_t to = (target ? target[segment] : segment) * parts + part;
  out[to * width + column] = static_cast<Out>(total);
}

template <class Out>
__global__ void __launch_bounds__(kThreads) parts_kernel(const float* scratch, int64_t width, Out* out) {
  const int64_t at = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= width) return;
  float total = 0;
  for (int64_t part = 0; part < kConstantParts; ++part) total += scratch[(at * kConstantParts + part) * width + column];
  out[at * width + column] = static_cast<Out>(total);
}

unsigned blocks(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " on CUDA: " + cudaGetErrorString(error));
}

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Word>
void launch_pack(const PackArguments& a, cudaStream_t stream) {
  const auto as = [](const uint8_t* bytes) { return reinterpret_cast<const Word*>(bytes); };
  const Tables<Word> tables = {a.tables.source,     a.tables.row,          as(a.tables.embedding),
                               as(a.tables.visual), as(a.tables.constant), a.tables.words / int64_t{sizeof(Word)}};
  LLAVA_FAST_LAUNCH(pack_kernel<Word>, static_cast<unsigned>(a.rows), kThreads, stream, tables,
                    reinterpret_cast<Word*>(a.out));
}

template <class Word>
void launch_take(const TakeArguments& a, cudaStream_t stream) {
  LLAVA_FAST_LAUNCH(take_kernel<Word>, static_cast<unsigned>(a.count), kThreads, stream,
                    reinterpret_cast<const Word*>(a.rows), a.place, a.row_bytes / int64_t{sizeof(Word)},
                    reinterpret_cast<Word*>(a.out));
}

template <class Value>
void launch_sum(const SumArguments& a, float* scratch, cudaStream_t stream) {
  const auto* rows = static_cast<const Value*>(a.rows);
  auto* out = static_cast<Value*>(a.out);
  const unsigned count = static_cast<unsigned>(a.count);
  if (!scratch) {
    LLAVA_FAST_LAUNCH(sum_kernel, dim3(count, blocks(a.width)), kThreads, stream, rows, a.segments, a.target, a.width,
                      1, out);
    return;
  }
  LLAVA_FAST_LAUNCH(sum_kernel, dim3(count, blocks(a.width), kConstantParts), kThreads, stream, rows, a.segments,
                    static_cast<const int32_t*>(nullptr), a.width, kConstantParts, scratch);
  LLAVA_FAST_LAUNCH(parts_kernel, dim3(count, blocks(a.width)), kThreads, stream, scratch, a.width, out);
}

}  // namespace

void pack_rows_cuda(const PackArguments& a, void* stream) {
  if (a.rows == 0 || a.tables.words == 0) return;
  const bool wide = a.tables.words % 16 == 0 && aligned16(a.out) && aligned16(a.tables.embedding) &&
                    aligned16(a.tables.visual) && aligned16(a.tables.constant);
  const auto on = static_cast<cudaStream_t>(stream);
  wide ? launch_pack<uint4>(a, on) : launch_pack<uint8_t>(a, on);
  check_launch("token_pack");
}

void take_rows_cuda(const TakeArguments& a, void* stream) {
  if (a.count == 0 || a.row_bytes == 0) return;
  const bool wide = a.row_bytes % 16 == 0 && aligned16(a.out) && aligned16(a.rows);
  const auto on = static_cast<cudaStream_t>(stream);
  wide ? launch_take<uint4>(a, on) : launch_take<uint8_t>(a, on);
  check_launch("token_pack's visual gradient");
}

void sum_segments_cuda(const SumArguments& a, float* scratch, void* stream) {
  if (a.count == 0 || a.width == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.type) {
    case Type::kFloat32:
      launch_sum<float>(a, scratch, on);
      break;
    case Type::kFloat16:
      launch_sum<__half>(a, scratch, on);
      break;
    case Type::kBfloat16:
      launch_sum<__nv_bfloat16>(a, scratch, on);
      break;
    default:
      throw std::invalid_argument("sum_segments on CUDA takes float32, float16 and bfloat16");
  }
  check_launch("token_pack's table gradient");
}

}  // namespace llava_fast::pack
