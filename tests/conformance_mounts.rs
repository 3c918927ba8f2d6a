// SPDX-License-Identifier: Apache-2.0
//! `mounts`, `root` and the paths of `linux` that restrict them, from inside. Runs against runc and crun too.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use harness::fields::{HostDirectory, check_refused, look, probe};
use harness::{Bundle, BundleBuilder, Runtime, skip_on};
use serde_json::{Value, json};

fn has(seen: &Value, place: &str, options: &[&str]) {
    let mount = &seen["mounts"][place];
    let all = [&mount["options"], &mount["data"]];
    for option in options {
        let found = all.iter().any(|list| {
            list.as_array()
                .is_some_and(|list| list.contains(&json!(option)))
        });
        assert!(found, "{place}: {option}: {mount}");
    }
}

/// guest: mounts.destination mounts.type mounts.source mounts.options root.path root.readonly
#[test]
fn file_systems_of_the_kernel() {
    let runtime = Runtime::new();
    let bundle = probe(
        r"
show(mounts=mounts(), top=tried(os.mkdir, '/new'), small=written('/mnt/small/file', 'x' * (1 << 20)),
    modes=[node(path)[0] for path in ('/mnt/small', '/mnt/kept', '/dev/shm')],
    copied=sorted(os.listdir('/etc')) == sorted(os.listdir('/mnt/etc')) and node('/etc/passwd') == node('/mnt/etc/passwd'),
    etc=written('/etc/passwd', 'x'), original=read('/mnt/etc/passwd') == read('/etc/passwd'),
    pid=read('/proc/1/comm'), queues=os.listdir('/dev/mqueue'), terminals=sorted(os.listdir('/dev/pts')),
    cgroup=sorted(set(os.listdir('/sys/fs/cgroup')) & {'cgroup.procs', 'memory.max', 'pids.max'}),
    executed=tried(os.execv, '/mnt/noexec', ['x']), tmp=sorted(os.listdir('/mnt')))",
    )
    .mount("/mnt", "tmpfs", "tmpfs", &["mode=0755"])
    .mount("/mnt/small", "tmpfs", "some-name", &["nosuid", "nodev", "noexec", "size=256k", "mode=1770", "noatime"])
    .mount("/mnt/kept", "tmpfs", "tmpfs", &["ro", "nodiratime", "strictatime"])
    .mount("/mnt/relative", "tmpfs", "tmpfs", &["nr_inodes=17"])
    .mount("/mnt/etc", "bind", harness::debian().join("etc").to_str().unwrap(), &["bind", "ro"])
    .mount("/etc", "tmpfs", "tmpfs", &["tmpcopyup"])
    .build();
    let seen = look(&runtime, &bundle);
    assert_eq!(seen["top"], "Read-only file system");
    for (place, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/mnt/small", "tmpfs"),
    ] {
        assert_eq!(seen["mounts"][place]["type"], kind, "{place}");
    }
    assert_eq!(seen["mounts"]["/mnt/small"]["source"], "some-name");
    has(
        &seen,
        "/mnt/small",
        &["rw", "nosuid", "nodev", "noexec", "noatime", "size=256k"],
    );
    has(&seen, "/mnt/kept", &["ro", "nodiratime"]);
    has(&seen, "/mnt/relative", &["rw", "relatime", "nr_inodes=17"]);
    has(&seen, "/sys", &["ro", "nosuid", "nodev", "noexec"]);
    has(
        &seen,
        "/sys/fs/cgroup",
        &["ro", "nosuid", "nodev", "noexec", "relatime"],
    );
    has(&seen, "/dev", &["nosuid", "mode=755", "size=65536k"]);
    has(
        &seen,
        "/dev/pts",
        &["nosuid", "noexec", "gid=5", "mode=620", "ptmxmode=666"],
    );
    let strict = seen["mounts"]["/mnt/kept"]["options"].as_array().unwrap();
    assert!(!strict.contains(&json!("relatime")), "{strict:?}");
    assert_eq!(seen["small"], "No space left on device");
    assert_eq!(
        seen["modes"],
        json!(["drwxrwx--T", "drwxrwxrwt", "drwxrwxrwt"])
    );
    assert_eq!(seen["copied"], true, "tmpcopyup");
    assert_eq!(seen["etc"], "ok", "the copy can be written");
    assert_eq!(seen["original"], false, "and nothing else is");
    assert_eq!(seen["pid"], "python3", "proc is that of the container");
    assert_eq!(seen["queues"], json!([]));
    assert_eq!(seen["terminals"], json!(["ptmx"]));
    assert_eq!(
        seen["cgroup"],
        json!(["cgroup.procs", "memory.max", "pids.max"]),
        "its own cgroup is the root"
    );
}

/// host: mounts.source mounts.options
/// guest: mounts.destination mounts.options
#[test]
fn directories_and_files_of_the_host() {
    let runtime = Runtime::new();
    let mut host = HostDirectory::new();
    host.write("file", "first");
    host.write("tool", "#!/bin/sh\necho ran\n");
    let below = host.mount("below");
    fs::write(below.join("deep"), "deep").unwrap();
    let top = host.path("");
    let script = "
cat /mnt/plain/file; echo; ls /mnt/plain/below | wc -l; cat /mnt/all/below/deep; echo
echo 1 > /mnt/plain/new && echo written
echo 1 > /mnt/ro/new || echo refused
echo 1 > /mnt/ro/below/new && echo below rw || echo below ro
echo 1 > /mnt/rro/below/new || echo refused below
/bin/sh /mnt/single; /mnt/single || echo not executed
cat /relative/name; echo
cat /etc/inside/file; echo
stat -c %F /made/by/runtime/directory /made/by/runtime/file
grep -c . /dev/null
cat /mnt/null; echo x > /mnt/null && echo null
grep ' /mnt/all ' /proc/self/mountinfo | grep -o unbindable
echo end; sleep 1000";
    let bundle = Bundle::script(script)
        .capabilities(&["CAP_DAC_OVERRIDE"])
        .bind(&top, "/mnt/plain", &[])
        .bind(&top, "/mnt/all", &["rbind", "runbindable"])
        .bind(&top, "/mnt/ro", &["rbind", "ro"])
        .bind(&top, "/mnt/rro", &["rbind", "rro"])
        .bind(&host.path("tool"), "/mnt/single", &["noexec"])
        .bind(&host.path("file"), "/mnt/live", &["ro"])
        .bind(Path::new("in-the-bundle"), "/relative", &[])
        // Links of the image lead inside it, also absolute ones and those that go up.
        .bind(&top, "/way/inside", &[])
        .bind(&top, "/made/by/runtime/directory", &["nosuid", "nodev"])
        .mount(
            "/made/by/runtime/file",
            "none",
            host.path("file").to_str().unwrap(),
            &["bind"],
        )
        .bind(Path::new("/dev/null"), "/mnt/null", &[])
        .build();
    symlink("../../../etc", bundle.rootfs().join("way")).unwrap();
    fs::create_dir(bundle.path().join("in-the-bundle")).unwrap();
    fs::write(bundle.path().join("in-the-bundle/name"), "relative").unwrap();
    let outside = bundle.path().join("../etc/inside");
    let container = runtime.create(bundle);
    container.start();
    harness::wait_until("output", || container.stdout().ends_with("end\n"));
    let mut expected = "first\n0\ndeep\nwritten\nrefused\n".to_owned();
    // A guest sees what is mounted below as part of the whole, so that `ro` is for all of it; elsewhere `rro` is that.
    expected += if runtime.is_sandbox() {
        "below ro\n"
    } else {
        "below rw\n"
    };
    expected += "refused below\nran\nnot executed\nrelative\nfirst\n";
    expected += "directory\nregular file\n0\nnull\nunbindable\nend\n";
    assert_eq!(container.stdout(), expected);
    // What the host rewrites while the container runs, as engines do with /etc/hosts.
    host.write("file", "second");
    let rest = container.exec(&["/bin/cat", "/mnt/live", "/mnt/plain/file"]);
    assert_eq!(rest.ok(), "secondsecond");
    assert_eq!(fs::read_to_string(host.path("new")).unwrap(), "1\n");
    assert_eq!(host.path("below/new").exists(), !runtime.is_sandbox());
    assert!(!outside.exists());
}

/// guest: mounts.options
#[test]
fn options_that_other_runtimes_of_debian_do_not_have() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "their versions in Debian 12 do not know nosymfollow or rnoatime"
    );
    let host = HostDirectory::new();
    let bundle = probe("show(mounts=mounts(), link=read('/mnt/kept/link'))")
        .mount("/mnt", "tmpfs", "tmpfs", &[])
        .bind(&host.path(""), "/mnt/kept", &["nosymfollow", "noexec"])
        .bind(
            &host.path(""),
            "/mnt/recursive",
            &[
                "rbind",
                "rnoatime",
                "rnosuid",
                "rnodev",
                "rnoexec",
                "rnodiratime",
            ],
        )
        .mount(
            "/mnt/sync",
            "tmpfs",
            "tmpfs",
            &["sync", "dirsync", "lazytime", "noexec", "exec", "ro", "rw"],
        )
        .mount("/mnt/ramfs", "ramfs", "ramfs", &["mode=700"])
        .mount("/mnt/own-proc", "proc", "proc", &["hidepid=invisible"])
        .build();
    host.write("target", "text");
    symlink("target", host.path("link")).unwrap();
    let seen = look(&runtime, &bundle);
    assert_eq!(seen["link"], "Too many levels of symbolic links");
    has(&seen, "/mnt/kept", &["nosymfollow", "noexec"]);
    has(
        &seen,
        "/mnt/recursive",
        &["noatime", "nosuid", "nodev", "noexec", "nodiratime"],
    );
    has(&seen, "/mnt/sync", &["rw"]);
    let sync = &seen["mounts"]["/mnt/sync"];
    assert!(
        !sync["options"]
            .as_array()
            .unwrap()
            .contains(&json!("noexec")),
        "{sync}"
    );
    assert_eq!(seen["mounts"]["/mnt/ramfs"]["type"], "ramfs");
    has(&seen, "/mnt/own-proc", &["hidepid=invisible"]);
}

/// guest: linux.maskedPaths linux.readonlyPaths linux.rootfsPropagation
#[test]
fn paths_that_are_hidden_or_read_only() {
    let runtime = Runtime::new();
    let bundle = |propagation: &str| {
        probe(
            r"
show(file=read('/etc/os-release'), directory=os.listdir('/usr/share/zoneinfo' if 0 else '/usr/share/perl5'),
    kept=written('/mnt/kept', 'x'), open=written('/mnt/open', 'x'), sys=written('/proc/sys/kernel/pid_max', '400'),
    mounts={path: mount for path, mount in mounts().items() if path in ('/', '/etc/os-release')})",
        )
        .mount("/mnt", "bind", "volume", &["rbind"])
        .set("/linux/maskedPaths", json!(["/usr/lib/os-release", "/usr/share/perl5", "/not/there"]))
        .set("/linux/readonlyPaths", json!(["/mnt/kept", "/proc/sys", "/not/there"]))
        .set("/linux/rootfsPropagation", propagation)
        .capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"])
    };
    for propagation in ["shared", "private", "unbindable"] {
        let bundle = bundle(propagation).build();
        let volume = bundle.path().join("volume");
        fs::create_dir(&volume).unwrap();
        for file in ["kept", "open"] {
            fs::write(volume.join(file), "").unwrap();
        }
        let seen = look(&runtime, &bundle);
        assert_eq!(seen["file"], "", "{seen}");
        assert_eq!(seen["directory"], json!([]));
        assert_eq!(seen["kept"], "Read-only file system");
        assert_eq!(seen["open"], "ok");
        assert_eq!(seen["sys"], "Read-only file system");
        let expected = match propagation {
            "private" => json!([]),
            propagation => json!([propagation]),
        };
        // Elsewhere it is what the host sees of the container's.
        if !runtime.is_sandbox() {
            break;
        }
        assert_eq!(
            seen["mounts"]["/"]["propagation"], expected,
            "{propagation}"
        );
    }
}

fn with_mount(mount: Value) -> BundleBuilder {
    Bundle::busybox(&["/bin/true"]).set("/mounts/-", mount)
}

/// refused: mounts.source root.path
#[test]
fn mounts_that_cannot_be() {
    let runtime = Runtime::new();
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    let missing =
        json!({"destination": "/mnt", "type": "bind", "source": "/no/such", "options": ["bind"]});
    refused(
        with_mount(missing),
        &["/no/such", "no such file or directory"],
    );
    let busybox = || Bundle::busybox(&["/bin/true"]);
    refused(busybox().set("/root/path", "no-such"), &["no-such"]);
}

/// refused: mounts.options mounts.type mounts.source mounts.destination mounts.uidMappings mounts.gidMappings
/// refused: linux.rootfsPropagation linux.maskedPaths linux.readonlyPaths root.path
#[test]
fn mounts_that_a_guest_cannot_have() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they share the kernel of the host"
    );
    let host = HostDirectory::new();
    let directory = host.path("").to_str().unwrap().to_owned();
    let bind = |options: &[&str]| {
        let mut all = vec!["bind"];
        all.extend(options);
        json!({"destination": "/mnt", "type": "bind", "source": directory, "options": all})
    };
    let of = |source: &Path| json!({"destination": "/mnt", "type": "bind", "source": source, "options": ["bind"]});
    let refused = |bundle, words: &[&str]| check_refused(&runtime, bundle, words);
    refused(
        with_mount(bind(&["rshared"])),
        &["mounts[7] (/mnt).options", "shared", "propagate"],
    );
    refused(
        with_mount(bind(&["idmap"])),
        &["mounts[7] (/mnt).options", "idmap"],
    );
    refused(with_mount(bind(&["tmpcopyup"])), &["options", "tmpcopyup"]);
    refused(with_mount(bind(&["size=1m"])), &["options", "size=1m"]);
    refused(
        with_mount(bind(&["src-nofollow"])),
        &["options", "src-nofollow"],
    );
    let mut mapped = bind(&[]);
    mapped["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
    mapped["gidMappings"] = mapped["uidMappings"].clone();
    refused(with_mount(mapped), &["uidMappings"]);
    let unknown = json!({"destination": "/mnt", "type": "nosuchfs", "source": "x"});
    refused(with_mount(unknown), &["mounts[7] (/mnt).type", "nosuchfs"]);
    let ext4 = json!({"destination": "/mnt", "type": "ext4", "source": "/dev/vda"});
    refused(
        with_mount(ext4),
        &["mounts[7] (/mnt).type", "ext4", "bind it"],
    );
    refused(
        with_mount(json!({"destination": "", "type": "tmpfs", "source": "tmpfs"})),
        &["destination"],
    );
    refused(
        with_mount(json!({"destination": "/mnt", "type": "bind", "options": ["bind"]})),
        &["source"],
    );

    let socket = host.path("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    refused(with_mount(of(&socket)), &["source", "socket"]);
    let fifo = host.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    refused(with_mount(of(&fifo)), &["source", "FIFO"]);
    let block = host.path("block");
    let number = rustix::fs::makedev(7, 200);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &block,
        rustix::fs::FileType::BlockDevice,
        0o600.into(),
        number,
    )
    .unwrap();
    refused(with_mount(of(&block)), &["source", "block device"]);

    let busybox = || Bundle::busybox(&["/bin/true"]);
    refused(
        busybox().set("/linux/rootfsPropagation", "sideways"),
        &["linux.rootfsPropagation", "sideways"],
    );
    refused(
        busybox().set("/linux/maskedPaths/-", "relative"),
        &["linux.maskedPaths", "relative"],
    );
    refused(
        busybox().set("/linux/readonlyPaths/-", "relative"),
        &["linux.readonlyPaths", "relative"],
    );
    refused(busybox().set("/root/path", ""), &["root.path"]);
}

/// ignored: mounts.options mounts.source
#[test]
fn mounts_of_the_host_that_mean_the_guest_s() {
    let runtime = Runtime::new();
    skip_on!(
        runtime,
        ["runc", "crun"],
        "they share the kernel of the host"
    );
    let host = HostDirectory::new();
    let bundle = Bundle::script("cat /sys/kernel/osrelease 2>/dev/null; uname -r; grep ' /sys ' /proc/self/mountinfo | wc -l")
        .bind(&host.path(""), "/mnt", &["rslave"])
        .bind(Path::new("/sys"), "/sys", &["rbind"])
        .build();
    let outcome = runtime.run(&bundle);
    outcome.ok();
    assert!(outcome.stderr.contains("slave"), "{outcome:?}");
    assert!(outcome.stderr.contains("the guest's own"), "{outcome:?}");
}
