// Fibers: what a CUDA thread is in the emulator. A fiber has a stack of its own and runs until it hands the
// processor to another one, which costs a few nanoseconds: a block of 512 threads meets a barrier in
// microseconds.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace tokenstep::simt {

// A suspended flow of control: a fiber's, or that of the host thread that runs the fibers.
class Context {
 public:
  Context();
  ~Context();
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;

  // The next switch to this context calls `entry` on the stack [low, low + bytes). `entry` must never return.
  void start(char* low, size_t bytes, void (*entry)());
  // Suspends the flow of control that calls it in `from` and resumes `to`.
  static void switch_to(Context& from, Context& to);

 private:
  struct Registers;
  std::unique_ptr<Registers> registers_;
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
