"""Stub of one Python process that `verl_cpu.forkserver` has forked: passes its files through, ends when it ends.

Ray and multiprocessing run this in place of Python, as ``forkserver_stub.py SOCKET ARGUMENTS``, with the arguments of
Python: a script and its arguments, or ``-c CODE``, after switches. It imports next to nothing. If the server cannot be
reached, and for multiprocessing's resource tracker, which imports nothing either, it becomes Python.
"""

import json
import os
import socket
import sys

arguments, passed = sys.argv[2:], [1, 2]
if "-c" in arguments:  # from multiprocessing, with pipes; before it are switches, which the server has too
    arguments = arguments[arguments.index("-c") :]
    passed += [n for n in range(3, 1024) if os.path.exists(f"/proc/self/fd/{n}")]
elif arguments[0] == "-u":  # from Ray, for servers of its own
    arguments = arguments[1:]
connection = socket.socket(socket.AF_UNIX)
try:
    if "resource_tracker import" in " ".join(arguments):
        raise OSError("not for the server")
    connection.connect(sys.argv[1])
except OSError:
    connection.close()
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
request = {
    "arguments": arguments,
    "descriptors": passed,
    "environment": dict(os.environ),
    "folder": os.getcwd(),
}
socket.send_fds(connection, [json.dumps(request).encode() + b"\0"], passed)
sys.exit(int(connection.recv(16) or 1))
