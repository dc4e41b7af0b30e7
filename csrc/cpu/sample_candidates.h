// Candidates: tokens that may survive the filters, in a small buffer, ids ascending. Every filter keeps a
// prefix of the order (value descending, id ascending), so that what is kept is described by one cut.
#pragma once
#include <algorithm>
#include <cstddef>
#include <new>

#include "common/numerics.h"
#include "cpu/sample_blocks.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// Grow-only scratch memory; what it held is lost when it grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }
  T* reserve(size_t count) {
    if (count <= capacity_) return data_;
    release();
    capacity_ = 0;
    data_ = static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
    capacity_ = count;
    return data_;
  }
  T* data() const { return data_; }
  T& operator[](ptrdiff_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    if (data_) ::operator delete(data_, kAlignment);
    data_ = nullptr;
  }
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

// The next float above or below x (not NaN, not the infinity on that side), -0 and +0 being one.
TOKENSTEP_INLINE float next_above(float x) { return from_ordered_bits(ordered_bits(x) + 1); }
TOKENSTEP_INLINE float next_below(float x) { return -next_above(-x); }

struct Candidates {
  Buffer<float> values;
  Buffer<int32_t> ids;
  Buffer<uint64_t> weights;
  Buffer<int32_t> order;  // scratch of the selections
  int count = 0;

  void clear(int vocab_size) {
    const size_t n =
        static_cast<size_t>(vocab_size) + kBlock + kLanes;  // the last block's padding, whole vectors
    values.reserve(n);
    ids.reserve(n);
    weights.reserve(n);
    order.reserve(n);
    count = 0;
  }
  void append(const Candidates& more) {
    memcpy(&values[count], more.values.data(), sizeof(float) * static_cast<size_t>(more.count));
    memcpy(&ids[count], more.ids.data(), sizeof(int32_t) * static_cast<size_t>(more.count));
    count += more.count;
  }
  void weigh(float x_max) {
    for (int i = 0; i < count; ++i)
      weights[i] = static_cast<uint64_t>(static_cast<int64_t>(weight_of(values[i], 1.0f, x_max)));
  }
  // Weighs the tempered values of what the cut keeps, which is one of untempered values; returns their sum.
  uint64_t weigh_tempered(Cut cut, float temperature, float x_max) {
    uint64_t sum = 0;
    for (int i = 0; i < count; ++i) {
      const float value = divide_by_temperature(values[i], temperature);
      weights[i] = is_kept(values[i], ids[i], cut) ? weight(sub(value, x_max)) : 0;
      sum += weights[i];
    }
    return sum;
  }
  uint64_t total() const {
    uint64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += weights[i];
    return sum;
  }
  // Gives weight 0 to what the cut excludes; returns the sum of what is left.
  uint64_t drop(Cut cut) {
    uint64_t sum = 0;
    for (int i = 0; i < count; ++i)
      sum += weights[i] &= -static_cast<uint64_t>(is_kept(values[i], ids[i], cut));
    return sum;
  }
  // Removes what the cut excludes (weights are not kept).
  void keep(Cut cut) {
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      values[kept] = values[i];
      ids[kept] = ids[i];
      kept += is_kept(values[i], ids[i], cut);
    }
    count = kept;
  }
};

// The shortest prefix of (value descending, id ascending) whose weight reaches `target`, found by refining a
// histogram of the values. weight(i) is the weight of candidate i; the candidates together must reach the
// target.
template <class Weight>
Cut select(const Candidates& c, uint64_t target, Weight weight) {
  constexpr int kBins = 512, kSortBelow = 48;
  int32_t* order = c.order.data();
  int n = c.count;
  for (int i = 0; i < n; ++i) order[i] = i;
  while (n > kSortBelow) {
    uint32_t low = UINT32_MAX, high = 0;
    for (int i = 0; i < n; ++i) {
      const uint32_t key = ordered_bits(c.values[order[i]]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    if (low == high) {  // ties only, of equal weight: the lowest ids
      const uint64_t each = weight(order[0]), wanted = each ? (target + each - 1) / each : 1;
      const uint64_t last = std::min<uint64_t>(std::max<uint64_t>(wanted, 1), static_cast<uint64_t>(n)) - 1;
      return {c.values[order[0]], c.ids[order[last]]};
    }
    const int bits = 32 - __builtin_clz(high - low), shift = bits > 9 ? bits - 9 : 0;
    uint64_t histogram[kBins] = {};
    for (int i = 0; i < n; ++i)
      histogram[(ordered_bits(c.values[order[i]]) - low) >> shift] += weight(order[i]);
    uint32_t bin = (high - low) >> shift;
    while (bin > 0 && histogram[bin] < target) target -= histogram[bin--];
    int kept = 0;
    for (int i = 0; i < n; ++i) {
      const int32_t candidate = order[i];
      order[kept] = candidate;
      kept += (ordered_bits(c.values[candidate]) - low) >> shift == bin;
    }
    n = kept;
  }
  std::sort(order, order + n,
            [&](int32_t a, int32_t b) { return comes_before(c.values[a], a, c.values[b], b); });
  int last = 0;
  for (uint64_t sum = 0; last < n - 1 && (sum += weight(order[last])) < target; ++last) {
  }
  return {c.values[order[last]], c.ids[order[last]]};
}
inline Cut select_count(const Candidates& c, int count) {
  return select(c, static_cast<uint64_t>(count), [](int32_t) { return uint64_t{1}; });
}
inline Cut select_weight(const Candidates& c, uint64_t target) {
  return select(c, target, [&](int32_t i) { return c.weights[i]; });
}

// A lower bound of the k-th largest of n values that leaves at most a few more: bisection over the bits.
// `keys` is scratch for n integers.
inline float bound_of_kth_largest(const float* values, int n, int k, int32_t* keys) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int i = 0; i < n; ++i) {
    const int32_t key = ordered_int(static_cast<int32_t>(bits_of(values[i])));
    keys[i] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  while (low < high) {  // at least k keys are >= low
    const int32_t middle = static_cast<int32_t>(high - (int64_t{high} - low) / 2);
    int count = 0;
    for (int i = 0; i < n; ++i) count += keys[i] >= middle;
    if (count < k) {
      high = middle - 1;
    } else {
      low = middle;
      if (count <= k + k / 8) break;
    }
  }
  return float_from_bits(static_cast<uint32_t>(ordered_int(low)));
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
