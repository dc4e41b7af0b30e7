#include "simt/scheduler.h"

#include <bit>

#include "simt/machine.h"

namespace tokenstep::simt {

Random::Random(uint64_t seed) : state_((seed + 1) * 0x9E3779B97F4A7C15u | 1) {
  for (int i = 0; i < 8; ++i) next();  // similar seeds part ways
}

void Scheduler::start(uint32_t num_warps, uint32_t warps_per_block) {
  ready_.clear();
  held_.clear();
  running_ = nullptr;
  num_warps_ = num_warps;
  warps_per_block_ = warps_per_block;
  hold_left_ = 0;
  waits_in_a_row_ = 0;
}

void Scheduler::add(Thread* thread) {
  Warp& warp = *thread->warp;
  waits_in_a_row_ = 0;
  if (warp.ready == 0) {
    warp.place = ready_.size();
    ready_.push_back(&warp);
  }
  warp.ready |= 1u << thread->lane;
}

void Scheduler::add_waiting(Thread* thread) {
  const uint64_t waits = waits_in_a_row_ + 1;
  add(thread);
  waits_in_a_row_ = waits;
  running_ = nullptr;                                  // another warp is more likely to do something
  if (waits % (64 * num_warps_) == 0) hold_left_ = 0;  // or one that is held back
}

Thread* Scheduler::next() {
  if (--hold_left_ < 0) hold_others();
  if (!running_ || running_->ready == 0 || --turns_left_ < 0) {
    choose_warp();
    if (!running_) return nullptr;
  }
  Warp& warp = *running_;
  const int start = static_cast<int>(random.next() >> 59);
  const int lane = (start + std::countr_zero(std::rotr(warp.ready, start))) % 32;
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) remove(warp);
  return warp.lane[lane];
}

void Scheduler::choose_warp() {
  running_ = nullptr;
  for (;;) {
    if (ready_.empty()) {
      if (held_.empty()) return;
      release();  // nobody else can run
    }
    Warp& warp = *ready_[random.below(ready_.size())];
    if (!is_held(warp)) {
      running_ = &warp;
      turns_left_ = static_cast<int64_t>(random.next() % (uint64_t{1} << random.next() % 8));
      return;
    }
    remove(warp);
    held_.push_back(&warp);
  }
}

void Scheduler::hold_others() {
  release();
  running_ = nullptr;
  hold_left_ = static_cast<int64_t>(random.next() % (uint64_t{1} << random.next() % 19));
  const size_t what = random.below(3);
  if (what == 0) return;
  const auto warp = static_cast<uint32_t>(random.below(num_warps_));
  hold_begin_ = what == 1 ? warp / warps_per_block_ * warps_per_block_ : warp;
  hold_end_ = hold_begin_ + (what == 1 ? warps_per_block_ : 1);
}

void Scheduler::release() {
  hold_begin_ = hold_end_ = 0;
  for (Warp* warp : held_) {
    warp->place = ready_.size();
    ready_.push_back(warp);
  }
  held_.clear();
}

bool Scheduler::is_held(const Warp& warp) const {
  return warp.number >= hold_begin_ && warp.number < hold_end_;
}

void Scheduler::remove(Warp& warp) {
  ready_[warp.place] = ready_.back();
  ready_[warp.place]->place = warp.place;
  ready_.pop_back();
}

}  // namespace tokenstep::simt
