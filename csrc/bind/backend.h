// What the shared bindings of a module run on. A module links one implementation: backend_cpu.cpp, or
// backend_device.cpp for a GPU and for the emulator of one.
#pragma once
#include <cstddef>
#include <memory>
#include <string>

#include "common/params.h"

namespace tokenstep::bind::backend {

// DLPack's type of the device whose tensors the module takes, and its name.
extern const int kDeviceType;
extern const char* const kDeviceName;

// The kernels' memory is the host's, and idle between calls: arrays are checked before anything runs.
// Otherwise the host reads no tensor, and what only the device knows is checked there
// (SampleStatus::kBadParameter).
extern const bool kOnHost;

// Where the work of a call goes; work of one queue runs in the order in which it was given.
struct Queue {
  int device_id = 0;
  void* stream = nullptr;
};

// ---- the ops --------------------------------------------------------------------------------------------
// Bytes of memory that a call of these sizes needs beside its arguments. It starts zeroed, later calls find
// it as the last one left it, and no two may use it at once.
size_t workspace_bytes(int num_rows, int vocab_size, const Queue& queue);
void sample(const SampleParams& params, void* workspace, const Queue& queue);
void apply_logits(const ApplyLogitsParams& params, void* workspace, const Queue& queue);
void set_row_fields(const RowFieldsParams& params, const Queue& queue);
void update_slot(const SlotUpdate& update, const Queue& queue);

// Memory that paged_attention needs beside its arguments, whatever their sizes. The first `zeroed` bytes
// start zeroed, later calls find them as the last one left them; no two calls may use it at once.
struct WorkspaceBytes {
  size_t total = 0, zeroed = 0;
};
WorkspaceBytes attention_workspace_bytes(const Queue& queue);

// On the host: judges lengths and block ids (cpu/attention.h), writes batch.status, which must be given, and
// returns the first bad sequence, or -1. Devices judge in their kernels: nothing happens here, and -1.
int judge_sequences(const PagedBatch& batch, bool attends, int32_t window, std::string& why);
// They obey the host's verdicts, or find their own and write batch.status if it is wanted: a bad sequence
// appends nothing, and gives zeros and lse -inf.
void paged_attention(const AttentionParams& params, const Queue& queue);
void append_kv(const PagedBatch& batch, const Queue& queue);
void merge_attention(const MergeParams& params, const Queue& queue);

// ---- memory of the device -------------------------------------------------------------------------------
struct Deleter {
  int device_id = 0;
  void operator()(void* memory) const;
};
using Memory = std::unique_ptr<void, Deleter>;

Memory allocate_zeroed(size_t bytes,
                       const Queue& queue);  // pages are provided as they are touched, on the CPU
void zero(void* memory, size_t bytes, const Queue& queue);
void copy_to_device(void* to, const void* from, size_t bytes,
                    const Queue& queue);                                          // `from` is free on return
void copy_to_host(void* to, const void* from, size_t bytes, const Queue& queue);  // waits for the queue

// Host memory that the device can read. It lives until what was given to the queue before its end is done.
class Staging {
 public:
  Staging(size_t bytes, const Queue& queue);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  Queue queue_;
};

// Raises if the queue is being captured into a graph: `op` copies values that a replay would not see change.
void refuse_capture(const char* op, const Queue& queue);

}  // namespace tokenstep::bind::backend
