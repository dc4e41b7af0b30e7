"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
ts = pytest.importorskip("tokenstep")
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1.6e-2)], ids=str
)
@pytest.mark.parametrize("heads", ["9 3 64", "4 4 16", "7 1 80"])
def test_cascade_attention_agrees_with_plain_attention(heads, dtype, bound, capsys):
    """The bound: results of at most 1, rounded to the dtype for each part and once more by the merge."""
    sizes = ["--batch", "5", "--prefix", "96", "--suffix", "21", "--block-size", "16"]
    difference = example("cascade").main([*sizes, "--dtype", dtype, "--heads", *heads.split()])
    assert difference <= bound
    printed = capsys.readouterr().out
    assert "plain" in printed
    assert "cascade" in printed


def test_cascade_refuses_a_prefix_that_ends_within_a_block(capsys):
    with pytest.raises(SystemExit):
        example("cascade").main(["--prefix", "97"])
    assert "multiple of --block-size" in capsys.readouterr().err


def plainly(decoder, steps):
    """What the decode loop of cuda_graph computes, without a cache: by torch's attention, a row at a time."""
    rows = []
    half = decoder.rope.cos.shape[1]
    for row in range(len(decoder.tokens)):
        tokens = [0]
        for step in range(steps):
            x = decoder.embedding[torch.tensor(tokens)]
            cos, sin = decoder.rope.cos[: step + 1, None], decoder.rope.sin[: step + 1, None]
            for weights in decoder.weights:
                normed = torch.nn.functional.rms_norm(x, x.shape[1:])
                q, k, v = (torch.einsum("th,ndh->tnd", normed, w) for w in weights[:3])
                q, k = (
                    torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
                    for a, b in (q.split(half, 2), k.split(half, 2))
                )
                heads = (t.transpose(0, 1)[None] for t in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(
                    *heads, is_causal=True, enable_gqa=True
                )
                x = x + torch.einsum("ntd,ndh->th", out[0], weights[3])
            logits = torch.nn.functional.rms_norm(x[-1:], x.shape[1:]) @ decoder.head.T / x.shape[1] ** 0.5
            drawn = ts.sample(
                logits, temperature=0.7 + 0.1 * row, top_p=0.9, repetition_penalty=1.2, prompt_tokens=[[0]],
                output_tokens=[tokens[1:]], seed=row, position=step,
            )  # fmt: skip
            tokens.append(int(drawn.tokens))
        rows.append(tokens[1:])
    return rows


def test_the_step_of_the_cuda_graph_example_is_the_decode_step_of_its_model(capsys):
    module = example("cuda_graph")
    tokens = module.main(["--batch", "3", "--steps", "20", "--device", "cpu"])
    assert tokens.tolist() == plainly(module.Decoder(3, 20, "cpu"), 20)
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    assert "no GPU: the same step, called directly" in capsys.readouterr().out


@pytest.mark.cuda
def test_a_replayed_graph_gives_the_tokens_of_the_steps_one_by_one():
    module = example("cuda_graph")
    replayed = module.main(["--batch", "3", "--steps", "40", "--device", "cuda"])
    decoder = module.Decoder(3, 40, "cuda")
    decoder.begin()
    for _ in range(40):
        decoder.step()
    assert torch.equal(replayed, decoder.history.cpu())
