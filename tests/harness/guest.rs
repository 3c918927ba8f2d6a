// SPDX-License-Identifier: Apache-2.0
//! Copies of an installation whose guest files a test replaces: an initramfs of its own, a damaged kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Bundle, runtime, top};

/// A copy of what `make install` installs, to change its files. Removed on drop.
#[derive(Debug)]
pub struct Installation {
    path: PathBuf,
    seconds: u32,
}

impl Default for Installation {
    fn default() -> Installation {
        Installation::new()
    }
}

impl Installation {
    pub fn new() -> Installation {
        let path = std::env::temp_dir().join(runtime::new_id());
        let guest = path.join("lib/sandbox");
        fs::create_dir_all(path.join("bin")).unwrap();
        fs::create_dir_all(&guest).unwrap();
        let built = top().join("target");
        fs::copy(built.join("release/sandbox"), path.join("bin/sandbox")).unwrap();
        for name in ["vmlinux", "initramfs.cpio"] {
            fs::copy(built.join("lib/sandbox").join(name), guest.join(name)).unwrap();
        }
        Installation { path, seconds: 120 }
    }

    /// One whose guest runs machine code as its first process.
    pub fn with_code(code: &[u8]) -> Installation {
        let mut initramfs = Initramfs::new();
        initramfs.file("init", 0o755, &elf(code));
        initramfs.device("kmsg", (1, 11));
        Installation::with_initramfs(initramfs)
    }

    /// One whose guest runs a program of this machine as its first process, with the libraries that it needs. `files` are
    /// beside it.
    pub fn with_program(program: &Path, files: &[(&str, &[u8])]) -> Installation {
        let mut initramfs = Initramfs::new();
        for directory in ["dev", "proc", "sys", "run"] {
            initramfs.directory(directory);
        }
        initramfs.device("dev/console", (5, 1));
        // A program that is started without streams opens it in their place.
        initramfs.device("dev/null", (1, 3));
        initramfs.device("dev/kmsg", (1, 11));
        for library in libraries(program) {
            initramfs.copy(&library, library.to_str().unwrap());
        }
        initramfs.copy(program, "/init");
        for (name, content) in files {
            initramfs.file(name, 0o644, content);
        }
        Installation::with_initramfs(initramfs)
    }

    fn with_initramfs(initramfs: Initramfs) -> Installation {
        let installation = Installation::new();
        installation.replace_initramfs(&initramfs.finish());
        installation
    }

    pub fn replace_initramfs(&self, content: &[u8]) {
        fs::write(self.path.join("lib/sandbox/initramfs.cpio"), content).unwrap();
    }

    /// How many seconds guests have to boot, and agents to answer.
    pub fn deadline(mut self, seconds: u32) -> Installation {
        self.seconds = seconds;
        self
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The program with its global options; the caller adds the verb.
    pub fn program(&self, root: &Path) -> Command {
        let mut command = Command::new(self.path.join("bin/sandbox"));
        command
            .arg("--root")
            .arg(root)
            .env("SANDBOX_BOOT_TIMEOUT_S", self.seconds.to_string())
            .stdin(Stdio::null());
        command
    }

    /// `run` of a bundle in the foreground.
    pub fn command(&self, root: &Path, bundle: &Bundle) -> Command {
        let mut command = self.program(root);
        command.args(["run", "-b"]).arg(bundle.path());
        command.arg(runtime::new_id());
        command
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The shared libraries of a program, its loader among them.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let paths = text.lines().filter_map(|line| {
        let before = line.rsplit_once(" (")?.0;
        let path = before.rsplit_once("=> ").map_or(before, |(_, path)| path);
        let path = PathBuf::from(path.trim());
        path.is_absolute().then_some(path)
    });
    paths.collect()
}

/// A static x86-64 program of one segment that begins with its code.
fn elf(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64; then EV_CURRENT.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry point, program headers behind this one, no section headers.
    for value in [ADDRESS + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, PF_R | PF_X.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(code);
    file
}

/// A newc archive.
#[derive(Debug)]
struct Initramfs {
    archive: Vec<u8>,
    directories: Vec<String>,
}

impl Initramfs {
    fn new() -> Initramfs {
        Initramfs {
            archive: Vec::new(),
            directories: Vec::new(),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        let archive = &mut self.archive;
        let (size, name_size) = (data.len(), name.len() + 1);
        archive.extend(format!("070701{:08X}{mode:08X}{:08X}{:08X}", 0, 0, 0).bytes());
        archive.extend(format!("{:08X}{:08X}{size:08X}{:08X}{:08X}", 1, 0, 0, 0).bytes());
        let (major, minor) = device;
        archive.extend(format!("{major:08X}{minor:08X}{name_size:08X}{:08X}", 0).bytes());
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, (0, 0), content);
    }

    fn device(&mut self, name: &str, number: (u32, u32)) {
        self.entry(name, 0o020_600, number, &[]);
    }

    fn directory(&mut self, name: &str) {
        if !self.directories.iter().any(|known| known == name) {
            self.directories.push(name.to_owned());
            self.entry(name, 0o040_755, (0, 0), &[]);
        }
    }

    /// A file of this machine, with the directories above it.
    fn copy(&mut self, source: &Path, path: &str) {
        let name = path.trim_start_matches('/');
        for (end, _) in name.match_indices('/') {
            self.directory(&name[..end]);
        }
        let content = fs::read(source).unwrap();
        self.file(name, 0o755, &content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.archive
    }
}
