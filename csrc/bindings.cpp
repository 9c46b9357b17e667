// The Python module llava_fast._C: each folder binds its own functions.
#include <pybind11/pybind11.h>

#include "decode/bindings.h"
#include "image/bindings.h"
#include "image/tiles_cuda.h"
#include "pack/bindings.h"

namespace {

bool built_with_cuda() {
#ifdef LLAVA_FAST_BUILT_WITH_CUDA
  return true;
#else
  return false;
#endif
}

bool has_cuda() {
#ifdef LLAVA_FAST_BUILT_WITH_CUDA
  return llava_fast::cuda_device_usable();
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of llava_fast. Call it through llava_fast.";
  m.def("built_with_cuda", &built_with_cuda, "Whether this module was compiled with CUDA code.");
  m.def("has_cuda", &has_cuda, "Whether CUDA code was compiled in and a usable device is here.");
  llava_fast::bind_image(m);
  llava_fast::decode::bind(m);
  llava_fast::pack::bind(m);
}
