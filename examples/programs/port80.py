# SPDX-License-Identifier: Apache-2.0
"""Asks for ports below 1024 as root without the capability CAP_NET_BIND_SERVICE."""

import os
import socket
import sys


def bind(port):
    with socket.socket() as listener:
        try:
            listener.bind(("0.0.0.0", port))
        except PermissionError as error:
            print("port %4d: refused (%s)" % (port, error.strerror))
            return False
    print("port %4d: given" % port)
    return True


print("user id %d, capabilities %s" % (
    os.geteuid(),
    next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff:"))))
sys.exit(0 if bind(8080) and not bind(80) and not bind(443) else 1)
