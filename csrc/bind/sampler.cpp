// tokenstep._C.Sampler: the engine's form of sample. Parameters, history and biases of each slot stay in
// memory between steps, where a kernel reads and advances them; a step with `out` given allocates nothing.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "bind/ops.h"
#include "bind/sample_args.h"
#include "bind/sample_outputs.h"
#include "common/check.h"
#include "common/sampling_rules.h"
#include "cpu/fp_environment.h"
#include "cpu/sample.h"

namespace tokenstep::bind {
namespace {

// Zeroed memory that the operating system provides page by page as it is touched.
template <class T>
class LazyZeros {
 public:
  bool empty() const { return !memory_; }
  void allocate(size_t count) {
    memory_.reset(static_cast<T*>(std::calloc(count, sizeof(T))));
    if (!memory_) throw std::bad_alloc();
  }
  T* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

// History of the slots: per slot a list of unique ids with room for all of the vocabulary, and counts by
// token id. Both are address space until touched: a slot takes 4 bytes per unique id, and the pages of its
// counts that its ids lie in.
class Histories {
 public:
  Histories(int max_rows, int vocab_size) : max_rows_(max_rows), vocab_size_(vocab_size) {}

  int32_t* ids() const { return ids_.data(); }
  uint32_t* counts() const { return counts_.data(); }

  void admit(int slot, const RowInputs& inputs, RowParams& row) {
    if (ids_.empty()) ids_.allocate(size());
    if (counts_.empty()) counts_.allocate(size());
    row.history_begin = int64_t{slot} * vocab_size_;
    row.history_capacity = vocab_size_;
    for (int i = 0; i < row.history_size; ++i) {
      const int32_t id = inputs.history_ids[static_cast<size_t>(i)];
      ids_.data()[row.history_begin + i] = id;
      counts_.data()[row.history_begin + id] = inputs.history_counts[static_cast<size_t>(i)];
    }
  }
  void release(const RowParams& row) {
    if (row.history_capacity == 0) return;
    for (int i = 0; i < row.history_size; ++i)
      counts_.data()[row.history_begin + ids_.data()[row.history_begin + i]] = 0;
  }

 private:
  size_t size() const { return static_cast<size_t>(max_rows_) * static_cast<size_t>(vocab_size_); }
  int max_rows_, vocab_size_;
  LazyZeros<int32_t> ids_;
  LazyZeros<uint32_t> counts_;
};

// Biases of the slots, in one array; holes are closed when they are more than what is used.
class Biases {
 public:
  const int32_t* ids() const { return ids_.data(); }
  const float* values() const { return values_.data(); }

  // `rows` are all slots; those that are not admitted have bias_size 0, as has `row` until now.
  void admit(const RowInputs& inputs, std::vector<RowParams>& rows, RowParams& row) {
    if (inputs.bias_ids.empty()) return;
    if (ids_.size() > 2 * used_ + 4096) close_holes(rows);
    row.bias_begin = static_cast<int64_t>(ids_.size());
    ids_.insert(ids_.end(), inputs.bias_ids.begin(), inputs.bias_ids.end());
    values_.insert(values_.end(), inputs.bias_values.begin(), inputs.bias_values.end());
    row.bias_size = static_cast<int32_t>(inputs.bias_ids.size());
    used_ += inputs.bias_ids.size();
  }
  void release(RowParams& row) {
    used_ -= static_cast<size_t>(row.bias_size);
    row.bias_size = 0;
  }

 private:
  void close_holes(std::vector<RowParams>& rows) {
    std::vector<int32_t> ids;
    std::vector<float> values;
    for (RowParams& row : rows) {
      const auto begin = static_cast<ptrdiff_t>(row.bias_begin), end = begin + row.bias_size;
      row.bias_begin = static_cast<int64_t>(ids.size());
      ids.insert(ids.end(), ids_.begin() + begin, ids_.begin() + end);
      values.insert(values.end(), values_.begin() + begin, values_.begin() + end);
    }
    ids_.swap(ids);
    values_.swap(values);
  }
  std::vector<int32_t> ids_;
  std::vector<float> values_;
  size_t used_ = 0;
};

int read_size(const char* name, int64_t value, int64_t limit) {
  if (value < 1 || value > limit)
    raise<ValueError>("Sampler", "%s = %lld, expected 1 \u2264 %s \u2264 %lld", name,
                      static_cast<long long>(value), name, static_cast<long long>(limit));
  return static_cast<int>(value);
}

class Sampler {
 public:
  Sampler(int64_t max_rows, int64_t vocab_size)
      : max_rows_(read_size("max_rows", max_rows, 1 << 20)),
        vocab_size_(read_size("vocab_size", vocab_size, kMaxVocabSize)),
        rows_(static_cast<size_t>(max_rows_)),
        admitted_(rows_.size()),
        stepped_in_(rows_.size()),
        histories_(max_rows_, vocab_size_) {}

  void admit(int64_t row, nb::handle temperature, nb::handle top_k, nb::handle top_p, nb::handle min_p,
             nb::handle repetition_penalty, nb::handle presence_penalty, nb::handle frequency_penalty,
             nb::handle logit_bias, nb::handle seed, nb::handle substream, nb::handle logprobs,
             nb::handle prompt_tokens, nb::handle output_tokens) {
    constexpr const char* kOp = "Sampler.admit";
    const cpu::FpEnvironment environment;
    expect_slot(kOp, row);
    const RowInputs inputs = read_one_row(
        kOp,
        {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
         prompt_tokens, output_tokens, logit_bias, seed, nb::handle(), substream},
        vocab_size_);
    const int num_logprobs = read_num_logprobs(kOp, logprobs);
    const Use use(*this, kOp);
    const size_t slot = static_cast<size_t>(row);
    forget(slot);
    RowParams params = inputs.rows[0];
    params.num_logprobs = num_logprobs;
    params.bias_begin = params.bias_size = 0;
    if (has_penalties(params))
      histories_.admit(static_cast<int>(row), inputs, params);
    else
      params.history_begin = params.history_size = 0;
    rows_[slot] = params;
    biases_.admit(inputs, rows_, rows_[slot]);
    admitted_[slot] = true;
  }

  void release(int64_t row) {
    constexpr const char* kOp = "Sampler.release";
    expect_slot(kOp, row);
    const Use use(*this, kOp);
    if (!admitted_[static_cast<size_t>(row)])
      raise<ValueError>(kOp, "row = %lld was not admitted", static_cast<long long>(row));
    forget(static_cast<size_t>(row));
  }

  nb::object step(nb::handle logits, nb::handle rows, nb::handle token_bitmask, nb::handle out,
                  nb::handle logprobs_mode) {
    constexpr const char* kOp = "Sampler.step";
    const Tensor x = read_logits(kOp, logits);
    if (x.shape[1] != vocab_size_)
      raise<ValueError>(kOp, "logits has shape %s, expected [B, %d] like the sampler's vocabulary",
                        shape_text(x).c_str(), vocab_size_);
    SampleParams params{};
    params.logits = x.data;
    params.logits_stride = x.stride[0];
    params.logits_dtype = x.dtype;
    params.num_rows = static_cast<int32_t>(x.shape[0]);
    params.vocab_size = vocab_size_;
    params.logprobs_mode = read_logprobs_mode(kOp, logprobs_mode);
    read_bitmask(kOp, token_bitmask, params);

    const Use use(*this, kOp);
    const int num_logprobs = take_slots(kOp, rows, params);
    params.rows = rows_.data();
    params.history_ids = histories_.ids();
    params.history_counts = histories_.counts();
    params.history_counts_stride = vocab_size_;
    params.bias_ids = biases_.ids();
    params.bias_values = biases_.values();
    nb::object outputs;
    if (out.is_none()) {
      outputs = new_outputs(x, num_logprobs, params);
    } else {
      use_outputs(kOp, out, x, num_logprobs, params);
      outputs = nb::borrow(out);
    }
    nb::gil_scoped_release release;
    cpu::sample(params);
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

  void forget(size_t slot) {
    if (!admitted_[slot]) return;
    histories_.release(rows_[slot]);
    biases_.release(rows_[slot]);
    rows_[slot] = RowParams{};
    admitted_[slot] = false;
  }

  // The slots of this step: each admitted, none twice. Returns the largest number of log probabilities that
  // one wants.
  int take_slots(const char* op, nb::handle rows, SampleParams& params) {
    if (!rows.is_none()) {
      const Tensor slots = tensor_from(op, "rows", rows);
      slots.expect_dtype({DType::kInt32}).expect_shape({params.num_rows}, "[B]").expect_contiguous();
      if (!slots.on_cpu())
        raise<ValueError>(op, "rows is on %s, expected cpu like logits",
                          device_name(slots.device_type, slots.device_id).c_str());
      params.row_slots = slots.as<const int32_t>();
    } else if (params.num_rows > max_rows_) {
      raise<ValueError>(op, "logits has %d rows, expected at most max_rows = %d", params.num_rows, max_rows_);
    }
    ++step_;
    int num_logprobs = -1;
    for (int i = 0; i < params.num_rows; ++i) {
      const int32_t slot = params.row_slots ? params.row_slots[i] : i;
      if (slot < 0 || slot >= max_rows_)
        raise<ValueError>(op, "rows[%d] = %d, expected 0 \u2264 row < %d", i, slot, max_rows_);
      const size_t at = static_cast<size_t>(slot);
      if (!admitted_[at]) raise<ValueError>(op, "rows[%d] = %d was not admitted", i, slot);
      if (stepped_in_[at] == step_) raise<ValueError>(op, "rows[%d] = %d appears twice", i, slot);
      stepped_in_[at] = step_;
      num_logprobs = std::max(num_logprobs, rows_[at].num_logprobs);
    }
    return num_logprobs;
  }

  const int max_rows_, vocab_size_;
  std::vector<RowParams> rows_;
  std::vector<uint8_t> admitted_;
  std::vector<uint64_t> stepped_in_;  // the last step that a slot took part in
  uint64_t step_ = 0;
  Histories histories_;
  Biases biases_;
  std::atomic<bool> busy_{false};
};

}  // namespace

void register_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Slots of sampling state that stay in memory between steps.")
      .def(nb::init<int64_t, int64_t>(), nb::arg("max_rows"), nb::arg("vocab_size"))
      .def("admit", &Sampler::admit, nb::arg("row"), any_object("temperature") = 1.0, any_object("top_k") = 0,
           any_object("top_p") = 1.0, any_object("min_p") = 0.0, any_object("repetition_penalty") = 1.0,
           any_object("presence_penalty") = 0.0, any_object("frequency_penalty") = 0.0,
           any_object("logit_bias") = nb::none(), any_object("seed") = nb::none(),
           any_object("substream") = 0, any_object("logprobs") = nb::none(),
           any_object("prompt_tokens") = nb::none(), any_object("output_tokens") = nb::none(),
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
