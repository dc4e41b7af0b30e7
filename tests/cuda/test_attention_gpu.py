"""What only a GPU can show of paged attention: graphs whose lengths change, streams, wide tables."""

import numpy as np
import pytest
from attention_cases import Heads, assert_same_bits, paged, random_sequence
from device_arrays import moved
from sample_device import Gpu

import tokenstep as ts

pytestmark = pytest.mark.cuda
HEADS = Heads(8, 2, 128)


@pytest.fixture
def gpu():
    chosen = Gpu()
    yield chosen
    chosen.close()


def batch_on(gpu, lengths):
    rng = np.random.default_rng(0)
    sequences = [random_sequence(rng, "bfloat16", HEADS, n) for n in lengths]
    return {n: moved(gpu, a) for n, a in paged(sequences, "bfloat16").arguments.items()}


def attend(arguments, **options):
    out, lse = ts.paged_attention(**arguments, return_lse=True, **options)
    return out.cpu(), lse.cpu()


def test_a_captured_launch_follows_lengths_that_change_between_replays(gpu):
    import torch

    arguments = batch_on(gpu, [700, 2000, 1, 90])
    workspace = torch.zeros(ts.attention_workspace_bytes(), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(arguments["q"])
    ts.paged_attention(**arguments, out=out, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ts.paged_attention(**arguments, out=out, workspace=workspace)
    for lengths in ([700, 2000, 1, 90], [1, 17, 1, 0], [256, 1999, 0, 33]):
        arguments["seq_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        want, _ = attend(arguments)
        assert torch.equal(out.cpu().view(torch.int16), want.view(torch.int16))


def test_launches_follow_the_current_stream(gpu):
    import torch

    arguments = batch_on(gpu, [700, 33])
    want = attend(arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = attend(arguments)
    assert_same_bits(got, want)


def test_a_table_for_128k_tokens_gives_the_same_bits(gpu):
    import torch

    arguments = batch_on(gpu, [256, 200])
    want = attend(arguments)
    wide = torch.full((2, 8192), -1, dtype=torch.int32, device="cuda")
    wide[:, : arguments["block_table"].shape[1]] = arguments["block_table"]
    assert_same_bits(attend(arguments | {"block_table": wide}), want)
