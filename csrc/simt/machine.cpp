#include "simt/machine.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

#include "simt/memory.h"
#include "simt/signals.h"
#include "simt/source_lines.h"

namespace tokenstep::simt {

Machine machine;

namespace {
constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxBlockThreads = 1024, kMaxGroupThreads = 1 << 16;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90
constexpr uint32_t kLastTick = 1u << 31;

uint32_t count(const dim3& dim) { return dim.x * dim.y * dim.z; }

// Blocks that run together: whole clusters.
uint32_t group_blocks(const LaunchConfig& config) {
  if (config.cooperative) return count(config.grid);
  return std::max(1u, config.together / config.cluster) * config.cluster;
}

void check_config(const LaunchConfig& config) {
  const auto refuse = [&](const char* why) { throw Error("simt: kernel " + config.name + ": " + why); };
  const uint32_t threads = count(config.block);
  if (threads == 0 || threads > kMaxBlockThreads) refuse("a block must have 1 to 1024 threads");
  if (count(config.grid) == 0) refuse("the grid is empty");
  if (config.shared_bytes > kMaxSharedBytes) refuse("more than 227 KB of shared memory");
  if (config.cluster == 0 || config.cluster > 16) refuse("a cluster must have 1 to 16 blocks");
  if (config.grid.x % config.cluster) refuse("the grid's width is not a multiple of the cluster's");
  if (uint64_t{threads} * std::min(group_blocks(config), count(config.grid)) > kMaxGroupThreads)
    refuse("more than 65536 threads would have to run together");
}

uint3 position(uint32_t number, const dim3& in) {
  return {number % in.x, number / in.x % in.y, number / in.x / in.y};
}
}  // namespace

void run(const LaunchConfig& config, const Kernel& kernel) { machine.run(config, kernel); }

void Machine::run(const LaunchConfig& config, const Kernel& kernel) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  check_config(config);
  config_ = &config;
  kernel_ = &kernel;
  grid_dim = config.grid;
  block_dim = config.block;
  scheduler_.random = Random(config.seed);
  error_.clear();
  const SignalGuard signals;
  memory.begin_launch(config);

  const uint32_t num_blocks = count(config.grid), group = group_blocks(config);
  std::vector<uint32_t> starts;
  for (uint32_t block = 0; block < num_blocks; block += group) starts.push_back(block);
  for (size_t i = starts.size(); i > 1; --i) std::swap(starts[i - 1], starts[scheduler_.random.below(i)]);
  for (const uint32_t start : starts) {
    run_group(start, std::min(group, num_blocks - start));
    if (!error_.empty()) break;
  }
  memory.end_launch();
  retire_ticks();
  blocks_.clear();
  clusters_.clear();
  if (!error_.empty()) throw Error(with_source_lines(error_));
}

void Machine::prepare(uint32_t first_block, uint32_t num_blocks) {
  retire_ticks();
  const uint32_t block_threads = this->block_threads();
  num_threads_ = unfinished_ = num_blocks * block_threads;
  if (threads_.size() < num_threads_) {
    threads_.resize(num_threads_);
    stacks_.reserve(num_threads_);
  }
  blocks_.assign(num_blocks, {});
  clusters_.assign(num_blocks / config_->cluster, {});
  const uint32_t block_warps = (block_threads + kWarp - 1) / kWarp;
  scheduler_.start(num_blocks * block_warps, block_warps);
  const ClockRef start = ClockRef::filled(num_threads_, first_tick_ - 1);

  for (uint32_t b = 0; b < blocks_.size(); ++b) {
    Block& block = blocks_[b];
    block.number = b;
    block.index = position(first_block + b, grid_dim);
    block.cluster = &clusters_[b / config_->cluster];
    block.rank = b % config_->cluster;
    block.cluster->blocks.push_back(&block);
    block.first_thread = b * block_threads;
    block.running = block_threads;
    block.warps.resize(block_warps);
    for (uint32_t w = 0; w < block_warps; ++w) block.warps[w].number = b * block_warps + w;
    for (uint32_t t = 0; t < block_threads; ++t) {
      Thread& thread = threads_[block.first_thread + t];
      Warp& warp = block.warps[t / kWarp];
      thread = {};
      thread.number = block.first_thread + t;
      thread.lane = t % kWarp;
      thread.index = position(t, block_dim);
      thread.warp = &warp;
      thread.block = &block;
      thread.clock.known = start;
      thread.clock.tick = first_tick_;
      thread.context.start(stacks_.low(thread.number), stacks_.bytes(thread.number), &Machine::entry);
      warp.lane[thread.lane] = &thread;
      warp.lanes |= 1u << thread.lane;
      scheduler_.add(&thread);
    }
  }
  memory.begin_group(blocks_, num_threads_);
}

// Ends a group. Ticks go on from one to the next: what is left in the shadow of memory is seen to be old.
void Machine::retire_ticks() {
  uint32_t last_tick = first_tick_;
  for (Thread& thread : std::span(threads_).first(num_threads_)) {
    last_tick = std::max(last_tick, thread.clock.tick);
    thread.clock = {};
    thread.known_at_arrival = {};
    thread.copies.clear();
  }
  first_tick_ = last_tick + 1;
  if (first_tick_ < kLastTick) return;
  memory.forget();
  first_tick_ = 1;
}

void Machine::run_group(uint32_t first_block, uint32_t num_blocks) {
  prepare(first_block, num_blocks);
  current = scheduler_.next();
  Context::switch_to(host_, current->context);
  current = nullptr;
  if (error_.empty()) memory.end_group();
}

void Machine::entry() {
  machine.kernel_->call(machine.kernel_->arguments);
  machine.leave();
}

void Machine::leave() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (!thread.copies.empty()) fail("it left the kernel before its cp.async copies were waited for");
  thread.done = true;
  if (block.cluster->blocks.size() > 1)
    block.exit_clock.add(thread.clock.known, thread.number, thread.clock.tick);
  if (--block.running == 0) memory.end_block(block);
  if (--unfinished_ == 0) abandon();
  run_next();
}

// ---- who runs next ----------------------------------------------------------------------------------------

void Machine::run_next() {
  Thread* const thread = scheduler_.next();
  if (!thread) fail_deadlock();
  Thread* const previous = std::exchange(current, thread);
  if (thread != previous) Context::switch_to(previous->context, thread->context);
}

void Machine::yield() {
  scheduler_.add(current);
  run_next();
}

void Machine::wait_in_loop() {
  scheduler_.add_waiting(current);
  if (scheduler_.stuck()) fail("deadlock: every thread that can run waits in a loop for another one");
  run_next();
}

void Machine::maybe_yield() {
  if (scheduler_.random.below(16) == 0) yield();
}

void Machine::maybe_wait_in_loop() {
  if (scheduler_.random.below(16) == 0) wait_in_loop();
}

void Machine::park(const char* what, const Where& where) {
  current->waits_for = what;
  current->where = where;
  run_next();
}

void Machine::resume(Thread* thread) {
  thread->waits_for = nullptr;
  scheduler_.add(thread);
}

void Machine::order(std::span<Thread* const> threads) {
  ClockSum known_sum, fenced_sum;
  for (const Thread* thread : threads) {
    const ThreadClock& clock = thread->clock;
    known_sum.add(clock.known, thread->number, clock.tick);
    fenced_sum.add(clock.fenced, thread->number, clock.fenced_tick);
  }
  const ClockRef known = known_sum.take(), fenced = fenced_sum.take();
  for (Thread* thread : threads) {
    thread->clock.known = known;
    thread->clock.fenced = fenced;
    ++thread->clock.tick;
  }
}

// ---- errors -----------------------------------------------------------------------------------------------

// Leaves the fiber for good. Nothing on a fiber's stack owns anything: neither device code nor the emulator
// may hold memory there while another fiber can run.
void Machine::abandon() {
  Context::switch_to(current->context, host_);
  __builtin_unreachable();
}

void Machine::describe(const Thread& thread) {
  char text[160];
  const uint3 &block = thread.block->index, &index = thread.index;
  snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z, index.x,
           index.y, index.z);
  error_ += text;
}

void Machine::set_error(const Thread& thread, const char* format, va_list args) {
  error_ = "simt: kernel " + config_->name + ", ";
  describe(thread);
  char text[1024];
  vsnprintf(text, sizeof text, format, args);
  error_.append(": ").append(text);
}

void Machine::report(const Thread& thread, const char* format, ...) {
  va_list args;
  va_start(args, format);
  set_error(thread, format, args);
  va_end(args);
}

void Machine::fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  set_error(*current, format, args);
  va_end(args);
  abandon();
}

void Machine::fail_in_signal(const char* what, uintptr_t address) {
  if (stacks_.contains(address)) fail("stack overflow");
  fail("%s at address 0x%zx", what, static_cast<size_t>(address));
}

void Machine::fail_deadlock() {
  error_ = "simt: kernel " + config_->name + ", deadlock: nobody can run.";
  struct Group {
    const Thread* first;
    size_t count;
  };
  {
    std::map<std::string, Group> groups;
    for (size_t i = 0; i < num_threads_; ++i) {
      const Thread& thread = threads_[i];
      const std::string state =
          thread.done ? "left the kernel"
                      : std::string("waits at ") + thread.waits_for + " (" + location(thread.where) + ")";
      ++groups.try_emplace(state, &thread, 0).first->second.count;
    }
    for (const auto& [state, group] : groups) {
      error_ += " ";
      describe(*group.first);
      if (group.count > 1) error_ += " and " + std::to_string(group.count - 1) + " more";
      error_ += ": " + state + ".";
    }
  }
  abandon();
}

std::string location(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

}  // namespace tokenstep::simt
