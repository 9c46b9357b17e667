// token_pack's part of llava_fast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace llava_fast::pack {

void bind(pybind11::module_& m);

}  // namespace llava_fast::pack
