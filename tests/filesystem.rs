// SPDX-License-Identifier: Apache-2.0
//! File system test suites that others wrote, in short: `tests/filesystem/run.sh` has the long form and others. Each runs
//! in the container's own root file system, which the guest may cache for long, and in a directory of the host.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use harness::{Bundle, Runtime, top};

/// What the suites need to act as root and as others.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
];

/// Copies a tree of directories and regular files.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else if !to.exists() {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A container with the tools of `tests/filesystem/tools.sh` that runs `suite.sh SUITE` in `/work` and in `/mnt`.
fn bundle(suite: &str, volume: &Path, environment: &[&str]) -> Bundle {
    let tools = top().join("target/filesystem-tests");
    assert!(
        tools.join("bin/fsx").exists(),
        "{} is missing: run tests/filesystem/tools.sh",
        tools.display()
    );
    let script = format!(
        "set -e; for d in /work /mnt; do echo \"$d\"; /bin/sh /bin/suite.sh {suite} $d /dev/shm; done"
    );
    let mut builder = Bundle::script(&script)
        .mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"])
        .bind(volume, "/mnt", &[])
        .capabilities(CAPABILITIES)
        .set("/process/noNewPrivileges", false);
    for variable in environment {
        builder = builder.env(variable);
    }
    let bundle = builder.build();
    let rootfs = bundle.rootfs();
    for directory in ["lib", "lib64"] {
        copy(&tools.join(directory), &rootfs.join(directory));
    }
    // A link to busybox, which a copy would overwrite.
    fs::remove_file(rootfs.join("bin/sleep")).unwrap();
    symlink("busybox", rootfs.join("bin/which")).unwrap();
    for program in ["fsx", "pjdfstest", "sleep"] {
        let to = rootfs.join("bin").join(program);
        fs::copy(tools.join("bin").join(program), to).unwrap();
    }
    for file in ["suite.sh", "fsx.toml", "pjdfstest.toml"] {
        let from = top().join("tests/filesystem").join(file);
        fs::copy(from, rootfs.join("bin").join(file)).unwrap();
    }
    fs::create_dir(rootfs.join("work")).unwrap();
    let users = "root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), users).unwrap();
    let groups = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";
    fs::write(rootfs.join("etc/group"), groups).unwrap();
    bundle
}

/// A directory of the host, removed on drop.
struct Volume(PathBuf);

impl Volume {
    fn new(name: &str) -> Volume {
        let path = std::env::temp_dir().join(format!("filesystem-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Volume(path)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(suite: &str, environment: &[&str]) -> String {
    let volume = Volume::new(suite);
    let outcome = Runtime::new().run(&bundle(suite, &volume.0, environment));
    let output = outcome.text().to_owned();
    println!("{output}");
    assert_eq!(outcome.status, 0, "{output}{}", outcome.stderr);
    output
}

#[test]
fn fsx_finds_what_it_wrote() {
    let output = run("fsx", &["FSX_SEEDS=3 5", "FSX_OPERATIONS=600"]);
    let result = "fsx: seeds 3 5, 600 operations each, 0 failed";
    assert_eq!(output.matches(result).count(), 2, "{output}");
}

#[test]
fn pjdfstest_passes() {
    // Of each system call some tests; all of them take minutes in an emulated host.
    let names = "PJDFSTEST=rename:: open::etxtbsy utimensat ftruncate unlink::unlink link::link chown::lchown posix_fallocate";
    let output = run("pjdfstest", &[names]);
    let summaries: Vec<&str> = output
        .lines()
        .filter(|line| line.starts_with("Summary: "))
        .collect();
    assert_eq!(summaries.len(), 2, "{output}");
    for summary in summaries {
        assert!(summary.starts_with("Summary: 0 failed"), "{output}");
        assert!(!summary.contains(" 0 passed"), "{output}");
    }
}
