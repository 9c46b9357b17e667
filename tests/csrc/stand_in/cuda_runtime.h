// Of CUDA's runtime what csrc's .cu files use, on the host: a launch is loops over blocks and threads, one after another
// (kernels without shared memory and barriers), in either order. Launches that a device would refuse are errors here.
#pragma once

#include <cstdint>

#define __global__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t last_error = cudaSuccess;
inline bool runs_backwards = false;
inline int64_t launches = 0;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 9, cudaSuccess; }

template <class Run>
void run_on_host(dim3 grid, unsigned threads, const Run& run) {
  const bool fits = grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535 && threads >= 1 && threads <= 1024;
  if (!fits) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++launches;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z * threads;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t at = runs_backwards ? count - 1 - i : i;
    threadIdx = dim3(static_cast<unsigned>(at % threads), 0, 0);
    at /= threads;
    blockIdx = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                    static_cast<unsigned>(at / grid.x / grid.y));
    run();
  }
}

#define LLAVA_FAST_LAUNCH(kernel, grid, threads, stream, ...) \
  (static_cast<void>(stream), run_on_host(grid, threads, [&] { kernel(__VA_ARGS__); }))
