// Sampler of a module: the engine's form of sample. Parameters, history and biases of each slot stay in the
// device's memory between steps, where a kernel reads and advances them; a step with `out` given allocates
// nothing, and on a GPU can be captured in a graph.
#include <algorithm>
#include <atomic>
#include <vector>

#include "bind/backend.h"
#include "bind/ops.h"
#include "bind/sample_args.h"
#include "bind/sample_outputs.h"
#include "common/check.h"
#include "common/sampling_rules.h"
#include "cpu/fp_environment.h"

namespace tokenstep::bind {
namespace {

int read_size(const char* name, int64_t value, int64_t limit) {
  if (value < 1 || value > limit)
    raise<ValueError>("Sampler", "%s = %lld, expected 1 \u2264 %s \u2264 %lld", name,
                      static_cast<long long>(value), name, static_cast<long long>(limit));
  return static_cast<int>(value);
}

// What the host knows of a slot; the rest is in the device's memory.
struct Slot {
  bool is_admitted = false;
  int num_logprobs = -1;
  uint64_t last_step = 0;  // that it took part in, where the host sees the steps' rows
  // Unique ids, then counts by id: room for all of the vocabulary, of which only the places of ids seen are
  // ever touched. Null as long as no request with penalties has come to this slot; kept from then on.
  backend::Memory history;
  backend::Memory bias;  // ids, then values
  size_t bias_capacity = 0;
  backend::Memory window;  // as RowParams::window says
  size_t window_capacity = 0;
};

class Sampler {
 public:
  Sampler(int64_t max_rows, int64_t vocab_size, int device_id, nb::handle semantics)
      : max_rows_(read_size("max_rows", max_rows, 1 << 20)),
        vocab_size_(read_size("vocab_size", vocab_size, kMaxVocabSize)),
        device_id_(device_id),
        semantics_(read_semantics("Sampler", semantics)),
        slots_(static_cast<size_t>(max_rows_)) {
    const backend::Queue queue = current_queue();
    rows_ = backend::allocate_zeroed(slots_.size() * sizeof(RowParams), queue);
    const std::vector<RowParams> vacant(slots_.size(), vacant_row());
    backend::copy_to_device(rows_.get(), vacant.data(), vacant.size() * sizeof(RowParams), queue);
    if (const size_t bytes = backend::workspace_bytes(max_rows_, vocab_size_, queue))
      workspace_ = backend::allocate_zeroed(bytes, queue);
  }

  void admit(int64_t row, nb::handle temperature, nb::handle top_k, nb::handle top_p, nb::handle min_p,
             nb::handle repetition_penalty, nb::handle presence_penalty, nb::handle frequency_penalty,
             nb::handle logit_bias, nb::handle seed, nb::handle substream, nb::handle logprobs,
             nb::handle prompt_tokens, nb::handle output_tokens, nb::handle penalty_last_n) {
    constexpr const char* kOp = "Sampler.admit";
    const cpu::FpEnvironment environment;
    expect_slot(kOp, row);
    RowInputs inputs = read_one_row(
        kOp,
        {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
         prompt_tokens, output_tokens, logit_bias, seed, nb::handle(), substream, semantics_, penalty_last_n},
        vocab_size_);
    const int num_logprobs = read_num_logprobs(kOp, logprobs);
    if (!keeps_history(inputs.rows[0])) inputs.drop_history();

    const Use use(*this, kOp);
    const backend::Queue queue = current_queue();
    backend::refuse_capture(kOp, queue);
    Slot& slot = slots_[static_cast<size_t>(row)];
    const backend::Staging staging(inputs.packed_bytes(), queue);
    inputs.pack(staging.data(), staging.data());
    const RowParams& given = inputs.rows[0];
    SlotUpdate update{};
    update.slot = row_of(row);
    update.row = given;
    update.row.num_logprobs = num_logprobs;
    update.history_ids = given.history_ids;
    update.history_counts = given.history_counts;
    update.bias_ids = given.bias_ids;
    update.bias_values = given.bias_values;
    update.window_tokens = given.window;
    update.window_size = static_cast<int32_t>(inputs.window_tokens.size());
    provide_history(slot, update.row, queue);
    provide_bias(slot, update.row, queue);
    provide_window(slot, update.row, update.window_size, queue);
    backend::update_slot(update, queue);
    slot.is_admitted = true;
    slot.num_logprobs = num_logprobs;
  }

  void release(int64_t row) {
    constexpr const char* kOp = "Sampler.release";
    expect_slot(kOp, row);
    const Use use(*this, kOp);
    Slot& slot = slots_[static_cast<size_t>(row)];
    if (!slot.is_admitted) raise<ValueError>(kOp, "row = %lld was not admitted", static_cast<long long>(row));
    const backend::Queue queue = current_queue();
    backend::refuse_capture(kOp, queue);
    SlotUpdate update{};
    update.slot = row_of(row);
    update.row = vacant_row();
    backend::update_slot(update, queue);
    slot.is_admitted = false;
    slot.num_logprobs = -1;
  }

  nb::object step(nb::handle logits, nb::handle rows, nb::handle token_bitmask, nb::handle out,
                  nb::handle logprobs_mode) {
    constexpr const char* kOp = "Sampler.step";
    const Tensor x = read_logits(kOp, logits);
    if (x.shape[1] != vocab_size_)
      raise<ValueError>(kOp, "logits has shape %s, expected [B, %d] like the sampler's vocabulary",
                        shape_text(x).c_str(), vocab_size_);
    if (x.device_id != device_id_)
      raise<ValueError>(kOp, "logits is on %s, expected %s like the sampler",
                        device_name(x.device_type, x.device_id).c_str(),
                        device_name(x.device_type, device_id_).c_str());
    SampleParams params = params_of(kOp, x, token_bitmask, semantics_);
    params.logprobs_mode = read_logprobs_mode(kOp, logprobs_mode);
    params.rows = row_of(0);
    params.num_slots = max_rows_;

    const Use use(*this, kOp);
    read_slots(kOp, rows, x, params);
    const int num_logprobs = backend::kOnHost ? take_slots(kOp, params) : most_logprobs(params);
    nb::object outputs;
    if (out.is_none()) {
      outputs = new_outputs(x, num_logprobs, params);
    } else {
      use_outputs(kOp, out, x, num_logprobs, params);
      outputs = nb::borrow(out);
    }
    nb::gil_scoped_release release;
    backend::sample(params, workspace_.get(), {x.device_id, current_stream(x)});
    return outputs;
  }

  int max_rows() const { return max_rows_; }
  int vocab_size() const { return vocab_size_; }

 private:
  // One call at a time: a step works on the slots without the interpreter's lock.
  class Use {
   public:
    Use(Sampler& sampler, const char* op) : busy_(sampler.busy_) {
      if (busy_.exchange(true)) raise<ValueError>(op, "the sampler is in use by another thread");
    }
    ~Use() { busy_.store(false); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    std::atomic<bool>& busy_;
  };

  void expect_slot(const char* op, int64_t row) const {
    if (row < 0 || row >= max_rows_)
      raise<ValueError>(op, "row = %lld, expected 0 \u2264 row < %d", static_cast<long long>(row), max_rows_);
  }

  backend::Queue current_queue() const {
    return {device_id_, current_stream(backend::kDeviceType, device_id_)};
  }
  RowParams* row_of(int64_t slot) const { return static_cast<RowParams*>(rows_.get()) + slot; }

  // A window of no tokens is llama.cpp's way to switch penalties off.
  bool keeps_history(const RowParams& row) const {
    return has_penalties(row) && (semantics_ != Semantics::kLlamaCpp || row.penalty_last_n != 0);
  }

  void provide_history(Slot& slot, RowParams& row, const backend::Queue& queue) const {
    if (!keeps_history(row)) return;
    const size_t size = static_cast<size_t>(vocab_size_);
    if (!slot.history)
      slot.history = backend::allocate_zeroed(size * (sizeof(int32_t) + sizeof(uint32_t)), queue);
    row.history_ids = static_cast<int32_t*>(slot.history.get());
    row.history_counts = reinterpret_cast<uint32_t*>(row.history_ids + size);
    row.history_capacity = vocab_size_;
  }

  void provide_bias(Slot& slot, RowParams& row, const backend::Queue& queue) const {
    const size_t size = static_cast<size_t>(row.bias_size);
    if (size > slot.bias_capacity) {
      const size_t capacity = std::max(size, 2 * slot.bias_capacity);
      slot.bias = backend::allocate_zeroed(capacity * (sizeof(int32_t) + sizeof(float)), queue);
      slot.bias_capacity = capacity;
    }
    row.bias_ids = static_cast<int32_t*>(slot.bias.get());
    row.bias_values = reinterpret_cast<float*>(row.bias_ids + slot.bias_capacity);
  }

  void provide_window(Slot& slot, RowParams& row, int32_t num_tokens, const backend::Queue& queue) const {
    row.window = nullptr;
    if (!keeps_history(row) || row.penalty_last_n <= 0) return;
    const size_t size = static_cast<size_t>(row.penalty_last_n) + static_cast<size_t>(vocab_size_);
    if (size > slot.window_capacity) {
      slot.window = backend::allocate_zeroed(size * sizeof(int32_t), queue);
      slot.window_capacity = size;
    }
    row.window = static_cast<int32_t*>(slot.window.get());
    row.window_at = num_tokens % row.penalty_last_n;
  }

  void read_slots(const char* op, nb::handle rows, const Tensor& logits, SampleParams& params) const {
    if (rows.is_none()) {
      if (params.num_rows > max_rows_)
        raise<ValueError>(op, "logits has %d rows, expected at most max_rows = %d", params.num_rows,
                          max_rows_);
      return;
    }
    const Tensor slots = tensor_from(op, "rows", rows);
    slots.expect_dtype({DType::kInt32})
        .expect_shape({params.num_rows}, "[B]")
        .expect_contiguous()
        .expect_same_device(logits);
    params.row_slots = slots.as<const int32_t>();
  }

  // The slots of this step, read here: each admitted, none twice. Returns the most log probabilities that one
  // wants.
  int take_slots(const char* op, const SampleParams& params) {
    ++step_;
    int num_logprobs = -1;
    for (int i = 0; i < params.num_rows; ++i) {
      const int32_t row = params.row_slots ? params.row_slots[i] : i;
      if (row < 0 || row >= max_rows_)
        raise<ValueError>(op, "rows[%d] = %d, expected 0 \u2264 row < %d", i, row, max_rows_);
      Slot& slot = slots_[static_cast<size_t>(row)];
      if (!slot.is_admitted) raise<ValueError>(op, "rows[%d] = %d was not admitted", i, row);
      if (slot.last_step == step_) raise<ValueError>(op, "rows[%d] = %d appears twice", i, row);
      slot.last_step = step_;
      num_logprobs = std::max(num_logprobs, slot.num_logprobs);
    }
    return num_logprobs;
  }

  // The most log probabilities that one of the slots may want that the device is about to take.
  int most_logprobs(const SampleParams& params) const {
    const auto end = slots_.begin() + (params.row_slots ? max_rows_ : params.num_rows);
    int num_logprobs = -1;
    for (auto slot = slots_.begin(); slot != end; ++slot)
      num_logprobs = std::max(num_logprobs, slot->num_logprobs);
    return num_logprobs;
  }

  const int max_rows_, vocab_size_, device_id_;
  const Semantics semantics_;
  std::vector<Slot> slots_;
  uint64_t step_ = 0;
  backend::Memory rows_;  // RowParams of each slot
  backend::Memory workspace_;
  std::atomic<bool> busy_{false};
};

}  // namespace

void register_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Slots of sampling state that stay in memory between steps.")
      .def(nb::init<int64_t, int64_t, int, nb::handle>(), nb::arg("max_rows"), nb::arg("vocab_size"),
           nb::arg("device_id") = 0, any_object("semantics") = "tokenstep")
      .def("admit", &Sampler::admit, nb::arg("row"), any_object("temperature") = 1.0, any_object("top_k") = 0,
           any_object("top_p") = 1.0, any_object("min_p") = 0.0, any_object("repetition_penalty") = 1.0,
           any_object("presence_penalty") = 0.0, any_object("frequency_penalty") = 0.0,
           any_object("logit_bias") = nb::none(), any_object("seed") = nb::none(),
           any_object("substream") = 0, any_object("logprobs") = nb::none(),
           any_object("prompt_tokens") = nb::none(), any_object("output_tokens") = nb::none(),
           any_object("penalty_last_n") = nb::none(),
           "Fills a slot (again). Its next token has position len(output_tokens).")
      .def("step", &Sampler::step, any_object("logits"), any_object("rows") = nb::none(),
           any_object("token_bitmask") = nb::none(), any_object("out") = nb::none(),
           any_object("logprobs_mode") = "raw",
           "One token for each row: the tuple of sample, or `out`, such a tuple of arrays, filled. Bad rows "
           "show in status.")
      .def("release", &Sampler::release, nb::arg("row"))
      .def_prop_ro("max_rows", &Sampler::max_rows)
      .def_prop_ro("vocab_size", &Sampler::vocab_size);
}

}  // namespace tokenstep::bind
