// llava_fast._C.{pack_rows, take_rows, sum_segments}: addresses and sizes in, checked by llava_fast.ops.token_pack.
#include "pack/bindings.h"

#include <stdexcept>
#include <string>

#include "pack/pack.h"

namespace py = pybind11;

namespace llava_fast::pack {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Type type_of(const std::string& name) {
  if (name == "float32") return Type::kFloat32;
  if (name == "float64") return Type::kFloat64;
  if (name == "float16") return Type::kFloat16;
  if (name == "bfloat16") return Type::kBfloat16;
  throw std::invalid_argument("unknown type " + name);
}

PackArguments pack_arguments(uintptr_t source, uintptr_t row, uintptr_t embedding, uintptr_t visual, uintptr_t constant,
                             uintptr_t out, int64_t rows, int64_t row_bytes) {
  return {{at<const int32_t>(source), at<const int32_t>(row), at<const uint8_t>(embedding), at<const uint8_t>(visual),
           at<const uint8_t>(constant), row_bytes},
          at<uint8_t>(out),
          rows};
}

TakeArguments take_arguments(uintptr_t rows, uintptr_t place, uintptr_t out, int64_t count, int64_t row_bytes) {
  return {at<const uint8_t>(rows), at<const int32_t>(place), at<uint8_t>(out), count, row_bytes};
}

SumArguments sum_arguments(uintptr_t rows, uintptr_t order, uintptr_t first, uintptr_t target, uintptr_t out,
                           int64_t count, int64_t width, const std::string& type) {
  return {at<const void>(rows),
          {at<const int32_t>(order), at<const int32_t>(first)},
          at<const int32_t>(target),
          at<void>(out),
          count,
          width,
          type_of(type)};
}

}  // namespace

void bind(py::module_& m) {
  const char* doc = "Addresses and sizes in; see llava_fast.ops.token_pack, which checks what it passes.";
  m.def(
      "pack_rows",
      [](uintptr_t source, uintptr_t row, uintptr_t embedding, uintptr_t visual, uintptr_t constant, uintptr_t out,
         int64_t rows, int64_t row_bytes, int threads) {
        const py::gil_scoped_release release;
        pack_rows(pack_arguments(source, row, embedding, visual, constant, out, rows, row_bytes), threads);
      },
      doc);
  m.def(
      "take_rows",
      [](uintptr_t rows, uintptr_t place, uintptr_t out, int64_t count, int64_t row_bytes, int threads) {
        const py::gil_scoped_release release;
        take_rows(take_arguments(rows, place, out, count, row_bytes), threads);
      },
      doc);
  m.def(
      "sum_segments",
      [](uintptr_t rows, uintptr_t order, uintptr_t first, uintptr_t target, uintptr_t out, int64_t count,
         int64_t width, const std::string& type, int threads) {
        const SumArguments arguments = sum_arguments(rows, order, first, target, out, count, width, type);
        const py::gil_scoped_release release;
        sum_segments(arguments, threads);
      },
      doc);
#ifdef LLAVA_FAST_BUILT_WITH_CUDA
  m.def(
      "pack_rows_cuda",
      [](uintptr_t source, uintptr_t row, uintptr_t embedding, uintptr_t visual, uintptr_t constant, uintptr_t out,
         int64_t rows, int64_t row_bytes, uintptr_t stream) {
        const py::gil_scoped_release release;
        pack_rows_cuda(pack_arguments(source, row, embedding, visual, constant, out, rows, row_bytes),
                       at<void>(stream));
      },
      doc);
  m.def(
      "take_rows_cuda",
      [](uintptr_t rows, uintptr_t place, uintptr_t out, int64_t count, int64_t row_bytes, uintptr_t stream) {
        const py::gil_scoped_release release;
        take_rows_cuda(take_arguments(rows, place, out, count, row_bytes), at<void>(stream));
      },
      doc);
  m.def(
      "sum_segments_cuda",
      [](uintptr_t rows, uintptr_t order, uintptr_t first, uintptr_t target, uintptr_t out, int64_t count,
         int64_t width, const std::string& type, uintptr_t scratch, uintptr_t stream) {
        const SumArguments arguments = sum_arguments(rows, order, first, target, out, count, width, type);
        const py::gil_scoped_release release;
        sum_segments_cuda(arguments, at<float>(scratch), at<void>(stream));
      },
      doc);
  m.attr("PACK_CONSTANT_PARTS") = kConstantParts;
#endif
}

}  // namespace llava_fast::pack
