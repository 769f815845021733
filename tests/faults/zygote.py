"""Processes of the real command that start at once: forks of one that has imported everything and computed nothing."""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Child:
    """A command at work. Its process number stays its own until ``wait`` has returned."""

    zygote: "Zygote"
    pid: int

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, seconds: float) -> bool:
        """Whether it ends within some seconds."""
        return self.zygote.ended(seconds)

    def wait(self) -> int:
        """Its exit status; negative if a signal ended it."""
        return self.zygote.reap()


class Zygote:
    """Start it once, ``start`` commands one after the other, ``close`` it."""

    def __init__(self) -> None:
        quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        environment = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._status: int | None = None
        assert self._answer() == "ready"

    def start(self, *arguments: str, log: Path) -> Child:
        """Run ``inhibitor`` with arguments; what it prints goes to the end of a file."""
        self._status = None
        self._ask({"argv": ["inhibitor", *arguments], "log": str(log)})
        return Child(self, int(self._answer()))

    def ended(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        if self._status is None and select.select([self.process.stdout], [], [], seconds)[0]:
            self._status = int(self._answer())
        return self._status is not None

    def reap(self) -> int:
        if self._status is None:
            self._status = int(self._answer())
        self._ask("reap")
        return self._status

    def close(self) -> None:
        self.process.communicate()  # which closes its pipes

    def _ask(self, request: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def serve() -> None:
    """The zygote's own life: a line with a command; the child's number; its status; a line to let go of it."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert  # noqa: F401

    import inhibitor.cli.distill
    import inhibitor.cli.finetune
    import inhibitor.distill.run
    import inhibitor.evaluate.finetune
    import inhibitor.report
    import inhibitor.training  # noqa: F401
    from inhibitor.cli import main

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = request["argv"]
            status = 1
            try:
                main()
                status = 0
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        answers.write(f"{child}\n")
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert found is not None
        answers.write(f"{found.si_status if found.si_code == os.CLD_EXITED else -found.si_status}\n")
        sys.stdin.readline()
        os.waitpid(child, 0)


if __name__ == "__main__":
    serve()
