// Two backends. If an OpenMP runtime is in the process (torch brings one), its workers are used: they spin
// for a while after each of torch's own regions, and a second set of threads would fight them for the cores.
// It is found by its soname, not linked: the wheel then needs no OpenMP library, and there is never a second
// runtime. Otherwise a small pool of our own.
#include "cpu/parallel.h"

#include <dlfcn.h>
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

Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: its detached threads may outlive static destructors
  return *pool;
}

// libgomp's entry point, also offered by LLVM's and Intel's runtimes.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_openmp() {
  for (const char* soname : {"libgomp.so.1", "libiomp5.so", "libomp.so"}) {
    void* library = dlopen(soname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) continue;
    if (void* symbol = dlsym(library, "GOMP_parallel")) return reinterpret_cast<GompParallel>(symbol);
    dlclose(library);
  }
  return nullptr;
}

enum class Backend { kAuto, kPool, kOpenMp };
std::atomic<Backend> backend{Backend::kAuto};

GompParallel openmp() {
  if (backend.load(std::memory_order_relaxed) == Backend::kPool) return nullptr;
  static std::atomic<GompParallel> found{nullptr};
  GompParallel entry = found.load(std::memory_order_acquire);
  if (!entry && (entry = find_openmp()))
    found.store(entry, std::memory_order_release);  // torch may come later
  return entry;
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

int default_num_threads() {
  for (const char* name : {"TOKENSTEP_NUM_THREADS", "OMP_NUM_THREADS"})
    if (const int n = positive_int(getenv(name))) return n;
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::atomic<int>& thread_count() {
  static std::atomic<int> count{default_num_threads()};
  return count;
}

thread_local bool inside_task = false;  // a nested region runs on the thread it is in

}  // namespace

void parallel_for(int num_tasks, TaskRef f) {
  const int threads = std::min(num_tasks, num_threads());
  if (threads > 1 && !inside_task) {
    const auto guarded = [&](int task) {
      inside_task = true;
      f(task);
      inside_task = false;
    };
    if (const GompParallel entry = openmp()) {
      const TaskRef task = guarded;
      OpenMpJob job{task, num_tasks};
      entry(run_openmp_job, &job, static_cast<unsigned>(threads), 0);
      return;
    }
    if (pool().run(num_tasks, threads, guarded)) return;
  }
  for (int task = 0; task < num_tasks; ++task) f(task);
}

int num_threads() { return thread_count().load(std::memory_order_relaxed); }

void set_num_threads(int n) {
  if (n < 1) raise<ValueError>("set_num_threads", "n = %d, expected n >= 1", n);
  thread_count().store(n);
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
