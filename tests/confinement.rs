// SPDX-License-Identifier: Apache-2.0
//! What a container may not do inside its own guest, and what it cannot reach outside.

use std::fs;

use harness::{Bundle, Runtime};
use serde_json::json;

#[test]
fn a_capability_that_is_not_granted_is_refused() {
    let program = r"
import socket
open('/proc/sys/net/ipv4/ip_unprivileged_port_start', 'w').write('1024') if False else None
for port in (8080, 80):
    try:
        socket.socket().bind(('127.0.0.1', port)); print(port, 'bound')
    except PermissionError: print(port, 'refused')
";
    let user = |bundle: harness::BundleBuilder| {
        bundle
            .set(
                "/linux/sysctl",
                json!({"net.ipv4.ip_unprivileged_port_start": "1024"}),
            )
            .set("/process/user/uid", 1000)
            .set("/process/user/gid", 1000)
    };
    let without = user(Bundle::python(program)).capabilities(&[]).build();
    let runtime = Runtime::new();
    assert_eq!(runtime.run(&without).ok(), "8080 bound\n80 refused");
    let with = user(Bundle::python(program))
        .capabilities(&["CAP_NET_BIND_SERVICE"])
        .build();
    assert_eq!(runtime.run(&with).ok(), "8080 bound\n80 bound");
}

#[test]
fn root_that_escapes_a_chroot_is_still_inside() {
    let program = r"
import os
os.mkdir('/tmp/jail'); handle = os.open('/', os.O_RDONLY)
os.chroot('/tmp/jail'); os.fchdir(handle)
for _ in range(64): os.chdir('..')
os.chroot('.')
print(open('/etc/os-release').readline().strip(), os.path.exists('/run/share'), os.path.exists('/init'))
";
    let bundle = Bundle::python(program)
        .capabilities(&["CAP_SYS_CHROOT"])
        .build();
    let outcome = Runtime::new().run(&bundle);
    assert!(
        outcome.ok().contains("Debian") && outcome.ok().ends_with("False False"),
        "{outcome:?}"
    );
}

#[test]
fn seccomp_refuses_what_the_profile_forbids() {
    let bundle =
        Bundle::script("mkdir /tmp/a && echo made; sethostname 2>/dev/null; echo still here")
            .set(
                "/linux/seccomp",
                json!({
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [
                        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                        {"names": ["nosuchcall"], "action": "SCMP_ACT_KILL"}
                    ]
                }),
            )
            .build();
    let outcome = Runtime::new().run(&bundle);
    assert_eq!(outcome.ok(), "still here");
    assert!(
        outcome.stderr.contains("Function not implemented"),
        "{outcome:?}"
    );
}

#[test]
fn a_read_only_root_stays_read_only() {
    let script = "touch /x; mount -o remount,rw / 2>/dev/null; touch /x; echo end";
    let bundle = Bundle::script(script)
        .set("/root/readonly", true)
        .capabilities(&["CAP_SYS_ADMIN"])
        .build();
    let outcome = Runtime::new().run(&bundle);
    assert_eq!(outcome.ok(), "end");
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    if Runtime::new().is_sandbox() {
        assert!(
            !bundle.rootfs().join("x").exists(),
            "the host enforces it too"
        );
    }
}

#[test]
fn a_read_only_volume_stays_read_only() {
    let volume = std::env::temp_dir().join(format!("volume-{}", std::process::id()));
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "content").unwrap();
    let script = "cat /mnt/file; echo x > /mnt/file; mount -o remount,rw /mnt; echo x > /mnt/file; rm /mnt/file";
    let bundle = Bundle::script(script)
        .bind(&volume, "/mnt", &["ro"])
        .capabilities(&["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"])
        .build();
    let runtime = Runtime::new();
    let outcome = runtime.run(&bundle);
    assert_eq!(outcome.text(), "content");
    if runtime.is_sandbox() {
        assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "content");
    }
    fs::remove_dir_all(&volume).unwrap();
}

#[test]
fn masked_and_read_only_paths() {
    let script = "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/pid_max; echo end";
    let outcome = Runtime::new().run(&Bundle::script(script).build());
    assert_eq!(outcome.ok(), "0\n0\nend");
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
}

#[test]
fn the_user_and_its_limits_are_as_asked() {
    let script =
        "id -u; id -g; id -G; ulimit -n; pwd; grep NoNewPrivs /proc/self/status; echo $GREETING";
    let bundle = Bundle::script(script)
        .set(
            "/process/user",
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6]}),
        )
        .set("/process/cwd", "/tmp")
        .env("GREETING=hello world")
        .build();
    let outcome = Runtime::new().run(&bundle);
    let expected = "1000\n1001\n1001 5 6\n1024\n/tmp\nNoNewPrivs:\t1\nhello world";
    assert_eq!(outcome.ok(), expected);
}
