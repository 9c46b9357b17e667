// Products with int8 and int4 weights for any processor: loops over 16 lanes that the compiler vectorises.
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

inline Sixteen splat16(float x) {
  Sixteen out;
  for (float& lane : out.lanes) lane = x;
  return out;
}
inline Sixteen add(const Sixteen& a, const Sixteen& b) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = a.lanes[i] + b.lanes[i];
  return out;
}
inline Sixteen multiply(const Sixteen& a, const Sixteen& b) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = a.lanes[i] * b.lanes[i];
  return out;
}
inline Sixteen subtract(const Sixteen& a, const Sixteen& b) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = a.lanes[i] - b.lanes[i];
  return out;
}
inline Sixteen spread4(const float* p) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = p[i / 4];
  return out;
}
inline Sixteen spread2(const float* p) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = p[i / 8];
  return out;
}
inline Sixteen spread_zeros4(const uint8_t* p) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = static_cast<float>(p[i / 4]) - 8;
  return out;
}
inline Sixteen spread_zeros2(const uint8_t* p) {
  Sixteen out;
  for (int i = 0; i < 16; ++i) out.lanes[i] = static_cast<float>(p[i / 8]) - 8;
  return out;
}

inline Bytes int8_codes(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.codes[i] = static_cast<int8_t>(p[i]);
  return out;
}
inline Bytes low_nibbles(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.codes[i] = static_cast<int8_t>(p[i] & 15);
  return out;
}
inline Bytes high_nibbles(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.codes[i] = static_cast<int8_t>(p[i] >> 4);
  return out;
}
struct Int8Unit {
  const int8_t* codes;
  explicit Int8Unit(const int8_t* p) : codes(p) {}
};
struct Int4Unit {
  const int8_t *even, *odd;
  explicit Int4Unit(const int8_t* p) : even(p), odd(p + 64) {}
};
inline int32_t dot4(const int8_t* a, const int8_t* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}
inline int32_t sum4(const int8_t* a) { return a[0] + a[1] + a[2] + a[3]; }
inline Sixteen dot(const Bytes& w, const Int8Unit& x) {
  Sixteen out;
  for (int i = 0; i < 64; i += 4) out.lanes[i / 4] = static_cast<float>(dot4(w.codes + i, x.codes + i));
  return out;
}
inline Sixteen dot(const Bytes& low, const Bytes& high, const Int4Unit& x) {
  Sixteen out;
  for (int i = 0; i < 64; i += 4)
    out.lanes[i / 4] = static_cast<float>(dot4(low.codes + i, x.even + i) + dot4(high.codes + i, x.odd + i) -
                                          8 * (sum4(x.even + i) + sum4(x.odd + i)));
  return out;
}
inline Sixteen sums(const Int4Unit& x) {
  Sixteen out;
  for (int i = 0; i < 64; i += 4) out.lanes[i / 4] = static_cast<float>(sum4(x.even + i) + sum4(x.odd + i));
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
