// LLAVA_FAST_LAUNCH(kernel, grid, threads, stream, arguments...): a launch of one-dimensional blocks. Tests define it as
// loops over blocks and threads (tests/csrc/stand_in).
#pragma once

#ifndef LLAVA_FAST_LAUNCH
#define LLAVA_FAST_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif
