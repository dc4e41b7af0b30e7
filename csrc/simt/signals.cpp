#include "simt/signals.h"

#include <array>

#include "simt/machine.h"

namespace tokenstep::simt {
namespace {

constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t kStackBytes = 64 << 10;
std::array<struct sigaction, kSignals.size()> old_actions;

void on_fault(int signal, siginfo_t* info, void*) {
  if (!machine.current) {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
    return;  // the instruction faults again
  }
  // Leaves the handler by switching to the host's context. No signal is blocked meanwhile (SA_NODEFER).
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (signal == SIGFPE) machine.fail("integer division by zero");
  machine.fail_in_signal(signal == SIGILL ? "illegal instruction" : "access to memory that is not mapped",
                         address);
}

}  // namespace

SignalGuard::SignalGuard() : stack_(new char[kStackBytes]) {
  const stack_t stack = {.ss_sp = stack_.get(), .ss_flags = 0, .ss_size = kStackBytes};
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

SignalGuard::~SignalGuard() {
  for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace tokenstep::simt
