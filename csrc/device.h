// LLAVA_FAST_DEVICE: a small function for the host and, where nvcc compiles it, the device.
#pragma once

#ifdef __CUDACC__
#define LLAVA_FAST_DEVICE __host__ __device__ __forceinline__
#else
#define LLAVA_FAST_DEVICE inline
#endif
