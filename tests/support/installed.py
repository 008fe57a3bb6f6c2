"""What an installed wheel must show, without pytest and away from the sources:

    python tests/support/installed.py [--cuda sm_80,sm_90]

Its backends with their reasons (`--cuda`: the CUDA module is in it, has code for these, and loads without a driver), and a merge
of tiny checkpoints. Exit code 1 and a line where something is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path


def check_backends(cuda: str | None) -> None:
    import lors_kernels
    from lors_kernels import available_backends

    known = available_backends()
    for name, status in known.items():
        print(f"{name:10} {status.state}: {status.reason}")
    assert "site-packages" in lors_kernels.__file__, f"expected the installed package, got {lors_kernels.__file__}"
    assert known["cpu"].ok, "expected the backend cpu"
    if cuda is None:
        return
    status = known["cuda"]
    assert not status.broken, status.reason
    for arch in cuda.split(","):
        assert arch in status.reason.split(" and ")[0], f"expected code for {arch}, got {status.reason}"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert not status.ok and "no NVIDIA driver" in status.reason, status.reason


def check_merge() -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    import lors

    rng = np.random.default_rng(0)
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    base = rng.standard_normal((24, 16)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = {label: Path(folder) / f"{label}.safetensors" for label in ("base", "a", "b")}
        deltas = {label: rng.standard_normal(base.shape).astype(np.float32) / 100 for label in ("a", "b")}
        for label, path in paths.items():
            save_file({name: base + deltas.get(label, 0)}, path)
        experts = {label: paths[label] for label in deltas}
        lors.merge(paths["base"], experts, Path(folder) / "out", rank=16, density=0.0, lam=0.5)
        merged = load_file(Path(folder) / "out" / "model.safetensors")[name]
        wanted = base + 0.5 * (deltas["a"] + deltas["b"])  # all of the rank: nothing is left out
    assert np.abs(merged - wanted).max() < 1e-5, np.abs(merged - wanted).max()
    print("merged two experts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", help="architectures that must be in the CUDA module, as sm_80,sm_90")
    try:
        check_backends(parser.parse_args().cuda)
        check_merge()
    except AssertionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
