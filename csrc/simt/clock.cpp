#include "simt/clock.h"

namespace tokenstep::simt {
namespace {
std::vector<Clock*>& unused() {
  static auto& clocks = *new std::vector<Clock*>;  // outlives every static that holds a clock
  return clocks;
}
}  // namespace

Clock* Clock::make() {
  if (unused().empty()) return new Clock;
  Clock* clock = unused().back();
  unused().pop_back();
  clock->added_to = 0;
  return clock;
}

void Clock::recycle(Clock* clock) { unused().push_back(clock); }

}  // namespace tokenstep::simt
