# SPDX-License-Identifier: Apache-2.0
"""What is measured: OCI runtimes with one command line, and QEMU's microvm with the same guest files."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import time

import measure

# Time for an idle container to have done all that it does after its start.
SETTLE_SECONDS = 3


def version_of(command):
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return text.strip().splitlines()[0] if text.strip() else ""


def program_name(program):
    return os.path.basename(program)


class OciRuntime:
    def __init__(self, name, program, directory, options=(), run_options=()):
        """Options of the runtime go before the verb, those of `run` behind it."""
        self.name = name
        self.label = " ".join((program_name(program),) + options + run_options)
        self.run_options = run_options
        self.program = program
        self.path = shutil.which(program)
        self.options = list(options)
        self.directory = directory
        self.messages = os.path.join(directory, name + ".messages")
        self.stages_file = os.path.join(directory, name + ".stages")
        self.version = version_of(self.path) if self.path else ""

    def missing(self):
        return None if self.path else "%s not found" % self.program

    def command(self, *arguments):
        return [self.path, "--root", os.path.join(self.directory, self.name + ".state"), *self.options, *arguments]

    def start(self, bundle, container):
        """One start of /bin/true to its end. Also the stages, where the runtime tells them."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.stages_file)
        environment = dict(os.environ, SANDBOX_STAGES=self.stages_file)
        command = self.command("run", *self.run_options, "--bundle", bundle, container)
        try:
            sample = measure.run(command, self.messages, environment)
        except measure.Failed:
            self.remove(container)
            raise
        return sample, read_stages(self.stages_file)

    def idle(self, bundle, container, count=1):
        """Memory of detached containers whose processes sleep."""
        containers = ["%s-%d" % (container, number) for number in range(count)]
        try:
            # Their processes are to live on, so nothing is reaped here.
            for name in containers:
                self.detach(bundle, name)
            time.sleep(SETTLE_SECONDS)
            return measure.tree_memory()
        finally:
            self.remove(*containers)

    def detach(self, bundle, container):
        arguments = ("run", *self.run_options, "--detach", "--bundle", bundle, container)
        self.wait_for(measure.spawn(self.command(*arguments), self.messages), "run --detach")

    def wait_for(self, pid, verb):
        with measure.deadline(60, "%s %s" % (self.name, verb)):
            _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise measure.Failed("%s %s: status %d: %s" % (self.name, verb, code, measure.last_line(self.messages)))

    def verbs(self, bundle, container, execs):
        """Wall times in ns: of /bin/true executed several times in a running container, and of its forced deletion."""
        try:
            self.detach(bundle, container)
            times = {"exec": [self.timed("exec", container, "/bin/true") for _ in range(execs)]}
            times["delete"] = [self.timed("delete", "--force", container)]
            return times
        finally:
            self.remove(container)

    def timed(self, *arguments):
        started = time.monotonic_ns()
        self.wait_for(measure.spawn(self.command(*arguments), self.messages), arguments[0])
        return time.monotonic_ns() - started

    def remove(self, *containers):
        for container in containers:
            for arguments in (("kill", container, "KILL"), ("delete", "--force", container)):
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run(self.command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, timeout=60)
        measure.kill_descendants()


def read_stages(path):
    """[(stage, CLOCK_MONOTONIC in ns)], empty for a runtime that tells none."""
    stages = []
    try:
        with open(path) as file:
            for line in file:
                entry = json.loads(line)
                stages.append((str(entry["stage"]), int(entry["ns"])))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise measure.Failed("stages file: %s" % error)
    return stages


MARK = b"bench-init runs\n"


class Qemu:
    """Boots the same kernel and initramfs to the first instructions of an init, and no further."""

    name = "qemu"
    label = "QEMU microvm, boot to init only"
    program = "qemu-system-x86_64"
    # What vmm/src/plan.rs gives to the kernel, with a console to see the init by.
    command_line = ("loglevel=3 panic=-1 reboot=t tsc=reliable no_timer_check random.trust_cpu=on "
                    "console=hvc0 rdinit=/bench-init")

    def __init__(self, guest_files, memory_mib, directory):
        self.path = shutil.which(self.program)
        self.version = version_of(self.path) if self.path else ""
        self.kernel = os.path.join(guest_files, "vmlinux")
        self.initramfs = os.path.join(guest_files, "initramfs.cpio")
        self.memory_mib = memory_mib
        self.directory = directory
        self.console = os.path.join(directory, "qemu.console")
        self.messages = os.path.join(directory, "qemu.messages")

    def missing(self):
        if not self.path:
            return "%s not found" % self.program
        for path in (self.kernel, self.initramfs):
            if not os.path.exists(path):
                return "%s is missing" % path
        return None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm cannot be opened"

    def image(self, idle):
        """The initramfs with one more program in it; the kernel takes archives one after the other."""
        path = os.path.join(self.directory, "idle.cpio" if idle else "halt.cpio")
        if not os.path.exists(path):
            with open(self.initramfs, "rb") as file:
                data = file.read()
            with open(path, "wb") as file:
                file.write(data + b"\0" * (-len(data) % 512) + cpio("bench-init", init_program(idle)))
        return path

    def command(self, idle=False):
        return [
            self.path, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
            "-machine", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,auto-kernel-cmdline=on",
            "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", str(self.memory_mib),
            "-kernel", self.kernel, "-initrd", self.image(idle), "-append", self.command_line,
            "-chardev", "file,id=console,path=" + self.console,
            "-device", "virtio-serial-device", "-device", "virtconsole,chardev=console",
        ]

    def reached_init(self):
        try:
            with open(self.console, "rb") as file:
                return MARK.strip() in file.read()
        except OSError:
            return False

    def start(self, _bundle, _container):
        sample = measure.run(self.command(), self.messages)
        if not self.reached_init():
            raise measure.Failed("qemu: the guest ended before its init: " + measure.last_line(self.messages))
        return sample, []

    def idle(self, _bundle, _container):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.console)
        measure.spawn(self.command(idle=True), self.messages)
        try:
            with measure.deadline(60, "qemu: boot to init"):
                while not self.reached_init():
                    if not measure.descendants():
                        raise measure.Failed("qemu: " + measure.last_line(self.messages))
                    time.sleep(0.02)
            time.sleep(SETTLE_SECONDS)
            return measure.tree_memory()
        finally:
            measure.kill_descendants()


def init_program(idle):
    """A static ELF: writes MARK to its console, then sleeps for ever or resets the machine."""
    base, header_size = 0x400000, 64 + 56
    code = bytes.fromhex(
        "b801000000"            # mov eax, SYS_write
        "bf01000000"            # mov edi, 1
        "488d3500000000"        # lea rsi, [rip + offset of MARK], patched below
        + "ba" + struct.pack("<I", len(MARK)).hex() +
        "0f05")                 # syscall
    if not idle:
        code += bytes.fromhex(
            "b8a9000000"        # mov eax, SYS_reboot
            "bfaddee1fe"        # mov edi, LINUX_REBOOT_MAGIC1
            "be69191228"        # mov esi, LINUX_REBOOT_MAGIC2
            "ba67452301"        # mov edx, LINUX_REBOOT_CMD_RESTART
            "0f05")
    code += bytes.fromhex(
        "b822000000"            # mov eax, SYS_pause
        "0f05"
        "ebf7")                 # jmp to the mov
    # MARK lies behind the code; the lea ends at its byte 17.
    code = code[:13] + struct.pack("<i", len(code) - 17) + code[17:]
    size = header_size + len(code) + len(MARK)
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base + header_size, 64, 0, 0,
                      64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return elf + segment + code + MARK


def cpio(name, data):
    """An archive in the "newc" format with one executable file."""
    def entry(name, mode, data):
        fields = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
    return entry(name, 0o100755, data) + entry("TRAILER!!!", 0, b"")
