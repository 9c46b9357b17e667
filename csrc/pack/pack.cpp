// token_pack on the CPU: rows are copied and summed a block of rows at a time, on plain threads.
#include "pack/pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "parallel.h"

namespace llava_fast::pack {
namespace {

constexpr int64_t kBytesPerTask = 1 << 20;  // a thread is worth starting for less than this

struct Nothing {};

// body(first, last) over [0, count), in tasks of about kBytesPerTask.
template <class Body>
void for_rows(int64_t count, int64_t row_bytes, int threads, const Body& body) {
  const int64_t rows = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(row_bytes, 1));
  const int tasks = static_cast<int>((count + rows - 1) / rows);
  parallel_for<Nothing>(tasks, threads,
                        [&](int task, Nothing&) { body(task * rows, std::min(count, (task + 1) * rows)); });
}

template <class Value>
void sum(const SumArguments& a, int threads) {
  const auto* rows = static_cast<const Value*>(a.rows);
  auto* out = static_cast<Value*>(a.out);
  for_rows(a.count, a.width * sizeof(Value), threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      Value* to = out + (a.target ? a.target[s] : s) * a.width;
      std::fill(to, to + a.width, Value{0});
      for (int32_t use = a.segments.first[s]; use < a.segments.first[s + 1]; ++use) {
        const Value* from = rows + a.segments.order[use] * a.width;
        for (int64_t c = 0; c < a.width; ++c) to[c] += from[c];
      }
    }
  });
}

}  // namespace

void pack_rows(const PackArguments& a, int threads) {
  const size_t bytes = static_cast<size_t>(a.tables.words);
  for_rows(a.rows, a.tables.words, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int32_t source = a.tables.source[at];
      uint8_t* to = a.out + at * a.tables.words;
      if (source < 0 || source > 2) {
        std::memset(to, 0, bytes);
        continue;
      }
      const uint8_t* table = source == 0 ? a.tables.embedding : source == 1 ? a.tables.visual : a.tables.constant;
      std::memcpy(to, table + a.tables.row[at] * a.tables.words, bytes);
    }
  });
}

void take_rows(const TakeArguments& a, int threads) {
  const size_t bytes = static_cast<size_t>(a.row_bytes);
  for_rows(a.count, a.row_bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      uint8_t* to = a.out + at * a.row_bytes;
      if (a.place[at] < 0)
        std::memset(to, 0, bytes);
      else
        std::memcpy(to, a.rows + a.place[at] * a.row_bytes, bytes);
    }
  });
}

void sum_segments(const SumArguments& arguments, int threads) {
  if (arguments.type == Type::kFloat32)
    sum<float>(arguments, threads);
  else if (arguments.type == Type::kFloat64)
    sum<double>(arguments, threads);
  else
    throw std::invalid_argument("sum_segments on the CPU takes float32 and float64");
}

}  // namespace llava_fast::pack
