"""A process with everything imported that forks for every command: a start costs nothing, and what runs is the same.

Reads one JSON object a line: arguments, folder, environment, files for the two streams. Answers with the exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings

import networkx  # noqa: F401 - what every child finds imported, as are the next
import torch
import torch._dynamo

import ockham.cli.app  # noqa: F401


def run(job: dict) -> None:
    """Become the command, in a child; never returns."""
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for stream, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warnings.resetwarnings()
    warnings.simplefilter("default")
    sys.argv, code = ["ockham", *job["arguments"]], 0
    try:
        runpy.run_module("ockham", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
