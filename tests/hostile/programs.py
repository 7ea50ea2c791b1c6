"""Programs that want a reward without the work, or to do harm. Each defines the right `f` only if its attack succeeds.

The runner puts these names in front: SECRET (an environment variable's name), VICTIM (a process id), PORT (of a listening
socket), FOLDER (anyone may write there; it holds the file `data`, whose content is "granted").
"""

GRANTED = "def f(a, b): return a + b\n"


def attack(body: str) -> str:
    """A program that runs `body`, which sets `won`, and defines `f` right only then."""
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    return f"won = False\ntry:\n{indented}\nexcept Exception:\n    pass\nif won:\n    {GRANTED}else:\n    f = None\n"


PROGRAMS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(999,)).start()",
    "endless loop": "while True: pass",
    "endless loop in C": "f = lambda a, b: sum(iter(int, 1))",
    "deaf loop": "import signal\nfor s in range(1, 60):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
    "while True: pass",
    "sleep": "import time\ntime.sleep(9999)",
    "stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory of children": "import os\nfor _ in range(20):\n    try: os.fork()\n    except OSError: pass\n"
    "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(a, b): return f(a, b)",
    "output": "while True: print('x' * 10**6)",
    "output on every descriptor": "import os\nwhile True:\n    for fd in range(64):\n"
    "        try: os.write(fd, b'x' * 10**5)\n        except OSError: pass",
    "exit at once": "import os\nos._exit(0)",
    "exit later": "import os\ndef f(a, b): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "exit in f": "def f(a, b): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\natexit.register(print, 'ok')",
    "print the expected": "print(3)\nprint('True')\nprint('passed')\nf = print",
    "write a verdict": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'{\"verdict\": true, \"error\": null}\\n')\n    except OSError: pass",
    "answer in advance": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'{\"value\": true}\\n' * 100)\n    except OSError: pass",
    "equal to all": "class All:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
    "f = lambda a, b: All()",
    "int equal to all": "class All(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "f = lambda a, b: All(4)",
    "patch builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.int = builtins.str = lambda *a: 3\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.compile = builtins.exec = lambda *a: None\nf = None",
    "patch the checker": "import sys, json\nfor m in list(sys.modules.values()):\n    for name in ('check', 'serve', 'ask'):\n"
    "        if hasattr(m, name): setattr(m, name, lambda *a: {'verdict': True, 'error': None})\n"
    "json.dumps = lambda *a, **k: '{\"verdict\": true, \"error\": null}'",
    "patch assert": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\n__debug__ if True else None",
    "read frames and heap": attack(
        "import gc, sys, re\nframe, seen = sys._getframe(), []\nwhile frame: seen += [repr(frame.f_locals)]; frame = frame.f_back\n"
        "seen += [repr(o)[:10000] for o in gc.get_objects() if isinstance(o, (dict, list, str, bytes))]\n"
        "won = any('f(20, 30)' in s and '50' in s and 'seen' not in s for s in seen)"
    ),
    "environment": attack("import os\nwon = SECRET in os.environ"),
    "environment of others": attack(
        "import os\nfor p in ['self', os.getpid(), os.getppid(), 1, VICTIM]:\n"
        "    try: won |= SECRET.encode() in open(f'/proc/{p}/environ', 'rb').read()\n    except OSError: pass"
    ),
    "memory of others": attack("open(f'/proc/{VICTIM}/mem', 'rb')\nwon = True"),
    "ptrace": attack("import ctypes\nwon = ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0"),
    "ptrace the parent": attack("import ctypes, os\nwon = ctypes.CDLL(None).ptrace(16, os.getppid() or 1, 0, 0) == 0"),
    "kill": attack("import os\nos.kill(VICTIM, 9)\nwon = True"),
    "kill the parent": "import os\nfor p in (os.getppid(), 1):\n    try: os.kill(p, 9)\n    except OSError: pass",
    "kill all": "import os\nos.kill(-1, 9)",
    "read the data": attack("won = open(FOLDER + '/data').read() == 'granted'"),
    "read the home": attack("import os\nwon = bool(os.listdir('/root') + os.listdir('/home'))"),
    "write outside": attack("open(FOLDER + '/new', 'w').write('x')\nwon = True"),
    "write elsewhere": attack(
        "import os, sys\nfor d in ['/', '/etc', '/usr', '/usr/lib', '/var/tmp', '/dev/shm', '/root', sys.prefix, sys.path[0]]:\n"
        "    try: open(d + '/ilr-hostile', 'w'); won = True\n    except OSError: pass"
    ),
    "delete": attack("import os\nos.remove(FOLDER + '/data')\nwon = True"),
    "delete all": "import shutil, os\nfor d in os.listdir('/'):\n    if d not in ('proc', 'sys', 'dev'):\n"
    "        shutil.rmtree(FOLDER, ignore_errors=True)",
    "fill the disk": "import os\nn = 0\nwhile True:\n    n += 1\n    try: open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))\n"
    "    except OSError: pass",
    "connect": attack("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nwon = True"),
    "open a socket": attack("import socket\nsocket.socket()\nwon = True"),
    "become root": attack("import os\nos.setuid(0)\nwon = os.getuid() == 0 and open('/etc/shadow').read() != ''"),
    "new namespaces": attack("import ctypes\nwon = ctypes.CDLL(None).unshare(0x10000000 | 0x20000) == 0"),
    "mount": attack("import ctypes\nwon = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    "start a program": attack(
        "import subprocess\nwon = b'root' in subprocess.run(['/bin/sh', '-c', 'cat /etc/passwd'], capture_output=True).stdout"
    ),
    "daemon": "import os, time, ctypes\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
    "    ctypes.CDLL(None).prctl(1, 0)\n    while True: time.sleep(1)\nf = None",
    "deep value": "def f(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "deep text": "import os, json\njson.dumps = lambda *a, **k: '{\"value\": ' + '[' * 10**6",
    "large number": "f = lambda a, b: 1 << 10**8",
    "endless iterator": "import itertools\nf = lambda a, b: itertools.count()",
    "endless error": "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(a, b): raise E",
    "nul bytes": "f = '\0'",
    "not a program": "The answer is 3 because (((((",
    "deep program": "f = " + "(" * 10_000 + ")" * 10_000,
}
