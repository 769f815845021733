"""Packs what a machine needs that has a GPU and PyTorch but no network, in pieces that can be sent one by one.

    python gpu/pack.py --text ../shared/data/wikipedia/train.parquet ../shared/data/imdb/unsupervised.parquet

There, in a folder that holds the pieces:

    cat piece-* | tar x && make gpu MINUTES=25

Into dist/gpu/ go piece-00, piece-01, … and their SHA-256: this package and the small ones that it needs as wheels for
Python 3.12 on Linux x86-64, the tests of the operator, MiniLM-L6 in bfloat16 as the teacher, and the text.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIECE = 48 << 20  # bytes
# What the machine may lack; PyTorch, Triton, transformers and the rest it must have.
PACKAGES = (
    "annotated-types",
    "datasets",
    "dill",
    "multiprocess",
    "pydantic",
    "pydantic_core",
    "typing-inspection",
    "xxhash",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SOURCES = ("Makefile", "gpu", "tests/__init__.py", "tests/conftest.py", "tests/ops", "pyproject.toml")


def wheels(folder: Path) -> None:
    """This package without its native kernels, and the others in the versions of constraints.txt."""
    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line]
    chosen = [line for line in pinned if line.partition("==")[0].lower() in PACKAGES]
    if len(chosen) != len(PACKAGES):
        raise SystemExit(f"constraints.txt must pin {', '.join(PACKAGES)}; it pins {', '.join(chosen)}")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip"]
    python = ["--python-version", "3.12", "--implementation", "cp", *platforms]
    target = ["--no-deps", "--quiet"]
    subprocess.run([*pip, "download", *target, "--only-binary=:all:", *python, "--dest", folder, *chosen], check=True)
    subprocess.run([*pip, "wheel", *target, "-C", "wheel.cmake=false", "--wheel-dir", folder, ROOT], check=True)


def teacher(folder: Path) -> None:
    """MiniLM-L6 and its tokenizer, half as large."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from inhibitor.models.loading import load_pretrained

    load_pretrained(AutoModel, "minilm", dtype=torch.bfloat16).save_pretrained(folder)
    load_pretrained(AutoTokenizer, "minilm").save_pretrained(folder)


def split(archive: Path, output: Path) -> None:
    """Cut the archive into pieces, and write down what each should hash to."""
    sums = []
    with archive.open("rb") as file:
        for number in range(-(-archive.stat().st_size // PIECE)):
            piece = output / f"piece-{number:02d}"
            piece.write_bytes(file.read(PIECE))
            sums.append(f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}")
    (output / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
    print("\n".join(sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files that E1 reads")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "gpu", help="default: dist/gpu")
    given = parser.parse_args()
    missing = [str(path) for path in given.text if not path.is_file()]
    if missing:
        raise SystemExit(f"--text: expected files, got {', '.join(missing)}. Check the paths.")
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels(folder / "wheels")
        teacher(folder / "teacher")
        with tarfile.open(folder / "all.tar", "w") as archive:
            for source in SOURCES:
                archive.add(ROOT / source, source, filter=lambda entry: None if "__pycache__" in entry.name else entry)
            archive.add(folder / "wheels", "wheels")
            archive.add(folder / "teacher", "teacher")
            for number, path in enumerate(given.text):
                archive.add(path, f"text/{number:02d}-{path.name}")
        split(folder / "all.tar", given.output)


if __name__ == "__main__":
    main()
