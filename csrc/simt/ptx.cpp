#include "simt/ptx.h"

#include <algorithm>

#include "simt/machine.h"
#include "simt/memory.h"

namespace tokenstep::simt {

char* shared_memory() { return memory.shared(*machine.current->block); }
uint32_t cluster_rank() { return machine.current->block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(machine.current->block->cluster->blocks.size()); }
char* peer(const void* address, uint32_t rank) { return memory.peer(address, rank); }

void load_noncoherent(const void* from, void* to, size_t bytes) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  if (memory.is_shared(reinterpret_cast<uintptr_t>(from)))
    machine.fail("non-coherent read of shared memory at %s", code_tag(code).chars);
  memory.expect_aligned(from, bytes, code);
  memory.access(from, bytes, Access::kNonCoherentRead, code);
  memcpy(to, from, bytes);
}

// ---- cp.async: what it copies arrives only when it is waited for, so that a missing wait shows ------------

void copy_async(void* to, const void* from, size_t bytes, size_t from_bytes) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  Thread& me = *machine.current;
  if (!memory.is_shared(reinterpret_cast<uintptr_t>(to)))
    machine.fail("cp.async to %s, expected shared memory, at %s", "global memory", code_tag(code).chars);
  memory.expect_aligned(to, bytes, code);
  memory.expect_aligned(from, bytes, code);
  if (from_bytes) memory.access(from, from_bytes, Access::kRead, code);
  memory.access(to, bytes, Access::kAsyncWrite, code);
  me.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), static_cast<uint32_t>(bytes),
                       static_cast<uint32_t>(from_bytes), me.copy_groups});
}

void commit_copies() { ++machine.current->copy_groups; }

void wait_for_copies(uint32_t groups_in_flight) {
  const uint32_t code = code_offset(__builtin_return_address(0));
  Thread& me = *machine.current;
  const auto is_due = [&](const AsyncCopy& copy) { return copy.group + groups_in_flight < me.copy_groups; };
  for (const AsyncCopy& copy : me.copies) {
    if (!is_due(copy)) continue;
    if (copy.from_bytes) memory.access(copy.from, copy.from_bytes, Access::kRead, code);
    memcpy(copy.to, copy.from, copy.from_bytes);
    memset(copy.to + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
    memory.deliver(copy.to, copy.bytes, code);
  }
  std::erase_if(me.copies, is_due);
}

}  // namespace tokenstep::simt
