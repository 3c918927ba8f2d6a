// SPDX-License-Identifier: Apache-2.0
//! What the host or the guest can have wrong: one clear line, status 1, and nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::inventory::leaves_nothing;
use harness::runtime::finish;
use harness::{Bundle, Outcome, Runtime};

/// A copy of what `make install` installs, to change its files, and how many seconds its guests have to boot. Removed on
/// drop.
struct Installation(PathBuf, &'static str);

impl Installation {
    fn new() -> Installation {
        let path = std::env::temp_dir().join(harness::runtime::new_id());
        let guest = path.join("lib/sandbox");
        fs::create_dir_all(path.join("bin")).unwrap();
        fs::create_dir_all(&guest).unwrap();
        let built = harness::top().join("target");
        fs::copy(built.join("release/sandbox"), path.join("bin/sandbox")).unwrap();
        for name in ["vmlinux", "initramfs.cpio"] {
            fs::copy(built.join("lib/sandbox").join(name), guest.join(name)).unwrap();
        }
        Installation(path, "60")
    }

    /// One whose guest runs `code` as its first process.
    fn with_init(code: &[u8]) -> Installation {
        let installation = Installation::new();
        installation.replace_initramfs(&initramfs(&elf(code)));
        installation
    }

    fn replace_initramfs(&self, content: &[u8]) {
        fs::write(self.0.join("lib/sandbox/initramfs.cpio"), content).unwrap();
    }

    fn command(&self, root: &Path, bundle: &Bundle) -> Command {
        let mut command = Command::new(self.0.join("bin/sandbox"));
        command
            .arg("--root")
            .arg(root)
            .args(["run", "-b"])
            .arg(bundle.path())
            .arg(harness::runtime::new_id())
            .env("SANDBOX_BOOT_TIMEOUT_S", self.1)
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
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

/// A newc archive of `/init` and `/kmsg`, the kernel's log.
fn initramfs(init: &[u8]) -> Vec<u8> {
    fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
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
    let mut archive = Vec::new();
    entry(&mut archive, "init", 0o100_755, (0, 0), init);
    entry(&mut archive, "kmsg", 0o020_600, (1, 11), &[]);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

/// mov edi, 3; mov eax, SYS_exit; syscall
const EXIT: &[u8] = b"\xbf\x03\0\0\0\xb8\x3c\0\0\0\x0f\x05";

/// reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART)
const REBOOT: &[u8] =
    b"\xbf\xad\xde\xe1\xfe\xbe\x69\x19\x12\x28\xba\x67\x45\x23\x01\xb8\xa9\0\0\0\x0f\x05";

const MESSAGE: &[u8] = b"<0>waiting for nothing\x1b[2J\n";

/// Opens the kernel's log, writes [`MESSAGE`] at the level of emergencies, and sleeps for ever.
fn wait_for_ever() -> Vec<u8> {
    let length = u8::try_from(MESSAGE.len()).unwrap();
    let mut code = Vec::new();
    // lea rdi, [rip + path]; mov esi, O_WRONLY; mov eax, SYS_open; syscall; mov edi, eax
    code.extend(b"\x48\x8d\x3d\x2d\0\0\0\xbe\x01\0\0\0\xb8\x02\0\0\0\x0f\x05\x89\xc7");
    // lea rsi, [rip + message]; mov edx, length; mov eax, SYS_write; syscall
    code.extend(b"\x48\x8d\x35\x1e\0\0\0\xba");
    code.extend([length, 0, 0, 0]);
    code.extend(b"\xb8\x01\0\0\0\x0f\x05");
    // again: mov eax, SYS_pause; syscall; jmp again
    code.extend(b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7");
    let path = code.len();
    code.extend(b"/kmsg\0");
    let message = code.len();
    code.extend(MESSAGE);
    // Distances from the end of each lea.
    code[3] = u8::try_from(path - 7).unwrap();
    code[24] = u8::try_from(message - 28).unwrap();
    code
}

/// Runs a container with an installation that cannot and gives its one line.
fn failure(installation: &Installation) -> String {
    let mut line = String::new();
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("true").build();
        let outcome = finish(installation.command(runtime.root(), &bundle));
        line = checked(runtime.root(), &outcome);
    });
    line
}

fn checked(root: &Path, outcome: &Outcome) -> String {
    let line = outcome.refusal();
    println!("{line}");
    assert!(!line.contains(char::is_control), "{line:?}");
    let left = fs::read_dir(root).unwrap().count();
    assert_eq!(left, 0, "left behind after: {line}");
    line.to_owned()
}

fn is_sandbox() -> bool {
    Runtime::new().is_sandbox()
}

#[test]
fn a_guest_whose_first_process_ends() {
    if !is_sandbox() {
        return;
    }
    let line = failure(&Installation::with_init(EXIT));
    assert!(
        line.contains("guest kernel stopped while booting"),
        "{line}"
    );
    assert!(line.contains("Attempted to kill init"), "{line}");
}

#[test]
fn a_guest_that_reboots() {
    if !is_sandbox() {
        return;
    }
    let line = failure(&Installation::with_init(REBOOT));
    assert!(
        line.contains("guest kernel stopped while booting"),
        "{line}"
    );
}

#[test]
fn a_guest_that_never_answers() {
    if !is_sandbox() {
        return;
    }
    let mut installation = Installation::with_init(&wait_for_ever());
    installation.1 = "5";
    let line = failure(&installation);
    assert!(line.contains("did not come up within 5 s"), "{line}");
    assert!(line.contains("waiting for nothing"), "{line}");
}

#[test]
fn an_initramfs_that_is_none() {
    if !is_sandbox() {
        return;
    }
    let installation = Installation::new();
    for content in [&b"not an archive"[..], b""] {
        installation.replace_initramfs(content);
        let line = failure(&installation);
        assert!(
            line.contains("guest kernel stopped while booting") || line.contains("initramfs"),
            "{line}"
        );
    }
}

#[test]
fn a_guest_kernel_that_panics_under_a_container() {
    if !is_sandbox() {
        return;
    }
    leaves_nothing(|runtime| {
        let bundle =
            Bundle::script("echo before; sleep 0.2; echo c > /proc/sysrq-trigger; sleep 1000")
                .remove("/linux/readonlyPaths")
                .build();
        let outcome = runtime.run(&bundle);
        assert_eq!(outcome.status, 137, "{outcome:?}");
        assert_eq!(outcome.text(), "before\n");
        let line = outcome.stderr.trim_end();
        assert!(line.contains("guest kernel stopped"), "{line}");
        assert!(!line.contains('\n'), "{line}");
    });
}

/// Runs a command after the shell commands `set_up`, in a mount namespace of its own. They mount with busybox, since
/// util-linux keeps books in `/run`.
fn run_after(set_up: &str, command: &Command) -> Outcome {
    let mut all = Command::new("unshare");
    let script = format!("{set_up}\nexec \"$@\"");
    all.args(["--mount", "sh", "-e", "-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null());
    finish(all)
}

/// The one line of a run after `set_up`.
fn failure_after(set_up: &str) -> String {
    let installation = Installation::new();
    let mut line = String::new();
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("true").build();
        let command = installation.command(runtime.root(), &bundle);
        line = checked(runtime.root(), &run_after(set_up, &command));
    });
    line
}

#[test]
fn no_kvm() {
    if !is_sandbox() {
        return;
    }
    let line = failure_after("busybox mount -t tmpfs none /dev");
    assert!(line.contains("/dev/kvm"), "{line}");
    assert!(line.contains("o such file or directory"), "{line}");
    assert!(line.contains("sandbox check"), "{line}");
}

#[test]
fn a_kvm_that_is_none() {
    if !is_sandbox() {
        return;
    }
    let line = failure_after("busybox mount --bind /dev/null /dev/kvm");
    assert!(line.to_lowercase().contains("kvm"), "{line}");
}

#[test]
fn a_user_who_may_not_open_kvm() {
    if !is_sandbox() {
        return;
    }
    let installation = Installation::new();
    let root = installation.0.join("state");
    fs::create_dir(&root).unwrap();
    std::os::unix::fs::chown(&root, Some(65534), Some(65534)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let guard = installation.0.join("kvm");
    fs::write(&guard, "").unwrap();
    fs::set_permissions(&guard, fs::Permissions::from_mode(0o600)).unwrap();
    leaves_nothing(|_| {
        let bundle = Bundle::script("true").build();
        let command = installation.command(&root, &bundle);
        let mut as_nobody = Command::new("setpriv");
        as_nobody
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(command.get_program())
            .args(command.get_args());
        let set_up = format!("busybox mount --bind '{}' /dev/kvm", guard.display());
        let line = checked(&root, &run_after(&set_up, &as_nobody));
        assert!(line.contains("/dev/kvm"), "{line}");
        assert!(line.contains("ermission denied"), "{line}");
        assert!(line.contains("group"), "{line}");
    });
}

#[test]
#[ignore = "KVM that cannot run guests is not to be had where KVM works; to be run by hand where it does not"]
fn a_kvm_that_cannot_run_guests() {
    let mut installation = Installation::new();
    installation.1 = "5";
    let line = failure(&installation);
    assert!(line.contains("sandbox check"), "{line}");
}

/// Runs a container with its state directory on a small file system. None: it ran.
fn on_a_small_disk(options: &str) -> Option<String> {
    let installation = Installation::new();
    let mut line = None;
    leaves_nothing(|runtime| {
        let bundle = Bundle::script("true").build();
        let root = runtime.root().join("small");
        fs::create_dir(&root).unwrap();
        let command = installation.command(&root, &bundle);
        // The shell stays, to look what is left.
        let set_up = format!(
            "busybox mount -t tmpfs -o mode=700,{options} none '{root}'
            \"$@\" || status=$?
            test -z \"$(ls -A '{root}')\" || echo left behind: $(ls -AR '{root}')
            exit ${{status:-0}}",
            root = root.display()
        );
        let outcome = run_after(&set_up, &command);
        assert_eq!(outcome.text(), "", "{outcome:?}");
        fs::remove_dir(&root).unwrap();
        if outcome.status != 0 {
            line = Some(checked(runtime.root(), &outcome));
        }
    });
    line
}

#[test]
fn a_full_disk_below_the_state_directory() {
    if !is_sandbox() {
        return;
    }
    for kind in ["size", "nr_inodes"] {
        let mut refused = 0;
        let largest = 24;
        let enough = (1..largest).find(|&count| {
            let options = match kind {
                "size" => format!("size={}k", 4 * count),
                _ => format!("nr_inodes={count}"),
            };
            let Some(line) = on_a_small_disk(&options) else {
                return true;
            };
            refused += 1;
            assert!(line.contains("o space left on device"), "{options}: {line}");
            let names = ["config.json", "state.json", "control", "state directory"];
            assert!(
                names.iter().any(|name| line.contains(name)),
                "{options}: {line}"
            );
            false
        });
        assert!(enough.is_some() && refused > 0, "{kind}: {refused} refused");
    }
}
