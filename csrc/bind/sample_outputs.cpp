#include "bind/sample_outputs.h"

#include "common/check.h"

namespace tokenstep::bind {

nb::tuple new_outputs(const Tensor& logits, int num_logprobs, SampleParams& params) {
  Tensor view;
  const int64_t rows = params.num_rows;
  const nb::object tokens = new_array_like(logits, DType::kInt64, {rows}, view);
  params.tokens = view.as<int64_t>();
  const nb::object status = new_array_like(logits, DType::kInt32, {rows}, view);
  params.status = view.as<int32_t>();
  params.num_top_logprobs = 0;
  if (num_logprobs < 0) return nb::make_tuple(tokens, status, nb::none(), nb::none(), nb::none(), nb::none());
  params.num_top_logprobs = num_logprobs;
  const nb::object logprobs = new_array_like(logits, DType::kFloat32, {rows}, view);
  params.logprobs = view.as<float>();
  const nb::object ranks = new_array_like(logits, DType::kInt32, {rows}, view);
  params.ranks = view.as<int32_t>();
  const nb::object top_tokens = new_array_like(logits, DType::kInt64, {rows, num_logprobs}, view);
  params.top_tokens = view.as<int64_t>();
  const nb::object top_logprobs = new_array_like(logits, DType::kFloat32, {rows, num_logprobs}, view);
  params.top_logprobs = view.as<float>();
  return nb::make_tuple(tokens, status, logprobs, ranks, top_tokens, top_logprobs);
}

void use_outputs(const char* op, nb::handle out, const Tensor& logits, int num_logprobs,
                 SampleParams& params) {
  static constexpr const char* kNames[] = {"out[0] (tokens)", "out[1] (status)",     "out[2] (logprobs)",
                                           "out[3] (ranks)",  "out[4] (top_tokens)", "out[5] (top_logprobs)"};
  constexpr int kCount = 6, kAlways = 2, kFirstTop = 4;
  if (!PyTuple_Check(out.ptr()) || PyTuple_Size(out.ptr()) != kCount)
    raise<TypeError>(
        op, "out is not a tuple of 6, expected (tokens, status, logprobs, ranks, top_tokens, top_logprobs)");
  Tensor views[kCount];
  for (int i = 0; i < kCount; ++i) {
    const nb::handle array = PyTuple_GetItem(out.ptr(), i);
    const bool is_top = i >= kFirstTop;
    if (array.is_none()) {
      if (i < kAlways || num_logprobs > (is_top ? 0 : -1))
        raise<ValueError>(op, "%s is None, expected an array: a row wants it", kNames[i]);
      continue;
    }
    views[i] = tensor_from(op, kNames[i], array, Access::kWrite);
    const bool is_float = i == 2 || i == 5;
    views[i].expect_dtype({is_float ? DType::kFloat32 : i == 0 || i == 4 ? DType::kInt64 : DType::kInt32});
    if (is_top)
      views[i].expect_shape({params.num_rows, -1}, "[B, N]");
    else
      views[i].expect_shape({params.num_rows}, "[B]");
    views[i].expect_contiguous().expect_same_device(logits);
  }
  params.tokens = views[0].as<int64_t>();
  params.status = views[1].as<int32_t>();
  params.logprobs = views[2].as<float>();
  params.ranks = views[3].as<int32_t>();
  params.top_tokens = views[4].as<int64_t>();
  params.top_logprobs = views[5].as<float>();
  params.num_top_logprobs = 0;
  if (views[4].source.is_valid() != views[5].source.is_valid())
    raise<ValueError>(op, "one of out[4] and out[5] is None, expected both arrays or neither");
  if (!views[4].source.is_valid()) return;
  const int64_t width = views[4].shape[1];
  if (views[5].shape[1] != width || width < num_logprobs || width > kMaxTopLogprobs)
    raise<ValueError>(
        op, "out[4] and out[5] have shapes %s and %s, expected [B, N] both with %d \u2264 N \u2264 %d",
        shape_text(views[4]).c_str(), shape_text(views[5]).c_str(), num_logprobs < 0 ? 0 : num_logprobs,
        kMaxTopLogprobs);
  params.num_top_logprobs = static_cast<int32_t>(width);
}

}  // namespace tokenstep::bind
