#include "image/taps.h"

#include <cmath>
#include <limits>
#include <stdexcept>

namespace llava_fast {
namespace {

constexpr double kSupport = 2.0;  // samples on each side that the bicubic kernel reaches

// Keys' cubic convolution with a = -0.5, in Pillow's order of operations.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

int32_t fixed_point(double weight) {
  const double scaled = weight * (1 << kPrecisionBits);
  return static_cast<int32_t>(weight < 0 ? scaled - 0.5 : scaled + 0.5);
}

}  // namespace

Taps bicubic_taps(int in_size, int out_size) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double filter_scale = scale < 1.0 ? 1.0 : scale;  // shrinking widens the kernel (antialiasing)
  const double inverse = 1.0 / filter_scale;
  const double support = kSupport * filter_scale;

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
      raw[k] = bicubic((k + first - center + 0.5) * inverse);
      sum += raw[k];
    }
    int32_t* weights = &taps.weights[static_cast<size_t>(i) * taps.width];
    for (int k = 0; k < count; ++k) weights[k] = fixed_point(sum != 0.0 ? raw[k] / sum : raw[k]);
    taps.first[i] = first;
    taps.count[i] = count;
  }
  return taps;
}

}  // namespace llava_fast
