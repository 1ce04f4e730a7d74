"""setup.cfg describes what is on disk, so that a wheel holds what an editable install shows."""

from __future__ import annotations

import configparser
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = {"mirai_dist": ROOT, "mirai_launch": ROOT / "launcher", "mirai_kernels": ROOT / "kernels"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(value: str) -> list[str]:
    return [line for line in value.split("\n") if line]


def test_every_package_is_listed_once(setup: configparser.ConfigParser):
    on_disk = {
        ".".join(file.parent.relative_to(root).parts)
        for name, root in SOURCE_ROOTS.items()
        for file in (root / name).rglob("*.py")
    }
    listed = lines(setup["options"]["packages"])
    assert len(listed) == len(set(listed))
    assert set(listed) == on_disk, "bring `packages` in setup.cfg up to date"


def test_every_package_folder_is_a_regular_package(setup: configparser.ConfigParser):
    for package in lines(setup["options"]["packages"]):
        folder = SOURCE_ROOTS[package.split(".")[0]] / package.replace(".", "/")
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py"


def test_packages_are_typed_and_found_where_setup_says(setup: configparser.ConfigParser):
    folders = dict(line.split(" = ") for line in lines(setup["options"]["package_dir"]))
    assert set(folders) == set(SOURCE_ROOTS)
    for name, folder in folders.items():
        assert ROOT / folder == SOURCE_ROOTS[name] / name
        assert (ROOT / folder / "py.typed").exists()


def test_the_base_install_has_no_torch(setup: configparser.ConfigParser):
    assert sorted(line.split(">")[0] for line in lines(setup["options"]["install_requires"])) == [
        "PyYAML",
        "omegaconf",
        "rich",
    ]


def test_the_console_script_exists(setup: configparser.ConfigParser):
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "mirai"
    assert callable(getattr(import_module(module), function))
