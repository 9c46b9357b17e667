// The image functions of llava_fast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace llava_fast {

void bind_image(pybind11::module_& m);

}  // namespace llava_fast
