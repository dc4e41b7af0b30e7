// Device memory of one call, from the allocator of a tensor's library.
#pragma once
#include <cstddef>
#include <cstdint>

#include "bind/tensor.h"

namespace tokenstep::bind {

// Uninitialised, on the device of `like`, aligned to 256 bytes. Memory that is freed is reused in the order
// of the stream.
class Scratch {
 public:
  Scratch(const Tensor& like, size_t bytes) {
    constexpr size_t kAlignment = 256;
    const size_t words = (bytes + kAlignment) / sizeof(int32_t);
    array_ = new_array_like(like, DType::kInt32, {static_cast<int64_t>(words)}, view_);
    const uintptr_t address = reinterpret_cast<uintptr_t>(view_.data);
    data_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  void* data() const { return data_; }

 private:
  nb::object array_;
  Tensor view_;
  void* data_;
};

}  // namespace tokenstep::bind
