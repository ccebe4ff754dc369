"""A run imports only the packages that it uses."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from policylab.launch.imports import absent

ROOT = Path(__file__).parent.parent

#: Heavy packages that are installed with the package or its extras, but not used by a default run.
UNUSED = (
    *(
        "matplotlib",
        "scipy",
        "wandb",
        "tensorboard",
        "mlflow",
        "pandas",
        "sklearn",
        "nltk",
        "datasets",
        "peft",
    ),
    *(
        "gguf",
        "torchvision",
        "IPython",
        "vllm",
        "trl",
        "policylab.report.plots",
        "policylab.rollouts.generate",
    ),
)

RUN = f"""
import atexit, runpy, sys
atexit.register(lambda: print("LOADED", [name for name in {UNUSED!r} if name in sys.modules]))
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_default_run_imports_nothing_that_it_does_not_use(tmp_path):
    """The real script with its real callbacks, in a smaller run."""
    small = ["iterations=1", "rollout.prompts=2", "validation.prompts=2", f"paths.logs={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", RUN, *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "LOADED []"


class TestAbsent:
    def test_a_package_seems_not_to_be_installed_for_a_while(self):
        name = "iniconfig"  # pytest needs it
        module = sys.modules.pop(name, None)
        try:
            with absent((name,)):
                with pytest.raises(ImportError):
                    __import__(name)
                with pytest.raises(importlib.metadata.PackageNotFoundError):
                    importlib.metadata.version(name)
                assert importlib.metadata.version("pytest")
            assert importlib.metadata.version(name)
            __import__(name)
        finally:
            if module is not None:
                sys.modules[name] = module

    def test_transformers_asks_again_afterwards(self):
        from transformers.utils import import_utils

        answer = import_utils.is_scipy_available()
        import_utils.is_scipy_available.cache_clear()
        loaded = {
            name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "scipy"
        }
        try:
            with absent(("scipy",)):
                assert not import_utils.is_scipy_available()
            assert import_utils.is_scipy_available() == answer
        finally:
            sys.modules.update(loaded)

    def test_what_is_imported_already_stays(self):
        with absent(("pytest",)):
            assert sys.modules["pytest"] is pytest
            assert importlib.metadata.version("pytest")
        assert sys.modules["pytest"] is pytest

    def test_it_also_ends_at_an_error(self):
        with pytest.raises(ZeroDivisionError), absent(("no_such_package",)):
            raise ZeroDivisionError
        assert "no_such_package" not in sys.modules
