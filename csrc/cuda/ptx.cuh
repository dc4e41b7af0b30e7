// What needs PTX: one function per instruction, named for what it does. The only file with asm. In the
// emulator the same functions are software (csrc/simt/ptx.h); kernels include this file before anything else
// and use no other asm.
#pragma once

#ifdef TOKENSTEP_SIMT
#include "simt/ptx.h"  // IWYU pragma: export
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tokenstep::cuda {

// ---- shared memory: all of it is dynamic ------------------------------------------------------------------
extern __shared__ __align__(1024) char dynamic_shared_memory[];
__device__ __forceinline__ char* shared_memory() { return dynamic_shared_memory; }
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- a barrier of some warps of the block -----------------------------------------------------------------
// `barrier` is 1 to 15, `threads` a multiple of 32: how many meet there.
__device__ __forceinline__ void sync_warps(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- thread-block clusters: sm_90 and later; elsewhere a cluster is one block -----------------------------
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// A barrier of the cluster's threads in two halves: what came before any thread's arrival is ordered before
// what comes after a wait. All lanes of a warp arrive, and wait, together.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster. That block must have started, and must
// not have left: a cluster barrier before the first access and one after the last.
template <class T>
__device__ __forceinline__ T* map_to_peer(T* pointer, uint32_t rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
// A word at that place, in one access: cheaper than through a pointer of 64 bits.
__device__ __forceinline__ uint32_t load_from_peer(const uint32_t* pointer, uint32_t rank) {
  uint32_t value;
  asm volatile(
      "{\n .reg .u32 address;\n mapa.shared::cluster.u32 address, %1, %2;\n"
      " ld.shared::cluster.u32 %0, [address];\n}"
      : "=r"(value)
      : "r"(shared_address(pointer)), "r"(rank)
      : "memory");
  return value;
}
#else
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* map_to_peer(T* pointer, uint32_t) {
  return pointer;
}
__device__ __forceinline__ uint32_t load_from_peer(const uint32_t* pointer, uint32_t) { return *pointer; }
#endif
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // the barrier wants whole warps
  cluster_arrive();
  cluster_wait();
}

// ---- flags in global memory, between blocks ---------------------------------------------------------------
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void spin_pause() { __nanosleep(20); }  // in every loop that waits for a flag

// ---- global memory that is read once ----------------------------------------------------------------------
// 16 bytes that this launch does not write; they leave no trace in L1.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}
// The same for memory that this launch may write, later and in the same thread.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---- cp.async: global to shared memory without registers --------------------------------------------------
// 16 bytes, both sides aligned to 16; zeros where not `valid`, and nothing is read then. The thread that
// copied sees them after copy_async_wait(), others after a barrier behind that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// The same of 8 bytes, both sides aligned to 8.
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}
// Ends a group of copies. Waits until no more than kGroupsInFlight groups are on their way.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsInFlight>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

// ---- tensor cores -----------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit values: lane l names row l % 8 of matrix l / 8 (16 bytes of shared memory) and
// gets, of each matrix, the values 2 * (l % 4) and the next of row l / 4; transposed, of column l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two of them: lanes 0 to 15 name rows.
__device__ __forceinline__ void load_matrix_x2(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}
// c[16, 8] += a[16, 16] b[16, 8] of half or bfloat16, c in fp32, in the fragment layout of the PTX manual.
template <class Half>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic -------------------------------------------------------------------------------------------
__device__ __forceinline__ float max_nan(float a, float b) {  // NaN if either is
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float exp2_approx(
    float x) {  // 2 ulp; not for what must have the same bits everywhere
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- the compiler -----------------------------------------------------------------------------------------
// The same value, of which the compiler knows nothing: what is worked out from it in a loop is not kept in
// registers from one turn to the next.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace tokenstep::cuda

#endif
