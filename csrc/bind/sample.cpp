// sample and apply_logits of a module: checks, params, kernel, outputs of the same kind as the logits.
#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

#include "bind/backend.h"
#include "bind/ops.h"
#include "bind/sample_args.h"
#include "bind/sample_outputs.h"
#include "bind/scratch.h"
#include "common/check.h"
#include "cpu/fp_environment.h"

namespace tokenstep::bind {
namespace {

// One call on the module's device: puts the rows where the kernels read them.
class Call {
 public:
  Call(const char* op, const Tensor& logits, RowInputs& inputs, SampleParams& params)
      : op_(op), queue_{logits.device_id, current_stream(logits)} {
    params.num_slots = params.num_rows;
    if (backend::kOnHost) {
      inputs.point_rows(inputs.history_ids.data(), inputs.history_counts.data(), inputs.bias_ids.data(),
                        inputs.bias_values.data());
      params.rows = inputs.rows.data();
      return;
    }
    backend::refuse_capture(op, queue_);
    rows_.emplace(logits, inputs.packed_bytes());
    params.rows = static_cast<RowParams*>(rows_->data());
    inputs.sort_histories();
    std::vector<char> packed(inputs.packed_bytes());
    inputs.pack(packed.data(), rows_->data());
    backend::copy_to_device(rows_->data(), packed.data(), packed.size(), queue_);
    const RowFieldsParams& fields = inputs.device_fields;
    if (std::any_of(std::begin(fields.fields), std::end(fields.fields), [](auto& f) { return f.data; })) {
      inputs.device_fields.rows = params.rows;
      inputs.device_fields.num_rows = params.num_rows;
      backend::set_row_fields(inputs.device_fields, queue_);
    }
    if (const size_t bytes = backend::workspace_bytes(params.num_rows, params.vocab_size, queue_)) {
      workspace_.emplace(logits, bytes);
      backend::zero(workspace_->data(), bytes, queue_);
    }
  }
  const backend::Queue& queue() const { return queue_; }
  void* workspace() const { return workspace_ ? workspace_->data() : nullptr; }

  // check None: rows that cannot be sampled raise where that needs no waiting for the device.
  void check_status(nb::handle check, const SampleParams& params) const {
    if (check.is_none() ? !backend::kOnHost : !nb::cast<bool>(check)) return;
    if (backend::kOnHost) return raise_for_status(op_, params.status, params.num_rows);
    std::vector<int32_t> status(static_cast<size_t>(params.num_rows));
    {
      nb::gil_scoped_release release;
      backend::copy_to_host(status.data(), params.status, status.size() * sizeof(int32_t), queue_);
    }
    raise_for_status(op_, status.data(), params.num_rows);
  }

 private:
  const char* op_;
  backend::Queue queue_;
  std::optional<Scratch> rows_, workspace_;
};

nb::tuple sample(nb::handle logits, nb::handle temperature, nb::handle top_k, nb::handle top_p,
                 nb::handle min_p, nb::handle repetition_penalty, nb::handle presence_penalty,
                 nb::handle frequency_penalty, nb::handle prompt_tokens, nb::handle output_tokens,
                 nb::handle logit_bias, nb::handle token_bitmask, nb::handle seed, nb::handle position,
                 nb::handle substream, nb::handle logprobs, nb::handle logprobs_mode, nb::handle check,
                 nb::handle semantics, nb::handle penalty_last_n) {
  constexpr const char* kOp = "sample";
  const cpu::FpEnvironment environment;  // the rounding of parameters must not flush subnormal numbers either
  const Tensor x = read_logits(kOp, logits);
  const Semantics meaning = read_semantics(kOp, semantics);
  RowInputs inputs = read_rows(
      kOp,
      {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
       prompt_tokens, output_tokens, logit_bias, seed, position, substream, meaning, penalty_last_n},
      x);
  SampleParams params = params_of(kOp, x, token_bitmask, meaning);
  const int num_logprobs = read_num_logprobs(kOp, logprobs);
  params.logprobs_mode = read_logprobs_mode(kOp, logprobs_mode);
  for (RowParams& row : inputs.rows) row.num_logprobs = num_logprobs;
  const nb::tuple outputs = new_outputs(x, num_logprobs, params);
  const Call call(kOp, x, inputs, params);
  {
    nb::gil_scoped_release release;
    backend::sample(params, call.workspace(), call.queue());
  }
  call.check_status(check, params);
  return outputs;
}

// Rows of `out` may lie where the rows of `logits` lie, each on its own; any other overlap would destroy
// unread logits.
void refuse_overlap(const char* op, const Tensor& x, const Tensor& out) {
  const int64_t rows = x.shape[0], width = x.shape[1];
  if (rows == 0) return;
  if (rows > 1 && std::abs(out.stride[0]) < width)
    raise<ValueError>(op, "out has overlapping rows (stride %lld), expected at least %lld",
                      static_cast<long long>(out.stride[0]), static_cast<long long>(width));
  const auto extent = [&](const Tensor& t, const char*& begin, const char*& end) {
    const int64_t last = (rows - 1) * t.stride[0], size = bytes_of(t.dtype);
    begin = t.as<const char>() + std::min<int64_t>(0, last) * size;
    end = t.as<const char>() + (std::max<int64_t>(0, last) + width) * size;
  };
  const char *x_begin, *x_end, *out_begin, *out_end;
  extent(x, x_begin, x_end);
  extent(out, out_begin, out_end);
  if (x_end <= out_begin || out_end <= x_begin) return;
  if (x.dtype == DType::kFloat32 && (x.stride[0] == out.stride[0] || rows == 1)) {
    if (x.data == out.data) return;  // in place
    const int64_t stride = std::abs(x.stride[0]) * static_cast<int64_t>(sizeof(float));
    const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
    if (rows > 1 && stride > 0) {  // columns of one array side by side
      const int64_t offset = ((out.as<const char>() - x.as<const char>()) % stride + stride) % stride;
      if (offset >= bytes && offset <= stride - bytes) return;
    }
  }
  raise<ValueError>(
      op, "out overlaps logits, expected separate memory, or logits itself (float32, the same rows)");
}

nb::tuple apply_logits(nb::handle logits, nb::handle temperature, nb::handle top_k, nb::handle top_p,
                       nb::handle min_p, nb::handle repetition_penalty, nb::handle presence_penalty,
                       nb::handle frequency_penalty, nb::handle prompt_tokens, nb::handle output_tokens,
                       nb::handle logit_bias, nb::handle token_bitmask, nb::handle out, nb::handle check,
                       nb::handle semantics, nb::handle penalty_last_n) {
  constexpr const char* kOp = "apply_logits";
  const cpu::FpEnvironment environment;
  const Tensor x = read_logits(kOp, logits);
  const Semantics meaning = read_semantics(kOp, semantics);
  const nb::int_ zero(0);
  RowInputs inputs =
      read_rows(kOp,
                {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                 prompt_tokens, output_tokens, logit_bias, zero, zero, zero, meaning, penalty_last_n},
                x);
  ApplyLogitsParams params{params_of(kOp, x, token_bitmask, meaning), nullptr, 0};
  Tensor result, status;
  nb::object result_array;
  if (out.is_none()) {
    result_array = new_array_like(x, DType::kFloat32, {x.shape[0], x.shape[1]}, result);
  } else {
    result = tensor_from(kOp, "out", out, Access::kWrite);
    result.expect_dtype({DType::kFloat32})
        .expect_shape({x.shape[0], x.shape[1]}, "[B, V]")
        .expect_contiguous_last_axis();
    result.expect_same_device(x);
    refuse_overlap(kOp, x, result);
    result_array = nb::borrow(out);
  }
  const nb::object status_array = new_array_like(x, DType::kInt32, {x.shape[0]}, status);
  params.sample.status = status.as<int32_t>();
  params.out = result.as<float>();
  params.out_stride = result.stride[0];
  const Call call(kOp, x, inputs, params.sample);
  {
    nb::gil_scoped_release release;
    backend::apply_logits(params, call.workspace(), call.queue());
  }
  call.check_status(check, params.sample);
  return nb::make_tuple(result_array, status_array);
}

}  // namespace

void register_sample(nb::module_& m) {
  m.def("sample", &sample, any_object("logits"), any_object("temperature") = 1.0, any_object("top_k") = 0,
        any_object("top_p") = 1.0, any_object("min_p") = 0.0, any_object("repetition_penalty") = 1.0,
        any_object("presence_penalty") = 0.0, any_object("frequency_penalty") = 0.0,
        any_object("prompt_tokens") = nb::none(), any_object("output_tokens") = nb::none(),
        any_object("logit_bias") = nb::none(), any_object("token_bitmask") = nb::none(),
        any_object("seed") = nb::none(), any_object("position") = 0, any_object("substream") = 0,
        any_object("logprobs") = nb::none(), any_object("logprobs_mode") = "raw",
        any_object("check") = nb::none(), any_object("semantics") = "tokenstep",
        any_object("penalty_last_n") = nb::none(),
        "(tokens, status, logprobs, ranks, top_tokens, top_logprobs) of each row; the last four None without "
        "logprobs.");
  m.def("apply_logits", &apply_logits, any_object("logits"), any_object("temperature") = 1.0,
        any_object("top_k") = 0, any_object("top_p") = 1.0, any_object("min_p") = 0.0,
        any_object("repetition_penalty") = 1.0, any_object("presence_penalty") = 0.0,
        any_object("frequency_penalty") = 0.0, any_object("prompt_tokens") = nb::none(),
        any_object("output_tokens") = nb::none(), any_object("logit_bias") = nb::none(),
        any_object("token_bitmask") = nb::none(), any_object("out") = nb::none(),
        any_object("check") = nb::none(), any_object("semantics") = "tokenstep",
        any_object("penalty_last_n") = nb::none(),
        "(out, status): float32 logits after the filters, -inf where cut.");
  register_sampler(m);
}

}  // namespace tokenstep::bind
