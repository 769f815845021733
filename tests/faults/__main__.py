"""What ``make faults`` prints at its end: what was tried, and what held."""

import json
import os
import platform
from pathlib import Path

import torch

WORDS = {
    "trials": "kill -9 at random times",
    "survived": "… of which the run ended with the bits of an undisturbed one",
    "runs": "runs killed over and over until they finished",
    "terminated": "SIGTERM or SIGINT while training: exit status 143 or 130 and a whole checkpoint",
    "longest_sigterm_seconds": "longest time from the signal to the end of the process, s",
    "processes_stopped_together": "processes that SIGTERM stopped after the same step",
    "flipped": "bits flipped in a checkpoint",
    "noticed": "… of which were noticed, with the file named",
    "resumed": "stops after each step of a training, each of which went on to the same bits",
}


def main() -> None:
    """Print the record as a table, and complete it with the command and the machine."""
    file = Path(os.environ["INHIBITOR_FAULTS_RECORD"])
    found = json.loads(file.read_text(encoding="utf-8"))
    found["resumed"] = sum(found.pop(name) for name in list(found) if name.startswith("resumed ("))
    for name, words in WORDS.items():
        print(f"{found.get(name, '–'):>10}  {words}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found["command"] = "make faults"
    found["machine"] = (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
