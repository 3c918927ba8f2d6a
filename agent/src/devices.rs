// SPDX-License-Identifier: Apache-2.0
//! Device nodes of a container, and its terminal.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use agent_protocol::{Device, DeviceKind, WindowSize};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, Uid, chownat, fchown, fstat, fstatfs, makedev,
    mknodat, openat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::{Result, Stage, refused};
use crate::mounts::{attach_tree, clone_tree};
use crate::rootfs::{Kind, Rootfs};

/// The devices that each container has (runtime-spec, config-linux, "Default Devices").
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// runtime-spec, runtime-linux, "Dev symbolic links".
const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

pub(crate) fn make_default_devices(rootfs: &Rootfs) -> Result<()> {
    let directory = rootfs.make("/dev", Kind::Directory).stage("/dev")?;
    for (name, major, minor) in NODES {
        let device = standard(name, major, minor);
        make(rootfs, &directory, name.as_ref(), &device).stage(&device.path)?;
    }
    for (name, target) in LINKS {
        match symlinkat(target, &directory, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).stage(format_args!("/dev/{name}")),
        }
    }
    // An image may have left something else there.
    match unlinkat(&directory, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno).stage("/dev/ptmx"),
    }
    symlinkat("pts/ptmx", &directory, "ptmx").stage("/dev/ptmx")
}

fn standard(name: &str, major: u32, minor: u32) -> Device {
    Device {
        path: format!("/dev/{name}"),
        kind: DeviceKind::Character,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    }
}

pub(crate) fn make_devices(rootfs: &Rootfs, devices: &[Device]) -> Result<()> {
    for (index, device) in devices.iter().enumerate() {
        rootfs
            .make_parent(&device.path)
            .and_then(|(directory, name)| make(rootfs, &directory, name, device))
            .field(format_args!("devices[{index}] {}", device.path))?;
    }
    Ok(())
}

fn make(
    rootfs: &Rootfs,
    directory: &OwnedFd,
    name: &OsStr,
    device: &Device,
) -> rustix::io::Result<()> {
    let (kind, number) = match device.kind {
        DeviceKind::Character => (
            FileType::CharacterDevice,
            makedev(device.major, device.minor),
        ),
        DeviceKind::Block => (FileType::BlockDevice, makedev(device.major, device.minor)),
        DeviceKind::Fifo => (FileType::Fifo, 0),
    };
    let mode = Mode::from_raw_mode(device.mode & 0o7777);
    match mknodat(directory, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) if is_node(directory, name, kind, number) => return Ok(()),
        // In a user namespace nodes cannot be made, only bound.
        Err(Errno::EXIST | Errno::PERM) if kind != FileType::Fifo => {
            return bind(rootfs, device, kind, number);
        }
        Err(errno) => return Err(errno),
    }
    if (device.uid, device.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        chownat(
            directory,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    Ok(())
}

fn is_node(directory: &OwnedFd, name: &OsStr, kind: FileType, number: Dev) -> bool {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| {
        FileType::from_raw_mode(found.st_mode) == kind && found.st_rdev == number
    })
}

/// Binds the agent's own node of the same name, if it is that device.
fn bind(rootfs: &Rootfs, device: &Device, kind: FileType, number: Dev) -> rustix::io::Result<()> {
    if !Path::new(&device.path).starts_with("/dev") {
        return Err(Errno::PERM);
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = openat(CWD, &device.path, flags, Mode::empty())?;
    let found = fstat(&node)?;
    if FileType::from_raw_mode(found.st_mode) != kind || found.st_rdev != number {
        return Err(Errno::PERM);
    }
    let target = rootfs.make(&device.path, Kind::File)?;
    attach_tree(clone_tree(node.as_fd(), false)?.as_fd(), target.as_fd())
}

/// A pseudo-terminal of the container's own devpts.
#[derive(Debug)]
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

/// Opens a terminal without trusting a path: what is at `/dev/pts/ptmx` has to be the multiplexer, and
/// the other end is asked of the kernel.
pub(crate) fn open_terminal(rootfs: &Rootfs, size: WindowSize, owner: u32) -> Result<Terminal> {
    let handle = rootfs
        .open("/dev/pts/ptmx")
        .stage("terminal: /dev/pts/ptmx")?;
    let genuine = |fd: &OwnedFd| -> rustix::io::Result<bool> {
        let found = fstat(fd)?;
        Ok(
            FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
                && found.st_rdev == makedev(5, 2)
                && fstatfs(fd)?.f_type == DEVPTS_SUPER_MAGIC,
        )
    };
    if !genuine(&handle).stage("terminal: /dev/pts/ptmx")? {
        return Err(refused(
            "terminal: /dev/pts/ptmx: not a terminal multiplexer",
        ));
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = rootfs
        .open_with("/dev/pts/ptmx", flags)
        .stage("terminal: open")?;
    if !genuine(&master).stage("terminal: open")? {
        return Err(refused(
            "terminal: /dev/pts/ptmx: not a terminal multiplexer",
        ));
    }
    unlockpt(&master).stage("terminal: unlock")?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).stage("terminal: open")?;
    resize(&master, size).stage("terminal: size")?;
    match fchown(&slave, Some(Uid::from_raw(owner)), None) {
        // As with runc: an owner that the user namespace does not know is left alone.
        Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
        Err(errno) => return Err(errno).stage("terminal: owner"),
    }
    Ok(Terminal { master, slave })
}

pub(crate) fn resize(terminal: impl AsFd, size: WindowSize) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}

/// Makes the terminal `/dev/console`.
pub(crate) fn bind_console(rootfs: &Rootfs, terminal: &Terminal) -> Result<()> {
    let target = rootfs
        .make("/dev/console", Kind::File)
        .stage("/dev/console")?;
    clone_tree(terminal.slave.as_fd(), false)
        .and_then(|tree| attach_tree(tree.as_fd(), target.as_fd()))
        .stage("/dev/console")
}
