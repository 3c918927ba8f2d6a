# SPDX-License-Identifier: Apache-2.0
"""Kernel and initramfs of the emulated host, made once and kept by content hash.

What saves boot time: the kernel is the uncompressed ELF image inside the
Debian one (QEMU enters it directly, PVH), and the initramfs holds one static
program and the modules needed before the root file system, uncompressed.
"""

import glob
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))


class BootError(Exception):
    """The message says what is missing."""


class BootFiles:
    def __init__(self, kernel, initramfs, modules):
        self.kernel = kernel
        self.initramfs = initramfs
        self.modules = modules


def cache_directory():
    cache = os.environ.get("SANDBOX_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = os.path.join(base, "sandbox-build")
    return os.path.abspath(os.path.join(cache, "host"))


def prepare():
    """Returns the BootFiles, making them if the cache lacks them."""
    cache = cache_directory()
    tree = unpacked_kernel(cache)
    vmlinuz = glob.glob(os.path.join(tree, "boot/vmlinuz-*"))[0]
    modules = glob.glob(os.path.join(tree, "lib/modules/*"))[0]
    sources = [vmlinuz, os.path.join(modules, "modules.dep")]
    sources += [os.path.join(HERE, name) for name in ("init.c", "modules.list", "boot_files.py")]
    directory = os.path.join(cache, "boot-" + content_hash(sources))
    if not os.path.isdir(directory):
        make(directory, vmlinuz, modules)
    return BootFiles(
        os.path.join(directory, "vmlinux"), os.path.join(directory, "initramfs.cpio"), modules
    )


def unpacked_kernel(cache):
    """The tree that packages.sh unpacks; the script returns at once if it is there."""
    script = os.path.join(HERE, "packages.sh")
    if subprocess.run([script, "host"], stdin=subprocess.DEVNULL, stdout=2).returncode != 0:
        raise BootError("tests/host/packages.sh host failed")
    trees = glob.glob(os.path.join(cache, "kernel/linux-image-*"))
    if not trees:
        raise BootError("no unpacked kernel in " + cache)
    return max(trees)


def content_hash(paths):
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.sha256(file.read()).digest())
    return total.hexdigest()[:16]


def make(directory, vmlinuz, modules):
    parent = os.path.dirname(directory)
    temporary = tempfile.mkdtemp(prefix=".boot.", dir=parent)
    try:
        extract_kernel(vmlinuz, os.path.join(temporary, "vmlinux"))
        init = os.path.join(temporary, "init")
        compile_init(init)
        write_initramfs(os.path.join(temporary, "initramfs.cpio"), init, modules)
        try:
            os.rename(temporary, directory)
        except OSError:
            # Another run was faster; its files are the same.
            if not os.path.isdir(directory):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def extract_kernel(vmlinuz, target):
    """Takes the ELF image out of a bzImage (Documentation/arch/x86/boot.rst)."""
    with open(vmlinuz, "rb") as file:
        image = file.read()
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length - 4]  # the last four bytes are the inflated size
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        command = ["zstd", "-dqc"]
    elif payload.startswith(b"\xfd7zXZ\0"):
        command = ["xz", "-dc"]
    else:
        # Any other compression: the kernel inflates itself, in more time.
        shutil.copyfile(vmlinuz, target)
        return
    with open(target, "wb") as file:
        run_or_raise(command, "kernel image", input=payload, stdout=file)


def compile_init(target):
    compiler = os.environ.get("CC", "cc")
    source = os.path.join(HERE, "init.c")
    run_or_raise([compiler, "-O2", "-Wall", "-Wextra", "-static", "-o", target, source], "init.c")
    run_or_raise(["strip", target], "init.c")


def run_or_raise(command, what, **options):
    result = subprocess.run(command, stderr=subprocess.PIPE, **options)
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip()
        raise BootError("%s: %s failed: %s" % (what, command[0], message))


def module_lines():
    """(name, parameters) of each module that modules.list names."""
    with open(os.path.join(HERE, "modules.list")) as file:
        for line in file:
            name, _, parameters = line.partition("#")[0].strip().partition(" ")
            if name:
                yield name, parameters


def module_name(path):
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def load_order(modules):
    """(path, parameters) of the listed modules and what they need, needed first."""
    dependencies = {}
    with open(os.path.join(modules, "modules.dep")) as file:
        for line in file:
            path, _, needed = line.partition(":")
            # modules.dep names the closest dependency first, modprobe loads from the end.
            dependencies[module_name(path)] = (path, needed.split()[::-1])
    with open(os.path.join(modules, "modules.builtin")) as file:
        builtin = {module_name(line.strip()) for line in file}
    order = {}
    for name, parameters in module_lines():
        name = name.replace("-", "_")
        if name in builtin:
            continue
        if name not in dependencies:
            raise BootError("module %s: not in %s" % (name, modules))
        path, needed = dependencies[name]
        for each in needed:
            order.setdefault(each, "")
        order[path] = parameters
    return order.items()


def write_initramfs(target, init, modules):
    with open(target, "wb") as archive:
        writer = CpioWriter(archive)
        writer.add("dev", 0o040755, b"")
        writer.add("modules", 0o040755, b"")
        lines = []
        for path, parameters in load_order(modules):
            name = module_name(path)
            with open(os.path.join(modules, path), "rb") as file:
                writer.add("modules/%s.ko" % name, 0o100644, file.read())
            lines.append("%s %s\n" % (name, parameters) if parameters else name + "\n")
        writer.add("modules/list", 0o100644, "".join(lines).encode())
        # The kernel gives init this as its stdin, stdout and stderr.
        writer.add("dev/console", 0o020600, b"", device=(5, 1))
        with open(init, "rb") as file:
            writer.add("init", 0o100755, file.read())
        writer.add("TRAILER!!!", 0, b"")


class CpioWriter:
    """Format newc (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self, file):
        self.file = file
        self.inode = 0

    def add(self, name, mode, data, device=(0, 0)):
        self.inode += 1
        name = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0]
        self.write(b"070701" + b"".join(b"%08x" % field for field in fields) + name)
        self.write(data)

    def write(self, data):
        self.file.write(data)
        self.file.write(b"\0" * (-len(data) % 4))
