// The tile kernels on a CUDA device, compiled if nvcc is available. Developed on a machine without a GPU.
#pragma once

#include <cstdint>

#include "image/tile_plan.h"

namespace llava_fast {

// Whether a device of capability 8.0 or later can be used here; false, not an error, without a driver.
bool cuda_device_usable();

// Everything but `stream` is device memory: the plan's jobs and words, the batch's pixels, plan.middle_bytes of
// scratch, the tiles. Two launches on `stream`, no synchronisation. Throws std::runtime_error if a launch fails.
void make_tiles_cuda(const TileJob* jobs, int job_count, const int32_t* words, const TileLayout& layout,
                     int64_t first_pixels, int64_t canvas_pixels, const uint8_t* pixels, uint8_t* scratch,
                     uint8_t* tiles, void* stream);

}  // namespace llava_fast
