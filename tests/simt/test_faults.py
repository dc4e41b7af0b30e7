"""Every fault that the emulator claims to find is planted once and found; without it the kernel is right."""

import gc
import re
import resource
from pathlib import Path

import pytest
from tokenstep._C_simt import testing

RACE = r"race on {} memory at .*: its .* at .* and the .* by block .* thread .* at .* are not ordered"
SHARED_RACE, GLOBAL_RACE = RACE.format("shared"), RACE.format("global")

# What the error must say.
FAULTS = {
    "missing_barrier": f"{SHARED_RACE}|read of shared memory .* which nobody has written",
    "missing_barrier_before_reuse": SHARED_RACE,
    "missing_barrier_after_clearing": SHARED_RACE,
    "race_between_warps": SHARED_RACE,
    "shuffle_is_no_barrier": f"{SHARED_RACE}|nobody has written",
    "race_between_halves_of_a_warp": f"{SHARED_RACE}|nobody has written",
    "shared_out_of_bounds": "write out of bounds: 4 bytes at byte 256 of 256 bytes of shared memory",
    "shared_below_its_start": "write out of bounds: 4 bytes at byte -4 of 256 bytes of shared memory",
    "shared_across_its_end": "read out of bounds: .* of 328 bytes of shared memory",
    "shared_memory_that_nobody_wrote": "read of shared memory at byte 0 at .* which nobody has written",
    "misaligned": "misaligned access to shared memory at byte .*, 8 bytes at",
    "divergent_barrier": r"divergent barrier: it is at __syncthreads\(\) in line",
    "barrier_that_one_thread_misses": r"deadlock.*thread \(5, 0, 0\): left the kernel.*"
    r"and 62 more: waits at __syncthreads\(\) \(faults.cuh:",
    "named_barrier_of_another_size": "barrier 3 in line .* threads, but others wait there for|deadlock",
    "named_barrier_that_a_warp_misses": "deadlock.*31 more: left the kernel.*waits at a named barrier",
    "divergent_warp": r"divergent warp: lane \d+ is at __shfl_xor_sync\(\) in line",
    "warp_operation_that_a_lane_misses": r"deadlock.*thread \(31, 0, 0\) and 1 more: left the kernel"
    r".*and 61 more: waits at __any_sync\(\)",
    "shuffle_from_a_lane_outside_of_the_mask": r"lane \d+ reads lane 20, which is not in the mask 0x0000ffff",
    "mask_without_the_caller": r"__ballot_sync\(\) .* mask 0x7fffffff, which leaves out the calling lane 31",
    "missing_copy_wait": "read of shared memory .* before the cp.async .* has been waited for",
    "copy_wait_for_too_few_groups": "read of shared memory .* before the cp.async .* has been waited for",
    "missing_barrier_after_copy_wait": f"{SHARED_RACE}|nobody has written|before the cp.async",
    "copies_in_flight_at_the_end": "left the kernel before its cp.async copies were waited for",
    "missing_cluster_barrier_before_access": r"read of the shared memory of block .* may not have started",
    "missing_cluster_barrier_before_leaving": "shared memory of block .* (has left|may have left by then)",
    "race_in_a_cluster": SHARED_RACE,
    "block_outside_of_the_cluster": "a peer's address is asked for rank 2 of a cluster of 2 blocks",
    "cluster_arrival_without_wait": "arrives twice at the cluster's barrier",
    "cluster_wait_without_arrival": "waits at the cluster's barrier without having arrived",
    "missing_fence_before_flag": GLOBAL_RACE,
    "missing_fence_after_flag": GLOBAL_RACE,
    "missing_acquire": GLOBAL_RACE,
    "flag_that_nobody_sets": "deadlock: every thread that can run waits in a loop",
    "race_on_global_memory": GLOBAL_RACE,
    "global_out_of_bounds": "read out of bounds: bytes 4096 to 4099 of a buffer of 4096 bytes",
    "write_to_read_only_memory": "write to a read-only buffer",
    "non_coherent_read_of_what_was_written": "non-coherent read at .* which this launch wrote at",
    "null_pointer": "out of bounds: address 0x0 is in no buffer of the launch",
    "division_by_zero": "integer division by zero",
    "stack_overflow": "stack overflow",
}
SEEDS = 20


def error_of(name, seed, buffers=True):
    with pytest.raises(RuntimeError) as error:
        testing.run(name, fault=True, seed=seed, buffers=buffers)
    return str(error.value)


def test_every_planted_fault_has_its_message_here():
    assert set(FAULTS) == set(testing.faults())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_every_order_of_threads(name):
    slow = name == "flag_that_nobody_sets"  # runs until nobody has made progress for millions of turns
    for seed in range(2 if slow else SEEDS):
        message = error_of(name, seed)
        assert message.startswith(f"simt: kernel {name}, ")
        assert re.search(FAULTS[name], message), message


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_kernel_without_the_fault_gives_the_same_in_every_order_of_threads(name):
    results = [testing.run(name, fault=False, seed=seed) for seed in range(SEEDS)]
    assert all(result == results[0] for result in results)


def test_an_error_names_block_thread_and_both_lines_of_a_race():
    message = error_of("missing_fence_before_flag", seed=3)
    assert re.search(r"block \([12], 0, 0\), thread \(\d+, 0, 0\): race on global", message)
    read, write = (int(line) for line in re.findall(r"faults\.cuh:(\d+)", message))
    source = Path(__file__).with_name("faults.cuh").read_text().splitlines()
    assert "b.out[neighbour()]" in source[read - 1]
    assert source[write - 1].strip() == "b.out[thread()] = 7;"


def test_a_wild_pointer_is_an_error_even_where_no_buffers_are_given():
    assert "access to memory that is not mapped at address 0x0" in error_of("null_pointer", 0, buffers=False)


def test_after_a_fault_the_next_launch_is_right():
    for name in FAULTS:
        if name == "flag_that_nobody_sets":
            continue
        error_of(name, seed=1)
        assert testing.run("missing_barrier", fault=False)[:64] == [*range(1, 64), 0]


def test_faults_leave_no_fibers_and_no_memory_behind():
    names = [
        "missing_barrier",
        "barrier_that_one_thread_misses",
        "missing_copy_wait",
        "missing_fence_after_flag",
    ]
    names += ["stack_overflow", "race_in_a_cluster", "missing_cluster_barrier_before_leaving"]

    def fail_often(times):
        for seed in range(times):
            for name in names:
                error_of(name, seed % 3)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = fail_often(20)
    assert (
        fail_often(400) - before < 1024
    )  # KB; 2800 launches of 64 threads or more, each thread with its clocks
