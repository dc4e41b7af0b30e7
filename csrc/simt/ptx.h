// The functions of csrc/cuda/ptx.cuh in software. Descriptions are there.
#pragma once
#include "simt/device.h"
#include "simt/matrix.h"

namespace tokenstep::simt {

char* shared_memory();
uint32_t cluster_rank();
uint32_t cluster_size();
char* peer(const void* address, uint32_t rank);
uint32_t load_acquire(const uint32_t* address);
void store_release(uint32_t* address, uint32_t value);
void load_noncoherent(const void* from, void* to, size_t bytes);
void copy_async(void* to, const void* from, size_t bytes, size_t from_bytes);
void commit_copies();
void wait_for_copies(uint32_t groups_in_flight);

}  // namespace tokenstep::simt

namespace tokenstep::cuda {

inline char* shared_memory() { return simt::shared_memory(); }

// ---- barriers of some warps -------------------------------------------------------------------------------
inline void sync_warps(uint32_t barrier, uint32_t threads, SimtWhere where = SimtWhere::current()) {
  simt::sync_some(barrier, threads, where);
}

// ---- clusters ---------------------------------------------------------------------------------------------
inline uint32_t cluster_rank() { return simt::cluster_rank(); }
inline uint32_t cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive(SimtWhere where = SimtWhere::current()) { simt::arrive_at_cluster(where); }
inline void cluster_wait(SimtWhere where = SimtWhere::current()) { simt::wait_for_cluster(where); }
inline void cluster_sync(SimtWhere where = SimtWhere::current()) {
  simt::arrive_at_cluster(where);
  simt::wait_for_cluster(where);
}
template <class T>
T* map_to_peer(T* pointer, uint32_t rank) {
  return reinterpret_cast<T*>(simt::peer(pointer, rank));
}

inline uint32_t load_from_peer(const uint32_t* pointer, uint32_t rank) { return *map_to_peer(pointer, rank); }

// ---- global memory ----------------------------------------------------------------------------------------
inline uint32_t load_acquire(const uint32_t* address) { return simt::load_acquire(address); }
inline void store_release(uint32_t* address, uint32_t value) { simt::store_release(address, value); }
inline void spin_pause() { simt::pause(); }
inline uint4 load_streaming(const void* address) {
  uint4 value;
  simt::load_noncoherent(address, &value, sizeof value);
  return value;
}
inline uint4 load_once(const void* address) { return *static_cast<const uint4*>(address); }
inline void prefetch_l2(const void*) {}

// ---- cp.async ---------------------------------------------------------------------------------------------
inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  simt::copy_async(shared, global, 16, valid ? 16 : 0);
}
inline void copy_async_8(void* shared, const void* global, bool valid = true) {
  simt::copy_async(shared, global, 8, valid ? 8 : 0);
}
inline void copy_async_commit() { simt::commit_copies(); }
template <int kGroupsInFlight>
void copy_async_wait() {
  simt::wait_for_copies(kGroupsInFlight);
}

// ---- tensor cores -----------------------------------------------------------------------------------------
inline void load_matrix_x4(uint32_t (&registers)[4], const void* row,
                           SimtWhere where = SimtWhere::current()) {
  simt::load_matrices<4>(registers, row, false, where);
}
inline void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row,
                                      SimtWhere where = SimtWhere::current()) {
  simt::load_matrices<4>(registers, row, true, where);
}
inline void load_matrix_x2(uint32_t (&registers)[2], const void* row,
                           SimtWhere where = SimtWhere::current()) {
  simt::load_matrices<2>(registers, row, false, where);
}
inline void load_matrix_x2_transposed(uint32_t (&registers)[2], const void* row,
                                      SimtWhere where = SimtWhere::current()) {
  simt::load_matrices<2>(registers, row, true, where);
}
template <class Half>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  SimtWhere where = SimtWhere::current()) {
  static_assert(std::same_as<Half, __half> || std::same_as<Half, __nv_bfloat16>);
  simt::multiply_matrices(c, a, b, std::same_as<Half, __nv_bfloat16>, where);
}

// ---- arithmetic -------------------------------------------------------------------------------------------
inline float max_nan(float a, float b) {
  if (a != a || b != b) return __uint_as_float(0x7fffffff);
  if (a == b) return a == 0.0f ? __uint_as_float(__float_as_uint(a) & __float_as_uint(b)) : a;
  return a > b ? a : b;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline int recomputed(int value) { return value; }

}  // namespace tokenstep::cuda

// Loads through the read-only path.
template <class T>
T __ldg(const T* address) {
  T value;
  tokenstep::simt::load_noncoherent(address, &value, sizeof value);
  return value;
}
