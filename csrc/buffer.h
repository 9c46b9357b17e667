// Memory that a thread uses again from task to task: uninitialised, and it only grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace llava_fast {

class Buffer {
 public:
  // At least `bytes` bytes; what the buffer held is lost.
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
