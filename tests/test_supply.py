"""What CI installs: every package of the lock file by version and hash, within the bounds of pyproject.toml."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def locked() -> dict[str, str]:
    """Versions in the lock file; each entry has hashes, or the file is refused here."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), line[:60]
            requirement = Requirement(line.split(" --hash")[0])
            (version,) = requirement.specifier
            assert version.operator == "=="
            found[canonicalize_name(requirement.name)] = version.version
    return found


def test_the_lock_file_names_all_that_is_needed_within_its_bounds():
    project, versions = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], locked()
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_ci_installs_nothing_else():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("pip install")]
    assert lines == [
        "pip install --quiet --require-hashes -r requirements.lock",
        "pip install --quiet --no-deps --no-build-isolation -e .",
    ]


@pytest.mark.network
def test_no_weakness_is_known():
    assert importlib.util.find_spec("pip_audit"), 'pip install -e ".[audit]"'
    command = [sys.executable, "-m", "pip_audit", "--strict", "--requirement", "requirements.lock", "--disable-pip"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
