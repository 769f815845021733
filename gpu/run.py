"""Everything that is to be measured on a GPU, part by part, each leaving its results before the next begins.

    python gpu/run.py --minutes 25 --output results/gpu
    python gpu/run.py --parts e1 --minutes 25 --output results/gpu      goes on with E1 where it was stopped
    python gpu/run.py --device cpu                                      all parts on tiny shapes: does it run at all?

Parts: tests (of the operator, on the device), attention (speed beside softmax attention and the authors' form),
training (tokens a second), e1 (a student of MiniLM-L6 on what is left of the minutes). Runs in the folder that the
pieces of gpu/pack.py were unpacked in, or in the repository.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "attention", "training", "e1")
LIMITS = {"tests": 200, "attention": 260, "training": 240}  # seconds; the first two together stay under eight minutes
GRACE = 60  # seconds in which E1 writes its checkpoint


def environment(device: str) -> dict[str, str]:
    """With the packages of ``wheels/``, unpacked once, where this is not a repository with its own."""
    wheels, site = ROOT / "wheels", ROOT / "site"
    found = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    found["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    if not wheels.is_dir():
        return found
    if not site.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*install, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), found.get("PYTHONPATH"))))
    return found


def command(part: str, device: str, output: Path) -> list[str]:
    """What a part runs."""
    python = [sys.executable]
    if part == "tests":
        chosen = ["-k", "without_queries"] if device == "cpu" else ["-n", str(min(12, os.cpu_count() or 1))]
        chosen += ["tests/ops/test_triton.py", "tests/ops/test_triton_integer.py"]
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    if part == "e1":
        recipe = "tiny.yaml" if device == "cpu" else "e1.yaml"
        teacher = "teacher" if (ROOT / "teacher").is_dir() else "minilm"
        text = sorted((ROOT / "text").glob("*")) or [ROOT.parent / "shared" / "data" / "wikipedia" / "train.parquet"]
        files = "text.files=[" + ",".join(map(str, text)) + "]"
        run = [*python, "gpu/distill.py", f"gpu/{recipe}"]
        return [*run, f"teacher={teacher}", f"output={output.resolve() / 'e1'}", files]
    return [*python, f"gpu/{part}_speed.py", "--device", device, "--output", str(output.resolve() / f"{part}.json")]


def run(part: str, device: str, output: Path, seconds: float, environ: dict[str, str]) -> dict[str, object]:
    """Run a part until it ends or its time is over; what it says goes to a file beside its results."""
    start = time.monotonic()
    with (output / f"{part}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command(part, device, output), cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
            stopped = False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # E1 saves and stops; the others have written what they measured
            stopped = True
            try:
                code = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    return {"code": code, "stopped at its limit": stopped, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts together; E1 takes what is left")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    given.output.mkdir(parents=True, exist_ok=True)
    environ = environment(given.device)
    done: dict[str, object] = {}
    for part in given.parts:
        left = end - time.monotonic() - (GRACE if part == "e1" else 0)
        seconds = min(left, LIMITS.get(part, left))
        if seconds < 1:
            done[part] = "no time left"
        else:
            done[part] = run(part, given.device, given.output, seconds, environ)
        print(part, json.dumps(done[part]), flush=True)
        (given.output / "parts.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    failed = [part for part, state in done.items() if not isinstance(state, dict) or state["code"] not in (0, 143, -15)]
    raise SystemExit(f"failed: {', '.join(failed)}; see {given.output}/*.log" if failed else 0)


if __name__ == "__main__":
    main()
