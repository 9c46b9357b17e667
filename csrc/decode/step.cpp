// A decoding step is bound by reading the weights, so it has few phases, each of which splits the rows of its weights
// among the threads: q, k, v; attention; o; gate and up; down. Threads live for one step and synchronise at a barrier
// after each phase. Each thread normalises and quantises all rows itself, which is cheaper than another barrier.
#include "decode/step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <system_error>
#include <thread>

#include "decode/inputs.h"

namespace llava_fast::decode {
namespace {

class Barrier {
 public:
  explicit Barrier(int parts) : parts_(parts) {}

  void wait() {
    constexpr int kSpins = 4096;  // about 10 us: longer than the threads of a phase drift apart on idle cores
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin)
      if (spin >= kSpins) std::this_thread::yield();
  }

 private:
  const int parts_;
  std::atomic<int> arrived_{0}, round_{0};
};

struct Range {
  int64_t begin, end;
};

Range share(int64_t total, int part, int parts) { return {total * part / parts, total * (part + 1) / parts}; }

// State shared by all threads.
struct Shared {
  std::vector<float> q, k, v, attended, gate, up;
};

std::vector<Kind> kinds(const Decoder& decoder) {
  std::vector<Kind> kinds;
  for (const Layer& l : decoder.layers)
    for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) kinds.push_back(linear->kind);
  return kinds;
}

BFloat16 round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // stays NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

class Worker {
 public:
  Worker(const Decoder& decoder, const std::vector<Sequence>& sequences, const float* cos, const float* sin, float* x,
         const KernelSet& kernels, Shared& shared)
      : decoder_(decoder),
        sequences_(sequences),
        cos_(cos),
        sin_(sin),
        x_(x),
        kernels_(kernels),
        shared_(shared),
        inputs_(count(), std::max({decoder.width, decoder.intermediate, decoder.heads * decoder.head_dim}),
                kinds(decoder)) {
    int64_t rows = 0;
    size_t runs = 0;
    for (const Sequence& sequence : sequences) {
      rows = std::max(rows, sequence.before + 1);
      runs = std::max(runs, sequence.runs.size());
    }
    pieces_.resize(runs);
    normed_.resize(count() * decoder.width);
    scores_.resize(decoder.heads / decoder.kv_heads * padded_rows(rows) + kCachedBlock * decoder.head_dim);
    query_.resize(decoder.heads / decoder.kv_heads * decoder.head_dim);
    key_.resize(decoder.head_dim);
  }

  void run(int part, int parts, Barrier& barrier) {
    const Decoder& d = decoder_;
    const int64_t width = d.width, q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
    for (size_t number = 0; number < d.layers.size(); ++number) {
      const Layer& layer = d.layers[number];
      norm(layer.input_norm);
      apply(layer.q, q_width, shared_.q.data(), false, part, parts);
      apply(layer.k, kv_width, shared_.k.data(), false, part, parts);
      apply(layer.v, kv_width, shared_.v.data(), false, part, parts);
      barrier.wait();
      for (int64_t task = part; task < count() * d.kv_heads; task += parts)
        attend(static_cast<int64_t>(number), task / d.kv_heads, task % d.kv_heads);
      barrier.wait();
      inputs_.set(shared_.attended.data(), q_width);
      apply(layer.o, width, x_, true, part, parts);
      barrier.wait();
      norm(layer.post_norm);
      apply(layer.gate, d.intermediate, shared_.gate.data(), false, part, parts);
      apply(layer.up, d.intermediate, shared_.up.data(), false, part, parts);
      const Range mine = share(d.intermediate, part, parts);
      for (int64_t row = 0; row < count(); ++row) {
        const int64_t at = row * d.intermediate + mine.begin;
        kernels_.swiglu(&shared_.gate[at], &shared_.up[at], mine.end - mine.begin);
      }
      barrier.wait();
      inputs_.set(shared_.gate.data(), d.intermediate);
      apply(layer.down, width, x_, true, part, parts);
      barrier.wait();
    }
    for (int64_t row = part; row < count(); row += parts)
      kernels_.rms_norm(x_ + row * width, d.norm, width, d.eps, x_ + row * width);
  }

 private:
  int64_t count() const { return static_cast<int64_t>(sequences_.size()); }

  void norm(const float* weight) {
    for (int64_t row = 0; row < count(); ++row)
      kernels_.rms_norm(x_ + row * decoder_.width, weight, decoder_.width, decoder_.eps,
                        &normed_[row * decoder_.width]);
    inputs_.set(normed_.data(), decoder_.width);
  }

  // The linear layer of the inputs that were set last.
  void apply(const Linear& linear, int64_t out, float* y, bool add, int part, int parts) {
    const Range mine = share(out, part, parts);
    kernels_.linear(linear.kind)(linear, mine.begin, mine.end, inputs_.of(linear.kind), y, out, add);
  }

  // Rotary embedding (Su et al. 2021), halves paired.
  void rotate(const float* x, int64_t row, float scale, float* out) const {
    const int64_t size = decoder_.head_dim, half = size / 2;
    const float *cos = cos_ + row * size, *sin = sin_ + row * size;
    for (int64_t i = 0; i < half; ++i) {
      out[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale;
      out[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * scale;
    }
  }

  // The query heads of one row that share a key head: store the new key and value, then attend.
  void attend(int64_t layer, int64_t row, int64_t kv_head) {
    const Decoder& d = decoder_;
    const int64_t size = d.head_dim, group = d.heads / d.kv_heads, at = sequences_[row].before;
    const int64_t window = d.layers[layer].window, first = window > 0 ? std::max<int64_t>(0, at + 1 - window) : 0;
    const int64_t bytes = row_bytes(d.cache, size);
    int64_t start = 0, count = 0;
    for (const Run& run : sequences_[row].runs) {
      const int64_t from = std::max(first, start) - start, to = std::min(at + 1 - start, run.rows);
      if (from < to) {
        char* const keys = run.first + (layer * 2 * d.kv_heads + kv_head) * run.plane;
        char* const values = keys + d.kv_heads * run.plane;
        if (start + to == at + 1) {
          const int64_t shared = (row * d.kv_heads + kv_head) * size;
          rotate(&shared_.k[shared], row, 1.0f, key_.data());
          store(key_.data(), keys + (to - 1) * bytes);
          store(&shared_.v[shared], values + (to - 1) * bytes);
        }
        pieces_[count++] = {keys + from * bytes, values + from * bytes, to - from};
      }
      start += run.rows;
      if (start > at) break;
    }
    const int64_t queries = (row * d.heads + kv_head * group) * size;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t g = 0; g < group; ++g) rotate(&shared_.q[queries + g * size], row, scale, &query_[g * size]);
    kernels_.attend(d.cache)(query_.data(), group, pieces_.data(), count, at + 1 - first, size, scores_.data(),
                             &shared_.attended[queries]);
  }

  // One head's key or value into the cache.
  void store(const float* row, void* cached) const {
    const int64_t size = decoder_.head_dim;
    if (decoder_.cache == CacheKind::kBFloat16) {
      std::transform(row, row + size, static_cast<BFloat16*>(cached), round_to_bfloat16);
    } else if (decoder_.cache == CacheKind::kFloat32) {
      std::copy_n(row, size, static_cast<float*>(cached));
    } else {
      int8_t* const codes = static_cast<int8_t*>(cached);
      const float scale = quantise_group(row, size, codes);
      std::memcpy(codes + size, &scale, sizeof(scale));
    }
  }

  const Decoder& decoder_;
  const std::vector<Sequence>& sequences_;
  const float *cos_, *sin_;
  float* x_;
  const KernelSet& kernels_;
  Shared& shared_;
  Inputs inputs_;
  std::vector<Piece> pieces_;
  std::vector<float> normed_, scores_, query_, key_;
};

}  // namespace

int64_t weight_bytes(const Decoder& d) {
  const int64_t q_width = d.heads * d.head_dim, kv_width = d.kv_heads * d.head_dim;
  int64_t bits = 0;
  for (const Layer& layer : d.layers) {
    bits += d.width * (q_width * bits_of(layer.q.kind) + kv_width * (bits_of(layer.k.kind) + bits_of(layer.v.kind)));
    bits += d.width * q_width * bits_of(layer.o.kind);
    bits += d.width * d.intermediate * (bits_of(layer.gate.kind) + bits_of(layer.up.kind) + bits_of(layer.down.kind));
  }
  return bits / 8;
}

void step(const Decoder& decoder, const std::vector<Sequence>& sequences, const float* cos, const float* sin, float* x,
          int threads, const KernelSet& kernels) {
  const size_t count = sequences.size(), kv_width = decoder.kv_heads * decoder.head_dim;
  const size_t q_width = decoder.heads * decoder.head_dim;
  Shared shared;
  for (std::vector<float>* buffer : {&shared.q, &shared.attended}) buffer->resize(count * q_width);
  for (std::vector<float>* buffer : {&shared.k, &shared.v}) buffer->resize(count * kv_width);
  for (std::vector<float>* buffer : {&shared.gate, &shared.up}) buffer->resize(count * decoder.intermediate);
  // Allocate before any thread starts, so that none can fail later.
  std::vector<Worker> workers(std::max(threads, 1), Worker(decoder, sequences, cos, sin, x, kernels, shared));
  std::vector<std::thread> others;
  others.reserve(workers.size());
  std::atomic<Barrier*> start{nullptr};
  std::atomic<int> parts{1};
  const auto follow = [&](int part) {
    Barrier* barrier;
    while ((barrier = start.load(std::memory_order_acquire)) == nullptr) std::this_thread::yield();
    workers[part].run(part, parts, *barrier);
  };
  try {
    for (size_t part = 1; part < workers.size(); ++part) others.emplace_back(follow, static_cast<int>(part));
  } catch (const std::system_error&) {
    // No more threads are available: those that started share the work.
  }
  parts = static_cast<int>(others.size()) + 1;
  Barrier barrier(parts);
  start.store(&barrier, std::memory_order_release);
  workers[0].run(0, parts, barrier);
  for (std::thread& thread : others) thread.join();
}

}  // namespace llava_fast::decode
