// A fault of the processor in a kernel (a wild pointer, a stack overflow, a division by zero) is an error
// too.
#pragma once
#include <csignal>
#include <memory>

namespace tokenstep::simt {

// Catches the signals while it lives; a fault outside of a kernel gets the handler that was there before.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  std::unique_ptr<char[]> stack_;  // a handler cannot run on a stack that overflowed
  stack_t old_stack_ = {};
};

}  // namespace tokenstep::simt
