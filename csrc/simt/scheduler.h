// Who runs next. The order is random, and a seed gives the same order again.
//
// An evenly random order would keep all warps in step, and nothing would ever be late: so whole warps and
// whole blocks are held back for long random stretches. And it would touch another fiber's stack at each
// switch: so the lanes of one warp mostly run one after another, for a random number of turns.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenstep::simt {

struct Thread;
struct Warp;

class Random {  // xorshift64
 public:
  explicit Random(uint64_t seed);
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  size_t below(size_t n) { return static_cast<size_t>((next() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

class Scheduler {
 public:
  Random random{0};

  void start(uint32_t num_warps, uint32_t warps_per_block);
  void add(Thread* thread);          // it may run
  Thread* next();                    // removes it; null: nobody may run
  void add_waiting(Thread* thread);  // it may run, but only to see whether another one has done something
  bool stuck() const { return waits_in_a_row_ > kMaxWaits; }  // for a very long time, all have only waited

 private:
  static constexpr uint64_t kMaxWaits = 1 << 20;
  void hold_others();
  void release();
  bool is_held(const Warp& warp) const;
  void remove(Warp& warp);
  void choose_warp();

  std::vector<Warp*> ready_, held_;  // every warp with a lane that may run is in one of them
  Warp* running_ = nullptr;          // the warp whose turn it is, for turns_left_ switches
  int64_t turns_left_ = 0;
  uint32_t num_warps_ = 0, warps_per_block_ = 1;
  uint32_t hold_begin_ = 0, hold_end_ = 0;  // numbers of the warps held back, for hold_left_ switches
  int64_t hold_left_ = 0;
  uint64_t waits_in_a_row_ = 0;
};

}  // namespace tokenstep::simt
