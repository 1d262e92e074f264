"""`detailflow serve` as a process of its own, as a user starts it."""

import os
import re
import subprocess
import sys


class Process:
    """`detailflow serve` on a free port, which it has again if it is started again."""

    errors: int | None = subprocess.PIPE  # where its stderr goes, as Popen has it

    def __init__(self, *options: str, **environment: str) -> None:
        self.options, self.environment, self.port = options, environment, 0
        self.start()

    def start(self) -> None:
        """Start it, on its old port if it had one."""
        command = [sys.executable, "-m", "detailflow", "serve", "--device", "cpu", "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.banner = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)", self.banner)
        assert found, (self.process.wait(10), self.process.stderr and self.process.stderr.read())
        self.url, self.port = found[0], int(found[1])

    def end(self) -> tuple[int, str]:
        """Stop it as an operator does; return its exit status and what it wrote to stderr."""
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors
