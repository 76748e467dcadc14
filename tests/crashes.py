"""Child processes that end themselves at a chosen event: a call that changes the disk, a step, a save."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

OnCall = Callable[[str], None]
OS_CALLS = ("open", "write", "fsync", "rename", "replace", "unlink")  # of `os`: calls that change the disk
WRITING_CALLS = ("mkdir", "os.open", "open", "write", "serialize_file")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def fork(work: Callable[[], object]) -> int:
    """Run in a child process, which starts in milliseconds as everything is imported already.

    Args:
        work: ends normally, or as a command with SystemExit.

    Returns:
        The exit code, negative after a signal that ended the child.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def before(owner: Any, name: str, on_call: OnCall) -> None:
    """Call ``on_call(name)`` before each call of a function; for the rest of this (child) process."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        on_call(name)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def kill_at(number: int) -> OnCall:
    """Kills this process at a call."""
    calls = count(1)

    def on_call(name: str) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_call


def watch_os_calls(on_call: OnCall) -> None:
    """Call ``on_call`` before each of `OS_CALLS`."""
    for name in OS_CALLS:
        before(os, name, on_call)


def watch_disk(on_call: OnCall) -> None:
    """Call ``on_call`` before each call that changes the disk, and inside those that write: the file is torn then."""
    for name in ("write", "fsync", "rename", "replace", "unlink", "rmdir"):
        before(os, name, on_call)
    _watch_mkdir(on_call)
    _watch_os_open(on_call)
    for module in (io, builtins):
        _watch_open(module, on_call)
    _watch_safetensors(on_call)


def _on_call_of(path: Any, name: str, on_call: OnCall) -> None:
    """As the system does, errors of functions that take a path name it."""
    try:
        on_call(name)
    except OSError as error:
        error.filename = os.fspath(path)
        raise


def _watch_mkdir(on_call: OnCall) -> None:
    original = os.mkdir

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
        _on_call_of(path, "mkdir", on_call)
        original(path, *args, **kwargs)

    setattr(os, "mkdir", wrapped)  # noqa: B010


def _watch_os_open(on_call: OnCall) -> None:
    original = os.open

    def wrapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & WRITE_FLAGS:
            _on_call_of(path, "os.open", on_call)
        return original(path, flags, *args, **kwargs)

    setattr(os, "open", wrapped)  # noqa: B010


def _watch_open(module: Any, on_call: OnCall) -> None:
    original = module.open

    def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = not set("wax+").isdisjoint(mode)
        if writes:
            _on_call_of(file, "open", on_call)
        opened = original(file, mode, *args, **kwargs)
        if writes:
            on_call("write")  # the file exists and is empty
        return opened

    module.open = wrapped


def _watch_safetensors(on_call: OnCall) -> None:
    original = safetensors.torch.serialize_file

    def wrapped(tensors: Any, path: Any, **kwargs: Any) -> None:
        on_call("serialize_file")
        original(tensors, path, **kwargs)
        data = Path(path).read_bytes()
        os.truncate(path, len(data) // 2)
        on_call("half of a file")
        with io.FileIO(path, "w") as file:
            file.write(data)

    setattr(safetensors.torch, "serialize_file", wrapped)  # noqa: B010


def fill_disk_at(number: int) -> OnCall:
    """Makes the disk full from a call on: files can be opened and removed, but not created or written."""
    calls = count(1)

    def on_call(name: str) -> None:
        if name in WRITING_CALLS and next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return on_call
