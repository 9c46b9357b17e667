#include "image/taps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace llava_fast {
namespace {

// The filters, each in Pillow's order of operations. kSupport: samples on each side that it reaches.

struct Box {
  static constexpr double kSupport = 0.5;
  double operator()(double x) const { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }
};

struct Bilinear {
  static constexpr double kSupport = 1.0;
  double operator()(double x) const {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
  }
};

struct Hamming {
  static constexpr double kSupport = 1.0;
  double operator()(double x) const {
    x = std::fabs(x);
    if (x == 0.0) return 1.0;
    if (x >= 1.0) return 0.0;
    x = x * M_PI;
    return std::sin(x) / x * (0.54f + 0.46f * std::cos(x));  // Pillow's constants are floats
  }
};

struct Bicubic {  // Keys' cubic convolution with a = -0.5
  static constexpr double kSupport = 2.0;
  double operator()(double x) const {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
  }
};

struct Lanczos {  // sinc windowed by a sinc three times as wide
  static constexpr double kSupport = 3.0;
  static double sinc(double x) {
    if (x == 0.0) return 1.0;
    x = x * M_PI;
    return std::sin(x) / x;
  }
  double operator()(double x) const { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }
};

int32_t fixed_point(double weight) {
  const double scaled = weight * (1 << kPrecisionBits);
  return static_cast<int32_t>(weight < 0 ? scaled - 0.5 : scaled + 0.5);
}

template <class Kernel>
Taps convolution_taps(int in_size, int out_size) {
  const Kernel kernel;
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = scale < 1.0 ? 1.0 : scale;  // shrinking widens the kernel (antialiasing)
  const double inverse = 1.0 / filter_scale;
  const double support = Kernel::kSupport * filter_scale;

  Taps taps;
  taps.in_size = in_size;
  taps.out_size = out_size;
  taps.width = static_cast<int>(std::ceil(support)) * 2 + 1;
  if (out_size > std::numeric_limits<int>::max() / taps.width / static_cast<int>(sizeof(double)))
    throw std::length_error("resize: the filter table is too large");
  taps.first.resize(out_size);
  taps.count.resize(out_size);
  taps.weights.assign(static_cast<size_t>(out_size) * taps.width, 0);

  std::vector<double> raw(taps.width);
  for (int i = 0; i < out_size; ++i) {
    const double center = (i + 0.5) * scale;
    int first = static_cast<int>(center - support + 0.5);
    if (first < 0) first = 0;
    int last = static_cast<int>(center + support + 0.5);
    if (last > in_size) last = in_size;
    const int count = last - first;
    double sum = 0.0;
    for (int k = 0; k < count; ++k) {
      raw[k] = kernel((k + first - center + 0.5) * inverse);
      sum += raw[k];
    }
    int32_t* weights = &taps.weights[static_cast<size_t>(i) * taps.width];
    for (int k = 0; k < count; ++k) weights[k] = fixed_point(sum != 0.0 ? raw[k] / sum : raw[k]);
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

// One sample per output. Pillow accumulates the step from output to output, so rounding errors accumulate and decide
// ties; the same is done here. Below 2^24 samples they never pass the last sample, so the clamp has no effect.
Taps nearest_taps(int in_size, int out_size) {
  Taps taps = identity_taps(out_size);
  taps.in_size = in_size;
  const double step = static_cast<double>(in_size) / out_size;
  double position = step * 0.5;
  for (int& first : taps.first) {
    first = std::min(static_cast<int>(position), in_size - 1);
    position += step;
  }
  return taps;
}

}  // namespace

Taps identity_taps(int size) {
  Taps taps;
  taps.in_size = taps.out_size = size;
  taps.width = 1;
  for (int i = 0; i < size; ++i) taps.first.push_back(i);
  taps.count.assign(size, 1);
  taps.weights.assign(size, 1 << kPrecisionBits);
  return taps;
}

Taps filter_taps(Filter filter, int in_size, int out_size) {
  switch (filter) {
    case Filter::kNearest:
      return nearest_taps(in_size, out_size);
    case Filter::kLanczos:
      return convolution_taps<Lanczos>(in_size, out_size);
    case Filter::kBilinear:
      return convolution_taps<Bilinear>(in_size, out_size);
    case Filter::kBicubic:
      return convolution_taps<Bicubic>(in_size, out_size);
    case Filter::kBox:
      return convolution_taps<Box>(in_size, out_size);
    case Filter::kHamming:
      return convolution_taps<Hamming>(in_size, out_size);
  }
  throw std::invalid_argument("resize: unknown filter");
}

}  // namespace llava_fast
