"""Build the wheel from the sdist, install it, and use it from another folder: `make package`, `make package-clean`.

    python tests/packaging/check_package.py [--clean]

The wheel is installed alone into a new environment that sees the packages of the running one. With --clean it is
installed with its dependencies, in the versions of constraints.txt, into an environment that sees nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USE = Path(__file__).with_name("use_installed.py")
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> None:
    """Build, install and try; end with an error where a step fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clean", action="store_true", help="install the dependencies too, as a user does")
    clean = parser.parse_args().clean
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        wheel = build(folder / "dist")
        python = install(wheel, folder / "environment", clean)
        away = folder / "away"
        away.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, USE], check=True, cwd=away, env=environment)
        print(f"{wheel.name}: built from the sdist, installed{' with its dependencies' * clean}, used")


def build(out: Path) -> Path:
    """Return the wheel, built from the sdist; both hold the whole package and nothing beside it."""
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PIP_CONSTRAINT": str(CONSTRAINTS)}
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    listed = subprocess.run(["git", "ls-files", "ties_peft"], check=True, cwd=ROOT, capture_output=True, text=True)
    wanted = set(listed.stdout.split())
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if ".dist-info/" not in name} == wanted
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert wanted <= inside and "README.md" in inside, wanted - inside
    return wheel


def install(wheel: Path, folder: Path, clean: bool) -> Path:
    """Return the interpreter of a new environment that has the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if clean:
        subprocess.run([*pip, "-c", CONSTRAINTS, wheel], check=True)
    else:
        subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        packages = str(distribution("peft").locate_file(""))  # read as a plain folder, in which .pth files do nothing
        (Path(site) / "dependencies.pth").write_text(packages + "\n", encoding="utf-8")
    return python


if __name__ == "__main__":
    main()
