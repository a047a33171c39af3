"""Stands for one Ray worker that `verl_cpu.forkserver` has forked: passes its output through, ends when it ends.

Ray runs this in place of Python, as ``forkserver_stub.py SOCKET default_worker.py ARGUMENTS``. It imports next to
nothing.
"""

import json
import os
import socket
import sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
socket.send_fds(connection, [json.dumps(request).encode() + b"\0"], [1, 2])
sys.exit(int(connection.recv(16) or 1))
