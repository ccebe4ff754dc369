"""Packs the packages of `benchmarks/gpu.sh`, except torch, as wheels for a machine without a network.

    python benchmarks/gpu_wheels.py --python 3.12
    python benchmarks/gpu_wheels.py --python 3.12 --with trl accelerate datasets --without numpy scipy matplotlib

The versions are those of this environment, in which everything must be installed. Wheels go to data/wheels, which git
ignores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data/wheels"
#: Packages for the tests, in addition to the package itself.
EXTRA = ("pytest", "pytest-xdist", "beartype", "peft", "accelerate")
#: Not packed: with CUDA they are gigabytes, and the machine has them.
ON_THE_MACHINE = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|setuptools|policylab)$")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]


def closure(names: list[str], without: set[str]) -> dict[str, str]:
    """Names and installed versions of packages and of all their dependencies."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in found or name in without or ON_THE_MACHINE.match(name):
            continue
        found[name] = metadata.version(name)
        waiting += needs(name)
    return found


def needs(name: str) -> list[str]:
    """The dependencies of an installed package, without its extras."""
    requirements = map(Requirement, metadata.requires(name) or [])
    return [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the other machine, such as 3.12")
    parser.add_argument("--with", nargs="*", default=[], dest="more", help="further packages, such as trl")
    parser.add_argument("--without", nargs="*", default=[], help="packages that the other machine has")
    chosen = parser.parse_args()
    names = [*needs("policylab"), *EXTRA, *chosen.more]
    packages = closure(names, {normal(name) for name in chosen.without})
    FOLDER.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    where = ["--python-version", chosen.python, "--implementation", "cp", "--only-binary=:all:"]
    for name, version in sorted(packages.items()):
        wanted = f"{name}=={version}"
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(FOLDER), *where, wanted]
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        if subprocess.run([*command, *platforms], capture_output=True).returncode:
            # a package without a wheel: one without compiled code can be built here
            build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(FOLDER), wanted]
            if subprocess.run(build).returncode:
                sys.exit(
                    f"{wanted}: no wheel for Python {chosen.python} on Linux, and none can be built here"
                )
        print(wanted, flush=True)
    size = sum(file.stat().st_size for file in FOLDER.glob("*.whl"))
    print(f"{len(packages)} packages, {size / 2**20:.0f} MiB in {FOLDER}")


if __name__ == "__main__":
    main()
