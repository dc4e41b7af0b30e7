#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace tokenstep::simt {

#ifdef __x86_64__
// swapcontext() makes a system call for the signal mask at each switch; what the calling convention lets a
// function destroy need not be saved, so six registers and the stack pointer are all.
asm(R"(
.text
.hidden tokenstep_simt_switch
.globl tokenstep_simt_switch
.type tokenstep_simt_switch, @function
tokenstep_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tokenstep_simt_switch, .-tokenstep_simt_switch
)");

void Context::start(char* low, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(low + bytes);  // a multiple of 16
  *--top = nullptr;                                    // the return address of `entry`, for debuggers
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

#else
void Context::start(char* low, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = low;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}
#endif

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kStride = kStackBytes + kPage;
}  // namespace

Stacks::~Stacks() {
  if (begin_) munmap(reinterpret_cast<void*>(begin_), size_);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  void* map = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  if (begin_) munmap(reinterpret_cast<void*>(begin_), size_);
  begin_ = reinterpret_cast<uintptr_t>(map);
  size_ = count * kStride;
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect(low(i) - kPage, kPage, PROT_NONE);
}

char* Stacks::low(size_t i) const { return reinterpret_cast<char*>(begin_ + i * kStride + kPage); }

// Stacks that all began at the same offset in a page would compete for the same few lines of the caches.
size_t Stacks::bytes(size_t i) const { return kStackBytes - i % 16 * 256; }

}  // namespace tokenstep::simt
