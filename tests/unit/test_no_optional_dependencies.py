"""Every module imports on a machine that has none of the optional packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "deepspeed", "flash_attn", "flash_attn_interface", "xformers", "triton", "diffusers", "transformers", "lmdb",
    "ftfy",
)  # fmt: skip
BASE_ONLY = (*OPTIONAL, "torch", "numpy", "safetensors", "tensorboard", "PIL", "av")  # what a login node lacks

# None in sys.modules is how Python itself notes "not installed": import raises, find_spec answers None.
PROGRAM = """
import importlib, pkgutil, sys
for name in {absent!r}:
    sys.modules[name] = None
for package in {packages!r}:
    folder = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(folder, package + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def import_everything(packages: list[str], absent: tuple[str, ...], extra_root: Path | None = None) -> list[str]:
    """Import every module of the packages in a fresh process; their names. AssertionError with the traceback if not."""
    roots = [extra_root, ROOT, ROOT / "launcher", ROOT / "kernels", os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root) for root in roots if root)}
    program = PROGRAM.format(absent=absent, packages=packages)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_modules_import_without_the_optional_packages():
    imported = set(import_everything(["mirai_dist", "mirai_launch"], OPTIONAL))
    for source_root, package in ((ROOT, "mirai_dist"), (ROOT / "launcher", "mirai_launch")):
        for file in (source_root / package).rglob("*.py"):
            module = ".".join(file.relative_to(source_root).with_suffix("").parts)
            left_out = file.name != "__init__.py" and module not in imported
            assert not left_out, f"{module} is in no package: a folder above it has no __init__.py"


def test_the_base_install_is_enough_for_the_login_node_side():
    import_everything(["mirai_launch", "mirai_dist.config", "mirai_dist.plan"], BASE_ONLY)


def test_an_unguarded_import_is_noticed(tmp_path: Path):
    package = tmp_path / "careless"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "backend.py").write_text("import deepspeed\n")
    with pytest.raises(AssertionError, match="deepspeed"):
        import_everything(["careless"], OPTIONAL, extra_root=tmp_path)
