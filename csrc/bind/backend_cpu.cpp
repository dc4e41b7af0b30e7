// The CPU as what the shared bindings run on.
#include <cstdlib>
#include <cstring>
#include <new>

#include "bind/backend.h"
#include "common/sampling_history.h"
#include "cpu/attention.h"
#include "cpu/sample.h"

namespace tokenstep::bind::backend {

const int kDeviceType = 1;
const char* const kDeviceName = "cpu";
const bool kOnHost = true;

size_t workspace_bytes(int, int, const Queue&) { return 0; }
void sample(const SampleParams& params, void*, const Queue&) { cpu::sample(params); }
void apply_logits(const ApplyLogitsParams& params, void*, const Queue&) { cpu::apply_logits(params); }
void set_row_fields(const RowFieldsParams&, const Queue&) {}  // the host has read all arrays

void update_slot(const SlotUpdate& update, const Queue&) {
  clear_history(*update.slot, 0, 1);
  fill_lists(update, 0, 1);
  *update.slot = update.row;
}

WorkspaceBytes attention_workspace_bytes(const Queue&) { return {}; }
int judge_sequences(const PagedBatch& batch, bool attends, int32_t window, std::string& why) {
  return cpu::check_sequences(batch, attends, window, batch.status, why);
}
void paged_attention(const AttentionParams& params, const Queue&) {
  cpu::paged_attention(params, params.batch.status);
}
void append_kv(const PagedBatch& batch, const Queue&) { cpu::append_kv(batch, batch.status); }
void merge_attention(const MergeParams& params, const Queue&) { cpu::merge_attention(params); }

void Deleter::operator()(void* memory) const { std::free(memory); }

Memory allocate_zeroed(size_t bytes, const Queue&) {
  void* const memory = std::calloc(bytes, 1);
  if (!memory) throw std::bad_alloc();
  return Memory(memory);
}
void zero(void* memory, size_t bytes, const Queue&) { memset(memory, 0, bytes); }
void copy_to_device(void* to, const void* from, size_t bytes, const Queue&) { memcpy(to, from, bytes); }
void copy_to_host(void* to, const void* from, size_t bytes, const Queue&) { memcpy(to, from, bytes); }

Staging::Staging(size_t bytes, const Queue& queue) : data_(::operator new(bytes)), queue_(queue) {}
Staging::~Staging() { ::operator delete(data_); }

void refuse_capture(const char*, const Queue&) {}

}  // namespace tokenstep::bind::backend
