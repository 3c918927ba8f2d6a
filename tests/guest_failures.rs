// SPDX-License-Identifier: Apache-2.0
//! What the host or the guest can have wrong: one clear line, status 1, and nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::guest::Installation;
use harness::inventory::leaves_nothing;
use harness::runtime::finish;
use harness::{Bundle, Outcome, Runtime};

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
    let line = failure(&Installation::with_code(EXIT));
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
    let line = failure(&Installation::with_code(REBOOT));
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
    let installation = Installation::with_code(&wait_for_ever()).deadline(5);
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
    let root = installation.path().join("state");
    fs::create_dir(&root).unwrap();
    std::os::unix::fs::chown(&root, Some(65534), Some(65534)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let guard = installation.path().join("kvm");
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
    let line = failure(&Installation::new().deadline(5));
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
