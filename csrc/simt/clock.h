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
  int references = 0;
  std::vector<uint32_t> known;  // by the thread's number in its group
};

// A counted reference. Not std::shared_ptr: its counts are atomic, and 32 of them change at each
// __syncwarp().
class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) { ++clock->references; }
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_) ++clock_->references;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef() {
    if (clock_ && --clock_->references == 0) delete clock_;
  }
  explicit operator bool() const { return clock_ != nullptr; }
  bool operator==(const ClockRef& other) const = default;
  uint32_t operator[](uint32_t thread) const { return clock_->known[thread]; }

  static ClockRef filled(size_t threads, uint32_t tick) {
    return ClockRef(new Clock{0, std::vector<uint32_t>(threads, tick)});
  }
  // What this one and `other` know; either may be null, and then knows nothing.
  ClockRef joined(const ClockRef& other) const {
    if (!other || other == *this) return *this;
    if (!*this) return other;
    ClockRef both(new Clock{0, clock_->known});
    both.learn(other);
    return both;
  }
  // A clock of its own that knows the same, and thread `thread` up to `tick`.
  ClockRef with(uint32_t thread, uint32_t tick) const {
    ClockRef more(new Clock{0, clock_->known});
    more.learn(thread, tick);
    return more;
  }

  // For an owner that has not shared the clock yet.
  void learn(uint32_t thread, uint32_t tick) {
    uint32_t& known = clock_->known[thread];
    known = std::max(known, tick);
  }
  void learn(const ClockRef& other) {
    const uint32_t* from = other.clock_->known.data();
    uint32_t* to = clock_->known.data();
    for (size_t i = 0; i < clock_->known.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

 private:
  Clock* clock_ = nullptr;
};

// What many threads know together. Most of them share one clock, which need not be added again.
class ClockSum {
 public:
  void add(const ClockRef& known, uint32_t thread, uint32_t tick, size_t threads) {
    if (!known) return;
    if (!sum_) sum_ = ClockRef::filled(threads, 0);
    if (known != last_) sum_.learn(last_ = known);
    sum_.learn(thread, tick);
  }
  ClockRef take() {
    last_ = {};
    return std::exchange(sum_, {});
  }

 private:
  ClockRef sum_, last_;
};

// joined(), for many threads one after another: those that come with the same clock leave with the same
// clock.
class ClockJoin {
 public:
  const ClockRef& operator()(const ClockRef& known, const ClockRef& other) {
    if (!result_ || known != known_ || other != other_) {
      known_ = known;
      other_ = other;
      result_ = known.joined(other);
    }
    return result_;
  }

 private:
  ClockRef known_, other_, result_;
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
