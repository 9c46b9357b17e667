// The loops, independent of the instruction set. A file for one set defines, in an anonymous namespace, TARGET,
// Vec, IntVec, Four, kLanes, kRegisters, splat, multiply_add, load_first, store_first, widen (kLanes of bfloat16 or
// int8), half and sum_each, then includes this. Rows need not be whole vectors: `load_first` fills up with zeros.
// half<0>(p) has the even ones of 2 * kLanes elements, half<1>(p) the odd ones, of bfloat16 widened.

struct __attribute__((packed, may_alias)) Unaligned {
  Vec value;
};
TARGET inline Vec load(const float* p) { return reinterpret_cast<const Unaligned*>(p)->value; }
TARGET inline void store(float* p, Vec v) { reinterpret_cast<Unaligned*>(p)->value = v; }
TARGET inline void store_upto(float* p, Vec v, int64_t left) {
  if (left < kLanes)
    store_first(p, v, left);
  else
    store(p, v);
}
TARGET inline float sum(Vec v) { return sum_each(v, v, v, v)[0]; }

TARGET inline Vec load(const BFloat16* p) { return widen(p); }
TARGET inline Vec load_first(const BFloat16* p, int64_t count) {
  BFloat16 padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return widen(padded);
}
template <class W>
TARGET inline Vec load_upto(const W* p, int64_t left) {
  return left < kLanes ? load_first(p, left) : load(p);
}

constexpr int kTileVectors = kRegisters >= 32 ? 4 : 3;  // vectors at a time: 4x4 or 4x3 sums fit the registers

constexpr int kAhead = 384;  // bytes fetched ahead in each row

// How elements of a weight and the inputs they are multiplied by are read: in order, or if two elements share 32 bits,
// the even ones and then the odd ones, which widens bfloat16 by a shift or a mask.
template <class W>
struct Order {
  static constexpr int kHalves = 1;
  template <int H, class T>
  TARGET static Vec read(const T* p) {
    return load(p);
  }
};
template <>
struct Order<BFloat16> {
  static constexpr int kHalves = 2;
  template <int H, class T>
  TARGET static Vec read(const T* p) {
    return half<H>(p);
  }
};

// Adds the products of one half of a step, of R rows by N vectors.
template <class W, int H, int R, int N>
TARGET inline void add_half(const W* const (&weight)[R], const float* const (&x)[N], int64_t c, Vec (&sums)[R][N]) {
  Vec xs[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) xs[j] = Order<W>::template read<H>(x[j] + c);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    const Vec v = Order<W>::template read<H>(weight[i] + c);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(v, xs[j], sums[i][j]);
  }
}

template <class W, int R, int N>
TARGET inline void add_step(const W* const (&weight)[R], const float* const (&x)[N], int64_t c, Vec (&sums)[R][N]) {
  add_half<W, 0>(weight, x, c, sums);
  if constexpr (Order<W>::kHalves == 2) add_half<W, 1>(weight, x, c, sums);
}

// y[j, row + i * step] = weight[row + i * step] . x[j] for R rows and N vectors, all sums in registers; `add` adds to y
// instead.
template <int R, int N, class W>
TARGET inline void tile(const W* weights, int64_t in, int64_t row, int64_t step, const float* x, int64_t x_stride,
                        float* y, int64_t y_stride, bool add) {
  constexpr int64_t kStep = Order<W>::kHalves * kLanes;
  const W* weight[R];
  const float* inputs[N];
  Vec sums[R][N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) inputs[j] = x + j * x_stride;
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    weight[i] = weights + (row + i * step) * in;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = splat(0);
  }
  const int64_t whole = in / kStep * kStep, left = in - whole;
  for (int64_t c = 0; c < whole; c += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) __builtin_prefetch(reinterpret_cast<const char*>(weight[i] + c) + kAhead);
    add_step(weight, inputs, c, sums);
  }
  if (left > 0) {  // part of a step: zero-padded copies
    W last[R][kStep] = {};
    float last_inputs[N][kStep] = {};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      for (int64_t k = 0; k < left; ++k) last[i][k] = weight[i][whole + k];
      weight[i] = last[i];
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      for (int64_t k = 0; k < left; ++k) last_inputs[j][k] = inputs[j][whole + k];
      inputs[j] = last_inputs[j];
    }
    add_step(weight, inputs, 0, sums);
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    // Four at once: reducing the lanes of each one separately would take longer than its products.
    const Four totals = sum_each(sums[0][j], sums[1 % R][j], sums[2 % R][j], sums[3 % R][j]);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      float& target = y[j * y_stride + row + i * step];
      target = add ? target + totals[i] : totals[i];
    }
  }
}

// R rows by all vectors.
template <int R, class W>
TARGET inline void rows_by_all(const W* weights, int64_t in, int64_t row, int64_t step, const float* x,
                               int64_t x_stride, int64_t count, float* y, int64_t y_stride, bool add) {
  for (int64_t j = 0; j < count; j += kTileVectors, x += kTileVectors * x_stride, y += kTileVectors * y_stride) {
    switch (count - j) {
      case 1:
        tile<R, 1>(weights, in, row, step, x, x_stride, y, y_stride, add);
        break;
      case 2:
        tile<R, 2>(weights, in, row, step, x, x_stride, y, y_stride, add);
        break;
      case 3:
        tile<R, 3>(weights, in, row, step, x, x_stride, y, y_stride, add);
        break;
      default:
        tile<R, kTileVectors>(weights, in, row, step, x, x_stride, y, y_stride, add);
    }
  }
}

template <class W>
TARGET void linear(const Linear& linear, int64_t begin, int64_t end, const Vectors& vectors, float* y,
                   int64_t y_stride, bool add) {
  const int64_t count = vectors.count, x_stride = vectors.stride;
  const float* const x = static_cast<const float*>(vectors.data);
  const W* const weights = static_cast<const W*>(linear.weight);
  if (linear.bias != nullptr) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = begin; r < end; ++r)
        y[j * y_stride + r] = add ? y[j * y_stride + r] + linear.bias[r] : linear.bias[r];
    add = true;
  }
  const Parts parts(end - begin, 4);
  for (int64_t r = 0; r < parts.together; ++r)
    rows_by_all<4>(weights, linear.in, begin + r, parts.step, x, x_stride, count, y, y_stride, add);
  parts.each_left(
      [&](int64_t r) { rows_by_all<1>(weights, linear.in, begin + r, 0, x, x_stride, count, y, y_stride, add); });
}

TARGET void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* out) {
  Vec squares = {};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec v = load_upto(x + c, width - c);
    squares = multiply_add(v, v, squares);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps);
  for (int64_t c = 0; c < width; c += kLanes)
    store_upto(out + c, load_upto(x + c, width - c) * splat(scale) * load_upto(weight + c, width - c), width - c);
}

// e^x to about 1e-7 relative, for x clamped to [-87, 88]: 2^n times a Taylor polynomial on |r| <= ln(2)/2, whose
// remainder r^8/8! is below 6e-9. ln(2) is subtracted in two parts, the first short enough for n times it to be
// exact. NaN stays NaN.
TARGET inline Vec exponential(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x * splat(1.44269504f) + round;
  const Vec n = shifted - round;
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec p = splat(1.0f / 5040);
  for (const float term : kTerms) p = multiply_add(p, r, splat(term));
  const IntVec exponent = (IntVec)shifted - (IntVec)round + 127;
  return p * (Vec)(exponent << 23);
}

TARGET void swiglu(float* gate, const float* up, int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec g = load_upto(gate + c, width - c);
    store_upto(gate + c, g / (splat(1.0f) + exponential(-g)) * load_upto(up + c, width - c), width - c);
  }
}

// scores [padded] to exp(scores - max), entries from `rows` on being padding; returns their sum.
TARGET float exponentials(float* scores, int64_t rows, int64_t padded) {
  for (int64_t t = rows; t < padded; ++t) scores[t] = -__builtin_inff();
  Vec most = load(scores);
  for (int64_t t = kLanes; t < padded; t += kLanes) {
    const Vec v = load(scores + t);
    most = v > most ? v : most;
  }
  float lanes[kLanes], highest;
  store(lanes, most);
  highest = lanes[0];
  for (const float lane : lanes) highest = lane > highest ? lane : highest;
  Vec total = {};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Vec e = exponential(load(scores + t) - splat(highest));
    store(scores + t, e);
    total += e;
  }
  return sum(total);
}

// out[g] += sum over t of weights[g, t] * values[t], for N heads and the `left` first of V vectors of columns.
template <int N, int V, class W>
TARGET inline void add_values(const float* weights, int64_t weights_stride, const W* values, int64_t rows,
                              int64_t size, int64_t left, float* out) {
  Vec sums[N][V];
#pragma GCC unroll 4
  for (int g = 0; g < N; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[g][v] = load_upto(out + g * size + v * kLanes, left - v * kLanes);
  for (int64_t t = 0; t < rows; ++t)
    for (int v = 0; v < V; ++v) {
      const Vec value = load_upto(values + t * size + v * kLanes, left - v * kLanes);
      for (int g = 0; g < N; ++g) sums[g][v] = multiply_add(splat(weights[g * weights_stride + t]), value, sums[g][v]);
    }
#pragma GCC unroll 4
  for (int g = 0; g < N; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_upto(out + g * size + v * kLanes, sums[g][v], left - v * kLanes);
}

template <int N, class W>
TARGET inline void add_value_rows(const float* weights, int64_t weights_stride, const W* values, int64_t rows,
                                  int64_t size, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes)
    add_values<N, 4>(weights, weights_stride, values + d, rows, size, 4 * kLanes, out + d);
  for (; d + 2 * kLanes <= size; d += 2 * kLanes)
    add_values<N, 2>(weights, weights_stride, values + d, rows, size, 2 * kLanes, out + d);
  for (; d < size; d += kLanes) add_values<N, 1>(weights, weights_stride, values + d, rows, size, size - d, out + d);
}

// Rows cached in 8 bits, as float32 [count, size].
TARGET void expand(const int8_t* rows, int64_t count, int64_t size, float* out) {
  for (int64_t t = 0; t < count; ++t, rows += row_bytes(CacheKind::kInt8, size), out += size) {
    float scale;
    __builtin_memcpy(&scale, rows + size, sizeof(scale));
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(out + d, widen(rows + d) * splat(scale));
    for (; d < size; ++d) out[d] = static_cast<float>(rows[d]) * scale;
  }
}

// How the kernel reads `count` cached rows from the first-th on: where they are, or expanded into `scratch`.
template <class W>
struct Read {
  typedef W Element;
  TARGET static const W* block(const void* rows, int64_t first, int64_t, int64_t size, float*) {
    return static_cast<const W*>(rows) + first * size;
  }
};
template <>
struct Read<int8_t> {
  typedef float Element;
  TARGET static const float* block(const void* rows, int64_t first, int64_t count, int64_t size, float* scratch) {
    expand(static_cast<const int8_t*>(rows) + first * row_bytes(CacheKind::kInt8, size), count, size, scratch);
    return scratch;
  }
};

// W: float, BFloat16 or int8_t, as the rows are cached.
template <class W>
TARGET void attend(const float* query, int64_t group, const Piece* pieces, int64_t count, int64_t rows, int64_t size,
                   float* scores, float* out) {
  typedef typename Read<W>::Element Element;
  const int64_t padded = padded_rows(rows);
  float* const scratch = scores + group * padded;
  int64_t done = 0;
  for (const Piece* piece = pieces; piece < pieces + count; done += piece++->rows) {
    // Rows that are multiplied where they are go all at once: long streams are read from memory faster.
    const int64_t step = sizeof(W) == 1 ? kCachedBlock : piece->rows;
    for (int64_t t = 0; t < piece->rows; t += step) {
      const int64_t block = piece->rows - t < step ? piece->rows - t : step;
      const Element* const keys = Read<W>::block(piece->keys, t, block, size, scratch);
      linear<Element>({Kind::kFloat32, keys, nullptr, size}, 0, block, {query, size, group},
                      scores + done + t, padded, false);
    }
  }
  for (int64_t d = 0; d < group * size; ++d) out[d] = 0;
  float total[kTileVectors];
  for (int64_t first = 0; first < group; first += kTileVectors) {
    const int64_t heads = group - first < kTileVectors ? group - first : kTileVectors;
    float* mine = scores + first * padded;
    for (int64_t g = 0; g < heads; ++g) total[g] = exponentials(mine + g * padded, rows, padded);
    for (const Piece* piece = pieces; piece < pieces + count; mine += piece++->rows)
      for (int64_t t = 0; t < piece->rows; t += kCachedBlock) {
        const int64_t block = piece->rows - t < kCachedBlock ? piece->rows - t : kCachedBlock;
        const Element* const values = Read<W>::block(piece->values, t, block, size, scratch);
        int64_t g = 0;
        for (; g + 2 <= heads; g += 2)
          add_value_rows<2>(mine + g * padded + t, padded, values, block, size, out + (first + g) * size);
        if (g < heads) add_value_rows<1>(mine + g * padded + t, padded, values, block, size, out + (first + g) * size);
      }
    for (int64_t g = 0; g < heads; ++g)
      for (int64_t d = 0; d < size; ++d) out[(first + g) * size + d] /= total[g];
  }
}

KernelSet make_kernels(const char* name, const QuantisedKernels& quantised) {
  return {name,     supported, linear<float>, linear<BFloat16>, quantised.int8, quantised.int4, quantised.panel,
          rms_norm, swiglu,    attend<float>, attend<BFloat16>, attend<int8_t>};
}
