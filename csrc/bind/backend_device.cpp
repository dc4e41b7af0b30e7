// A GPU, or the emulator of one, as what the shared bindings run on.
#include "bind/backend.h"
#include "common/check.h"
#include "cuda/attention.h"
#include "cuda/kv_append.h"
#include "cuda/runtime.h"
#include "cuda/sample.h"
#ifdef TOKENSTEP_SIMT
#include "bind/simt_buffers.h"
#endif

namespace tokenstep::bind::backend {
namespace {

cuda::Stream stream_of(const Queue& queue) { return {queue.device_id, queue.stream}; }

}  // namespace

#ifdef TOKENSTEP_SIMT
const int kDeviceType = 1;  // the emulator's memory is the host's, but nobody looks into it
const char* const kDeviceName = "cpu";
#else
const int kDeviceType = 2;
const char* const kDeviceName = "cuda";
#endif
const bool kOnHost = false;

size_t workspace_bytes(int num_rows, int vocab_size, const Queue& queue) {
  return cuda::sample_workspace_bytes(num_rows, vocab_size, queue.device_id);
}
void sample(const SampleParams& params, void* workspace, const Queue& queue) {
#ifdef TOKENSTEP_SIMT
  EmulatedBuffers allowed;
  allowed.add(params);
  allowed.add_logits(params);
  allowed.add_workspace(workspace, workspace_bytes(params.num_rows, params.vocab_size, queue));
#endif
  cuda::sample(params, workspace, stream_of(queue));
}
void apply_logits(const ApplyLogitsParams& params, void* workspace, const Queue& queue) {
#ifdef TOKENSTEP_SIMT
  EmulatedBuffers allowed;
  allowed.add(params.sample);
  if (params.out != params.sample.logits) allowed.add_logits(params.sample);
  allowed.add_rows(params.out, params.sample.num_rows, params.out_stride, params.sample.vocab_size);
  allowed.add_workspace(workspace, workspace_bytes(params.sample.num_rows, params.sample.vocab_size, queue));
#endif
  cuda::apply_logits(params, workspace, stream_of(queue));
}
void set_row_fields(const RowFieldsParams& params, const Queue& queue) {
  cuda::set_row_fields(params, stream_of(queue));
}
void update_slot(const SlotUpdate& update, const Queue& queue) {
  cuda::update_slot(update, stream_of(queue));
}

WorkspaceBytes attention_workspace_bytes(const Queue& queue) {
  const cuda::AttentionWorkspaceBytes bytes = cuda::attention_workspace_bytes(queue.device_id);
  return {bytes.total, bytes.zeroed};
}
int judge_sequences(const PagedBatch&, bool, int32_t, std::string&) { return -1; }
void paged_attention(const AttentionParams& params, const Queue& queue) {
#ifdef TOKENSTEP_SIMT
  EmulatedBuffers allowed;
  allowed.add(params);
#endif
  cuda::paged_attention(params, stream_of(queue));
}
void append_kv(const PagedBatch& batch, const Queue& queue) {
#ifdef TOKENSTEP_SIMT
  EmulatedBuffers allowed;
  allowed.add(batch, true);
#endif
  cuda::append_kv(batch, stream_of(queue));
}
void merge_attention(const MergeParams& params, const Queue& queue) {
#ifdef TOKENSTEP_SIMT
  EmulatedBuffers allowed;
  allowed.add(params);
#endif
  cuda::merge_attention(params, stream_of(queue));
}

void Deleter::operator()(void* memory) const { cuda::deallocate(memory, device_id); }

Memory allocate_zeroed(size_t bytes, const Queue& queue) {
  return Memory(cuda::allocate_zeroed(bytes, stream_of(queue)), Deleter{queue.device_id});
}
void zero(void* memory, size_t bytes, const Queue& queue) { cuda::zero(memory, bytes, stream_of(queue)); }
void copy_to_device(void* to, const void* from, size_t bytes, const Queue& queue) {
  cuda::copy_to_device(to, from, bytes, stream_of(queue));
}
void copy_to_host(void* to, const void* from, size_t bytes, const Queue& queue) {
  cuda::copy_to_host(to, from, bytes, stream_of(queue));
}

Staging::Staging(size_t bytes, const Queue& queue)
    : data_(cuda::stage(bytes, stream_of(queue))), queue_(queue) {}
Staging::~Staging() { cuda::unstage(data_, stream_of(queue_)); }

void refuse_capture(const char* op, const Queue& queue) {
  if (cuda::is_capturing(stream_of(queue)))
    throw std::runtime_error(
        std::string("tokenstep.") + op +
        ": the stream is being captured: a graph would repeat the values of now, expected a "
        "call outside of the capture (Sampler.step can be captured)");
}

}  // namespace tokenstep::bind::backend
