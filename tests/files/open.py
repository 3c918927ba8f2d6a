# SPDX-License-Identifier: Apache-2.0
"""Open files whose names go away or change hands, and files that several processes use at once."""

import errno
import fcntl
import mmap
import os
import struct
import sys
import time
import traceback

os.chdir("/mnt")


def write(path, data=b""):
    with open(path, "xb") as file:
        file.write(data)


def in_child(function):
    """Runs it in a process of its own; a traceback and a status when it fails."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def join(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0


def unlinked():
    file = open("unlinked", "x+b", buffering=0)
    file.write(b"before")
    os.unlink("unlinked")
    assert os.fstat(file.fileno()).st_nlink == 0
    file.write(b" after")
    os.fchmod(file.fileno(), 0o600)
    os.utime(file.fileno(), ns=(1, 2))
    assert os.fstat(file.fileno()).st_mtime_ns == 2
    os.truncate(file.fileno(), 9)
    file.seek(0)
    assert file.read() == b"before af"
    # A new file of the same name is another file.
    write("unlinked", b"new")
    assert os.stat("unlinked").st_ino != os.fstat(file.fileno()).st_ino
    with open("/proc/self/fd/%d" % file.fileno(), "rb") as again:
        assert again.read() == b"before af"
    os.unlink("unlinked")
    file.close()
    # Without any name from the start, and one later.
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"tmpfile")
    # With a directory, or Python calls link(2), which does not follow.
    descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    os.link(str(fd), "named-later", src_dir_fd=descriptors, follow_symlinks=True)
    os.close(descriptors)
    os.close(fd)
    with open("named-later", "rb") as file:
        assert file.read() == b"tmpfile"


def removed_directory():
    os.mkdir("removed")
    fd = os.open("removed", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir("removed")
    assert os.listdir(fd) == []
    try:
        os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        raise AssertionError("a removed directory took a file")
    except FileNotFoundError:
        pass
    os.close(fd)


def renamed_over():
    write("target", b"old")
    write("source", b"new")
    old = open("target", "r+b", buffering=0)
    new = open("source", "r+b", buffering=0)
    os.rename("source", "target")
    assert old.read() == b"old" and new.read() == b"new"
    old.write(b" still")
    new.write(b" too")
    with open("target", "rb") as file:
        assert file.read() == b"new too"
    old.seek(0)
    assert old.read() == b"old still" and os.fstat(old.fileno()).st_nlink == 0
    old.close()
    new.close()
    # A directory with open files in it moves.
    os.makedirs("tree/sub")
    file = open("tree/sub/file", "x+b", buffering=0)
    os.rename("tree", "moved")
    file.write(b"moved")
    with open("moved/sub/file", "rb") as again:
        assert again.read() == b"moved"
    assert not os.path.exists("tree")
    file.close()


def mapped():
    size = 64 * 4096
    with open("mapped", "x+b", buffering=0) as file:
        file.truncate(size)
        shared = mmap.mmap(file.fileno(), size)
        shared[4096:4100] = b"mmap"
        # Through the file, and the other way round.
        assert os.pread(file.fileno(), 4, 4096) == b"mmap"
        os.pwrite(file.fileno(), b"write", 8192)
        assert shared[8192:8197] == b"write"

        def child():
            with open("mapped", "r+b") as mine:
                again = mmap.mmap(mine.fileno(), size)
                assert again[4096:4100] == b"mmap"
                again[0:5] = b"child"
                again.flush()

        join(in_child(child))
        assert shared[0:5] == b"child"
        private = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE)
        private[0:5] = b"mine!"
        assert shared[0:5] == b"child"
        shared[size - 3:size] = b"end"
        # Without a flush: closing and unmapping must do.
        shared.close()


def appended():
    lines = 500

    def append(letter):
        fd = os.open("appended", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number in range(lines):
            os.write(fd, b"%s%06d\n" % (letter, number))
        os.close(fd)

    join(*[in_child(lambda letter=letter: append(letter)) for letter in (b"a", b"b")])
    with open("appended", "rb") as file:
        written = file.read().splitlines()
    assert len(written) == 2 * lines, len(written)
    for letter in (b"a", b"b"):
        mine = [line for line in written if line.startswith(letter)]
        assert mine == [b"%s%06d" % (letter, number) for number in range(lines)]


def refused(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno in (errno.EAGAIN, errno.EACCES), error
        return
    raise AssertionError("a lock was given twice")


def locked():
    write("locked", b"0" * 100)
    file = open("locked", "r+b")

    def flock_child():
        with open("locked", "r+b") as mine:
            refused(fcntl.flock, mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused(fcntl.flock, mine, fcntl.LOCK_SH | fcntl.LOCK_NB)

    fcntl.flock(file, fcntl.LOCK_EX)
    join(in_child(flock_child))
    fcntl.flock(file, fcntl.LOCK_UN)

    def range_child():
        with open("locked", "r+b") as mine:
            refused(fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 20)
            query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 100, 0)
            answer = struct.unpack("hhqqi4x", fcntl.fcntl(mine, fcntl.F_GETLK, query))
            assert answer == (fcntl.F_WRLCK, os.SEEK_SET, 0, 10, os.getppid()), answer

    fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
    join(in_child(range_child))

    def waiting_child():
        with open("locked", "r+b") as mine:
            os.write(ready_write, b"x")
            fcntl.lockf(mine, fcntl.LOCK_EX)
            assert mine.read(4) == b"done"

    ready_read, ready_write = os.pipe()
    child = in_child(waiting_child)
    os.read(ready_read, 1)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it did not wait"
    os.pwrite(file.fileno(), b"done", 0)
    fcntl.lockf(file, fcntl.LOCK_UN)
    join(child)

    # Of the open file description: a second one in the same process is another owner.
    F_OFD_SETLK = 37
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    second = open("locked", "r+b")
    fcntl.fcntl(file, F_OFD_SETLK, whole)
    refused(fcntl.fcntl, second, F_OFD_SETLK, whole)
    # The lock goes with its file.
    file.close()
    fcntl.fcntl(second, F_OFD_SETLK, whole)
    second.close()


def long_names():
    name = "n" * 255
    write(name, b"long")
    assert name in os.listdir(".")
    for function in (lambda path: write(path), os.mkdir, lambda path: os.rename(name, path), os.stat):
        try:
            function("n" * 256)
            raise AssertionError("a name of 256 bytes was taken")
        except OSError as error:
            assert error.errno == errno.ENAMETOOLONG, error
    odd = b"\xff\xfe new\nline \\ \x01"
    write(odd, b"odd")
    assert odd in os.listdir(b".")


def long_paths():
    path = "/mnt/p"
    os.mkdir(path)
    while len(path) + 200 < 4000:
        path += "/" + "d" * 180
        os.mkdir(path)
    path += "/" + "f" * (4000 - len(path) - 1)
    assert len(path) == 4000
    write(path, b"deep")
    with open(path, "rb") as file:
        assert file.read() == b"deep"
    assert os.path.realpath(path) == path
    os.chdir(os.path.dirname(path))
    assert os.getcwd() == os.path.dirname(path)
    with open(os.path.basename(path), "ab") as file:
        file.write(b"er")
    os.chdir("/mnt")


for check in (unlinked, removed_directory, renamed_over, mapped, appended, locked, long_names, long_paths):
    check()
    print(check.__name__, flush=True)
