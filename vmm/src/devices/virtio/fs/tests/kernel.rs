// SPDX-License-Identifier: Apache-2.0
//! A real client: Linux itself, on the machine that runs the tests. Its FUSE file system sends over `/dev/fuse` what it
//! would send over virtqueues. Needs root; without it, or without `/dev/fuse`, these tests say so and pass.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::super::abi::{InHeader, opcode};
use super::super::server::Server;
use super::super::test_support::{Guest, Scratch, first, generous};

/// How often each opcode was asked for.
type Counts = Arc<Mutex<BTreeMap<u32, usize>>>;

/// The share of a server, mounted in the mount namespace of the calling thread.
struct Mounted {
    scratch: Scratch,
    counts: Counts,
    thread: Option<JoinHandle<()>>,
}

impl Mounted {
    fn new() -> Option<Mounted> {
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let Ok(device) = device else {
            eprintln!("skipped: no /dev/fuse");
            return None;
        };
        let scratch = Scratch::new();
        for name in ["share", "mount", "native"] {
            fs::create_dir(scratch.path().join(name)).unwrap();
        }
        // SAFETY: nothing depends on which mount namespace the thread of a test is in.
        if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_err() {
            eprintln!("skipped: no privilege to mount");
            return None;
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let at = scratch.path().join("mount");
        rustix::mount::mount("share", &at, "fuse", MountFlags::empty(), &*options).unwrap();
        let counts = Counts::default();
        let thread = std::thread::spawn({
            let (counts, share) = (counts.clone(), scratch.path().join("share"));
            move || serve(&device, &share, &counts)
        });
        Some(Mounted {
            scratch,
            counts,
            thread: Some(thread),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Runs a shell script in a directory, and returns what it printed.
    fn run(&self, directory: &str, script: &str) -> String {
        let output = Command::new("sh")
            .args(["-euc", script])
            .current_dir(self.path(directory))
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{directory}: {script}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned() + &error
    }

    /// Requests since the last call.
    fn requests(&self) -> BTreeMap<u32, usize> {
        std::mem::take(&mut self.counts.lock().unwrap())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(self.path("mount"), UnmountFlags::empty());
        if let (Ok(()), Some(thread)) = (unmounted, self.thread.take()) {
            thread.join().unwrap();
        }
    }
}

/// Carries requests from the device to the server, until the file system is unmounted.
fn serve(device: &File, share: &Path, counts: &Counts) {
    let server = Server::new().unwrap();
    let root = File::open(share).unwrap();
    let private = vec![c"private".to_owned()];
    server.plug(root.into(), private, generous()).unwrap();
    let mut guest = Guest::of(server, Scratch::new());
    let mut request = vec![0; (1 << 20) + 8192];
    loop {
        let mut sources = [PollFd::new(device, PollFlags::IN)];
        poll(&mut sources, None).unwrap();
        let length = match rustix::io::read(device, &mut request[..]) {
            Ok(length) => length,
            Err(Errno::NODEV) => return,
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(error) => panic!("/dev/fuse: {error}"),
        };
        let header: InHeader = first(&request);
        *counts.lock().unwrap().entry(header.opcode).or_default() += 1;
        let reply = guest.raw(&request[..length], (1 << 20) + 4096);
        if !reply.is_empty() {
            // The kernel may have given up on it (a signal).
            let _ = (&mut &*device).write(&reply);
        }
    }
}

/// The same script on the share and on the host's own file system, with the same outcome.
fn compare(mounted: &Mounted, script: &str) {
    let native = mounted.run("native", script);
    let shared = mounted.run("mount", script);
    assert_eq!(shared, native, "{script}");
    let list = "find . -printf '%P %y %m %U %G %n %s %l %T@\\n' | sed 's/\\.[0-9]*$//' | sort";
    let list = list.replace("%T@", "");
    let (on_share, seen) = (mounted.run("share", &list), mounted.run("mount", &list));
    let without_sizes = |list: &str| {
        let is_directory = |line: &str| line.split(' ').nth(1) == Some("d");
        let lines = list.lines().filter(|line| !is_directory(line));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_sizes(&seen), without_sizes(&on_share), "{script}");
    assert_eq!(
        without_sizes(&seen),
        without_sizes(&mounted.run("native", &list)),
        "{script}"
    );
}

#[test]
fn programs_see_what_they_see_on_the_host() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    for script in [
        "mkdir -p a/b/c; echo one > a/f; echo two >> a/f; cat a/f; ln -s f a/l; cat a/l; ln a/f a/h; stat -c %h a/f",
        "cp -a /etc/passwd p; chmod 600 p; chown 7:8 p; touch -d @123456789 p; stat -c '%a %u %g %Y' p",
        "umask 077; mkdir m; touch m/f; umask 002; touch m/g; stat -c %a m m/f m/g",
        "mkdir s; chgrp 50 s; chmod 2775 s; touch s/f; mkdir s/d; stat -c '%a %g' s/f s/d",
        "exec 3<> open; echo data >&3; rm open; cat /proc/self/fd/3; stat -L -c %h /proc/self/fd/3",
        "mkdir gone; cd gone; rmdir ../gone; ls -la; stat -c %h . ; ! touch x 2>/dev/null",
        "touch x y; mv x z; mv z y; ls; mv -n y nothing/ 2>&1 || true",
        "truncate -s 1M sparse; printf x | dd of=sparse bs=1 seek=500000 conv=notrunc status=none; md5sum sparse",
        "mkfifo pipe; (echo through > pipe &); cat pipe",
        "mknod null c 1 3; mknod loop b 7 0; stat -c '%F %t %T' null loop; echo lost > null; rm null loop",
        "cp /bin/true t; chmod 755 t; ./t; chmod 4755 t; stat -c %a t; echo >> t; stat -c %a t",
        "seq 1 1000 | xargs touch; ls | wc -l; seq 1 1000 | xargs rm; ls | wc -l",
        "mkdir -p deep; for i in $(seq 60); do mkdir deep/d; cd deep; mv d deep; done; cd /; true",
        "i=0; while [ $i -lt 100 ]; do echo $i > r.tmp; mv r.tmp r; i=$((i+1)); done; cat r",
        "tar -C /usr/include -cf - linux | tar xf -; find linux | wc -l; cat $(find linux -type f | sort) | md5sum; rm -r linux",
    ] {
        let start = std::time::Instant::now();
        compare(&mounted, script);
        eprintln!("{:?} {script}", start.elapsed());
    }
}

/// A mapping of the start of a file, shared with it.
struct Mapping(*mut u8);

impl Mapping {
    fn new(file: &File) -> Mapping {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                LENGTH,
                access,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        Mapping(start.unwrap().cast())
    }

    /// `offset` and `length` lie in the file, which is not longer than the mapping.
    fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let at = offset..offset + length;
        // SAFETY: within the mapping; nothing else changes it meanwhile.
        at.map(|at| unsafe { self.0.add(at).read_volatile() })
            .collect()
    }

    fn write(&self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            // SAFETY: as for reading.
            unsafe { self.0.add(at).write_volatile(*byte) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped, and nobody uses any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), LENGTH) };
    }
}

/// The largest file below.
const LENGTH: usize = 256 << 10;

/// Brings a file system to its disk over and over, as Linux does by itself now and then.
struct WriteBack {
    wanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl WriteBack {
    fn of(directory: &Path) -> WriteBack {
        let directory = File::open(directory).unwrap();
        let wanted = Arc::new(AtomicBool::new(true));
        let thread = std::thread::spawn({
            let wanted = wanted.clone();
            move || {
                while wanted.load(Ordering::Relaxed) {
                    rustix::fs::syncfs(&directory).unwrap();
                }
            }
        });
        WriteBack {
            wanted,
            thread: Some(thread),
        }
    }
}

impl Drop for WriteBack {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Random operations on one file by several descriptors and a mapping, against what it must contain.
#[test]
fn a_file_holds_what_was_put_into_it() {
    use rustix::fs::{FallocateFlags, copy_file_range, fallocate, ftruncate};
    use std::os::unix::fs::FileExt;
    let Some(mounted) = Mounted::new() else {
        return;
    };
    for directory in ["mount", "mount/private"] {
        fs::create_dir_all(mounted.path(directory)).unwrap();
        let _write_back = WriteBack::of(&mounted.path(directory));
        let path = mounted.path(directory).join("file");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        ftruncate(&file, LENGTH as u64).unwrap();
        let appending = File::options().append(true).open(&path).unwrap();
        let mapping = Mapping::new(&file);
        let mut expected = vec![0u8; LENGTH];
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 16).unwrap() % limit
        };
        for step in 0..3000u32 {
            let size = expected.len();
            let offset = random(size + 1);
            let length = random(20_000).min(size - offset);
            let range = offset..offset + length;
            let data = vec![step.to_le_bytes()[0]; length];
            match random(12) {
                0 | 1 => {
                    file.write_all_at(&data, offset as u64).unwrap();
                    expected[range].copy_from_slice(&data);
                }
                2 | 3 => {
                    mapping.write(offset, &data);
                    expected[range].copy_from_slice(&data);
                }
                4 => assert_eq!(mapping.read(offset, length), expected[range], "{step}"),
                5 => {
                    let size = random(LENGTH);
                    ftruncate(&file, size as u64).unwrap();
                    expected.resize(size, 0);
                }
                6 => {
                    // Linux 6.18, not yet 6.12, sends zeroes instead of what is appended to a page if it is just
                    // writing back the start of that page.
                    file.sync_all().unwrap();
                    let room = (LENGTH - size).min(5000);
                    (&appending).write_all(&vec![b'a'; room]).unwrap();
                    expected.resize(size + room, b'a');
                }
                7 if length > 0 => {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, mode, offset as u64, length as u64).unwrap();
                    expected[range].fill(0);
                }
                8 => {
                    let to = random(size + 1);
                    let length = length.min(size - to);
                    if offset.abs_diff(to) >= length {
                        let (mut from, mut at) = (offset as u64, to as u64);
                        let (from, at) = (Some(&mut from), Some(&mut at));
                        assert_eq!(copy_file_range(&file, from, &file, at, length), Ok(length));
                        expected.copy_within(offset..offset + length, to);
                    }
                }
                9 => file.sync_all().unwrap(),
                10 => {
                    let again = fs::read(&path).unwrap();
                    assert!(again == expected, "{step}");
                }
                _ => {
                    let mut data = vec![0; length];
                    file.read_exact_at(&mut data, offset as u64).unwrap();
                    assert!(data == expected[range], "{step}");
                }
            }
        }
        drop(mapping);
        file.sync_all().unwrap();
        let on_host = mounted.path(&directory.replace("mount", "share"));
        assert!(fs::read(on_host.join("file")).unwrap() == expected);
    }
}

/// Everyday things, and which requests they take when nothing is cached and when it is.
#[test]
fn requests_are_few() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let share = mounted.path("share");
    fs::create_dir_all(share.join("private/d")).unwrap();
    for number in 0..100 {
        fs::write(share.join(format!("private/d/{number}")), "text").unwrap();
    }
    let mount = mounted.path("mount/private/d");
    let total = |counts: &BTreeMap<u32, usize>| -> usize {
        let counted = counts
            .iter()
            .filter(|(opcode, _)| !matches!(**opcode, opcode::FORGET | opcode::BATCH_FORGET));
        counted.map(|(_, count)| count).sum()
    };
    fs::metadata(&mount).unwrap();
    mounted.requests();
    let mut report = Vec::new();
    let mut measure = |what: &str, limit: usize, act: &dyn Fn()| {
        act();
        // RELEASE is sent when nobody waits for it any more.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let counts = mounted.requests();
        report.push(format!("{what}: {} {counts:?}", total(&counts)));
        assert!(total(&counts) <= limit, "{what}: {counts:?}");
    };
    let list = || assert_eq!(fs::read_dir(&mount).unwrap().count(), 100);
    let stat = |name: &str| fs::metadata(mount.join(name)).map(drop);
    let read = || assert_eq!(fs::read(mount.join("7")).unwrap(), b"text");
    measure("list", 6, &list);
    measure("list again", 3, &list);
    // Linux learns once that there are no STATX and FLUSH.
    measure("first use", 10, &|| {
        stat("5").unwrap();
        fs::read(mount.join("5")).unwrap();
    });
    measure("stat of what was listed", 0, &|| stat("3").unwrap());
    measure("stat of nothing", 1, &|| drop(stat("none").unwrap_err()));
    measure("stat of nothing again", 0, &|| {
        drop(stat("none").unwrap_err())
    });
    measure("read a file", 3, &read);
    // Reading has changed the time of access.
    measure("read it again", 3, &read);
    measure("create a file", 5, &|| {
        fs::write(mount.join("new"), "text").unwrap()
    });
    measure("append", 5, &|| {
        let file = File::options().append(true).open(mount.join("new"));
        file.unwrap().write_all(b"more").unwrap();
    });
    measure("rename", 3, &|| {
        fs::rename(mount.join("new"), mount.join("old")).unwrap()
    });
    measure("remove", 3, &|| fs::remove_file(mount.join("old")).unwrap());
    eprintln!("{}", report.join("\n"));
}

/// For work by hand: serves SANDBOX_FS_SHARE's mount in a shell command, SANDBOX_FS_COMMAND.
#[test]
#[ignore = "runs a command of one's own"]
fn command() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let status = Command::new("sh")
        .args(["-c", &std::env::var("SANDBOX_FS_COMMAND").unwrap()])
        .current_dir(mounted.path("mount"))
        .env("NATIVE", mounted.path("native"))
        .env("SHARE", mounted.path("share"))
        .status()
        .unwrap();
    eprintln!("{status}; requests by opcode: {:?}", mounted.requests());
}
