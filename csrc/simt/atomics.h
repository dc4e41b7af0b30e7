// CUDA's atomics, on shared and global memory, in the overloads that nvcc has.
#pragma once
#include <cstdint>

namespace tokenstep::simt {

enum class AtomicOp {
  kAdd,
  kSub,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kExchange,
  kIncrement,
  kDecrement,
  kCompareAndSwap
};

// Relaxed: indivisible, and no more. A __threadfence() before it publishes, one after it acquires.
template <class T>
T atomic(AtomicOp op, T* address, T value, T compare = {});

}  // namespace tokenstep::simt

#define TOKENSTEP_SIMT_ATOMIC(name, op, T)                                         \
  inline T name(T* address, T value) {                                             \
    return tokenstep::simt::atomic(tokenstep::simt::AtomicOp::op, address, value); \
  }
#define TOKENSTEP_SIMT_ATOMIC_INTEGER(name, op) \
  TOKENSTEP_SIMT_ATOMIC(name, op, int)          \
  TOKENSTEP_SIMT_ATOMIC(name, op, unsigned)     \
  TOKENSTEP_SIMT_ATOMIC(name, op, unsigned long long)

TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicAdd, kAdd)
TOKENSTEP_SIMT_ATOMIC(atomicAdd, kAdd, float)
TOKENSTEP_SIMT_ATOMIC(atomicSub, kSub, int)
TOKENSTEP_SIMT_ATOMIC(atomicSub, kSub, unsigned)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicMin, kMin)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicMax, kMax)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicAnd, kAnd)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicOr, kOr)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicXor, kXor)
TOKENSTEP_SIMT_ATOMIC_INTEGER(atomicExch, kExchange)
TOKENSTEP_SIMT_ATOMIC(atomicExch, kExchange, float)
TOKENSTEP_SIMT_ATOMIC(atomicInc, kIncrement, unsigned)  // (old >= limit) ? 0 : old + 1
TOKENSTEP_SIMT_ATOMIC(atomicDec, kDecrement, unsigned)  // (old == 0 || old > limit) ? limit : old - 1

#undef TOKENSTEP_SIMT_ATOMIC_INTEGER
#undef TOKENSTEP_SIMT_ATOMIC

inline int atomicCAS(int* address, int compare, int value) {
  return tokenstep::simt::atomic(tokenstep::simt::AtomicOp::kCompareAndSwap, address, value, compare);
}
inline unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
  return tokenstep::simt::atomic(tokenstep::simt::AtomicOp::kCompareAndSwap, address, value, compare);
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long compare,
                                    unsigned long long value) {
  return tokenstep::simt::atomic(tokenstep::simt::AtomicOp::kCompareAndSwap, address, value, compare);
}
