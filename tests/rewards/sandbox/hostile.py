"""Hostile programs of our own: (id, category, language, code). See `emberl.rewards.audit.attacks`
for how they are judged."""

from __future__ import annotations

from textwrap import dedent

_SYSCALL = (
    "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.syscall.restype ="
    " ctypes.c_long\n"
)

PYTHON_FORGERIES = {
    "int_subclass": (
        """
        class I(int):
            def __eq__(s, o): return True
            def __int__(s): return 5
            def __index__(s): return 5
            __hash__ = int.__hash__
        def add(a, b): return I(0)"""
    ),
    "lying_class": (
        """
        class L:
            __class__ = int
            def __eq__(s, o): return True
            def __int__(s): return 1
        def add(a, b): return L()"""
    ),
    "lying_list": (
        """
        class L(list):
            def __iter__(s):
                while True: yield 1
        def add(a, b): return L([1])"""
    ),
    "endless_dict": (
        """
        class D(dict):
            def keys(s):
                while True: yield 1
            def items(s):
                while True: yield (1, 1)
        def add(a, b): return D(x=1)"""
    ),
    "pickle_reduce": (
        """
        class P:
            def __reduce__(s): return (eval, ("5",))
        def add(a, b): return P()"""
    ),
    "self_reference": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep_nest": "def add(a, b):\n    x = 5\n    for _ in range(900): x = [x]\n    return x",
    "deep_nest_raw": (
        "import os\ndef add(a, b):\n    os.write(3, b'{\"ok\":' + b'[' * 200000 + b']' * 200000 +"
        " b'}\\n')"
    ),
    "surrogates": "def add(a, b): return '\\ud800' * 50 + chr(0) + chr(0x202e)",
    "evil_exception": (
        """
        class E(Exception):
            def __str__(s): raise E()
            __repr__ = __str__
        E.__name__ = "x" * 10000000
        def add(a, b): raise E()"""
    ),
    "evil_metaclass": (
        """
        class M(type):
            __name__ = property(lambda s: 1 / 0)
        class E(BaseException, metaclass=M): pass
        def add(a, b): raise E()"""
    ),
    "colliding_keys": "def add(a, b): return {i * (2**61 - 1): 0 for i in range(20000)}",
    "colliding_set": "def add(a, b): return {i * (2**61 - 1) for i in range(20000)}",
    "giant_int": "def add(a, b): return 1 << 3000000",
    "many_digits_raw": (
        "import os\ndef add(a, b):\n    os.write(3, b'{\"ok\": ' + b'7' * 900000 + b'}\\n')"
    ),
    "nan_token_raw": "import os\ndef add(a, b):\n    os.write(3, b'{\"ok\": NaN}\\n')",
    "half_line": (
        "import os, time\ndef add(a, b):\n    os.write(3, b'{\"ok\": ')\n    time.sleep(100)"
    ),
    "odd_shapes_raw": (
        """
        import os
        n = [0]
        def add(a, b):
            for t in (b'{"ok": {"dict": 1}}', b'{"ok": {"dict": [1]}}', b'{"ok": {}}', b'{"ok": {"set": 1, "x": 2}}',
                      b'{"ok": {"int": "zz"}}', b'{"ok": {"float": 5}}', b'{"passed": true}', b'[]', b'5', b'', b'\\xff'):
                os.write(3, t + b'\\n')"""
    ),
    "flood_channel": "import os\ndef add(a, b):\n    while True: os.write(3, b'x' * 65536)",
    "flood_lines": "import os\nwhile True: os.write(3, b'{\"ok\": 5}\\n' * 1000)",
    "ahead_of_calls": (
        'import os\nos.write(3, b\'{"ok": null}\\n\' + b\'{"ok": 5}\\n{"ok": -3}\\n{"ok":'
        " 2}\\n')\nos._exit(0)"
    ),
    "exit_like_ours": "import os\nos._exit(125)",
    "read_ahead": (
        """
        import os, json
        os.write(3, b'{"ok": null}\\n')
        seen = os.read(3, 65536)
        print(seen)
        os.write(3, b'{"ok": 0}\\n')
        os._exit(0)"""
    ),
    "patch_machinery": (
        """
        import sys, json, builtins
        for name in ("eval", "exec", "compile", "isinstance", "type", "len"):
            setattr(builtins, name, lambda *a, **k: 5)
        json.dumps = lambda *a, **k: "5"
        def add(a, b): return 0"""
    ),
    "hunt_for_answers": (
        """
        import gc, sys
        def add(a, b):
            for o in gc.get_objects():
                if isinstance(o, dict):
                    for k in ("expected", "answer", "tests", "test_list", "output"):
                        if k in o and isinstance(o[k], int): return o[k]
            return 0"""
    ),
    "close_everything": "import os\nos.closerange(0, 64)\ndef add(a, b): return 0",
    "wrong_fence": "```\ndef add(a, b): return 0",
    "null_byte": "def add(a, b): return 0\n\0",
    "deep_source": "x = " + "(" * 50000 + ")" * 50000,
    "deep_unary": "x = " + "-" * 90000 + "1",
    "ask_to_be_killed": (
        """
        import os, signal
        def add(a, b):
            for act in (lambda: os.kill(os.getpid(), 9), lambda: signal.raise_signal(9), lambda: os.abort(),
                        lambda: signal.pthread_kill(__import__("threading").get_ident(), 9)):
                try: act()
                except OSError: pass
            os.close(3)
            return 0"""
    ),
    "eat_memory_while_asked": (
        "x = []\ndef add(a, b):\n    while True: x.append(bytearray(1 << 22))"
    ),
    "two_answers_in_one_line": (
        'import os\ndef add(a, b):\n    os.write(3, b\'{"ok": 0} {"ok": 5}\\n\')'
    ),
    "answer_late": (
        """
        import os, threading, time
        def add(a, b):
            threading.Thread(target=lambda: (time.sleep(0.1), os.write(3, b'{"ok": 5}\\n'))).start()
            return 0"""
    ),
    "reply_of_the_server": (
        """
        import os
        def add(a, b):
            os.write(3, b'run\\n' + bytes(40))
            os.write(3, b'no\\nout of memory\\n')"""
    ),
    "surrogate_source": "def add(a, b): return '\ud800'",
}

PYTHON_RESOURCES = {
    "sleep": "import time\ntime.sleep(1000)",
    "list_growth": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "mmap_bomb": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))",
    "malloc_bomb": "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.malloc(1 << 20)",
    "c_stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x ="
        " [x]\nprint(repr(x)[:1])"
    ),
    "python_stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "small_stack_threads": (
        """
        import threading, time
        threading.stack_size(32768)
        for _ in range(100000): threading.Thread(target=time.sleep, args=(100,)).start()"""
    ),
    "alarm_loop": (
        """
        import signal
        signal.signal(signal.SIGALRM, lambda *a: None)
        signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)
        while True: pass"""
    ),
    "ignore_timer": (
        """
        import signal
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        while True: pass"""
    ),
    "stop_timer": (
        """
        import contextlib, ctypes, signal
        with contextlib.suppress(OSError): signal.setitimer(signal.ITIMER_PROF, 0)
        ctypes.CDLL(None).syscall(38, 2, bytes(32), None)
        while True: pass"""
    ),
    "many_naps": "import time\nwhile True: time.sleep(0.0001)",
    "naps_in_threads": (
        """
        import threading, time
        def nap():
            while True: time.sleep(0.001)
        for _ in range(30): threading.Thread(target=nap).start()"""
    ),
    "raw_threads": _SYSCALL
    + """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        # a loop of clone(CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM, stack of the code's own page); the children do the same
        code.write(bytes.fromhex("bf000f0500be00000000ba0000000041ba0000000041b80000000041b900000000b8380000000f05ebd6"))
        ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()""",
    "wait_for_ever": (
        "import threading\nthreading.Lock().acquire() or"
        " threading.Event().wait()\nthreading.Event().wait()"
    ),
    "ignore_cpu_limit": (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass"
    ),
    "sparse_output": "import os\nos.lseek(1, 1 << 40, 0)\nos.write(1, b'x')\nos.write(1, b'y')",
    "raise_limits": (
        """
        import resource
        for which in range(16):
            try: resource.setrlimit(which, (-1, -1)); print("RAISED", which)
            except (OSError, ValueError): pass
        x = []
        while True: x.append(bytearray(1 << 20))"""
    ),
    "ignore_output_limit": (
        """
        import signal, os
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        while True:
            try: os.write(1, b'x' * 65536)
            except OSError: pass"""
    ),
    "endless_input": "import sys\nwhile True: sys.stdin.read()",
    "null_pointer": "import ctypes\nctypes.string_at(0)",
    "non_daemon_thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "vfork_loop": _SYSCALL + "while True: libc.syscall(58)",
}

PYTHON_ESCAPES = {
    "fork_variants": _SYSCALL
    + """
        for name, args in (("FORK", (57,)), ("VFORK", (58,)), ("CLONE", (56, 17, 0, 0, 0, 0)),
            ("CLONE3", (435, 0, 0)),
                           ("NEWUSER", (56, 0x10000011, 0, 0, 0, 0)), ("UNSHARE", (272, 0x10000000)),
                           ("THREADUSER", (56, 0x10010000, 0, 0, 0, 0))):
            r = libc.syscall(*args)
            if r == 0: os.write(1, b"CHILD\\n")
            print(name, r)""",
    "exec_variants": _SYSCALL
    + """
        argv = (ctypes.c_char_p * 2)(b"sh", None)
        print("EXECVE", libc.syscall(59, b"/bin/sh", argv, None))
        print("EXECVEAT", libc.syscall(322, -100, b"/bin/sh", argv, None, 0))
        print("SPAWN", -1 if libc.posix_spawn(None, b"/bin/sh", None, None, argv, None) else 0)""",
    "forbidden_calls": _SYSCALL
    + """
        names = dict(PTRACE=101, SOCKET=41, SOCKETPAIR=53, SETNS=308, PIVOT=155, MOUNT=165, FSOPEN=430, MOUNTSETATTR=442,
                     CHROOT=161, KEXEC=246, INITMODULE=175, IOPL=172, SYSLOG=103, PERSONALITY=135, BPF=321, PERF=298,
                     USERFAULT=323, KEYCTL=250, URING=425, MEMFD=319, SHMGET=29, MSGGET=68, SEMGET=64, MQOPEN=240,
                     PROCESSVM=310, PIDFD=434, KCMP=312, OPENBYHANDLE=304, NAMETOHANDLE=303, LANDLOCK=444, SECCOMP=317,
                     SETUID=105, SETGID=106, SETRESUID=117, CAPSET=126, KILL=62, TKILL=200, TGKILL=234, REBOOT=169,
                     SETHOSTNAME=170, ACCT=163, SWAPON=167, QUOTACTL=179, NFSSERV=180, FANOTIFY=300, INOTIFY=294,
                     TIMERCREATE=222, SETPRIORITY=141, SETAFFINITY=203, MBIND=237, VMSPLICE=278, SPLICE=275, TEE=276,
                     OPENAT2=437, MKDIR=83, LINK=86, SYMLINK=88, UNLINK=87, RENAME=82, CHMOD=90, CHOWN=92, TRUNCATE=76,
                     FTRUNCATE=77, MKNOD=133, UTIME=132, SETXATTR=188, SYNC=162, MODIFYLDT=154, PRCTL=157, VHANGUP=153)
        for name, number in names.items():
            print(name, libc.syscall(number, 0, 0, 0, 0, 0, 0))""",
    "int80": _SYSCALL
    + """
        import mmap
        m = mmap.mmap(-1, 4096, prot=7)
        m.write(b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 2 (32-bit fork); int 0x80; ret
        f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
        print("INT80", f())""",
    "write_anywhere": (
        """
        import os
        for path in ("/x", "/tmp/x", "/dev/shm/x", "/usr/x", "/usr/lib/x", "/empty/x", "/dev/x"):
            for flags in (os.O_CREAT | os.O_WRONLY, os.O_CREAT | os.O_RDWR, os.O_TMPFILE | os.O_RDWR, os.O_CREAT):
                try: os.close(os.open(path, flags)); print("CREATED", path)
                except OSError: pass
        for path in ("/usr/lib/python3", "/usr/bin/env", "/dev/null", "/etc/passwd", "@CANARY@"):
            try: os.close(os.open(path, os.O_WRONLY)); print("WRITABLE", path)
            except OSError: pass"""
    ),
    "look_around": (
        """
        import os
        for path in ("/proc", "/sys", "/etc", "/root", "/home", "/var", "/work", "/opt", "/mnt", "/run", "/boot", "/srv"):
            try: print("LISTED", path, os.listdir(path))
            except OSError: pass
        allowed = {"bin", "dev", "empty", "lib", "lib64", "lib32", "libx32", "tmp", "usr", "python", "zygote.py"}
        print("ROOT" if set(os.listdir("/")) - allowed else "fine")
        print("DEVICES" if set(os.listdir("/dev")) - {"null", "zero", "random", "urandom"} else "fine")
        print("TEMPORARY" if os.listdir("/tmp") else "fine")"""
    ),
    "packages": (
        """
        import os, sys
        for root, dirs, files in os.walk("/"):
            if root.endswith(("site-packages", "dist-packages")) and (dirs or files): print("PACKAGES", root)"""
    ),
    "environment": _SYSCALL
    + """
        libc.getenv.restype = ctypes.c_char_p
        print(os.environ, libc.getenv(b"EMBERL_ATTACK_SECRET"), libc.getenv(b"PATH"))
        if os.environ: print("ENVIRONMENT")""",
    "open_descriptors": (
        """
        import os, stat
        for fd in range(256):
            try: mode = os.fstat(fd).st_mode
            except OSError: continue
            if fd > 3: print("INHERITED", fd)
            if stat.S_ISDIR(mode): print("DIRECTORY", fd)"""
    ),
    "kill_everyone": (
        """
        import os, signal
        for pid in (-1, 0, 1, os.getppid(), os.getpid()):
            for number in (0, 9, 15, 19):
                try: os.kill(pid, number); print("SIGNALLED", pid, number)
                except OSError: pass"""
    ),
    "async_signals": (
        """
        import fcntl, os
        for command in (8, 10, 15, 9, 1024, 1031, 1033):
            try: fcntl.fcntl(1, command, 1); print("FCNTL", command)
            except OSError: pass"""
    ),
    "terminal_injection": (
        """
        import fcntl
        for request in (0x5412, 0x541c, 0x540e, 0x8903):
            try: fcntl.ioctl(0, request, b"x"); print("IOCTL", request)
            except OSError: pass"""
    ),
    "parent_limits": _SYSCALL
    + """
        limits = (ctypes.c_ulong * 2)(1, 1)
        for pid in (0, 1, os.getppid()):
            print("PRLIMIT", libc.syscall(302, pid, 7, limits, None))""",
    "privileges": (
        """
        import os
        if os.geteuid() == 0 and os.getuid() != os.geteuid(): print("ROOTED")
        for act in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.setresuid(0, 0, 0),
            lambda: os.nice(-5)):
            try: act(); print("PRIVILEGED")
            except OSError: pass"""
    ),
    "processes_of_the_host": (
        """
        import os
        for pid in (1, os.getppid(), "self/..", *range(max(os.getppid() - 50, 2), os.getppid() + 50)):
            for name in ("mem", "environ", "maps", "cmdline", "root/etc/passwd", "cwd/.", "fd/0", "fdinfo/0", "task", "stat"):
                try: os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
                except OSError: continue
                if pid != os.getpid(): print("OPENED", pid, name)  # its own descriptors it has anyway
        for pid in (1, os.getppid()):
            for name in ("cwd", "exe", "root", "fd/0"):
                try: print("LINK", pid, os.readlink(f"/proc/{pid}/{name}"))
                except OSError: pass"""
    ),
    "secret_by_other_ways": (
        """
        import ctypes, linecache, mmap, os, runpy, shutil, zipimport
        path = "@SECRETFILE@"
        folder, name = os.path.split(path)
        ways = (lambda: os.open(path, os.O_PATH), lambda: os.read(os.open(path, os.O_RDONLY), 99),
            lambda: open(path).read(),
                lambda: os.read(os.open(name, os.O_RDONLY, dir_fd=os.open(folder, os.O_PATH)), 99),
                lambda: os.read(os.open("/proc/self/root" + path, os.O_RDONLY), 99), lambda: os.listdir(folder),
                lambda: os.scandir(folder).__next__().name, lambda: os.fwalk(folder).__next__(),
                    lambda: linecache.getlines(path),
                lambda: runpy.run_path(path), lambda: shutil.copy(path, "/dev/null"), lambda: os.readlink(path),
                lambda: os.link(path, "/tmp/x"), lambda: os.rename(path, path + "x"), lambda: os.unlink(path),
                lambda: os.truncate(path, 0), lambda: os.chmod(path, 0o777), lambda: os.utime(path),
                lambda: os.setxattr(path, "user.x", b"x"), lambda: os.mkdir(folder + "/d"),
                    lambda: os.symlink(path, "/tmp/y"),
                lambda: os.mkfifo(folder + "/f"), lambda: os.chdir(folder),
                    lambda: os.statvfs(path) and os.execv(path, ["x"]))
        for number, way in enumerate(ways):
            try: found = way()
            except (OSError, SyntaxError, NameError): continue
            if number and found: print("SECRET", number, found)"""
    ),
    "folders_of_other_runs": (
        """
        import glob, os
        homes = [f"/{name}/*" for name in ("run", "home", "root")]
        for pattern in ("/tmp/*", "/tmp/emberl-*/*", "/var/tmp/*", "/dev/shm/*", *homes):
            if found := glob.glob(pattern): print("LISTED", found)"""
    ),
    "sockets": (
        """
        import socket
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 17, 40, 38, 29):
            for kind in (1, 2, 3, 5):
                try: socket.socket(family, kind); print("SOCKET", family, kind)
                except OSError: pass
        try: socket.socketpair(); print("SOCKETPAIR")
        except OSError: pass"""
    ),
    "signals_by_number": _SYSCALL
    + """
        pid = os.getppid()
        for name, args in (("KILL", (62, pid, 0)), ("TKILL", (200, pid, 0)), ("TGKILL", (234, pid, pid, 0)),
            ("KILLALL", (62, -1, 0)),
                           ("KILLGROUP", (62, 0, 0)), ("SIGQUEUE", (129, pid, 0, 0)),
                           ("TGSIGQUEUE", (297, pid, pid, 0, 0)),
                           ("PIDFDOPEN", (434, pid, 0)), ("PIDFDSIGNAL", (424, 0, 0, 0, 0)),
                           ("PIDFDGETFD", (438, 0, 0, 0)),
                           ("VMREADV", (310, pid, 0, 0, 0, 0, 0)), ("VMWRITEV", (311, pid, 0, 0, 0, 0, 0)),
                           ("PTRACE", (101, 16, pid, 0, 0)),
                           ("SETPGID", (109, 0, pid)), ("SETSID", (112,)), ("SCHEDSET", (203, pid, 8, bytes(8))),
                           ("PRIO", (141, 0, pid, 5)),
                           ("IOPRIO", (251, 1, pid, 0)), ("MIGRATE", (256, pid, 0, 0, 0)),
                           ("MADVISE", (440, 0, 0, 0, 0, 0)),
                           ("MRELEASE", (448, 0, 0)), ("KCMP", (312, pid, pid, 0, 0, 0)),
                           ("PRCTL", (157, 1, 0, 0, 0, 0))):
            print(name, libc.syscall(*args))""",
    "undo_the_walls": _SYSCALL
    + """
        for name, args in (("LANDLOCKNEW", (444, 0, 0, 1)), ("LANDLOCKADD", (445, 3, 1, 0, 0)),
            ("LANDLOCKSELF", (446, 3, 0)),
                           ("SECCOMP", (317, 0, 0, 0)), ("NEWNS", (272, 0x20000)),
                           ("FSPICK", (433, -100, b"/", 0)), ("OPENTREE", (428, -100, b"/", 1)),
                           ("MOVEMOUNT", (429, -100, b"/", -100, b"/", 0)), ("CHROOT", (161, b"/")),
                           ("PERSONALITY", (135, 0x0040000)),
                           ("URING", (425, 1, bytes(120))), ("MEMFD", (319, b"x", 0)), ("SECRETMEM", (447, 0)),
                           ("SHMGET", (29, 0, 4096, 0o1600)),
                           ("MQOPEN", (240, b"x", 0o102, 0o600, 0)), ("USERFAULT", (323, 0)),
                           ("BPF", (321, 0, 0, 0)), ("EVENTFD", (290, 0, 0)),
                           ("TIMERFD", (283, 1, 0)), ("SIGNALFD", (289, -1, bytes(8), 8, 0)), ("EPOLL", (291, 0)),
                           ("INOTIFY", (294, 0))):
            print(name, libc.syscall(*args))""",
    "ctypes_dlopen": (
        """
        import ctypes
        try: ctypes.CDLL("@CANARY@"); print("LOADED")
        except OSError: pass
        try: ctypes.CDLL("/proc/self/exe"); print("LOADED")
        except OSError: pass"""
    ),
}

_HEADERS = [
    "cstdio",
    "cstdlib",
    "cstring",
    "csignal",
    "initializer_list",
    "fcntl.h",
    "unistd.h",
    "sys/syscall.h",
]
_CPP = "".join(f"#include <{name}>\n" for name in _HEADERS) + "using namespace std;\n"
_IO, _THREADS = "#include <iostream>\n", "#include <thread>\n#include <vector>\n"

CPP = {
    ("exit0", "forge"): _CPP + "int main(){exit(0);}",
    ("constructor_exit", "forge"): (
        _CPP + "__attribute__((constructor)) void f(){_exit(0);} int main(){}"
    ),
    ("echo", "forge"): _IO + _CPP + "int main(){string s; while(getline(cin,s)) cout<<s<<'\\n';}",
    ("empty", "forge"): "",
    (
        "interpreter",
        "forge",
    ): 'const char i[] __attribute__((section(".interp"))) = "/lib/none";\nint main(){}',
    (
        "interpreter_file",
        "forge",
    ): 'const char i[] __attribute__((section(".interp"))) = "/etc/passwd";\nint main(){}',
    ("nonsense", "forge"): "this is no C++",
    ("include_secret", "escape"): '#include "@SECRETFILE@"\nint main(){}',
    ("include_passwd", "escape"): '#include "/etc/passwd"\nint main(){}',
    ("include_environment", "escape"): '#include "/proc/self/environ"\nint main(){}',
    ("incbin_secret", "escape"): (
        'asm("x: .incbin \\"@SECRETFILE@\\"");\n#include <cstdio>\nextern char x[];\nint'
        " main(){puts(x);}"
    ),
    ("other_files", "escape"): (
        "\n".join(
            f'asm(".incbin \\"{path}\\"");'
            for path in ("/proc/self/environ", "/proc/1/environ", "/proc/self/fd/0", "/etc/shadow")
        )
        + "\nint main(){}"
    ),
    ("list_folders", "escape"): (
        '#include "/tmp"\n#include "/proc/self/cmdline"\n#pragma GCC dependency "/etc/passwd"\nint'
        " main(){}"
    ),
    ("write_by_asm", "escape"): (
        'asm(".print \\"x\\"\\n.file \\"/etc/passwd\\"\\n.include \\"@SECRETFILE@\\"");\nint'
        " main(){}"
    ),
    (
        "constexpr_loop",
        "resource",
    ): "constexpr long f(long n){return n<2?n:f(n-1)+f(n-2);}\nconstexpr long x=f(70);int main(){}",
    ("timer_ignored", "resource"): (
        _CPP + "#include <sys/time.h>\nint"
        " main(){signal(SIGPROF,SIG_IGN);signal(SIGXCPU,SIG_IGN);itimerval"
        " z{};setitimer(ITIMER_PROF,&z,0);for(;;);}"
    ),
    ("naps", "resource"): _CPP + "int main(){for(;;)usleep(100);}",
    ("host_by_syscalls", "escape"): (
        _CPP
        + """int main(){int p=getppid();for(long r:{syscall(SYS_kill,p,0),syscall(SYS_kill,-1,0),syscall(SYS_ptrace,16,p,0,0),
        syscall(SYS_openat,-100,"/proc/self/environ",0),syscall(SYS_openat,-100,"@SECRETFILE@",0),syscall(SYS_process_vm_readv,p,0,0,0,0,0),
        syscall(SYS_socket,1,1,0),syscall(SYS_memfd_create,"x",0),syscall(SYS_pidfd_open,p,0),syscall(SYS_statfs,"/",0),
        syscall(SYS_unlink,"@CANARY@"),syscall(SYS_setpgid,0,p)})if(r>=0)printf("CALL %ld\\n",r);}"""
    ),
    ("include_zero", "resource"): '#include "/dev/zero"\nint main(){}',
    ("incbin_zero", "resource"): 'asm(".incbin \\"/dev/zero\\"");\nint main(){}',
    ("template_bomb", "resource"): (
        "template<int N> struct A { using x = typename A<N*2>::x; using y = typename A<N*2+1>::y;"
        " };\nA<1>::x v; int main(){}"
    ),
    ("macro_bomb", "resource"): (
        "#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(x))))\n#define C(x) B(B(x))\nint"
        " a[]={C(C(1)) };int main(){}"
    ),
    ("giant_array_in_file", "resource"): "char a[1L<<33]={1}; int main(){}",
    (
        "giant_bss",
        "resource",
    ): '#include <cstdio>\nchar a[1L<<30]; int main(){a[5]=1; puts("bss");}',
    ("loop", "resource"): "int main(){for(volatile int i=0;;i++);}",
    ("new_bomb", "resource"): (
        _CPP + "int main(){for(;;){char*p=new char[1<<20];memset(p,1,1<<20);}}"
    ),
    (
        "stack",
        "resource",
    ): "int f(int x){volatile char a[4096];a[0]=x;return f(x+1)+a[0];} int main(){return f(1);}",
    ("output", "resource"): (
        _CPP + 'int main(){for(;;)puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");}'
    ),
    ("output_ignored", "resource"): (
        _CPP + 'int main(){signal(SIGXFSZ,SIG_IGN);for(;;)write(1,"xxxxxxxx",8);}'
    ),
    ("fork_bomb", "resource"): _CPP + "int main(){for(;;)fork();}",
    ("thread_bomb", "resource"): (
        _THREADS + _CPP + "int main(){vector<thread> v;for(;;)v.emplace_back([]{sleep(100);});}"
    ),
    ("abort", "resource"): _CPP + "int main(){abort();}",
    ("sleep", "resource"): _CPP + "int main(){sleep(1000);}",
    ("shell", "escape"): (
        _CPP + 'int main(){if(system("echo SHELL")==0)puts("SHELL");execl("/bin/sh","sh","-c","echo'
        ' SHELL",(char*)0);}'
    ),
    ("files", "escape"): (
        _CPP
        + """int main(){for(auto p:{"/etc/passwd","@SECRETFILE@","/usr/lib/os-release","/dev/null",".","/"}){
        if(FILE*f=fopen(p,"r"))puts("READ"); if(FILE*f=fopen(p,"w"))puts("WROTE");}
        if(syscall(SYS_openat,-100,".",0)>=0)puts("OPENED");}"""
    ),
    ("calls", "escape"): (
        _CPP
        + """int main(){for(int n:{SYS_fork,SYS_vfork,SYS_socket,SYS_ptrace,SYS_kill,SYS_memfd_create,SYS_mount,SYS_unshare,
        SYS_openat,SYS_open,SYS_execve,SYS_shmget,SYS_clone,SYS_setuid,SYS_prctl,SYS_io_uring_setup,SYS_bpf,SYS_pipe,SYS_dup}){
        long r=syscall(n,0,0,0,0,0,0);if(r>=0)printf("CALL %d %ld\\n",n,r);}}"""
    ),
    ("exec_again", "escape"): (
        _CPP
        + """int main(){char*a[]={(char*)"x",0};for(int fd=0;fd<64;fd++)syscall(SYS_execveat,fd,"",a,0,0x1000);
        syscall(SYS_execveat,-100,"/bin/sh",a,0,0x1000);
        for(int fd=3;fd<64;fd++)if(fcntl(fd,1)>=0)printf("INHERITED %d\\n",fd);}"""
    ),
    ("int80", "escape"): (
        _CPP
        + 'int main(){long r;asm volatile("int $0x80":"=a"(r):"a"(2));printf("INT80 %ld\\n",r);}'
    ),
    ("environment", "escape"): (
        _CPP + 'extern char**environ;int main(){for(char**e=environ;*e;e++)printf("ENVIRONMENT'
        ' %s\\n",*e);}'
    ),
    ("network", "escape"): (
        _CPP
        + """#include <netinet/in.h>
        #include <sys/socket.h>
        int main(){int s=socket(AF_INET,SOCK_STREAM,0);sockaddr_in a{};a.sin_family=AF_INET;a.sin_port=htons(@PORT@);
        a.sin_addr.s_addr=htonl(0x7f000001);if(connect(s,(sockaddr*)&a,sizeof a)==0)puts("CONNECTED");}"""
    ),
}


def _rows() -> list[dict[str, str]]:
    found = [
        {
            "id": name,
            "category": category,
            "language": "python",
            "code": dedent(code) if code[:1] == "\n" else code,
        }
        for category, programs in (("forge", PYTHON_FORGERIES), ("resource", PYTHON_RESOURCES))
        for name, code in programs.items()
    ]
    for name, code in PYTHON_ESCAPES.items():
        head, body = (_SYSCALL, code[len(_SYSCALL) :]) if code.startswith(_SYSCALL) else ("", code)
        found.append(
            {"id": name, "category": "escape", "language": "python", "code": head + dedent(body)}
        )
    return found


PYTHON_ROWS = _rows()
CPP_ROWS = [
    {"id": f"cpp_{i}", "category": c, "language": "cpp", "code": code}
    for (i, c), code in CPP.items()
]
