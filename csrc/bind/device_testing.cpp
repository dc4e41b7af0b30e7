// The submodule `testing` of the modules with device kernels: how a launch divides its work, and other ways
// to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "bind/ops.h"
#include "bind/tensor.h"
#include "common/check.h"
#include "cuda/attention.h"
#include "cuda/sample.h"
#ifdef TOKENSTEP_SIMT
#include "cuda/launch.cuh"
#endif

namespace nb = nanobind;

namespace tokenstep::bind {

void register_device_testing(nb::module_& parent) {
  nb::module_ m = nb::hasattr(parent, "testing")
                      ? nb::borrow<nb::module_>(parent.attr("testing"))
                      : parent.def_submodule("testing", "For tests and measurements.");
  m.def(
      "force_sample_geometry",
      [](const std::string& mode, int group_size, int num_threads) {
        cuda::force_sample_geometry(mode.c_str(), group_size, num_threads);
      },
      nb::arg("mode"), nb::arg("group_size") = 1, nb::arg("num_threads") = 512,
      "Rows are taken by groups of this kind ('solo', 'cluster', 'soft') and size, in all launches of the "
      "process; "
      "'auto' chooses again.");
  m.def(
      "sample_geometry",
      [](int vocab_size, int bytes_per_logit, int num_rows, int device_id) {
        const cuda::SampleGeometryInfo info =
            cuda::sample_geometry(vocab_size, bytes_per_logit, num_rows, device_id);
        return nb::make_tuple(info.mode, info.group_size, info.num_groups);
      },
      nb::arg("vocab_size"), nb::arg("bytes_per_logit"), nb::arg("num_rows"), nb::arg("device_id") = 0,
      "(mode, group size, groups) that a launch of these sizes has.");
  m.def("force_attention_geometry", &cuda::force_attention_geometry, nb::arg("grid") = 0,
        nb::arg("stages") = 0, nb::arg("slots") = 0,
        "Blocks, stages of a warp's ring and slots of partial results, in all launches of the process; 0: as "
        "it "
        "would be.");
  m.def(
      "launch_empty",
      [](nb::object array) {
        const Tensor tensor = tensor_from("testing.launch_empty", "array", array);
        cuda::launch_empty({tensor.device_id, current_stream(tensor)});
      },
      nb::arg("array"), "A kernel that does nothing, on the stream of the array; the floor of any launch.");
#ifdef TOKENSTEP_SIMT
  m.def(
      "set_seed", [](uint64_t seed) { cuda::emulation.seed = seed; },
      "Seeds the order in which threads run.");
  m.def(
      "set_together", [](unsigned blocks) { cuda::emulation.together = blocks; },
      "So many blocks of a launch run at once, the others after them.");
#endif
}

}  // namespace tokenstep::bind
