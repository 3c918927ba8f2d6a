// SPDX-License-Identifier: Apache-2.0
//! What a container does to files is what the host finds, and what the host does to them is what the container sees.

use std::fs::{self, File, FileTimes, Metadata, Permissions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use harness::runtime::wait;
use harness::{Bundle, BundleBuilder, Runtime, wait_until};
use rustix::fs::XattrFlags;
use serde_json::{Value, json};

const MEGABYTE: u64 = 1 << 20;
/// For root to do with files what root does.
const ROOT: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
];

/// A directory of the host for a container to write to, on a file system with all a file system has. Removed on drop.
struct Volume {
    path: PathBuf,
    mounted: bool,
}

impl Volume {
    fn new() -> Volume {
        let path = Volume::directory();
        // A tmpfs before Linux 6.6 has no such attributes.
        let attribute = rustix::fs::setxattr(&path, "user.probe", b"", XattrFlags::empty());
        let mounted = attribute.is_err();
        if mounted {
            let image = path.with_extension("ext4");
            let file = File::create(&image).unwrap();
            file.set_len(256 * MEGABYTE).unwrap();
            let options = ["-q", "-F", "-b4096", "-I256", "-N40000"];
            must(Command::new("mkfs.ext4").args(options).arg(&image));
            must(Command::new("mount").arg(&image).arg(&path));
            fs::remove_file(&image).unwrap();
            fs::remove_dir(path.join("lost+found")).unwrap();
        } else {
            rustix::fs::removexattr(&path, "user.probe").unwrap();
        }
        Volume { path, mounted }
    }

    /// One that need not have extended attributes.
    fn plain() -> Volume {
        Volume {
            path: Volume::directory(),
            mounted: false,
        }
    }

    /// With a short path: some tests make long ones below it.
    fn directory() -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("v-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn stat(&self, name: &str) -> Metadata {
        fs::symlink_metadata(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg(&self.path).status();
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Whether this is the emulated host of `tests/host/`, where every exit of the guest is slow.
fn emulated() -> bool {
    std::env::var_os("SANDBOX_EMULATED_HOST").is_some()
}

fn must(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// A container with `volume` at `/mnt` that runs a Python program.
fn python(program: &str, arguments: &[&str], volume: &Volume) -> BundleBuilder {
    let mut all = vec!["/usr/bin/python3", "-c", program];
    all.extend(arguments);
    Bundle::debian(&all)
        .bind(&volume.path, "/mnt", &[])
        .capabilities(ROOT)
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

/// What `describe` in attributes.py tells, seen from the host.
fn describe(path: &Path) -> Value {
    let stat = fs::symlink_metadata(path).unwrap();
    let mut xattrs = json!({});
    let mut list = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut list).unwrap();
    for name in list[..length].split(|byte| *byte == 0) {
        let name = str::from_utf8(name).unwrap();
        if name.starts_with("user.") {
            let value = xattr(path, name).unwrap();
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            xattrs[name] = json!(hex);
        }
    }
    json!({
        "mode": stat.mode(), "uid": stat.uid(), "gid": stat.gid(), "nlink": stat.nlink(), "size": stat.size(),
        "blocks": stat.blocks(),
        "atime": stat.atime() * 1_000_000_000 + stat.atime_nsec(),
        "mtime": stat.mtime() * 1_000_000_000 + stat.mtime_nsec(),
        "target": fs::read_link(path).ok().map(|target| target.to_str().unwrap().to_owned()),
        "xattrs": xattrs,
    })
}

/// Makes files of several kinds in `directory`.
fn make_host_files(directory: &Path) {
    fs::create_dir(directory).unwrap();
    let plain = directory.join("plain");
    fs::write(&plain, "plain").unwrap();
    lchown(&plain, Some(4321), Some(98765)).unwrap();
    fs::set_permissions(&plain, Permissions::from_mode(0o4711)).unwrap();
    for (name, value) in [("user.one", &b"\0\xff"[..]), ("user.empty", b"")] {
        rustix::fs::setxattr(&plain, name, value, XattrFlags::empty()).unwrap();
    }
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    let file = File::options().write(true).open(&plain).unwrap();
    file.set_times(FileTimes::new().set_accessed(time).set_modified(time))
        .unwrap();
    let sparse = File::create(directory.join("sparse")).unwrap();
    sparse.write_all_at(b"end", 32 * MEGABYTE).unwrap();
    sparse.sync_all().unwrap();
    fs::hard_link(&plain, directory.join("link")).unwrap();
    fs::create_dir(directory.join("directory")).unwrap();
    fs::set_permissions(directory.join("directory"), Permissions::from_mode(0o3775)).unwrap();
    symlink("../nowhere", directory.join("symlink")).unwrap();
}

#[test]
fn attributes_are_the_same_on_both_sides() {
    let volume = Volume::new();
    make_host_files(&volume.path("host"));
    let mut made = json!({});
    for entry in fs::read_dir(volume.path("host")).unwrap() {
        let entry = entry.unwrap();
        made[entry.file_name().to_str().unwrap()] = describe(&entry.path());
    }
    let bundle = python(include_str!("files/attributes.py"), &[], &volume).build();
    let outcome = Runtime::new().run(&bundle);
    let mut seen: Value = serde_json::from_str(outcome.ok()).unwrap();
    // Reading a symbolic link, as both sides do, counts as an access.
    made["symlink"]["atime"] = Value::Null;
    seen["symlink"]["atime"] = Value::Null;
    assert_eq!(seen, made);

    owners_modes_and_times(&volume);
    links_and_special_files(&volume);
    let attributes = volume.path("attributes");
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(xattr(&attributes, "user.binary"), Some(all));
    assert_eq!(xattr(&attributes, "user.empty"), Some(vec![]));
    assert_eq!(xattr(&attributes, "user.gone"), None);
    assert_eq!(xattr(&attributes, "user.replaced"), Some(b"new".to_vec()));
    let directory = volume.path("directory");
    assert_eq!(xattr(&directory, "user.directory"), Some(b"yes".to_vec()));
    holes(&volume);
}

fn owners_modes_and_times(volume: &Volume) {
    let masked = volume.stat("masked");
    assert_eq!(
        (masked.mode(), masked.uid(), masked.gid()),
        (0o100_640, 0, 0)
    );
    assert_eq!(volume.read("masked"), "masked");
    assert_eq!(volume.stat("masked-directory").mode(), 0o40_750);
    let owned = volume.stat("owned");
    assert_eq!(
        (owned.mode(), owned.uid(), owned.gid()),
        (0o106_751, 1234, 56789)
    );
    assert_eq!(
        (owned.atime(), owned.atime_nsec()),
        (1_000_000_000, 123_456_789)
    );
    assert_eq!(
        (owned.mtime(), owned.mtime_nsec()),
        (1_500_000_000, 987_654_321)
    );
    assert_eq!(owned.len(), 5);
    let early = volume.stat("early");
    assert_eq!((early.atime(), early.atime_nsec()), (-2, 500_000_000));
    assert_eq!((early.mtime(), early.mtime_nsec()), (-1, 999_999_999));
    let late = volume.stat("late");
    assert_eq!((late.atime(), late.atime_nsec()), (4_102_444_800, 1));
    assert_eq!(
        (late.mtime(), late.mtime_nsec()),
        (4_102_444_800, 999_999_999)
    );
    let directory = volume.stat("directory");
    assert_eq!((directory.mode(), directory.gid()), (0o43_770, 4242));
    assert_eq!(volume.stat("directory/inherits").gid(), 4242);
}

fn links_and_special_files(volume: &Volume) {
    let dangling = volume.stat("dangling");
    assert_eq!((dangling.uid(), dangling.gid()), (77, 78));
    assert_eq!(
        (dangling.mtime(), dangling.mtime_nsec()),
        (1_234_567_890, 7)
    );
    assert_eq!(volume.stat("dangling-too").ino(), dangling.ino());
    let target = fs::read_link(volume.path("dangling")).unwrap();
    assert_eq!(target.as_os_str().as_bytes(), "/no/such/\u{e9}".as_bytes());
    let target = fs::read_link(volume.path("long-symlink")).unwrap();
    assert_eq!(target.to_str().unwrap(), "t".repeat(4000));
    let linked = volume.stat("linked");
    assert_eq!(
        (linked.nlink(), linked.ino()),
        (2, volume.stat("directory/link").ino())
    );
    assert_eq!(volume.read("linked"), "one two");
    assert_eq!(volume.stat("kept").nlink(), 1);
    assert!(!volume.path("unlinked-once").exists());
    assert!(volume.stat("fifo").file_type().is_fifo());
    assert_eq!(volume.stat("fifo").mode() & 0o7777, 0o640);
    assert!(volume.stat("socket").file_type().is_socket());
}

fn holes(volume: &Volume) {
    let holes = volume.stat("holes");
    assert_eq!(holes.len(), 16 * MEGABYTE);
    let allocated = holes.blocks() * 512;
    assert!(
        (MEGABYTE..2 * MEGABYTE).contains(&allocated),
        "{allocated} bytes"
    );
    let mut file = File::open(volume.path("holes")).unwrap();
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap();
    let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
    assert_eq!((data, end), (4 * MEGABYTE, 5 * MEGABYTE));
    file.seek(SeekFrom::Start(4 * MEGABYTE - 1)).unwrap();
    let mut bytes = [1; 2];
    file.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0, b'x']);
    let punched = volume.stat("punched");
    assert_eq!(punched.len(), 4 * MEGABYTE);
    assert!(punched.blocks() * 512 < 3 * MEGABYTE, "{punched:?}");
    let content = fs::read(volume.path("punched")).unwrap();
    let zeroes = content.iter().filter(|byte| **byte == 0).count();
    assert_eq!(u64::try_from(zeroes).unwrap(), 2 * MEGABYTE);
    let allocated = volume.stat("allocated");
    assert_eq!(allocated.len(), MEGABYTE);
    assert!(allocated.blocks() * 512 >= MEGABYTE, "{allocated:?}");
}

#[test]
fn many_small_files() {
    // All of them in the emulated host, in four minutes: SMALL_FILES=20000 COMMAND_SECONDS=3000.
    let files: u32 = match std::env::var("SMALL_FILES") {
        Ok(text) => text.parse().expect("SMALL_FILES is a number"),
        Err(_) if emulated() => 500,
        Err(_) => 20_000,
    };
    let volume = Volume::new();
    let count = files.to_string();
    let bundle = python(include_str!("files/many.py"), &[&count], &volume).build();
    let outcome = Runtime::new().run(&bundle);
    outcome.ok();
    print!("{}", outcome.stderr);
    let mut left = 0;
    for number in (0..files).filter(|number| number % 250 % 16 == 0) {
        let name = format!("b{}/{number}", number / 250);
        assert_eq!(volume.read(&name), number.to_string());
        left += 1;
    }
    let directories = (0..files / 250).map(|number| volume.path(&format!("b{number}")));
    let found = directories.map(|directory| fs::read_dir(directory).unwrap().count());
    assert_eq!(found.sum::<usize>(), left);
    for number in 0..files / 250 {
        let empty = fs::read_dir(volume.path(&format!("a{number}"))).unwrap();
        assert_eq!(empty.count(), 0);
    }
}

#[test]
fn a_large_file() {
    // In the emulated host 1 GiB took 85 s alone, and more than the deadline beside other guests.
    let megabytes = if emulated() { 128 } else { 1024 };
    let volume = Volume::plain();
    let size = megabytes.to_string();
    let bundle = python(include_str!("files/gigabyte.py"), &[&size], &volume).build();
    let outcome = Runtime::new().run(&bundle);
    let hash = outcome.ok();
    print!("{}", outcome.stderr);
    assert_eq!(volume.stat("large").len(), megabytes * MEGABYTE);
    let output = Command::new("b2sum").arg(volume.path("large")).output();
    let output = output.unwrap();
    let sum = str::from_utf8(&output.stdout).unwrap();
    assert_eq!(sum.split(' ').next(), Some(hash));
}

#[test]
fn open_files_locks_and_long_names() {
    let volume = Volume::new();
    let bundle = python(include_str!("files/open.py"), &[], &volume).build();
    let outcome = Runtime::new().run(&bundle);
    let checks =
        "unlinked removed_directory renamed_over mapped appended locked long_names long_paths";
    assert_eq!(outcome.ok().replace('\n', " "), checks);
    assert_eq!(volume.read("target"), "new too");
    assert_eq!(volume.read("moved/sub/file"), "moved");
    assert_eq!(volume.read("named-later"), "tmpfile");
    let mapped = fs::read(volume.path("mapped")).unwrap();
    let expected: [(usize, &[u8]); 4] = [
        (0, b"child"),
        (4096, b"mmap"),
        (8192, b"write"),
        (64 * 4096 - 3, b"end"),
    ];
    for (offset, bytes) in expected {
        assert_eq!(&mapped[offset..offset + bytes.len()], bytes);
    }
    assert_eq!(volume.read("appended").lines().count(), 1000);
    assert_eq!(volume.read(&"n".repeat(255)), "long");
    let mut path = volume.path("p");
    while let Some(Ok(entry)) = fs::read_dir(&path).unwrap().next() {
        path = entry.path();
        if path.is_file() {
            break;
        }
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "deeper");
    let inside = path.strip_prefix(&volume.path).unwrap();
    assert_eq!("/mnt/".len() + inside.as_os_str().len(), 4000);
}

/// A shell in a container that runs one line after the other.
struct Shell {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Shell {
    fn new(runtime: &Runtime, bundle: &Bundle) -> Shell {
        let mut command = runtime.run_command(bundle);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Shell {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// The line's output and its status, with blanks for ends of line.
    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}; echo status $?").unwrap();
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            let length = self.stdout.read_line(&mut line).unwrap();
            assert_ne!(length, 0, "the shell has ended: {answer}");
            // Not always at the start of the line: output may end without a newline.
            if let Some((rest, status)) = line.split_once("status ") {
                return answer + rest + status.trim_end();
            }
            answer += &line.replace('\n', " ");
        }
    }

    fn end(self) {
        drop(self.stdin);
        assert_eq!(wait(self.child), 0);
    }
}

#[test]
fn the_host_changes_a_bound_directory_and_file() {
    let volume = Volume::plain();
    let single = Volume::plain();
    fs::write(volume.path("a"), "one\n").unwrap();
    fs::write(volume.path("log"), "first\n").unwrap();
    fs::write(single.path("file"), "one\n").unwrap();
    let bundle = Bundle::busybox(&["/bin/sh"])
        .bind(&volume.path, "/mnt", &[])
        .bind(&single.path("file"), "/etc/single", &[])
        .build();
    let runtime = Runtime::new();
    let mut shell = Shell::new(&runtime, &bundle);
    assert_eq!(shell.ask("cat /mnt/a /etc/single"), "one one 0");

    // What is opened after the change has it.
    fs::write(volume.path("a"), "two, and longer\n").unwrap();
    fs::write(single.path("file"), "two, and longer\n").unwrap();
    assert_eq!(
        shell.ask("cat /mnt/a /etc/single"),
        "two, and longer two, and longer 0"
    );
    fs::write(volume.path("a"), "3\n").unwrap();
    fs::write(single.path("file"), "3\n").unwrap();
    assert_eq!(shell.ask("cat /mnt/a /etc/single"), "3 3 0");
    // The same size, and on some file systems the same time.
    fs::write(volume.path("a"), "4\n").unwrap();
    fs::write(single.path("file"), "4\n").unwrap();
    assert_eq!(shell.ask("cat /mnt/a /etc/single"), "4 4 0");

    // New names show at once, other changes of names within a second.
    assert_eq!(shell.ask("test -e /mnt/new"), "1");
    fs::write(volume.path("new"), "new\n").unwrap();
    assert_eq!(shell.ask("cat /mnt/new"), "new 0");
    fs::write(volume.path("b"), "replaced\n").unwrap();
    fs::rename(volume.path("b"), volume.path("a")).unwrap();
    wait_until("rename over", || shell.ask("cat /mnt/a") == "replaced 0");
    fs::remove_file(volume.path("new")).unwrap();
    wait_until("removal", || shell.ask("test -e /mnt/new") == "1");
    fs::set_permissions(volume.path("a"), Permissions::from_mode(0o600)).unwrap();
    wait_until("mode", || shell.ask("stat -c %a /mnt/a") == "600 0");
    fs::create_dir(volume.path("directory")).unwrap();
    fs::write(volume.path("directory/file"), "").unwrap();
    assert_eq!(shell.ask("ls /mnt/directory"), "file 0");
    wait_until("listing", || shell.ask("ls /mnt") == "a directory log 0");

    // A reader that has the file open follows it.
    assert_eq!(
        shell.ask("exec 3</mnt/log; read line <&3; echo $line"),
        "first 0"
    );
    assert_eq!(shell.ask("read line <&3"), "1");
    let mut log = File::options()
        .append(true)
        .open(volume.path("log"))
        .unwrap();
    log.write_all(b"second\n").unwrap();
    wait_until("appended line", || {
        shell.ask("read line <&3 && echo $line") == "second 0"
    });

    // And the other way round, while the container runs.
    assert_eq!(
        shell.ask("echo back >/etc/single; echo back >/mnt/back"),
        "0"
    );
    assert_eq!(single.read("file"), "back\n");
    assert_eq!(volume.read("back"), "back\n");
    assert_eq!(shell.ask("exec 4>>/mnt/back; echo more >&4"), "0");
    assert_eq!(volume.read("back"), "back\nmore\n");
    shell.end();
}
