// The tiles of a batch of images on a GPU: a thread per pixel, a launch per pass, a row of blocks per view.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "image/tile_pixels.h"
#include "image/tiles_cuda.h"
#include "launch.h"

namespace llava_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxJobs = 65535;  // blocks along y

__global__ void __launch_bounds__(kThreads)
    middle_kernel(const TileJob* jobs, const int32_t* words, const uint8_t* pixels, uint8_t* scratch) {
  const TileJob& job = jobs[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < static_cast<int64_t>(job.middle_height) * job.middle_width) middle_pixel(job, words, i, pixels, scratch);
}

__global__ void __launch_bounds__(kThreads)
    tile_kernel(const TileJob* jobs, TileLayout layout, const int32_t* words, const uint8_t* scratch, uint8_t* tiles) {
  const TileJob& job = jobs[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < static_cast<int64_t>(job.canvas_height) * job.canvas_width) tile_pixel(job, layout, words, i, scratch, tiles);
}

unsigned blocks(int64_t pixels) { return static_cast<unsigned>((pixels + kThreads - 1) / kThreads); }

}  // namespace

bool cuda_device_usable() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

void make_tiles_cuda(const TileJob* jobs, int job_count, const int32_t* words, const TileLayout& layout,
                     int64_t first_pixels, int64_t canvas_pixels, const uint8_t* pixels, uint8_t* scratch,
                     uint8_t* tiles, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  for (int begin = 0; begin < job_count; begin += kMaxJobs) {
    const unsigned count = std::min(job_count - begin, kMaxJobs);
    LLAVA_FAST_LAUNCH(middle_kernel, dim3(blocks(first_pixels), count), kThreads, on, jobs + begin, words, pixels,
                      scratch);
    LLAVA_FAST_LAUNCH(tile_kernel, dim3(blocks(canvas_pixels), count), kThreads, on, jobs + begin, layout, words,
                      scratch, tiles);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("make_tiles on CUDA: ") + cudaGetErrorString(error));
}

}  // namespace llava_fast
