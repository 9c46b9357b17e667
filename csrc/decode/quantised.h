// Products with int8 and int4 weights, one set per instruction set. All give the same bits.
#pragma once

#include "decode/kernels.h"
#include "decode/product.h"

namespace llava_fast::decode {

struct QuantisedKernels {
  bool (*supported)();
  LinearKernel int8, int4;
  PanelKernels panel;
};

const QuantisedKernels& scalar_quantised();
#if defined(__x86_64__)
const QuantisedKernels& avx2_quantised();
const QuantisedKernels& avxvnni_quantised();
const QuantisedKernels& avx512vnni_quantised();

inline const QuantisedKernels& best_256_quantised() {
  return avxvnni_quantised().supported() ? avxvnni_quantised() : avx2_quantised();
}
#endif

}  // namespace llava_fast::decode
