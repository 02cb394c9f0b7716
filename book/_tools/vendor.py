"""Fetch what the built pages need from npm, so that they ask nobody else for anything.

    python book/_tools/vendor.py

Packages are pinned by version and sha512, taken with npm's own client, and only the files in use are kept: in
`_vendor`, which becomes a part of the built book. What is there already is not fetched again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "_vendor"
STAMP = VENDOR / "vendor.json"


@dataclass(frozen=True)
class Package:
    """A pinned npm package.

    Attributes:
        name: Its name.
        version: Its exact version.
        sha512: Of its archive, in base64, as npm records it.
        kept: Path in the package (a file, or a folder with a slash) to path in `_vendor`.
    """

    name: str
    version: str
    sha512: str
    kept: dict[str, str]

    @property
    def spec(self) -> str:
        """What npm calls it."""
        return f"{self.name}@{self.version}"


PACKAGES = (
    Package(
        "mathjax",
        "3.2.2",
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        {
            "es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
            "es5/input/tex/extensions/": "mathjax/input/tex/extensions/",
            "es5/output/chtml/fonts/": "mathjax/output/chtml/fonts/",
            "LICENSE": "mathjax/LICENSE",
        },
    ),
    Package(
        "requirejs",
        "2.3.8",
        "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==",
        {"require.js": "widgets/require.js"},
    ),
    Package(
        "@jupyter-widgets/html-manager",
        "1.0.15",
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        {
            "dist/embed-amd.js": "widgets/embed-amd.js",
            "dist/embed.js.LICENSE.txt": "widgets/LICENSE",
        },
    ),
    Package(
        "reveal.js",
        "5.2.1",
        "r7//6mIM5p34hFiDMvYfXgyjXqGRta+/psd9YtytsgRlrpRzFv4RbH76TXd2qD+7ZPZEbpBDhdRhJaFgfQ7zNQ==",
        {
            "dist/reset.css": "reveal/reset.css",
            "dist/reveal.css": "reveal/reveal.css",
            "dist/reveal.js": "reveal/reveal.js",
            "dist/theme/white.css": "reveal/theme/white.css",
            "dist/theme/fonts/source-sans-pro/": "reveal/theme/fonts/source-sans-pro/",
            "plugin/notes/notes.js": "reveal/notes.js",
            "LICENSE": "reveal/LICENSE",
        },
    ),
)


def recipe() -> str:
    """What is kept, as text: a folder made by another recipe is made again."""
    return json.dumps([[package.spec, package.sha512, package.kept] for package in PACKAGES], indent=1)


def fetch(package: Package, folder: Path) -> Path:
    """Let npm put a package's archive into a folder, and check it.

    Args:
        package: The package.
        folder: Where the archive goes.

    Returns:
        The archive.
    """
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("make book: npm is not installed; the pages need it once, to fetch MathJax and others (nodejs.org)")
    command = [npm, "pack", package.spec, "--json", "--ignore-scripts", "--pack-destination", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = run.stderr.strip().splitlines()
        sys.exit(f"make book: npm cannot fetch {package.spec}: {reason[-1] if reason else 'no reason given'}")
    archive = max(folder.glob("*.tgz"), key=lambda path: path.stat().st_mtime_ns)
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        sys.exit(f"make book: {package.spec} is not the pinned file (sha512 {found}): nothing was installed")
    return archive


def unpack(archive: Path, package: Package, folder: Path) -> None:
    """Copy the kept files of an archive to their places in a folder."""
    missing = set(package.kept)
    with tarfile.open(archive) as files:
        for member in files:
            path = member.name.partition("/")[2]
            for kept, target in package.kept.items():
                if member.isfile() and (path == kept or (kept.endswith("/") and path.startswith(kept))):
                    place = folder / (target + path.removeprefix(kept) if kept.endswith("/") else target)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    stream = files.extractfile(member)
                    assert stream is not None  # it is a file
                    place.write_bytes(stream.read())
                    missing.discard(kept)
    if missing:
        sys.exit(f"make book: {package.spec} has no {', '.join(sorted(missing))}")


def main() -> None:
    """Make `_vendor` unless it is there as the recipe says."""
    if STAMP.exists() and STAMP.read_text("utf-8") == recipe():
        return
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made"
        for number, package in enumerate(PACKAGES):
            archives = Path(place) / str(number)
            archives.mkdir()
            unpack(fetch(package, archives), package, made)
        shutil.rmtree(VENDOR, ignore_errors=True)
        shutil.move(made, VENDOR)
    STAMP.write_text(recipe(), "utf-8")
    print(f"fetched {', '.join(package.spec for package in PACKAGES)} into {VENDOR.name}/")


if __name__ == "__main__":
    main()
