// CUDA's spellings for kernels that run in the emulator: qualifiers, built-in variables, barriers, fences,
// intrinsics. csrc/cuda/ptx.cuh includes it instead of the CUDA headers when TOKENSTEP_SIMT is defined.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>  // the library uses __noinline__ as an attribute: it must have been read before the macro below

#include "simt/atomics.h"
#include "simt/half.h"
#include "simt/vector_types.h"
#include "simt/warp_intrinsics.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__  // would let the compiler keep values in registers across barriers
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

namespace tokenstep::simt {

// Of the thread that runs: they don't change while a function runs.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_dimensions();
[[gnu::const]] dim3 grid_dimensions();

uint32_t sync_block(const char* what, bool vote, SimtWhere where);  // returns the number of votes
void sync_some(uint32_t barrier, uint32_t threads, SimtWhere where);
void arrive_at_cluster(SimtWhere where);
void wait_for_cluster(SimtWhere where);
void fence();
void pause();
void on_volatile_access(const void* address, bool write);

}  // namespace tokenstep::simt

#define threadIdx (::tokenstep::simt::thread_index())
#define blockIdx (::tokenstep::simt::block_index())
#define blockDim (::tokenstep::simt::block_dimensions())
#define gridDim (::tokenstep::simt::grid_dimensions())

inline void __syncthreads(SimtWhere where = SimtWhere::current()) {
  tokenstep::simt::sync_block("__syncthreads()", false, where);
}
inline int __syncthreads_count(int predicate, SimtWhere where = SimtWhere::current()) {
  return static_cast<int>(tokenstep::simt::sync_block("__syncthreads_count()", predicate != 0, where));
}
inline int __syncthreads_or(int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::sync_block("__syncthreads_or()", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::sync_block("__syncthreads_and()", predicate == 0, where) == 0;
}
inline void __threadfence() { tokenstep::simt::fence(); }
inline void __nanosleep(unsigned) { tokenstep::simt::pause(); }

// ---- loads with a cache hint: plain loads here ------------------------------------------------------------
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}

// ---- bits -------------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned select = selector >> 4 * i & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (select & 7)) & 0xff;
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

// ---- fp32, each operation rounded once (the emulator is built with -ffp-contract=off) ---------------------
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// Approximate on the device; close enough here for what must not depend on their bits.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }

inline int min(int a, int b) { return b < a ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return b > a ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline int max(int a, int b) { return b > a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return b > a ? b : a; }
inline long long max(long long a, long long b) { return b > a ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return b > a ? b : a; }
