// Vector clocks: who knows of whose memory accesses. Every thread counts its synchronisations (its tick) and
// stamps its accesses with that count; `known[u]` is the last tick of thread u that is ordered before what
// the owner does next. Two accesses of which neither is ordered before the other, and one a write, are a
// race, in whatever order they happened to run (Flanagan, Freund: FastTrack, PLDI 2009). Threads that meet at
// a barrier share one clock.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace tokenstep::simt {

struct Clock {
  uint32_t references = 0;
  uint64_t added_to = 0;        // number of the ClockSum that it was added to last
  std::vector<uint32_t> known;  // by the thread's number in its group

  static Clock* make();
  static void recycle(Clock* clock);  // thousands come and go in a launch
};

// A counted reference; std::shared_ptr's counts are atomic, and 32 of them change at each __syncwarp().
class ClockRef {
 public:
  ClockRef() = default;
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_) ++clock_->references;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef() {
    if (clock_ && --clock_->references == 0) Clock::recycle(clock_);
  }
  explicit operator bool() const { return clock_ != nullptr; }
  bool operator==(const ClockRef& other) const = default;
  uint32_t operator[](uint32_t thread) const { return clock_->known[thread]; }

  static ClockRef filled(size_t threads, uint32_t tick) {
    ClockRef clock(Clock::make());
    clock.clock_->known.assign(threads, tick);
    return clock;
  }
  // What this one and `other` know; either may be null, and then knows nothing.
  ClockRef joined(const ClockRef& other) const {
    if (!other || other == *this) return *this;
    if (!*this) return other;
    ClockRef both = copy();
    both.learn(other);
    return both;
  }
  // A clock of its own that knows the same, and thread `thread` up to `tick`.
  ClockRef with(uint32_t thread, uint32_t tick) const {
    ClockRef more = copy();
    more.learn(thread, tick);
    return more;
  }

 private:
  friend class ClockSum;

  explicit ClockRef(Clock* clock) : clock_(clock) { ++clock->references; }
  ClockRef copy() const {
    ClockRef same(Clock::make());
    same.clock_->known = clock_->known;
    return same;
  }
  // For an owner that has not shared the clock yet.
  void learn(uint32_t thread, uint32_t tick) {
    uint32_t& known = clock_->known[thread];
    known = std::max(known, tick);
  }
  void learn(const ClockRef& other) {
    const uint32_t* from = other.clock_->known.data();
    uint32_t* to = clock_->known.data();
    for (size_t i = 0, n = clock_->known.size(); i < n; ++i) to[i] = std::max(to[i], from[i]);
  }

  Clock* clock_ = nullptr;
};

// What many threads know together. Most of them share one clock, which is added once.
class ClockSum {
 public:
  void add(const ClockRef& known, uint32_t thread, uint32_t tick) {
    if (!known) return;
    if (known.clock_->added_to != number_) {
      if (!sum_) {
        sum_ = known.copy();
        known.clock_->added_to = number_ = ++last_number;
      } else {
        sum_.learn(known);
        known.clock_->added_to = number_;
      }
    }
    sum_.learn(thread, tick);
  }
  ClockRef take() {
    number_ = kNone;
    return std::exchange(sum_, {});
  }

 private:
  static constexpr uint64_t kNone = ~uint64_t{0};
  static inline uint64_t last_number = 0;
  ClockRef sum_;
  uint64_t number_ = kNone;
};

// A thread's view of its group.
struct ThreadClock {
  ClockRef known;
  uint32_t tick = 1;

  // What its last __threadfence() covered: its relaxed atomics publish no more than that.
  ClockRef fenced;
  uint32_t fenced_tick = 0;
  // What was published at the places that it read atomically: its next __threadfence() makes it known.
  ClockRef read;

  bool knows(uint32_t thread, uint32_t at_tick) const { return known[thread] >= at_tick; }

  void fence() {
    known = known.joined(read);
    read = {};
    fenced = known;
    fenced_tick = tick++;
  }
  // ld.acquire, st.release and relaxed atomics at a place where `published` is what others have published.
  void acquire(const ClockRef& published) { known = known.joined(published); }
  void release(ClockRef& published, uint32_t self) { published = known.with(self, tick++); }
  void read_relaxed(const ClockRef& published) { read = read.joined(published); }
  void write_relaxed(ClockRef& published, uint32_t self, bool read_modify_write) {
    const ClockRef own = fenced ? fenced.with(self, fenced_tick) : ClockRef();
    published = read_modify_write ? published.joined(own) : own;
  }
};

}  // namespace tokenstep::simt
