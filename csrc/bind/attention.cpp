// paged_attention, append_kv and merge_attention of a module: Python arguments -> checks -> params ->
// kernels.
#include <nanobind/nanobind.h>

#include <climits>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bind/attention_args.h"
#include "bind/backend.h"
#include "bind/ops.h"
#include "bind/scratch.h"
#include "bind/tensor.h"
#include "common/check.h"
#include "common/params.h"

namespace tokenstep::bind {
namespace {

void read_score_rules(const char* op, nb::handle scale, nb::handle window, nb::handle softcap,
                      AttentionParams& params) {
  const double default_scale = 1.0 / std::sqrt(static_cast<double>(params.batch.head_dim));
  params.scale = read_float(op, "scale", scale, static_cast<float>(default_scale));
  params.softcap = read_float(op, "softcap", softcap, 0.0f);
  if (!softcap.is_none() && (params.softcap <= 0.0f || !std::isfinite(params.scale / params.softcap)))
    raise<ValueError>(op, "softcap = %g, expected softcap > 0 with scale / softcap finite, or None",
                      PyFloat_AsDouble(softcap.ptr()));
  params.window = window.is_none() ? 0 : read_positive_int(op, "window", window);
}

// Verdicts go into the caller's status array. Without one, the first bad sequence is an error where the host
// judges; on a device it gives zeros, and nobody is told.
void judge_sequences(TensorReader& reader, nb::handle status, bool attends, int32_t window,
                     const Tensor& like, PagedBatch& batch, std::vector<int32_t>& own) {
  if (!status.is_none()) {
    const Tensor given = reader.read_to_write("status", status);
    given.expect_dtype({DType::kInt32})
        .expect_shape({batch.num_sequences}, "[len(seq_lens)]")
        .expect_contiguous()
        .expect_same_device(like);
    batch.status = given.as<int32_t>();
  } else if (backend::kOnHost) {
    own.resize(static_cast<size_t>(batch.num_sequences));
    batch.status = own.data();
  }
  std::string why;
  if (backend::judge_sequences(batch, attends, window, why) >= 0 && status.is_none())
    raise<ValueError>(reader.op(), "%s", why.c_str());
}

// The caller's workspace, or one of this call's own.
void provide_workspace(TensorReader& reader, nb::handle source, const Tensor& q, const backend::Queue& queue,
                       std::optional<Scratch>& own, AttentionParams& params) {
  const backend::WorkspaceBytes needed = backend::attention_workspace_bytes(queue);
  if (!source.is_none()) {
    const Tensor given = reader.read_to_write("workspace", source);
    given.expect_contiguous().expect_same_device(q);
    int64_t bytes = bytes_of(given.dtype);
    for (int i = 0; i < given.ndim; ++i) bytes *= given.shape[i];
    constexpr uintptr_t kAlignment = 16;
    if (bytes < static_cast<int64_t>(needed.total) || reinterpret_cast<uintptr_t>(given.data) % kAlignment)
      raise<ValueError>(reader.op(),
                        "workspace has %lld bytes at %p, expected at least %lld "
                        "(attention_workspace_bytes) at a multiple of %d",
                        static_cast<long long>(bytes), given.data, static_cast<long long>(needed.total),
                        static_cast<int>(kAlignment));
    params.workspace = given.data;
  } else if (needed.total) {
    own.emplace(q, needed.total);
    backend::zero(own->data(), needed.zeroed, queue);
    params.workspace = own->data();
  }
  params.workspace_bytes = static_cast<int64_t>(needed.total);
}

nb::object paged_attention(nb::handle q_source, nb::handle k_cache, nb::handle v_cache,
                           nb::handle block_table, nb::handle seq_lens, nb::handle k, nb::handle v,
                           nb::handle rope, nb::handle query_start, nb::handle max_query_len,
                           nb::handle scale, nb::handle window, nb::handle softcap, nb::handle alibi_slopes,
                           nb::handle sinks, nb::handle k_scale, nb::handle v_scale, nb::handle out_source,
                           nb::handle return_lse, nb::handle status, nb::handle workspace) {
  TensorReader reader("paged_attention");
  const Tensor q = reader.read("q", q_source);
  AttentionParams params{};
  PagedBatch& batch = params.batch;
  batch = read_batch(reader,
                     {k_cache, v_cache, block_table, seq_lens, k, v, rope, query_start, k_scale, v_scale}, q);
  read_queries(q, batch);
  batch.max_query_len = read_positive_int(reader.op(), "max_query_len", max_query_len);
  check_query_start(reader.op(), batch);
  read_score_rules(reader.op(), scale, window, softcap, params);
  params.alibi_slopes = read_per_head(reader, "alibi_slopes", alibi_slopes, q);
  params.sinks = read_per_head(reader, "sinks", sinks, q);
  const bool wants_lse = read_bool(reader.op(), "return_lse", return_lse);

  nb::object out_object, lse_object;
  Tensor out, lse;
  if (out_source.is_none()) {
    out_object = new_array_like(q, q.dtype, {q.shape[0], q.shape[1], q.shape[2]}, out);
  } else {
    out_object = nb::borrow(out_source);
    out = reader.read_to_write("out", out_source);
    out.expect_dtype({q.dtype})
        .expect_shape({q.shape[0], q.shape[1], q.shape[2]}, "the shape of q")
        .expect_contiguous_last_axis()
        .expect_same_device(q);
  }
  params.out = {out.data, out.stride[0], out.stride[1]};
  if (wants_lse) {
    lse_object = new_array_like(q, DType::kFloat32, {q.shape[0], q.shape[1]}, lse);
    params.lse = lse.as<float>();
  }
  const backend::Queue queue{q.device_id, current_stream(q)};
  std::optional<Scratch> own_workspace;
  provide_workspace(reader, workspace, q, queue, own_workspace, params);
  std::vector<int32_t> own_status;
  judge_sequences(reader, status, true, params.window, q, batch, own_status);
  {
    nb::gil_scoped_release release;
    backend::paged_attention(params, queue);
  }
  return wants_lse ? nb::object(nb::make_tuple(out_object, lse_object)) : out_object;
}

void append_kv(nb::handle k_source, nb::handle v, nb::handle k_cache, nb::handle v_cache,
               nb::handle block_table, nb::handle seq_lens, nb::handle q_source, nb::handle rope,
               nb::handle query_start, nb::handle k_scale, nb::handle v_scale, nb::handle status) {
  TensorReader reader("append_kv");
  const Tensor k = reader.read("k", k_source);
  PagedBatch batch = read_batch(
      reader, {k_cache, v_cache, block_table, seq_lens, k_source, v, rope, query_start, k_scale, v_scale}, k);
  if (!q_source.is_none()) {
    const Tensor q = reader.read_to_write("q", q_source);
    q.expect_dtype({k.dtype})
        .expect_shape({k.shape[0], -1, k.shape[2]}, "[T, num_heads, head_dim]")
        .expect_contiguous_last_axis()
        .expect_same_device(k);
    read_queries(q, batch);
  }
  batch.max_query_len = INT32_MAX;
  check_query_start(reader.op(), batch);
  std::vector<int32_t> own_status;
  judge_sequences(reader, status, false, 0, k, batch, own_status);
  const backend::Queue queue{k.device_id, current_stream(k)};
  nb::gil_scoped_release release;
  backend::append_kv(batch, queue);
}

nb::tuple merge_attention(nb::handle outs_source, nb::handle lses_source) {
  TensorReader reader("merge_attention");
  const Tensor outs = reader.read("outs", outs_source);
  refuse_other_devices(outs);
  outs.expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_ndim(4)
      .expect_contiguous_last_axis();
  check_head_dim(outs);
  const Tensor lses = reader.read("lses", lses_source);
  lses.expect_dtype({DType::kFloat32})
      .expect_shape({outs.shape[0], outs.shape[1], outs.shape[2]}, "[S, T, num_heads] of outs")
      .expect_same_device(outs);
  MergeParams params{.dtype = outs.dtype,
                     .num_parts = size32(outs, 0),
                     .num_queries = size32(outs, 1),
                     .num_heads = size32(outs, 2),
                     .head_dim = size32(outs, 3),
                     .outs = outs.data,
                     .part_stride = outs.stride[0],
                     .row_stride = outs.stride[1],
                     .head_stride = outs.stride[2],
                     .lses = lses.as<float>(),
                     .lse_part_stride = lses.stride[0],
                     .lse_row_stride = lses.stride[1],
                     .lse_head_stride = lses.stride[2],
                     .out = nullptr,
                     .lse = nullptr};
  Tensor out, lse;
  const nb::object out_object =
      new_array_like(outs, outs.dtype, {outs.shape[1], outs.shape[2], outs.shape[3]}, out);
  const nb::object lse_object = new_array_like(outs, DType::kFloat32, {outs.shape[1], outs.shape[2]}, lse);
  params.out = out.data;
  params.lse = lse.as<float>();
  const backend::Queue queue{outs.device_id, current_stream(outs)};
  {
    nb::gil_scoped_release release;
    backend::merge_attention(params, queue);
  }
  return nb::make_tuple(out_object, lse_object);
}

}  // namespace

void register_attention(nb::module_& m) {
  m.def("paged_attention", &paged_attention, any_object("q"), any_object("k_cache"), any_object("v_cache"),
        any_object("block_table"), any_object("seq_lens"), any_object("k"), any_object("v"),
        any_object("rope"), any_object("query_start"), any_object("max_query_len"), any_object("scale"),
        any_object("window"), any_object("softcap"), any_object("alibi_slopes"), any_object("sinks"),
        any_object("k_scale"), any_object("v_scale"), any_object("out"), any_object("return_lse"),
        any_object("status"), any_object("workspace"));
  m.def("append_kv", &append_kv, any_object("k"), any_object("v"), any_object("k_cache"),
        any_object("v_cache"), any_object("block_table"), any_object("seq_lens"), any_object("q"),
        any_object("rope"), any_object("query_start"), any_object("k_scale"), any_object("v_scale"),
        any_object("status"));
  m.def("merge_attention", &merge_attention, any_object("outs"), any_object("lses"));
  m.def(
      "attention_workspace_bytes",
      [](int device_id) { return backend::attention_workspace_bytes({device_id, nullptr}).total; },
      nb::arg("device_id") = 0, "Bytes of a workspace of paged_attention; they start zeroed.");
}

}  // namespace tokenstep::bind
