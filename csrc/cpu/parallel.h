// parallel_for: the one way in which CPU kernels use threads. Results never depend on how many there are.
#pragma once
#include <memory>
#include <type_traits>

namespace tokenstep::cpu {

// A borrowed callable `void(int task)`, without allocation.
class TaskRef {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, TaskRef>>>
  TaskRef(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, int task) { (*static_cast<std::remove_reference_t<F>*>(object))(task); }) {}
  void operator()(int task) const { call_(object_, task); }

 private:
  void* object_;
  void (*call_)(void*, int);
};

// Runs f(0) ... f(num_tasks - 1), each once, on up to num_threads() threads, the caller's among them.
// Tasks may run in any order. They must not throw.
void parallel_for(int num_tasks, TaskRef f);

int num_threads();  // TOKENSTEP_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs this process may use
void set_num_threads(int n);                // n >= 1
const char* thread_backend();               // "openmp" (the runtime already in the process) or "pool"
void set_thread_backend(const char* name);  // "auto", "pool" or "openmp"; for measurements

}  // namespace tokenstep::cpu
