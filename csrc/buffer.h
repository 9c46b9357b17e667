// Scratch memory that a thread reuses between tasks: uninitialised, and it never shrinks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace llava_fast {

class Buffer {
 public:
  // At least `bytes` bytes; the previous content is lost.
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      data_.reset(new uint8_t[bytes]);
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t size_ = 0;
};

}  // namespace llava_fast
