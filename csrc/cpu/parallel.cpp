// Two backends. If an OpenMP runtime is in the process (torch brings one), its workers are used: they spin
// for a while after each of torch's own regions, and a second set of threads would fight them for the cores.
// It is found by its soname, not linked: the wheel then needs no OpenMP library, and there is never a second
// runtime. Otherwise a small pool of our own.
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"

namespace tokenstep::cpu {
namespace {

void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Tasks are claimed one by one by the caller and by whichever workers turn up. The caller waits for workers
// that have entered the job, never for one that the operating system has not scheduled yet. Workers spin
// briefly, then sleep.
class Pool {
 public:
  // False if another thread is using the pool: the caller then runs its tasks alone.
  bool run(int num_tasks, int threads, TaskRef task) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; num_workers_ < threads - 1; ++num_workers_)
        std::thread([this, seen = generation_.load()] { work(seen); }).detach();
      task_ = &task;
      num_tasks_ = num_tasks;
      places_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    claim_tasks();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;  // late workers find nothing to enter
    }
    for (int spins = 0; inside_.load(std::memory_order_acquire) != 0; ++spins)
      spins > 4000 ? std::this_thread::yield() : spin_pause();
    return true;
  }

 private:
  void work(uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spins)
        spin_pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (places_ == 0) continue;
        --places_;
        inside_.fetch_add(1, std::memory_order_relaxed);
      }
      claim_tasks();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }
  void claim_tasks() {
    for (int task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) (*task_)(task);
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_;
  int num_workers_ = 0, places_ = 0, num_tasks_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> next_{0}, inside_{0};
  const TaskRef* task_ = nullptr;
};

std::atomic<bool> forked{false};
std::atomic<Pool*> the_pool{nullptr};

// A fork copies no threads: the child's OpenMP runtime would wait for workers that are gone, and the pool's
// mutex may be held by one of them. So the child leaves the runtime and has a new pool.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  the_pool.store(nullptr);
});

// Never destroyed: its detached threads may outlive static destructors.
Pool& pool() {
  if (Pool* pool = the_pool.load(std::memory_order_acquire)) return *pool;
  Pool* made = new Pool;
  Pool* expected = nullptr;
  if (the_pool.compare_exchange_strong(expected, made)) return *made;
  delete made;
  return *expected;
}

// The part of libgomp's interface that is used here; LLVM's and Intel's runtimes offer it too.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*get_max_threads)();
};

const OpenMp* find_openmp() {
  for (const char* soname : {"libgomp.so.1", "libiomp5.so", "libomp.so"}) {
    void* library = dlopen(soname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) continue;
    void* parallel = dlsym(library, "GOMP_parallel");
    void* get_max_threads = dlsym(library, "omp_get_max_threads");
    if (parallel && get_max_threads) {
      static const OpenMp found{reinterpret_cast<decltype(OpenMp::parallel)>(parallel),
                                reinterpret_cast<decltype(OpenMp::get_max_threads)>(get_max_threads)};
      return &found;
    }
    dlclose(library);
  }
  return nullptr;
}

// Libraries that the process has loaded so far: only a new one can bring a runtime.
unsigned long long num_libraries_loaded() {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        *static_cast<unsigned long long*>(data) = info->dlpi_adds;
        return 1;
      },
      &count);
  return count;
}

enum class Backend { kAuto, kPool, kOpenMp };
std::atomic<Backend> backend{Backend::kAuto};

const OpenMp* openmp() {
  if (backend.load(std::memory_order_relaxed) == Backend::kPool || forked.load(std::memory_order_relaxed))
    return nullptr;
  static std::atomic<const OpenMp*> found{nullptr};
  static std::atomic<unsigned long long> looked_at{0};
  if (const OpenMp* runtime = found.load(std::memory_order_acquire)) return runtime;
  const unsigned long long loaded = num_libraries_loaded();  // torch may come later
  if (looked_at.load(std::memory_order_relaxed) == loaded) return nullptr;
  const OpenMp* runtime = find_openmp();
  found.store(runtime, std::memory_order_release);
  looked_at.store(loaded, std::memory_order_relaxed);
  return runtime;
}

struct OpenMpJob {
  const TaskRef& task;
  int num_tasks;
  std::atomic<int> next{0};
};

void run_openmp_job(void* data) {
  OpenMpJob& job = *static_cast<OpenMpJob*>(data);
  for (int task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.num_tasks;) job.task(task);
}

int positive_int(const char* text) {
  const long value = text ? strtol(text, nullptr, 10) : 0;
  return value > 0 && value < 4096 ? static_cast<int>(value) : 0;
}

int threads_of_environment() {
  for (const char* name : {"TOKENSTEP_NUM_THREADS", "OMP_NUM_THREADS"})
    if (const int n = positive_int(getenv(name))) return n;
  return 0;
}

int usable_cpus() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// 0: nobody has said how many.
std::atomic<int>& wanted_threads() {
  static std::atomic<int> count{threads_of_environment()};
  return count;
}

thread_local bool inside_task = false;  // a nested region runs on the thread it is in

}  // namespace

void parallel_for(int num_tasks, TaskRef f) {
  const int threads = num_tasks > 1 && !inside_task ? num_threads() : 1;
  if (threads > 1) {
    const auto guarded = [&](int task) {
      inside_task = true;
      f(task);
      inside_task = false;
    };
    if (const OpenMp* runtime = openmp()) {
      const TaskRef task = guarded;
      OpenMpJob job{task, num_tasks};
      // All threads, though there may be fewer tasks: libgomp ends those that a smaller team leaves out, and
      // torch's next region starts them anew.
      runtime->parallel(run_openmp_job, &job, static_cast<unsigned>(threads), 0);
      return;
    }
    if (pool().run(num_tasks, std::min(threads, num_tasks), guarded)) return;
  }
  for (int task = 0; task < num_tasks; ++task) f(task);
}

int num_threads() {
  if (const int wanted = wanted_threads().load(std::memory_order_relaxed)) return wanted;
  static const int cpus = usable_cpus();
  const OpenMp* runtime = openmp();
  return runtime ? runtime->get_max_threads() : cpus;
}

void set_num_threads(int n) {
  if (n < 1) raise<ValueError>("set_num_threads", "n = %d, expected n >= 1", n);
  wanted_threads().store(n);
}

const char* thread_backend() { return openmp() ? "openmp" : "pool"; }

void set_thread_backend(const char* name) {
  if (strcmp(name, "auto") == 0)
    backend = Backend::kAuto;
  else if (strcmp(name, "pool") == 0)
    backend = Backend::kPool;
  else if (strcmp(name, "openmp") == 0)
    backend = Backend::kOpenMp;
  else
    raise<ValueError>("set_thread_backend", "name = '%s', expected 'auto', 'pool' or 'openmp'", name);
}

}  // namespace tokenstep::cpu
