"""What the compiler reports of each kernel is what compile_report.txt says; nothing spills that must not."""

import difflib
import re

import compile_report
import pytest

# Functions that may spill or keep a stack frame, and why that costs nothing that matters.
MAY_SPILL: dict[str, str] = {
    r"attention_kernel<.*, 256, \d>": "16 rows of 256 outputs take 128 of 255 registers: some of what is "
    "read once an item or a slice goes to the stack",
    r"(sample_kernel|unsigned int write_top_tokens)<.*float, 512, \(GroupMode\)1, true>.*": "another "
    "engine's rules, of float32 in a cluster: a division takes registers, and one is saved once a row",
}

# Sources without a kernel: they are compiled, and have nothing to report.
HOST_ONLY = {"csrc/cuda/attention.cu", "csrc/cuda/runtime.cu"}

SAMPLE = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9tokenstep4cuda6sampleIfLi512EEEvNS_12SampleParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN9tokenstep4cuda6sampleIfLi512EEEvNS_12SampleParamsE
    24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 2 barriers, 24 bytes cumulative stack size, 640 bytes smem
ptxas info    : Compile time = 14.160 ms
ptxas info    : Function properties for _ZN9tokenstep4cuda4wideEi
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_the_compilers_report_is_read_right():
    kernel, function = compile_report.parse(SAMPLE, "sample.cu", "90a")
    assert kernel == compile_report.Usage("sample.cu", "sample<float, 512>", "90a", 128, 24, 12, 16, 640)
    assert function == compile_report.Usage("sample.cu", "wide", "90a", None, 8, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void tokenstep::cuda::f<float, (tokenstep::Mode)1>(tokenstep::P, int*)", "f<float, (Mode)1>"),
        ("tokenstep::cuda::(anonymous namespace)::g(int)", "g"),
        ("tokenstep::cuda::Row<float, 512>::wide(int)", "Row<float, 512>::wide"),
    ],
)
def test_names_are_short_and_tell_instantiations_apart(name, short):
    assert compile_report.short_name(name) == short


def test_architectures_that_need_the_same_share_a_line():
    usage = [
        compile_report.Usage("a.cu", "f", a, 40 if a == "120" else 32, 0, 0, 0, 0)
        for a in ("80", "90a", "120")
    ]
    text = compile_report.table(usage, "13.0")
    assert re.search(r"32 registers .* sm_80 sm_90a\n.*40 registers .* sm_120\n", text)


@pytest.fixture(scope="module")
def usages():
    if compile_report.nvcc_version() is None:
        pytest.skip("no nvcc on the PATH")
    return compile_report.compile_all()


@pytest.mark.slow
def test_every_source_compiles_for_every_architecture_without_warnings(usages):
    compiled = {(usage.source, usage.architecture) for usage in usages}
    with_kernels = {str(source) for source in compile_report.sources()} - HOST_ONLY
    assert compiled == {(s, a) for s in with_kernels for a in compile_report.ARCHITECTURES}


@pytest.mark.slow
def test_registers_stack_spills_and_shared_memory_are_those_of_the_table(usages):
    version = compile_report.nvcc_version()
    old, new = compile_report.TABLE.read_text(), compile_report.table(usages, version)
    made_by = old.splitlines()[0]
    if made_by != f"nvcc {version}":
        pytest.skip(f"the table is of {made_by}, this is nvcc {version}")
    difference = "".join(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), "table", "compiled")
    )
    assert not difference, f"\n{difference}\nIf this is meant: python tests/cuda/compile_report.py --update"


@pytest.mark.slow
def test_no_function_spills_or_keeps_a_stack_frame_unless_there_is_a_reason(usages):
    spilling = {u.function for u in usages if u.stack or u.spill_stores or u.spill_loads}
    unexplained = {f for f in spilling if not any(re.fullmatch(pattern, f) for pattern in MAY_SPILL)}
    assert not unexplained
    unused = {p for p in MAY_SPILL if not any(re.fullmatch(p, f) for f in spilling)}
    assert not unused, "these no longer spill: drop their excuse"
