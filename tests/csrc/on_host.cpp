// csrc's CUDA kernels with loops in place of launches, behind a C interface for ctypes. Each function returns 0, or 1
// for an error.
#include <cuda_runtime.h>

#include <exception>

#include "image/tiles.cu"
#include "pack/pack.cu"

namespace {

template <class Run>
int caught(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

using namespace llava_fast;

extern "C" {

void set_backwards(int backwards) { runs_backwards = backwards; }
int64_t count_launches() { return launches; }

int pack_rows(uintptr_t source, uintptr_t row, uintptr_t embedding, uintptr_t visual, uintptr_t constant, uintptr_t out,
              int64_t rows, int64_t row_bytes) {
  const pack::Tables<uint8_t> tables = {at<const int32_t>(source),    at<const int32_t>(row),
                                        at<const uint8_t>(embedding), at<const uint8_t>(visual),
                                        at<const uint8_t>(constant),  row_bytes};
  return caught([&] { pack::pack_rows_cuda({tables, at<uint8_t>(out), rows}, nullptr); });
}

int take_rows(uintptr_t rows, uintptr_t place, uintptr_t out, int64_t count, int64_t row_bytes) {
  const pack::TakeArguments arguments = {at<const uint8_t>(rows), at<const int32_t>(place), at<uint8_t>(out), count,
                                         row_bytes};
  return caught([&] { pack::take_rows_cuda(arguments, nullptr); });
}

int sum_segments(uintptr_t rows, uintptr_t order, uintptr_t first, uintptr_t target, uintptr_t out, int64_t count,
                 int64_t width, int type, uintptr_t scratch) {
  const pack::SumArguments arguments = {at<const void>(rows),
                                        {at<const int32_t>(order), at<const int32_t>(first)},
                                        at<const int32_t>(target),
                                        at<void>(out),
                                        count,
                                        width,
                                        static_cast<pack::Type>(type)};
  return caught([&] { pack::sum_segments_cuda(arguments, at<float>(scratch), nullptr); });
}

int make_tiles(uintptr_t jobs, int job_count, uintptr_t words, int tile, int patch_rows, int patch,
               int64_t first_pixels, int64_t canvas_pixels, uintptr_t pixels, uintptr_t scratch, uintptr_t tiles) {
  const TileLayout layout = {tile, patch_rows != 0, patch};
  return caught([&] {
    make_tiles_cuda(at<const TileJob>(jobs), job_count, at<const int32_t>(words), layout, first_pixels, canvas_pixels,
                    at<const uint8_t>(pixels), at<uint8_t>(scratch), at<uint8_t>(tiles), nullptr);
  });
}
}
