// The loops of a decoding step for any processor: vectors of four, which the compiler maps to available instructions.
#include "decode/kernels.h"
#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET
typedef float Vec __attribute__((vector_size(16)));
typedef Vec Four;
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
// The first `count` (fewer than kLanes) floats, zeros behind them.
inline Vec load_first(const float* p, int64_t count) {
  return Vec{p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, 0};
}
inline void store_first(float* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
inline Vec widen(const BFloat16* p) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return (Vec)(Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
inline Vec widen(const int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
template <int H>
inline Vec half(const float* p) {
  return Vec{p[H], p[2 + H], p[4 + H], p[6 + H]};
}
template <int H>
inline Vec half(const BFloat16* p) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return (Vec)(Bits{p[H].bits, p[2 + H].bits, p[4 + H].bits, p[6 + H].bits} << 16);
}
// The sum of the lanes of each of four vectors.
inline Four sum_each(Vec a, Vec b, Vec c, Vec d) {
  return Vec{a[0], b[0], c[0], d[0]} + Vec{a[2], b[2], c[2], d[2]} +
         (Vec{a[1], b[1], c[1], d[1]} + Vec{a[3], b[3], c[3], d[3]});
}
bool supported() { return true; }

#include "decode/kernels_body.h"

}  // namespace

const KernelSet& scalar_kernels() {
  static const KernelSet set = make_kernels("scalar", scalar_quantised());
  return set;
}

}  // namespace llava_fast::decode
