// paged_attention, append_kv and merge_attention: Python arguments -> checks -> params -> CPU kernels.
// Everything that the host can know is checked before anything is written.
#include "cpu/attention.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <climits>
#include <cmath>
#include <vector>

#include "bind/ops.h"
#include "bind/tensor.h"
#include "common/check.h"
#include "common/params.h"

namespace tokenstep::bind {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

void refuse_other_devices(const Tensor& tensor) {
  if (tensor.on_cpu()) return;
  const nb::module_ native = nb::module_::import_("tokenstep._native");
  const nb::object reason = native.attr("cuda_absent_because");
  raise<ValueError>(
      tensor.op, "%s is on %s, expected cpu: %s", tensor.argument,
      device_name(tensor.device_type, tensor.device_id).c_str(),
      reason.is_none() ? "this op has no CUDA kernel yet" : nb::cast<std::string>(reason).c_str());
}

std::string kind_of(nb::handle source) {
  return nb::cast<std::string>(nb::str(source.type().attr("__name__")));
}

// A number or None; `fallback` for None.
double number_from(const char* op, const char* argument, nb::handle source, double fallback) {
  if (source.is_none()) return fallback;
  const double value = PyFloat_AsDouble(source.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    raise<TypeError>(op, "%s is a %s, expected a number or None", argument, kind_of(source).c_str());
  }
  return value;
}

int32_t int_from(const char* op, const char* argument, nb::handle source, int64_t minimum) {
  const nb::object index = nb::steal(PyNumber_Index(source.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    raise<TypeError>(op, "%s is a %s, expected an int", argument, kind_of(source).c_str());
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow || value < minimum || value > INT32_MAX)
    raise<ValueError>(op, "%s = %s, expected %lld <= %s < 2^31", argument, nb::str(index).c_str(),
                      ll(minimum), argument);
  return static_cast<int32_t>(value);
}

const float* per_head(const char* op, const char* argument, nb::handle source, const Tensor& like,
                      int64_t heads, const char* names) {
  if (source.is_none()) return nullptr;
  const Tensor values = tensor_from(op, argument, source);
  values.expect_dtype({DType::kFloat32})
      .expect_shape({heads}, names)
      .expect_contiguous()
      .expect_same_device(like);
  return values.as<float>();
}

// ---- arguments that paged_attention and append_kv share
// -----------------------------------------------------------
struct BatchArguments {
  nb::handle q, k_cache, v_cache, block_table, seq_lens, k, v, cos, sin;
  bool interleaved;
  nb::handle query_start, k_scale, v_scale;
};

RowsView rows_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1]}; }

CacheView cache_view(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

void read_rope(const char* op, const BatchArguments& args, const Tensor& like, PagedBatch& batch) {
  if (args.cos.is_none()) return;
  const Tensor cos = tensor_from(op, "rope.cos", args.cos), sin = tensor_from(op, "rope.sin", args.sin);
  cos.expect_dtype({DType::kFloat32}).expect_ndim(2).expect_contiguous().expect_same_device(like);
  sin.expect_dtype({DType::kFloat32}).expect_contiguous().expect_same_device(like);
  sin.expect_shape({cos.shape[0], cos.shape[1]}, "the shape of rope.cos");
  if (cos.shape[1] < 1 || 2 * cos.shape[1] > batch.head_dim)
    raise<ValueError>(op,
                      "rope.cos has shape %s, expected [max_position, rotary_dim / 2] with 2 <= rotary_dim "
                      "<= %d (head_dim)",
                      shape_text(cos).c_str(), batch.head_dim);
  batch.rope = {cos.as<float>(), sin.as<float>(),
                static_cast<int32_t>(std::min<int64_t>(cos.shape[0], INT32_MAX)),
                static_cast<int32_t>(2 * cos.shape[1]), args.interleaved};
}

void check_head_dim(const char* op, const Tensor& tensor) {
  const int64_t head_dim = tensor.shape[tensor.ndim - 1];
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8)
    raise<ValueError>(op, "%s has head_dim %lld, expected a multiple of 8 from 8 to %d", tensor.argument,
                      ll(head_dim), kMaxHeadDim);
}

void check_query_start(const PagedBatch& batch, const char* op) {
  const int32_t* start = batch.query_start;
  if (start[0] < 0) raise<ValueError>(op, "query_start[0] = %d, expected at least 0", start[0]);
  for (int r = 0; r < batch.num_sequences; ++r) {
    const int64_t count = int64_t{start[r + 1]} - start[r];
    if (count < 0)
      raise<ValueError>(op, "query_start[%d] = %d, expected at least query_start[%d] = %d", r + 1,
                        start[r + 1], r, start[r]);
    if (count > batch.max_query_len)
      raise<ValueError>(op, "query_start gives sequence %d %lld queries, expected at most max_query_len = %d",
                        r, ll(count), batch.max_query_len);
  }
  if (start[batch.num_sequences] > batch.num_queries)
    raise<ValueError>(op, "query_start[%d] = %d, expected at most %d (the rows given)", batch.num_sequences,
                      start[batch.num_sequences], batch.num_queries);
}

// `first` is q or k: the tensor whose type, device and rows the others must match.
PagedBatch read_batch(const char* op, const BatchArguments& args, const Tensor& first) {
  refuse_other_devices(first);
  first.expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_ndim(3)
      .expect_contiguous_last_axis();
  check_head_dim(op, first);
  const bool appends = !args.k.is_none() || !args.v.is_none();
  const Access access = appends ? Access::kWrite : Access::kRead;
  const Tensor k_cache = tensor_from(op, "k_cache", args.k_cache, access);
  const Tensor v_cache = tensor_from(op, "v_cache", args.v_cache, access);
  const int64_t rows = first.shape[0], head_dim = first.shape[2];

  PagedBatch batch{};
  batch.dtype = batch.cache_dtype = first.dtype;
  batch.num_queries = static_cast<int32_t>(rows);
  batch.head_dim = static_cast<int32_t>(head_dim);
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    if (cache->dtype == DType::kFloat8E4M3 || cache->dtype == DType::kInt8)
      raise<TypeError>(
          op, "%s has dtype %s, expected %s like %s: quantised caches are not supported on the CPU yet",
          cache->argument, name_of(cache->dtype), name_of(first.dtype), first.argument);
    cache->expect_dtype({first.dtype}).expect_ndim(4).expect_same_device(first).expect_contiguous_last_axis();
  }
  k_cache.expect_shape({-1, -1, -1, head_dim}, "[num_blocks, block_size, num_kv_heads, head_dim]");
  v_cache.expect_shape({k_cache.shape[0], k_cache.shape[1], k_cache.shape[2], head_dim},
                       "the shape of k_cache");
  if (k_cache.shape[1] < 1 || k_cache.shape[2] < 1)
    raise<ValueError>(op, "k_cache has shape %s, expected block_size and num_kv_heads of at least 1",
                      shape_text(k_cache).c_str());
  if (!args.k_scale.is_none() || !args.v_scale.is_none())
    raise<ValueError>(
        op, "%s is given, expected None: only quantised caches (not supported on the CPU yet) have scales",
        args.k_scale.is_none() ? "v_scale" : "k_scale");
  batch.num_blocks = static_cast<int32_t>(k_cache.shape[0]);
  batch.block_size = static_cast<int32_t>(k_cache.shape[1]);
  batch.num_kv_heads = static_cast<int32_t>(k_cache.shape[2]);
  batch.k_cache = cache_view(k_cache);
  batch.v_cache = cache_view(v_cache);

  const Tensor block_table = tensor_from(op, "block_table", args.block_table);
  block_table.expect_dtype({DType::kInt32})
      .expect_ndim(2)
      .expect_contiguous_last_axis()
      .expect_same_device(first);
  const Tensor seq_lens = tensor_from(op, "seq_lens", args.seq_lens);
  seq_lens.expect_dtype({DType::kInt32}).expect_ndim(1).expect_contiguous().expect_same_device(first);
  const int64_t sequences = seq_lens.shape[0];
  block_table.expect_shape({sequences, -1}, "[len(seq_lens), max_blocks]");
  batch.num_sequences = static_cast<int32_t>(sequences);
  batch.max_blocks = static_cast<int32_t>(block_table.shape[1]);
  batch.block_table = block_table.as<int32_t>();
  batch.block_table_stride = block_table.stride[0];
  batch.seq_lens = seq_lens.as<int32_t>();

  if (!args.query_start.is_none()) {
    const Tensor start = tensor_from(op, "query_start", args.query_start);
    start.expect_dtype({DType::kInt32})
        .expect_shape({sequences + 1}, "[len(seq_lens) + 1]")
        .expect_contiguous();
    start.expect_same_device(first);
    batch.query_start = start.as<int32_t>();
  } else if (rows != sequences) {
    raise<ValueError>(op, "%s has %lld rows for %lld sequences, expected one each, or query_start",
                      first.argument, ll(rows), ll(sequences));
  }

  if (appends) {
    if (args.k.is_none() || args.v.is_none())
      raise<ValueError>(op, "%s is None, expected it together with the other of k and v",
                        args.k.is_none() ? "k" : "v");
    const Tensor k = tensor_from(op, "k", args.k), v = tensor_from(op, "v", args.v);
    for (const Tensor* t : {&k, &v}) {
      t->expect_dtype({first.dtype})
          .expect_shape({rows, batch.num_kv_heads, head_dim}, "[T, num_kv_heads, head_dim]");
      t->expect_contiguous_last_axis().expect_same_device(first);
    }
    batch.new_k = rows_view(k);
    batch.new_v = rows_view(v);
  }
  read_rope(op, args, first, batch);
  return batch;
}

void read_queries(const char* op, const Tensor& q, PagedBatch& batch) {
  batch.q = rows_view(q);
  batch.num_heads = static_cast<int32_t>(q.shape[1]);
  if (batch.num_heads < 1 || batch.num_heads % batch.num_kv_heads)
    raise<ValueError>(op, "q has %d heads, expected a multiple of the cache's %d", batch.num_heads,
                      batch.num_kv_heads);
}

// The verdicts of all sequences. Without a status array of the caller's, the first bad one is an error.
const int32_t* judge_sequences(const char* op, nb::handle status, bool attends, int32_t window,
                               const Tensor& like, PagedBatch& batch, std::vector<int32_t>& own) {
  if (!status.is_none()) {
    const Tensor given = tensor_from(op, "status", status, Access::kWrite);
    given.expect_dtype({DType::kInt32})
        .expect_shape({batch.num_sequences}, "[len(seq_lens)]")
        .expect_contiguous();
    given.expect_same_device(like);
    batch.status = given.as<int32_t>();
  } else {
    own.resize(static_cast<size_t>(batch.num_sequences));
  }
  int32_t* verdicts = batch.status ? batch.status : own.data();
  std::string why;
  if (cpu::check_sequences(batch, attends, window, verdicts, why) >= 0 && !batch.status)
    raise<ValueError>(op, "%s", why.c_str());
  return verdicts;
}

// ---- ops
// ------------------------------------------------------------------------------------------------------------
nb::object paged_attention(nb::handle q_source, nb::handle k_cache, nb::handle v_cache,
                           nb::handle block_table, nb::handle seq_lens, nb::handle k, nb::handle v,
                           nb::handle cos, nb::handle sin, bool interleaved, nb::handle query_start,
                           nb::handle max_query_len, nb::handle scale, nb::handle window, nb::handle softcap,
                           nb::handle alibi_slopes, nb::handle sinks, nb::handle k_scale, nb::handle v_scale,
                           nb::handle out_source, bool return_lse, nb::handle status) {
  constexpr const char* op = "paged_attention";
  const Tensor q = tensor_from(op, "q", q_source);
  AttentionParams params{};
  PagedBatch& batch = params.batch;
  batch = read_batch(op,
                     {q_source, k_cache, v_cache, block_table, seq_lens, k, v, cos, sin, interleaved,
                      query_start, k_scale, v_scale},
                     q);
  read_queries(op, q, batch);
  batch.max_query_len = int_from(op, "max_query_len", max_query_len, 1);
  if (batch.query_start) check_query_start(batch, op);

  const double scale_value =
      number_from(op, "scale", scale, 1.0 / std::sqrt(static_cast<double>(batch.head_dim)));
  if (!std::isfinite(scale_value)) raise<ValueError>(op, "scale = %g, expected a finite number", scale_value);
  const double softcap_value = number_from(op, "softcap", softcap, 0.0);
  if (!std::isfinite(softcap_value) || (!softcap.is_none() && softcap_value <= 0.0))
    raise<ValueError>(op, "softcap = %g, expected a positive finite number or None", softcap_value);
  params.scale = static_cast<float>(scale_value);
  params.softcap = static_cast<float>(softcap_value);
  params.window = window.is_none() ? 0 : int_from(op, "window", window, 1);
  params.alibi_slopes = per_head(op, "alibi_slopes", alibi_slopes, q, batch.num_heads, "[num_heads]");
  params.sinks = per_head(op, "sinks", sinks, q, batch.num_heads, "[num_heads]");

  nb::object out_object, lse_object;
  Tensor out, lse;
  if (out_source.is_none()) {
    out_object = new_array_like(q, q.dtype, {q.shape[0], q.shape[1], q.shape[2]}, out);
  } else {
    out_object = nb::borrow(out_source);
    out = tensor_from(op, "out", out_source, Access::kWrite);
    out.expect_dtype({q.dtype}).expect_shape({q.shape[0], q.shape[1], q.shape[2]}, "the shape of q");
    out.expect_contiguous_last_axis().expect_same_device(q);
  }
  params.out = rows_view(out);
  if (return_lse) {
    lse_object = new_array_like(q, DType::kFloat32, {q.shape[0], q.shape[1]}, lse);
    params.lse = lse.as<float>();
  }
  std::vector<int32_t> own_status;
  const int32_t* verdicts = judge_sequences(op, status, true, params.window, q, batch, own_status);
  {
    nb::gil_scoped_release release;
    cpu::paged_attention(params, verdicts);
  }
  return return_lse ? nb::object(nb::make_tuple(out_object, lse_object)) : out_object;
}

void append_kv(nb::handle k_source, nb::handle v, nb::handle k_cache, nb::handle v_cache,
               nb::handle block_table, nb::handle seq_lens, nb::handle q_source, nb::handle cos,
               nb::handle sin, bool interleaved, nb::handle query_start, nb::handle k_scale,
               nb::handle v_scale) {
  constexpr const char* op = "append_kv";
  const Tensor k = tensor_from(op, "k", k_source);
  PagedBatch batch = read_batch(op,
                                {q_source, k_cache, v_cache, block_table, seq_lens, k_source, v, cos, sin,
                                 interleaved, query_start, k_scale, v_scale},
                                k);
  if (!q_source.is_none()) {
    const Tensor q = tensor_from(op, "q", q_source, Access::kWrite);
    q.expect_dtype({k.dtype}).expect_shape({k.shape[0], -1, k.shape[2]}, "[T, num_heads, head_dim]");
    q.expect_contiguous_last_axis().expect_same_device(k);
    read_queries(op, q, batch);
  }
  batch.max_query_len = INT32_MAX;
  if (batch.query_start) check_query_start(batch, op);
  std::vector<int32_t> own_status;
  const int32_t* verdicts = judge_sequences(op, nb::none(), false, 0, k, batch, own_status);
  nb::gil_scoped_release release;
  cpu::append_kv(batch, verdicts);
}

nb::tuple merge_attention(nb::handle outs_source, nb::handle lses_source) {
  constexpr const char* op = "merge_attention";
  const Tensor outs = tensor_from(op, "outs", outs_source), lses = tensor_from(op, "lses", lses_source);
  refuse_other_devices(outs);
  outs.expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_ndim(4)
      .expect_contiguous_last_axis();
  check_head_dim(op, outs);
  lses.expect_dtype({DType::kFloat32})
      .expect_shape({outs.shape[0], outs.shape[1], outs.shape[2]}, "[S, T, num_heads] of outs");
  lses.expect_same_device(outs);
  Tensor out, lse;
  const nb::object out_object =
      new_array_like(outs, outs.dtype, {outs.shape[1], outs.shape[2], outs.shape[3]}, out);
  const nb::object lse_object = new_array_like(outs, DType::kFloat32, {outs.shape[1], outs.shape[2]}, lse);
  const MergeParams params{.dtype = outs.dtype,
                           .num_parts = static_cast<int32_t>(outs.shape[0]),
                           .num_queries = static_cast<int32_t>(outs.shape[1]),
                           .num_heads = static_cast<int32_t>(outs.shape[2]),
                           .head_dim = static_cast<int32_t>(outs.shape[3]),
                           .outs = outs.data,
                           .part_stride = outs.stride[0],
                           .row_stride = outs.stride[1],
                           .head_stride = outs.stride[2],
                           .lses = lses.as<float>(),
                           .lse_part_stride = lses.stride[0],
                           .lse_row_stride = lses.stride[1],
                           .lse_head_stride = lses.stride[2],
                           .out = out.data,
                           .lse = lse.as<float>()};
  {
    nb::gil_scoped_release release;
    cpu::merge_attention(params);
  }
  return nb::make_tuple(out_object, lse_object);
}

}  // namespace

void register_attention(nb::module_& m) {
  m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache"),
        nb::arg("block_table"), nb::arg("seq_lens"), nb::arg("k").none(), nb::arg("v").none(),
        nb::arg("cos").none(), nb::arg("sin").none(), nb::arg("interleaved"), nb::arg("query_start").none(),
        nb::arg("max_query_len"), nb::arg("scale").none(), nb::arg("window").none(),
        nb::arg("softcap").none(), nb::arg("alibi_slopes").none(), nb::arg("sinks").none(),
        nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("out").none(), nb::arg("return_lse"),
        nb::arg("status").none());
  m.def("append_kv", &append_kv, nb::arg("k"), nb::arg("v"), nb::arg("k_cache"), nb::arg("v_cache"),
        nb::arg("block_table"), nb::arg("seq_lens"), nb::arg("q").none(), nb::arg("cos").none(),
        nb::arg("sin").none(), nb::arg("interleaved"), nb::arg("query_start").none(),
        nb::arg("k_scale").none(), nb::arg("v_scale").none());
  m.def("merge_attention", &merge_attention, nb::arg("outs"), nb::arg("lses"));
}

}  // namespace tokenstep::bind
