"""Linux as the guest: a network namespace of its own with a tap device, whose other end goes to whoever holds the
other end of standard input. The test's own lines follow."""

import array, errno, fcntl, hashlib, os, random, select, socket, struct, subprocess, sys, threading, time

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TAP_WITHOUT_INFO_WITH_VNET_HEADER = 0x0002 | 0x1000 | 0x4000
CHECKSUM_TSO4_TSO6 = 1 | 2 | 4

GATEWAY, HOST, GATEWAY6, HOST6 = "198.18.0.1", "198.18.0.254", "fd63:7562:6279::1", "fd63:7562:6279::fe"


def run(*words):
    subprocess.run(words, check=True)


def plug(offloads):
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", TAP_WITHOUT_INFO_WITH_VNET_HEADER))
    fcntl.ioctl(tap, TUNSETOFFLOAD, CHECKSUM_TSO4_TSO6 if offloads else 0)
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "set", "eth0", "address", "02:63:75:62:00:02", "up")
    run("ip", "addr", "add", "198.18.0.2/24", "dev", "eth0")
    run("ip", "route", "add", "default", "via", GATEWAY)
    run("ip", "-6", "addr", "add", "fd63:7562:6279::2/64", "dev", "eth0", "nodad")
    run("ip", "-6", "route", "add", "default", "via", GATEWAY6)
    socket.send_fds(socket.socket(fileno=0), [b"tap"], [tap])
    os.close(tap)


def connect(port, host=HOST):
    return socket.create_connection((host, port), timeout=60)


def error_of(work):
    begin = time.monotonic()
    try:
        work()
    except OSError as error:
        return error.errno, time.monotonic() - begin
    return None, 0.0
