// The launch in progress: its blocks, warps and threads, and what ends it when a kernel breaks a rule.
//
// Blocks that may wait for one another (a cluster, or all of a cooperative grid) are a group and run
// together; groups run one after another, in random order, and their accesses are not compared with each
// other.
#pragma once
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/clock.h"
#include "simt/exchange.h"
#include "simt/fiber.h"
#include "simt/launch.h"
#include "simt/scheduler.h"

namespace tokenstep::simt {

struct Block;

// Threads that wait for the rest of their block. Number 0 is that of __syncthreads().
struct Barrier {
  std::vector<Thread*> waiting;
  Where where;
  uint32_t expected = 0;
  uint32_t votes = 0, last_votes = 0;  // of those that have come, and of the time before
};
constexpr uint32_t kBarriers = 16;

// A cluster's barrier has two halves: a thread arrives, may go on, and later waits until all have arrived.
struct SplitBarrier {
  uint32_t phase = 0, arrived = 0;
  std::vector<Thread*> waiting;
  ClockSum known, fenced;            // of those that have arrived in this phase
  ClockRef last_known, last_fenced;  // of the phase before
};

// A warp-wide operation that some of its lanes have reached.
struct Exchange {
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  Where where;
  void* lane[32] = {};  // on the stacks of the lanes that wait
};

// A cp.async in flight.
struct AsyncCopy {
  char* to;
  const char* from;
  uint32_t bytes, from_bytes;  // the rest is filled with zeros
  uint32_t group;              // commits that came before it
};

struct alignas(64) Thread {
  // What every switch and every access needs, in one line of the cache.
  Context context;
  ThreadClock clock;
  Block* block = nullptr;
  uint32_t number = 0;  // in its group

  uint32_t lane = 0;
  Warp* warp = nullptr;
  uint3 index = {};
  const char* waits_for = nullptr;  // null while it runs or may run
  Where where;                      // of its last synchronisation
  bool done = false;
  bool arrived_at_cluster = false;
  uint32_t cluster_phase = 0;  // in which it has arrived
  ClockRef known_at_arrival;
  std::vector<AsyncCopy> copies;  // in flight
  uint32_t copy_groups = 0;       // committed
};

struct Warp {
  uint32_t number = 0;  // in its group
  uint32_t ready = 0;   // lanes that may run, as a mask
  size_t place = 0;     // among the warps with such lanes
  Thread* lane[32] = {};
  uint32_t lanes = 0;  // as a mask
  std::vector<Exchange> pending;
};

struct Cluster {
  SplitBarrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  uint32_t number = 0;  // in its group
  uint3 index = {};
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in its cluster
  std::array<Barrier, kBarriers> barrier;
  std::vector<Warp> warps;
  uint32_t first_thread = 0, running = 0;
  std::vector<uint32_t>
      remote_access;    // by thread of the group: tick of its last access to this block's shared memory
  ClockSum exit_clock;  // what any of its threads knew when it left
};

class Machine {
 public:
  dim3 grid_dim, block_dim;
  Thread* current = nullptr;  // null outside of a kernel

  void run(const LaunchConfig& config, const Kernel& kernel);

  // ---- for the synchronisation primitives, called by the current thread ----
  void yield();               // lets others run
  void maybe_yield();         // sometimes: where another thread's access might come in between
  void wait_in_loop();        // lets others run, of which one must do something before this one can go on
  void maybe_wait_in_loop();  // sometimes: at a load that may be in such a loop
  void park(const char* what, const Where& where);  // until resume()
  void resume(Thread* thread);
  // What each of `threads` did before is now ordered before what each of them does next.
  void order(std::span<Thread* const> threads);

  Thread& thread(uint32_t number) { return threads_[number]; }
  size_t num_threads() const { return num_threads_; }
  uint32_t block_threads() const { return block_dim.x * block_dim.y * block_dim.z; }
  Block& block(uint32_t number) { return blocks_[number]; }
  size_t num_blocks() const { return blocks_.size(); }
  const Stacks& stacks() const { return stacks_; }
  const LaunchConfig& config() const { return *config_; }
  bool is_argument(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(kernel_->arguments) < kernel_->bytes;
  }
  uint32_t first_tick() const { return first_tick_; }

  // Ends the launch with an error that says which kernel, block and thread. Never returns: no argument may
  // own memory.
  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...);
  // The same for the host, when the group has ended.
  [[gnu::format(printf, 3, 4)]] void report(const Thread& thread, const char* format, ...);
  [[noreturn]] void fail_in_signal(const char* what, uintptr_t address);

 private:
  void run_group(uint32_t first_block, uint32_t num_blocks);
  void prepare(uint32_t first_block, uint32_t num_blocks);
  void retire_ticks();
  void leave();
  void run_next();
  [[noreturn]] void abandon();
  [[noreturn]] void fail_deadlock();
  void describe(const Thread& thread);
  void set_error(const Thread& thread, const char* format, va_list args);
  static void entry();

  const LaunchConfig* config_ = nullptr;
  const Kernel* kernel_ = nullptr;
  Context host_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  size_t num_threads_ = 0, unfinished_ = 0;
  uint32_t first_tick_ = 1;

  Scheduler scheduler_;
  std::string error_;
};

extern Machine machine;

std::string location(const Where& where);  // "file:line"
inline bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
inline bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && same_text(a.file_name(), b.file_name());
}

}  // namespace tokenstep::simt
