// Fibers: what a CUDA thread is in the emulator. A fiber has a stack of its own and runs until it hands the
// processor to another one, which takes nanoseconds: 512 threads meet at a barrier in some 20 microseconds.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace tokenstep::simt {

#ifdef __x86_64__
extern "C" void tokenstep_simt_switch(void** from, void* to);
#endif

// A suspended flow of control: a fiber's, or that of the host thread that runs the fibers.
class Context {
 public:
  // The next switch to this context calls `entry` on the stack [low, low + bytes). `entry` must never return.
  void start(char* low, size_t bytes, void (*entry)());

  // Suspends the flow of control that calls it in `from` and resumes `to`.
#ifdef __x86_64__
  static void switch_to(Context& from, Context& to) {
    tokenstep_simt_switch(&from.stack_pointer_, to.stack_pointer_);
  }

 private:
  void* stack_pointer_ = nullptr;  // the registers lie on the stack
#else
  static void switch_to(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
#endif
};

// Stacks for many fibers, in one range of addresses; below each lies a page that nobody may touch.
class Stacks {
 public:
  ~Stacks();
  void reserve(size_t count);  // no fiber may be running
  char* low(size_t i) const;   // the lowest usable byte of a stack
  size_t bytes(size_t i) const;
  bool contains(uintptr_t address) const { return address - begin_ < size_; }

 private:
  uintptr_t begin_ = 0;
  size_t size_ = 0, count_ = 0;
};

}  // namespace tokenstep::simt
