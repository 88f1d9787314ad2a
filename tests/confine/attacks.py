"""Attacks on a sandbox, as source that sets `effect`, and what runs each of them free and confined.

Everything an attacker could wish for is imported before the doors close. The names an attack finds: `target`, a file
that says "untouched" and the stem of names it may write; `folder`, where it lies, with the listening socket `door`;
`port`, a TCP port that answers; `victim`, another process of the same user; `terminal`, an open pseudo-terminal;
`number(x86, generic)`, a system call's number on this machine; `libc`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

EFFECT = 42  # exit status of a process whose attack worked
CONTAINED = 43  # of one whose attack was refused; anything else, but death by a signal, is a broken test

PRELUDE = """
import _posixshmem, ctypes, encodings.idna, fcntl, json, mmap, os, platform, resource, select, signal, socket, struct
import sys, termios, threading, time
from pipeline.confine import sandbox
libc = ctypes.CDLL(None, use_errno=True)

def number(x86, generic):
    return x86 if machine == "x86_64" else generic

def attempt(attack, level, names):
    try:
        if level != "free":
            sandbox.lock_down(level, 5)
        exec(attack, names)
        os._exit(42 if names["effect"] else 43)
    except (OSError, RuntimeError, MemoryError, AssertionError, ValueError) as error:
        os._exit(43)
    finally:
        os._exit(99)

machine = platform.machine()
"""

# Runs one attack in several fresh children, and prints the exit status of each by user and level. A child at a level
# with a wrapper is a new process, as the referee's worker is; the others are forks, which share its addresses.
DRIVER = f"""{PRELUDE}
from pipeline.confine import isolation
attack, folder, port, cases, prelude = json.loads(sys.stdin.read())

def child(user, level):
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as an ordinary user's process is
    target = f"{{folder}}/{{user}}-{{level}}"
    open(target, "w").write("untouched")
    alive, hold = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(hold)
        os.read(alive, 1)  # until this child has ended
        os._exit(0)
    given = {{"target": target, "folder": folder, "port": port, "victim": victim, "terminal": 0}}
    if level == isolation.BUBBLEWRAP:
        code = prelude + f"attempt({{attack!r}}, {{level!r}}, globals() | {{given!r}})"
        arguments = isolation.command(level, f"exec({{code!r}})")
        os.execve(arguments[0], arguments, {{}})
    attempt(attack, level, globals() | given | {{"terminal": os.openpty()[1]}})

results = []
for user, level in cases:
    pid = os.fork()
    if pid == 0:
        child(user, level)
    status = os.waitpid(pid, 0)[1]
    results.append(os.waitstatus_to_exitcode(status))
print(json.dumps(results))
"""

ATTACKS = {
    # --- files -------------------------------------------------------------------------------------------------------
    "read a file": "effect = open(target).read() == 'untouched'",
    "read a file by openat2": """
how = (ctypes.c_uint64 * 3)(0, 0, 0)
fd = libc.syscall(437, -100, target.encode(), how, ctypes.c_size_t(24))
effect = fd >= 0 and os.read(fd, 9) == b"untouched"
""",
    "read a file through a link": """
os.symlink(target, target + ".seen")
effect = open(target + ".seen").read() == "untouched"
""",
    "list a folder": "effect = len(os.listdir(folder)) > 0",
    "look at a file": "effect = os.stat(target).st_size > 0",
    "write a file": "effect = open(target + '.new', 'w').write('x') == 1",
    "fill the disk": "fd = os.open(target, os.O_WRONLY); os.posix_fallocate(fd, 0, 1 << 22); effect = True",
    "delete a file": "os.unlink(target); effect = True",
    "rename a file": "os.rename(target, target + '.moved'); effect = True",
    "truncate a file": "os.truncate(target, 0); effect = True",
    "change permissions": "os.chmod(target, 0o777); effect = True",
    "change times": "os.utime(target, (0, 0)); effect = True",
    "make a folder": "os.mkdir(target + '.folder'); effect = True",
    "make a link": "os.symlink('/etc/passwd', target + '.link'); effect = True",
    "make a hard link": "os.link(target, target + '.hard'); effect = True",
    "make a pipe file": "os.mkfifo(target + '.pipe'); effect = True",
    "change directory": "os.chdir(folder); effect = True",
    # --- the network and other sockets -------------------------------------------------------------------------------
    "connect over TCP": "socket.socket().connect(('127.0.0.1', port)); effect = True",
    "send over UDP": """
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
effect = out.sendto(b"secret", ("127.0.0.1", port)) == 6
""",
    "listen": "socket.create_server(('127.0.0.1', 0)); effect = True",
    "connect to a service's socket": "s = socket.socket(socket.AF_UNIX); s.connect(folder + '/door'); effect = True",
    "abstract socket": "s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + target); effect = True",
    "socket pair": "socket.socketpair(); effect = True",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); effect = True",
    "resolve a name": "effect = len(socket.getaddrinfo('localhost', 80)) > 0",
    # --- other processes ---------------------------------------------------------------------------------------------
    "list processes": "effect = str(os.getpid()) in os.listdir('/proc')",
    "read another's command line": "effect = len(open(f'/proc/{victim}/cmdline', 'rb').read()) > 0",
    "read another's environment": "effect = open(f'/proc/{victim}/environ', 'rb').read(1) is not None",
    "read its own environment": "effect = open('/proc/self/environ', 'rb').read() is not None",
    "read another's memory": """
class Span(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t))
here = ctypes.create_string_buffer(16)
mine, theirs = Span(ctypes.addressof(here), 16), Span(id(folder), 16)  # a fork shares the addresses
effect = libc.process_vm_readv(victim, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) == 16
""",
    "write another's memory": """
class Span(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t))
here = ctypes.create_string_buffer(8)
mine, theirs = Span(ctypes.addressof(here), 8), Span(ctypes.addressof(here), 8)
effect = libc.process_vm_writev(victim, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) == 8
""",
    "read another's memory as a file": """
memory = open(f"/proc/{victim}/mem", "rb", buffering=0)
memory.seek(id(folder))
effect = len(memory.read(16)) == 16
""",
    "write its own memory as a file": """
here = ctypes.create_string_buffer(b"before")
memory = open("/proc/self/mem", "r+b", buffering=0)
memory.seek(ctypes.addressof(here))
memory.write(b"after")
effect = here.raw.startswith(b"after")
""",
    "trace a process": "effect = libc.ptrace(0x4206, victim, None, None) == 0",
    "ask to be traced": "effect = libc.ptrace(0, 0, None, None) == 0",
    "steal a descriptor": """
fd = libc.syscall(438, os.pidfd_open(victim), 0, 0)
effect = fd >= 0
""",
    "compare processes": "effect = libc.syscall(number(312, 272), os.getpid(), victim, 2, 0, 0) >= 0",
    "kill a process": "os.kill(victim, 9); effect = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -9",
    "kill by a pidfd": "fd = os.pidfd_open(victim); signal.pidfd_send_signal(fd, 9); effect = True",
    "find a process by signal 0": "os.kill(victim, 0); effect = True",
    "signal its group": "os.killpg(os.getpgid(0), 0); effect = True",
    "signal itself": "signal.setitimer(signal.ITIMER_REAL, 50); effect = True",
    "fork": "pid = os.fork()\nif pid == 0: os._exit(0)\neffect = True",
    "daemon": """
pid = os.fork()
if pid == 0:
    os.setsid()
    open(target + ".daemon", "w")
    os._exit(0)
os.waitpid(pid, 0)
effect = os.path.exists(target + ".daemon")
""",
    "vfork and exec": "effect = os.posix_spawn('/bin/true', ['true'], {}) > 0",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'exit 42'])",
    "exec of anonymous memory": """
fd = os.memfd_create("program")
os.write(fd, open("/bin/sh", "rb").read())
os.execve(fd, ["sh", "-c", "exit 42"], {})
""",
    "thread": "t = threading.Thread(target=int); t.start(); t.join(); effect = True",
    "leave the session": "os.setpgid(0, 0); effect = True",
    "change priority": "before = os.nice(0); effect = os.nice(3) > before",
    "pin to a core": "os.sched_setaffinity(0, os.sched_getaffinity(0)); effect = True",
    # --- memory and descriptors --------------------------------------------------------------------------------------
    "allocate memory": "effect = len(mmap.mmap(-1, 1 << 30)) > 0",
    "allocate memory piece by piece": "pieces = [mmap.mmap(-1, 1 << 22) for _ in range(256)]; effect = True",
    "raise a limit": """
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
effect = True
""",
    "anonymous file": "effect = os.write(os.memfd_create('x'), b'x' * 4096) == 4096",
    "secret memory": "effect = libc.syscall(447, 0) >= 0",
    "shared memory": """
name = "/" + os.path.basename(target)
fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_RDWR, 0o600)
_posixshmem.shm_unlink(name)
effect = fd > 0
""",
    "System V shared memory": """
segment = libc.shmget(0, 4096, 0o1600)
effect = segment >= 0
libc.shmctl(segment, 0, None)
""",
    "message queue": "effect = libc.syscall(number(68, 186), 0, 0o1600) >= 0",
    "io_uring": "effect = libc.syscall(425, 4, (ctypes.c_char * 120)()) >= 0",
    "userfaultfd": "effect = libc.syscall(number(323, 282), 1) >= 0",
    "event poll": "select.epoll(); effect = True",
    "event counter": "os.eventfd(0); effect = True",
    "watch files": "effect = libc.inotify_init() >= 0",
    "duplicate a descriptor": "os.dup(1); effect = True",
    "make a pipe": "os.pipe(); effect = True",
    # --- terminals and the kernel ------------------------------------------------------------------------------------
    "terminal": "os.openpty(); effect = True",
    "terminal settings": "effect = libc.ioctl(0, 0x541B, ctypes.byref(ctypes.c_int())) == 0",
    "resize a terminal": "fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 9, 9, 0, 0)); effect = True",
    "keep a key": "effect = libc.syscall(number(248, 217), b'user', target.encode(), b'loot', 4, -2) > 0",
    "look for keys": "effect = libc.syscall(number(250, 219), 0, -2, 1) > 0",
    "namespaces": "effect = libc.unshare(0x10000000) == 0",
    "performance counters": """
event = (ctypes.c_uint64 * 16)(1 | 128 << 32, 1)  # a software event's task clock
ctypes.c_uint64.from_address(ctypes.addressof(event) + 40).value = 0b1100000  # neither kernel nor hypervisor
effect = libc.syscall(number(298, 241), event, 0, -1, -1, 0) >= 0
""",
    "another execution domain": "effect = libc.personality(0x0040000) >= 0",
    "new privileges": "effect = libc.prctl(15, b'disguise', 0, 0, 0) == 0",
}

# Not every kernel offers these to everyone: where a free process cannot do it either, there is nothing to contain.
NOT_EVERYWHERE = {
    "io_uring", "userfaultfd", "secret memory", "keep a key", "look for keys", "namespaces", "performance counters",
    "compare processes", "steal a descriptor",
}  # fmt: skip

# What only root can do.
ROOT_ATTACKS = {
    "become another user": "os.setuid(1); effect = os.getuid() == 1",
    "change root": "os.chroot(folder); effect = True",
    "mount": "effect = libc.unshare(0x20000) == 0 and libc.mount(b'x', folder.encode(), b'tmpfs', 0, None) == 0",
    "raw socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); effect = True",
    "make a device": "os.mknod(target + '.device', 0o20600, os.makedev(1, 3)); effect = True",
    "rename the machine": "socket.sethostname(socket.gethostname()); effect = True",
    "take a file": "os.chown(target, 1, 1); effect = True",
    "load into the kernel": "effect = libc.syscall(number(321, 280), 0, struct.pack('IIIII', 2, 4, 4, 1, 0), 20) >= 0",
}

# What a process can still do in bubblewrap: to itself and its wrapper, or to what ends with them. Keys are
# `nobody`'s; System V memory and queues are the namespace's own.
HARMLESS_IN_BUBBLEWRAP = {
    "ask to be traced", "signal its group", "signal itself", "leave the session", "change priority", "pin to a core",
    "raise a limit", "System V shared memory", "message queue", "terminal settings", "keep a key", "look for keys",
    "namespaces", "another execution domain", "new privileges",
}  # fmt: skip

Case = tuple[int | None, str]  # user (None: the one who runs the tests) and level ("free": not confined)


def drive(attack: str, folder: Path, cases: list[Case]) -> dict[Case, int]:
    """Exit status of a child for each case."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / "door"))
        (folder / "door").chmod(0o777)
        door.listen()
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps([attack, str(folder), server.getsockname()[1], cases, PRELUDE]),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def contained(code: int) -> bool:
    """Whether an exit status says that the attack was refused, or that the kernel killed its process."""
    return code == CONTAINED or code < 0 or code > 128  # bwrap gives a signal as 128 and its number
