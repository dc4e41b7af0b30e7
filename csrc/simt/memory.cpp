#include "simt/memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "simt/source_lines.h"

namespace tokenstep::simt {

Memory memory;

namespace {
constexpr size_t kAlignment = 1024;  // of shared memory
constexpr size_t kPageBytes = 4096, kCachedPages = 4096;
constexpr char kUnwritten = static_cast<char>(0xff), kLeft = static_cast<char>(0xee);  // NaN and -1; neither

bool is_write(Access access) {
  return access == Access::kWrite || access == Access::kStrongWrite || access == Access::kAsyncWrite;
}
bool is_strong(Access access) { return access == Access::kStrongRead || access == Access::kStrongWrite; }

const char* name_of(Access access) {
  switch (access) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kStrongRead:
      return "atomic or volatile read";
    case Access::kStrongWrite:
      return "atomic or volatile write";
    case Access::kNonCoherentRead:
      return "non-coherent read";
    case Access::kAsyncWrite:
      return "cp.async write";
  }
  return "access";
}

// Calls f(address of the word, mask of the bytes in it) for the aligned words of a range.
template <class F>
void for_each_word(uintptr_t address, size_t bytes, F f) {
  const uintptr_t end = address + bytes;
  for (uintptr_t word = address & ~uintptr_t{3}; word < end; word += 4) {
    uint8_t mask = 0xf;
    if (word < address) mask &= static_cast<uint8_t>(0xf << (address - word));
    if (end - word < 4) mask &= static_cast<uint8_t>(0xf >> (4 - (end - word)));
    f(word, mask);
  }
}
}  // namespace

// ---- the life of a launch ---------------------------------------------------------------------------------

void Memory::begin_launch(const LaunchConfig& config) {
  shared_bytes_ = config.shared_bytes;
  shared_stride_ = (shared_bytes_ + kAlignment - 1) / kAlignment * kAlignment + kGap;
  buffers_ = config.buffers;
  std::sort(buffers_.begin(), buffers_.end(),
            [](const Buffer& a, const Buffer& b) { return std::less<>()(a.data, b.data); });
}

void Memory::begin_group(std::vector<Block>& blocks, size_t num_threads) {
  blocks_ = &blocks;
  published_.clear();
  shared_size_ = blocks.size() * shared_stride_ + kGap;  // and after the last
  if (shared_capacity_ < shared_size_) {
    shared_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, shared_size_)));
    if (!shared_) throw std::bad_alloc();
    shared_capacity_ = shared_size_;
    shared_words_.assign(shared_size_ / 4, {});
  }
  for (Block& block : blocks) {
    memset(shared(block), kUnwritten, shared_bytes_);
    if (block.cluster->blocks.size() > 1) block.remote_access.assign(num_threads, 0);
  }
}

// Shared memory is gone when the last thread of its block has left.
void Memory::end_block(Block& block) { memset(shared(block), kLeft, shared_bytes_); }

// Whoever accessed another block's shared memory must have met that block once more before it left.
void Memory::end_group() {
  for (Block& block : *blocks_) {
    const ClockRef exit_clock = block.exit_clock.take();
    for (uint32_t number = 0; number < block.remote_access.size(); ++number) {
      if (block.remote_access[number] <= exit_clock[number]) continue;
      machine.report(machine.thread(number),
                     "it accesses the shared memory of block (%u, %u, %u), which may have left by then: no "
                     "cluster barrier "
                     "keeps that block until the access is done",
                     block.index.x, block.index.y, block.index.z);
      return;
    }
  }
}

void Memory::end_launch() {
  blocks_ = nullptr;
  published_.clear();
  shared_size_ = 0;
}

void Memory::forget() {
  std::fill(shared_words_.begin(), shared_words_.end(), Word());
  pages_.clear();
  page_cache_.clear();
}

// ---- accesses ---------------------------------------------------------------------------------------------

void Memory::access(const void* pointer, size_t bytes, Access access, uint32_t code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_shared(address)) {
    check_shared_range(address, bytes, access, code);
    for_each_word(address, bytes,
                  [&](uintptr_t at, uint8_t mask) { touch(shared_word(at), mask, access, code, at); });
  } else if (!machine.stacks().contains(address) && !in_module(address) && !machine.is_argument(address)) {
    if (!check_buffers(address, bytes, access, code)) return;
    for_each_word(address, bytes,
                  [&](uintptr_t at, uint8_t mask) { touch(global_word(at), mask, access, code, at); });
  }
}

void Memory::check_shared_range(uintptr_t address, size_t bytes, Access access, uint32_t code) {
  const Thread& me = *machine.current;
  const auto offset_in = [&](const Block& b) {
    return static_cast<ptrdiff_t>(address - reinterpret_cast<uintptr_t>(shared(b)));
  };
  const auto fits = [&](ptrdiff_t offset) {
    return offset >= 0 && offset + static_cast<ptrdiff_t>(bytes) <= static_cast<ptrdiff_t>(shared_bytes_);
  };
  const ptrdiff_t own = offset_in(*me.block);
  if (fits(own)) return;
  Block& block = (*blocks_)[std::min((address - shared_begin()) / shared_stride_, blocks_->size() - 1)];
  if (!fits(offset_in(block))) {
    const bool is_near = own >= -static_cast<ptrdiff_t>(kGap) && own < static_cast<ptrdiff_t>(shared_stride_);
    machine.fail("%s out of bounds: %zu bytes at byte %td of %zu bytes of shared memory, at %s",
                 name_of(access), bytes, is_near ? own : offset_in(block), shared_bytes_,
                 code_tag(code).chars);
  }
  const char* why = block.cluster != me.block->cluster ? "is not in its cluster"
                    : block.running == 0               ? "has left"
                    : !me.clock.knows(block.first_thread, machine.first_tick())
                        ? "may not have started: no cluster barrier precedes the access"
                        : nullptr;
  if (why)
    machine.fail("%s of the shared memory of block (%u, %u, %u), which %s, at %s", name_of(access),
                 block.index.x, block.index.y, block.index.z, why, code_tag(code).chars);
  block.remote_access[me.number] = me.clock.tick;
}

// Whether the memory may be written: if nobody may, there are no races to look for.
bool Memory::check_buffers(uintptr_t address, size_t bytes, Access access, uint32_t code) {
  if (buffers_.empty()) return true;
  auto after = std::upper_bound(
      buffers_.begin(), buffers_.end(), address,
      [](uintptr_t at, const Buffer& buffer) { return at < reinterpret_cast<uintptr_t>(buffer.data); });
  const Buffer* buffer = after == buffers_.begin() ? nullptr : &*--after;
  const uintptr_t offset = buffer ? address - reinterpret_cast<uintptr_t>(buffer->data) : 0;
  if (!buffer)
    machine.fail("%s out of bounds: address 0x%zx is in no buffer of the launch, at %s", name_of(access),
                 address, code_tag(code).chars);
  if (offset + bytes > buffer->bytes)
    machine.fail("%s out of bounds: bytes %zu to %zu of a buffer of %zu bytes, at %s", name_of(access),
                 offset, offset + bytes - 1, buffer->bytes, code_tag(code).chars);
  if (is_write(access) && !buffer->writable)
    machine.fail("%s to a read-only buffer, byte %zu of %zu, at %s", name_of(access), offset, buffer->bytes,
                 code_tag(code).chars);
  return buffer->writable;
}

Word& Memory::global_word(uintptr_t address) {
  if (page_cache_.empty()) page_cache_.resize(kCachedPages);
  const uintptr_t number = address / kPageBytes;
  CachedPage& cached = page_cache_[number % kCachedPages];
  if (cached.number != number) {
    std::unique_ptr<Page>& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    cached = {number, page.get()};
  }
  return cached.page->words[address % kPageBytes / 4];
}

void Memory::touch(Word& word, uint8_t bytes, Access access, uint32_t code, uintptr_t address) {
  const Thread& me = *machine.current;
  const uint32_t first = machine.first_tick();
  const auto is_recent = [&](const Stamp& stamp) { return stamp.tick >= first && (stamp.bytes & bytes); };
  const auto races_with = [&](const Stamp& stamp) {
    return is_recent(stamp) && stamp.thread != me.number && !me.clock.knows(stamp.thread, stamp.tick) &&
           !(is_strong(access) && is_strong(stamp.access));
  };
  if (is_recent(word.write) && word.write.access == Access::kAsyncWrite)
    machine.fail("%s of %s at %s before the cp.async that writes there, at %s, has been waited for",
                 name_of(access), describe(address).chars, code_tag(code).chars,
                 code_tag(word.write.code).chars);
  for (const Stamp& write : {word.write, word.strong_write}) {
    if (access == Access::kNonCoherentRead && is_recent(write))
      machine.fail("non-coherent read at %s of %s, which this launch wrote at %s", code_tag(code).chars,
                   describe(address).chars, code_tag(write.code).chars);
    if (races_with(write)) fail_race(write, access, code, address);
  }
  if (is_write(access)) {
    for (const Stamp& read : word.read)
      if (races_with(read)) fail_race(read, access, code, address);
  } else if (is_shared(address) && (word.written_in != first || (word.written & bytes) != bytes)) {
    machine.fail("read of %s at %s, which nobody has written", describe(address).chars, code_tag(code).chars);
  }
  record(word, {me.clock.tick, code, static_cast<uint16_t>(me.number), bytes, access});
}

void Memory::record(Word& word, const Stamp& now) {
  const uint32_t first = machine.first_tick();
  if (is_write(now.access)) {
    (is_strong(now.access) ? word.strong_write : word.write) = now;
    if (word.written_in != first) word.written = 0;
    word.written_in = first;
    word.written |= now.bytes;
    return;
  }
  for (Stamp& read : word.read) {
    if (read.tick >= first && read.thread != now.thread) continue;
    const bool says_more = read.tick >= first && !is_strong(read.access) && is_strong(now.access);
    if (!says_more) read = now;
    return;
  }
  const bool same_warp = machine.thread(word.read[0].thread).warp == machine.thread(now.thread).warp;
  word.read[same_warp ? 0 : 1] = now;
}

void Memory::deliver(const void* pointer, size_t bytes, uint32_t code) {
  const Thread& me = *machine.current;
  for_each_word(reinterpret_cast<uintptr_t>(pointer), bytes, [&](uintptr_t at, uint8_t mask) {
    shared_word(at).write = {me.clock.tick, code, static_cast<uint16_t>(me.number), mask, Access::kWrite};
  });
}

char* Memory::peer(const void* pointer, uint32_t rank) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const Block& mine = *machine.current->block;
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared(mine));
  if (offset >= shared_bytes_)
    machine.fail("a peer's address is asked for a pointer that is not to own shared memory");
  if (rank >= mine.cluster->blocks.size())
    machine.fail("a peer's address is asked for rank %u of a cluster of %zu blocks", rank,
                 mine.cluster->blocks.size());
  return shared(*mine.cluster->blocks[rank]) + offset;
}

ClockRef* Memory::find_published(const void* address) {
  const auto found = published_.find(reinterpret_cast<uintptr_t>(address));
  return found == published_.end() ? nullptr : &found->second;
}

// ---- messages ---------------------------------------------------------------------------------------------

Text Memory::describe(uintptr_t address) const {
  if (!is_shared(address)) return {"global memory at 0x%zx", static_cast<size_t>(address)};
  return {"shared memory at byte %zu", (address - shared_begin()) % shared_stride_ - kGap};
}

void Memory::fail_misaligned(const void* address, size_t alignment, uint32_t code) {
  machine.fail("misaligned access to %s, %zu bytes at %s",
               describe(reinterpret_cast<uintptr_t>(address)).chars, alignment, code_tag(code).chars);
}

void Memory::fail_race(const Stamp& before, Access access, uint32_t code, uintptr_t address) {
  const Thread& other = machine.thread(before.thread);
  const uint3 &block = other.block->index, &index = other.index;
  machine.fail(
      "race on %s: its %s at %s and the %s by block (%u, %u, %u), thread (%u, %u, %u) at %s are not ordered",
      describe(address).chars, name_of(access), code_tag(code).chars, name_of(before.access), block.x,
      block.y, block.z, index.x, index.y, index.z, code_tag(before.code).chars);
}

}  // namespace tokenstep::simt
