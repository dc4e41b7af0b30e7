// Atomics, fences, and loads and stores with an order: what flags between blocks are made of.
#include "simt/atomics.h"

#include "simt/device.h"
#include "simt/machine.h"
#include "simt/memory.h"

namespace tokenstep::simt {
namespace {

template <class T>
T apply(AtomicOp op, T old, T value, T compare) {
  if constexpr (!std::is_floating_point_v<T>) {
    switch (op) {
      case AtomicOp::kAnd:
        return old & value;
      case AtomicOp::kOr:
        return old | value;
      case AtomicOp::kXor:
        return old ^ value;
      case AtomicOp::kIncrement:
        return old >= value ? 0 : old + 1;
      case AtomicOp::kDecrement:
        return old == 0 || old > value ? value : old - 1;
      case AtomicOp::kAdd:  // signed overflow wraps
        return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) +
                              static_cast<std::make_unsigned_t<T>>(value));
      case AtomicOp::kSub:
        return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) -
                              static_cast<std::make_unsigned_t<T>>(value));
      default:
        break;
    }
  }
  switch (op) {
    case AtomicOp::kAdd:
      return old + value;
    case AtomicOp::kMin:
      return value < old ? value : old;
    case AtomicOp::kMax:
      return value > old ? value : old;
    case AtomicOp::kCompareAndSwap:
      return old == compare ? value : old;
    default:
      return value;
  }
}

}  // namespace

template <class T>
T atomic(AtomicOp op, T* address, T value, T compare) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  machine.maybe_yield();
  memory.expect_aligned(address, sizeof(T), code);
  memory.access(address, sizeof(T), Access::kStrongWrite, code);
  ThreadClock& clock = machine.current->clock;
  if (!memory.is_shared(
          reinterpret_cast<uintptr_t>(address))) {  // shared memory has barriers, and no need of fences
    ClockRef* published = memory.find_published(address);
    if (published) clock.read_relaxed(*published);
    if (published || clock.fenced)
      clock.write_relaxed(memory.published(address), machine.current->number, true);
  }
  const T old = *address;
  *address = apply(op, old, value, compare);
  return old;
}

template int atomic(AtomicOp, int*, int, int);
template unsigned atomic(AtomicOp, unsigned*, unsigned, unsigned);
template unsigned long long atomic(AtomicOp, unsigned long long*, unsigned long long, unsigned long long);
template float atomic(AtomicOp, float*, float, float);

void fence() { machine.current->clock.fence(); }

void on_volatile_access(const void* address, bool write) {
  machine.maybe_wait_in_loop();
  if (memory.is_shared(reinterpret_cast<uintptr_t>(address))) return;
  ThreadClock& clock = machine.current->clock;
  ClockRef* published = memory.find_published(address);
  if (!write) {
    if (published) clock.read_relaxed(*published);
  } else if (published || clock.fenced) {
    clock.write_relaxed(memory.published(address), machine.current->number, false);
  }
}

uint32_t load_acquire(const uint32_t* address) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  machine.maybe_wait_in_loop();
  memory.expect_aligned(address, sizeof *address, code);
  memory.access(address, sizeof *address, Access::kStrongRead, code);
  if (const ClockRef* published = memory.find_published(address)) machine.current->clock.acquire(*published);
  return *address;
}

void store_release(uint32_t* address, uint32_t value) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  machine.maybe_yield();
  memory.expect_aligned(address, sizeof *address, code);
  memory.access(address, sizeof *address, Access::kStrongWrite, code);
  machine.current->clock.release(memory.published(address), machine.current->number);
  *address = value;
}

}  // namespace tokenstep::simt
