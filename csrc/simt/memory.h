// The memory that kernels see, and its shadow. Kernels are compiled with the instrumentation of
// -fsanitize=thread, which calls the emulator (instrument.cpp) at every load and store: plain C++ pointers
// are checked, and kernels need no accessors. Errors are
//
// - in shared memory: reads of bytes that nobody wrote; accesses out of bounds, to a block outside of the
//   cluster, to one that may not have started or may have left; races between threads of the cluster;
// - in global memory: accesses outside of the launch's buffers, writes to read-only ones; non-coherent loads
//   of what the launch wrote; races between threads of a group, with fences and atomics taken into account;
// - in both: misaligned accesses; touching bytes that a cp.async has not delivered yet.
//
// What the compiler leaves as a call of memcpy() or memset() is not seen.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simt/clock.h"
#include "simt/machine.h"
#include "simt/source_lines.h"

namespace tokenstep::simt {

enum class Access : uint8_t {
  kRead,
  kWrite,
  kStrongRead,       // atomic or volatile: no race with another strong access
  kStrongWrite,      // also read-modify-write
  kNonCoherentRead,  // may see what was there before the launch
  kAsyncWrite,       // a cp.async on its way
};

// Who accessed some bytes of a word last, and where in the program.
struct Stamp {
  uint32_t tick = 0;  // below the group's first tick: long ago
  uint32_t code = 0;  // see source_lines.h
  uint16_t thread = 0;
  uint8_t bytes = 0;  // as a mask
  Access access = Access::kRead;
};

// The shadow of one aligned 4-byte word. A strong write does not displace a plain one: another strong write
// conflicts with the plain one alone. Of the reads since the last write two are kept, from different warps if
// any: whoever writes next is then compared with a reader of another warp, or at least of another lane.
struct Word {
  Stamp write, strong_write, read[2];
  uint32_t written_in = 0;  // first tick of the group that `written` belongs to
  uint8_t written = 0;      // bytes that have a value, as a mask
};

class Memory {
 public:
  void begin_launch(const LaunchConfig& config);
  void end_launch();
  void begin_group(std::vector<Block>& blocks, size_t num_threads);
  void end_block(Block& block);
  void end_group();
  void forget();

  char* shared(const Block& block) const { return shared_.get() + kGap + block.number * shared_stride_; }
  bool is_shared(uintptr_t address) const { return address - shared_begin() < shared_size_; }

  // The current thread is about to access memory, at `code` in the program; ends the launch if it must not.
  void access(const void* address, size_t bytes, Access access, uint32_t code);
  void expect_aligned(const void* address, size_t alignment, uint32_t code) {
    if (reinterpret_cast<uintptr_t>(address) & (alignment - 1)) fail_misaligned(address, alignment, code);
  }
  // A cp.async of the current thread has been waited for: the bytes are there.
  void deliver(const void* address, size_t bytes, uint32_t code);
  // The shared memory that holds `address`, of the block with another rank in the cluster.
  char* peer(const void* address, uint32_t rank);

  // What was published at a global address by fenced atomics and releasing stores.
  ClockRef& published(const void* address) { return published_[reinterpret_cast<uintptr_t>(address)]; }
  ClockRef* find_published(const void* address);

 private:
  static constexpr size_t kGap = 4096;  // around each block's shared memory
  struct Page {
    Word words[1024];
  };
  uintptr_t shared_begin() const { return reinterpret_cast<uintptr_t>(shared_.get()); }
  Word& shared_word(uintptr_t address) { return shared_words_[(address - shared_begin()) / 4]; }
  Word& global_word(uintptr_t address);
  void check_shared_range(uintptr_t address, size_t bytes, Access access, uint32_t code);
  bool check_buffers(uintptr_t address, size_t bytes, Access access, uint32_t code);
  void touch(Word& word, uint8_t bytes, Access access, uint32_t code, uintptr_t address);
  void record(Word& word, const Stamp& stamp);
  Text describe(uintptr_t address) const;
  [[noreturn]] void fail_misaligned(const void* address, size_t alignment, uint32_t code);
  [[noreturn]] void fail_race(const Stamp& before, Access access, uint32_t code, uintptr_t address);

  struct Free {
    void operator()(void* p) const { ::free(p); }
  };
  std::unique_ptr<char[], Free> shared_;
  size_t shared_stride_ = 0, shared_size_ = 0, shared_bytes_ = 0, shared_capacity_ = 0;
  std::vector<Word> shared_words_;
  std::vector<Block>* blocks_ = nullptr;

  std::vector<Buffer> buffers_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  struct CachedPage {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::vector<CachedPage> page_cache_;
  std::unordered_map<uintptr_t, ClockRef> published_;
};

extern Memory memory;

}  // namespace tokenstep::simt
