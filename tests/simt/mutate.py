"""Removes one synchronisation of the kernels at a time, and asks whether the emulator notices.

    python tests/simt/mutate.py sample|attention [--build-dir build/...] [--only 3 7 ...] [--list]

Each mutant is compiled for float32 with the commands of an existing build that has the emulator, then runs
small cases in launches divided in many ways. A mutant that survives is a synchronisation that is not needed,
or not tested: `survivors` says which, and why. About 20 seconds a mutant.
"""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = "csrc/cuda"


@dataclass(frozen=True)
class Kernels:
    """What is removed from which files, and what is left in its place."""

    files: str
    source: str  # whose float32 instantiation is compiled
    mutations: dict[str, str]
    # Mutants that nothing can notice: the end of the line that is changed, and why it is there all the same.
    survivors: dict[str, str] = field(default_factory=dict)


SAMPLE = Kernels(
    "sample_*.cuh",
    "sample_float32",
    {
        r"__syncthreads\(\);": ";",
        r"__threadfence\(\);": ";",
        # A shared copy is still flipped.
        r"(?<=block\.)sync_group\(\);": "parity;",
        r"block\.share\(\)": "(block.parity ^= 1, block.parity ^ 1)",
        r"(?<== )share\(\)": "(parity ^= 1, parity ^ 1)",
        r"wait_for_others\(args\.barriers \+ index\);": ";",
    },
)
ATTENTION = Kernels(
    "attention_*.cuh",
    "attention_float32",
    {
        r"__syncthreads\(\);": ";",
        r"__syncwarp\(\);": ";",
        r"__threadfence\(\);": ";",
        r"__syncthreads_or\(found\)": "found",
        r"(?<=  )wait_for_stage\(stages\);": ";",
        r"(?<=  )copy_async_commit\(\);": ";",
        r"merge\.wait_for_slot\(.*?\);": ";",
    },
)
KERNELS_OF = {"sample": SAMPLE, "attention": ATTENTION}


@dataclass(frozen=True)
class Mutant:
    """One place in one file, and the text that takes its place."""

    file: str
    line: int
    begin: int
    end: int
    text: str
    source: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.source}"


def mutants(kernels):
    """Every synchronisation of the kernels, in the order of the files."""
    found = []
    for path in sorted((ROOT / KERNELS).glob(kernels.files)):
        text = path.read_text()
        for pattern, replacement in kernels.mutations.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                source = text.splitlines()[line - 1].strip()
                found.append(Mutant(path.name, line, match.start(), match.end(), replacement, source))
    return sorted(found, key=lambda m: (m.file, m.line))


class Build:
    """The commands of a build with the emulator, for another copy of the sources."""

    def __init__(self, folder, source):
        self.folder = folder
        database = json.loads(self.ninja("compdb"))
        command = next(c["command"] for c in database if c["file"].endswith(f"simt/{source}.cpp"))
        self.compile = shlex.split(command)
        self.object = self.compile[self.compile.index("-o") + 1]
        link = self.ninja("commands", "_C_simt").splitlines()[-1]
        self.link = shlex.split(link.removeprefix(": && ").split(" && ")[0])

    def ninja(self, *tool):
        """What a tool of ninja prints."""
        return subprocess.run(
            ["ninja", "-C", self.folder, "-t", *tool], capture_output=True, text=True, check=True
        ).stdout.replace("ninja: Entering directory", "")

    def module(self, sources, scratch):
        """Compiles the source from a copy of csrc and links it with the rest of the build."""
        of_mutant, library = scratch / "mutant.o", scratch / "_C_simt.abi3.so"
        compile_ = [a.replace(str(ROOT / "csrc"), str(sources)) for a in self.compile]
        compile_[compile_.index("-o") + 1] = str(of_mutant)
        for flag in ("-MF", "-MT"):
            compile_[compile_.index(flag) + 1] = str(scratch / "unused")
        link = [str(of_mutant) if a == self.object else a for a in self.link]
        link[link.index("-o") + 1] = str(library)
        for command in (compile_, link):
            result = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{result.stderr}\nthe mutant does not compile")
        return library


def use(library):
    """Makes the module of a mutant the emulator's."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
    spec = importlib.util.spec_from_file_location("tokenstep._C_simt", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["tokenstep._C_simt"] = module


def check_sample():
    """Runs rows; returns what was noticed, or None."""
    import numpy as np
    import sample_device
    from sample_cases import assert_same, random_case

    from tokenstep import sampling as ts

    device = sample_device.Emulator()
    for seed in range(4):
        for geometry in (("solo", 1), ("cluster", 3), ("soft", 3)):
            for vocab_size, rows, semantics in ((1000, 6, None), (5000, 4, None), (1000, 6, "llama.cpp")):
                rng = np.random.default_rng([60, seed, vocab_size])
                case = random_case(rng, "float32", vocab_size, rows, semantics=semantics)
                device.use(geometry, seed=seed)
                try:
                    want = ts.sample(case.logits, check=False, **case.arguments)
                    assert_same(sample_device.sample(device, case.logits, case.arguments), want)
                    edits = sample_device.editing(case.arguments)
                    want = ts.apply_logits(case.logits, check=False, **edits)
                    got = case.logits.copy()
                    with device.active():
                        ts.apply_logits(got, check=False, out=got, **edits)
                    assert np.array_equal(got.view(np.int32), want.view(np.int32)), "other logits"
                except (AssertionError, RuntimeError) as error:
                    return f"{geometry[0]}, seed {seed}: {str(error).splitlines()[0]}"
    return None


def check_attention():
    """Attends, and appends, to short and long sequences; returns what was noticed, or None."""
    import numpy as np
    from attention_append_cases import Case
    from attention_cases import Heads, numbers
    from attention_device import DIVISIONS, on_device
    from sample_device import Emulator

    heads = Heads(4, 2, 64)
    lengths = [(600, 1), (70, 70), (1, 1), (1100, 2), (0, 1), (300, 5), (850, 1)]
    for name, division in DIVISIONS.items():
        workspace = np.zeros(1 << 23, np.uint8)
        for seed in range(4):
            before, case = (Case("float32", heads, lengths, seed=seed) for _ in range(2))
            before.append()
            before.batch.exact.update({n: before.batch.arguments[n] for n in ("k_cache", "v_cache")})
            want = before.batch.expected()
            batch = on_device(Emulator(), case.batch, **division, seed=seed)
            try:
                got = batch.attend(k=case.k, v=case.v, workspace=workspace)
                for a, b in zip(got, want, strict=True):
                    assert np.allclose(numbers(a), b, atol=1e-4, rtol=1e-4), "other results"
            except (AssertionError, RuntimeError) as error:
                return f"{name}, seed {seed}: {str(error).splitlines()[0]}"
    return None


CHECKS = {"sample": check_sample, "attention": check_attention}


def verdict(kernels, library):
    """`caught ...` or `survived`, of a mutant in a process of its own."""
    command = [sys.executable, __file__, kernels, "--check", str(library)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "caught: it never ends"
    if result.returncode not in (0, 1):
        return f"caught: exit status {result.returncode}"
    return result.stdout.strip().splitlines()[-1] if result.stdout else f"failed: {result.stderr[-300:]}"


def main():
    """Prints a line a mutant; the exit status is 1 if one survives that is not expected to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", choices=CHECKS)
    parser.add_argument("--build-dir", type=Path)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants, as --list prints them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        use(options.check)
        noticed = CHECKS[options.kernels]()
        print(f"caught: {noticed}" if noticed else "survived")
        return
    kernels = KERNELS_OF[options.kernels]
    chosen = [(i, m) for i, m in enumerate(mutants(kernels)) if not options.only or i in options.only]
    if options.list:
        print("\n".join(f"{i:3d} {m}" for i, m in chosen))
        return
    folder = options.build_dir or next(p.parent for p in ROOT.glob("build/*/build.ninja"))
    build, unexpected = Build(folder.resolve(), kernels.source), 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        shutil.copytree(ROOT / "csrc", scratch / "csrc")
        for i, mutant in chosen:
            path = scratch / KERNELS / mutant.file
            original = path.read_text()
            path.write_text(original[: mutant.begin] + mutant.text + original[mutant.end :])
            result = verdict(options.kernels, build.module(scratch / "csrc", scratch))
            path.write_text(original)
            reason = next((r for end, r in kernels.survivors.items() if mutant.source.endswith(end)), None)
            unexpected += result == "survived" and reason is None
            print(f"{i:3d} {mutant}\n      {result}{f' ({reason})' if reason else ''}", flush=True)
    print(f"{len(chosen)} mutants, {unexpected} survived unexpectedly")
    sys.exit(unexpected > 0)


if __name__ == "__main__":
    main()
