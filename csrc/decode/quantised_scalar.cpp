// Products with int8 and int4 weights for any processor: loops over 16 lanes that the compiler vectorises.
#include <cmath>

#include "decode/quantised.h"

namespace llava_fast::decode {
namespace {

#define TARGET
constexpr int kTileVectors = 2, kTileRows = 1;
struct Sixteen {
  float lanes[16];
};
struct Bytes {
  int8_t codes[64];
};

inline Sixteen load16(const void* p) {
  Sixteen out;
  __builtin_memcpy(out.lanes, p, sizeof(out.lanes));
  return out;
}
inline Sixteen splat16(float x) {
  Sixteen out;
  for (float& lane : out.lanes) lane = x;
  return out;
}
inline Sixteen multiply(const Sixteen& a, const Sixteen& b) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = a.lanes[i] * b.lanes[i];
  return out;
}
inline Sixteen multiply_add(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = std::fma(a.lanes[i], b.lanes[i], c.lanes[i]);
  return out;
}
struct Four {
  float lanes[4];
};
inline Four load4(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Four load2(const float* p) { return {{p[0], p[0], p[1], p[1]}}; }
inline Four load1(const float* p) { return {{*p, *p, *p, *p}}; }
inline Four multiply(const Four& a, const Four& b) {
  Four out;
  for (int i = 0; i < 4; ++i) out.lanes[i] = a.lanes[i] * b.lanes[i];
  return out;
}
inline Sixteen spread2(const Four& v) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = v.lanes[i / 8 * 2];
  return out;
}
inline Sixteen spread4(const Four& v) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = v.lanes[i / 4];
  return out;
}
inline Sixteen less_zeros(const uint8_t* p) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = 8 - static_cast<float>(p[i]);
  return out;
}

inline Bytes int8_codes(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.codes[i] = static_cast<int8_t>(p[i]);
  return out;
}
struct Nibbles {
  Bytes low, high;
};
inline Nibbles nibbles(const uint8_t* p) {
  Nibbles out;
  for (int i = 0; i < 64; ++i) {
    out.low.codes[i] = static_cast<int8_t>(p[i] & 15);
    out.high.codes[i] = static_cast<int8_t>(p[i] >> 4);
  }
  return out;
}
struct Int8Unit {
  const int8_t* codes;
  Int8Unit(const int8_t* p, const int32_t*, bool) : codes(p) {}
};
struct Int4Unit {
  const int8_t *even, *odd;
  const int32_t* offsets;
  Int4Unit(const int8_t* p, const int32_t* stored, bool) : even(p), odd(p + 64), offsets(stored) {}
};
inline int32_t dot4(const int8_t* a, const int8_t* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}
inline Sixteen dot(const Bytes& w, const Int8Unit& x) {
  Sixteen out;
  for (int i = 0; i < 64; i += 4) out.lanes[i / 4] = static_cast<float>(dot4(w.codes + i, x.codes + i));
  return out;
}
inline Sixteen dot(const Bytes& low, const Bytes& high, const Int4Unit& x) {
  Sixteen out;
  for (int i = 0; i < 64; i += 4)
    out.lanes[i / 4] =
        static_cast<float>(dot4(low.codes + i, x.even + i) + dot4(high.codes + i, x.odd + i) + x.offsets[i / 4]);
  return out;
}
inline float total(const Sixteen& v) {
  float eight[8];
  for (int i = 0; i < 8; ++i) eight[i] = v.lanes[i] + v.lanes[i + 8];
  return ((eight[0] + eight[2]) + (eight[1] + eight[3])) + ((eight[4] + eight[6]) + (eight[5] + eight[7]));
}
inline void sum_each16(const Sixteen& a, const Sixteen& b, const Sixteen& c, const Sixteen& d, float* totals) {
  totals[0] = total(a);
  totals[1] = total(b);
  totals[2] = total(c);
  totals[3] = total(d);
}
bool supported() { return true; }

#include "decode/quantised_body.h"

}  // namespace

const QuantisedKernels& scalar_quantised() {
  static const QuantisedKernels kernels = {supported, int8_linear, int4_linear, scalar_panel()};
  return kernels;
}

}  // namespace llava_fast::decode
