// What the compiler calls at each load and store of a kernel: the interface of -fsanitize=thread, without its
// library. This file itself, like all of the emulator, is compiled without the instrumentation.
#include <cstddef>
#include <cstdint>

#include "simt/device.h"
#include "simt/memory.h"

using tokenstep::simt::Access;
using tokenstep::simt::code_offset;
using tokenstep::simt::machine;
using tokenstep::simt::memory;

namespace {
// A kernel runs, and this is not a local variable of one of its threads.
[[gnu::always_inline]] inline bool is_checked(const void* address) {
  return machine.current && !machine.stacks().contains(reinterpret_cast<uintptr_t>(address));
}
[[gnu::always_inline]] inline void access(const void* address, size_t bytes, Access kind, bool aligned,
                                          void* caller) {
  if (!is_checked(address)) return;
  const uint32_t code = code_offset(caller);
  if (aligned) memory.expect_aligned(address, bytes, code);
  memory.access(address, bytes, kind, code);
}
[[gnu::always_inline]] inline void volatile_access(const void* address, size_t bytes, bool write,
                                                   void* caller) {
  if (!is_checked(address)) return;
  tokenstep::simt::on_volatile_access(address, write);
  access(address, bytes, write ? Access::kStrongWrite : Access::kStrongRead, true, caller);
}
}  // namespace

#define TOKENSTEP_SIMT_ACCESS(bytes)                                                                         \
  void __tsan_read##bytes(void* p) { access(p, bytes, Access::kRead, true, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { access(p, bytes, Access::kWrite, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                               \
    access(p, bytes, Access::kRead, false, __builtin_return_address(0));                                     \
  }                                                                                                          \
  void __tsan_unaligned_write##bytes(void* p) {                                                              \
    access(p, bytes, Access::kWrite, false, __builtin_return_address(0));                                    \
  }                                                                                                          \
  void __tsan_volatile_read##bytes(void* p) {                                                                \
    volatile_access(p, bytes, false, __builtin_return_address(0));                                           \
  }                                                                                                          \
  void __tsan_volatile_write##bytes(void* p) { volatile_access(p, bytes, true, __builtin_return_address(0)); }

extern "C" {
TOKENSTEP_SIMT_ACCESS(1)
TOKENSTEP_SIMT_ACCESS(2)
TOKENSTEP_SIMT_ACCESS(4)
TOKENSTEP_SIMT_ACCESS(8)
TOKENSTEP_SIMT_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) {
  access(p, bytes, Access::kRead, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  access(p, bytes, Access::kWrite, false, __builtin_return_address(0));
}
// Host code: virtual tables of objects that live across a launch, and the entry into functions and modules.
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
