"""One program under limits. This file runs as a script, in a process of its own, and imports nothing of evatune.

It reads an order from standard input, takes away what the program shall not have, runs it, and reports on a pipe.
Where the system allows it (Linux, with user namespaces for those who are not its administrator), the program has no
network, cannot touch other processes, and can write in its own folder only. What the system refuses is not an error
here: `evatune.tasks.generation.sandbox` tests what holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from typing import Any

_USER, _NETWORK, _PROCESSES, _FILES = 0x10000000, 0x40000000, 0x20000000, 0x00020000
_STRANGERS = 1 << 20
_PRIVATE, _RECURSIVE, _BIND = 1 << 18, 1 << 14, 1 << 12
_SAFE = 2 | 4  # no programs with the rights of their owner, no devices
_CAPABILITIES = 41
_PARENT_DEATH, _DROP_BOUND, _NO_NEW_PRIVILEGES = 1, 24, 38
_KILL = 9
_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_RECURSIVE, _READ_ONLY = 0x8000, 1


def main() -> None:
    """Run the program of the order on standard input."""
    order = json.load(sys.stdin)
    report = os.fdopen(order["report"], "w")
    with contextlib.suppress(OSError, AttributeError):
        _confine(order["folder"], n_bytes=order["file_bytes"])
    child = os.fork()  # the first process of a new process namespace: when it ends, all of its children do
    if child:
        report.close()
        os.waitpid(child, 0)
        return
    _limit(order)
    with contextlib.suppress(OSError, AttributeError):
        _drop_privileges()
    if program := os.fork():  # the first process ignores signals that others would end by, so the program is the second
        report.close()
        os.waitpid(program, 0)
        os._exit(0)
    own = os.getpid()
    reason = _outcome(order["program"])
    if os.getpid() != own:  # a process that the program started has come to the program's end
        os._exit(0)
    json.dump({"secret": order["secret"], "reason": reason}, report)
    report.flush()
    os._exit(0)


def _outcome(program: str) -> str:
    """Run a program; return why it failed, or an empty string."""
    silent = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silent, number)
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "program"})
    except BaseException as error:  # a program may also exit
        return f"{type(error).__name__}: {error}"[:200].rstrip(": ")
    return ""


def _limit(order: dict[str, Any]) -> None:
    limits = {
        "RLIMIT_CPU": order["seconds"] + 1,
        "RLIMIT_AS": order["memory_bytes"],
        "RLIMIT_FSIZE": order["file_bytes"],
        "RLIMIT_NPROC": order["processes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    for name, most in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), (int(most), int(most)))


def _confine(folder: str, *, n_bytes: int) -> None:
    """Take away the network, the other processes, and all files but the folder, as far as the system allows it.

    An administrator gives up all rights after that; others use a user namespace for it.
    """
    libc, user, group = _libc(), os.getuid(), os.getgid()
    apart = _NETWORK | _PROCESSES | _FILES
    if user:
        if libc.unshare(apart | _USER):
            libc.unshare(_NETWORK | _USER)
            return
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    elif libc.unshare(apart):
        return
    libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
    if not user:
        _uncover([*sys.path, sys.prefix, sys.base_prefix])
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    libc.syscall(_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    libc.mount(b"none", folder.encode(), b"tmpfs", _SAFE, f"size={n_bytes},mode=777".encode())
    os.chdir("/")
    os.chdir(folder)
    if not user:
        stranger = _STRANGERS + os.getpid()  # a user of its own, whose processes are counted for themselves
        os.setgroups([])
        os.setresgid(stranger, stranger, stranger)
        os.setresuid(stranger, stranger, stranger)


def _uncover(paths: list[str]) -> None:
    """Let others reach Python's files below a private folder, such as a home, whose other files are hidden then."""
    libc = _libc()
    covered: dict[str, list[tuple[str, int]]] = {}
    for path in sorted({os.path.realpath(path) for path in paths if os.path.isdir(path)}):
        parts = path.split("/")
        above = ["/".join(parts[: number + 1]) or "/" for number in range(1, len(parts))]
        private = next((folder for folder in above if not os.stat(folder).st_mode & 1), None)
        if private:
            covered.setdefault(private, []).append((path, os.open(path, os.O_RDONLY | os.O_DIRECTORY)))
    for private, inside in covered.items():
        libc.mount(b"none", private.encode(), b"tmpfs", _SAFE, b"mode=755")
        for path, opened in inside:
            os.makedirs(path, exist_ok=True)
            libc.mount(f"/proc/self/fd/{opened}".encode(), path.encode(), None, _RECURSIVE | _BIND, None)
            os.close(opened)


def _drop_privileges() -> None:
    """Give up what the new namespaces allowed, for good, and end when the parent does."""
    libc = _libc()
    libc.prctl(_PARENT_DEATH, _KILL, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for number in range(_CAPABILITIES):
        libc.prctl(_DROP_BOUND, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    main()
