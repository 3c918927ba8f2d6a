// SPDX-License-Identifier: Apache-2.0
//! The fuzzer of libFuzzer for all parsers of bytes that are not ours. The variable FUZZ_TARGET names the one to drive;
//! `run.sh` builds and starts it.
#![no_main]

mod bundle;
mod frames;

use std::sync::LazyLock;

type Target = fn(&[u8]);

/// Names as in `run.sh`.
const TARGETS: [(&str, Target); 14] = [
    ("registers", vmm::fuzzing::registers),
    ("descriptor-chains", vmm::fuzzing::descriptor_chains),
    ("rng", vmm::fuzzing::rng),
    ("balloon", vmm::fuzzing::balloon),
    ("vsock", vmm::fuzzing::vsock),
    ("fs-device", vmm::fuzzing::file_system_device),
    ("fs-requests", vmm::fuzzing::file_system_requests),
    ("uart", vmm::fuzzing::uart),
    ("ioapic", vmm::fuzzing::ioapic),
    ("snapshot", vmm::fuzzing::snapshot),
    ("agent-frames", frames::from_agent),
    ("monitor-frames", frames::to_agent),
    ("config", bundle::config),
    ("process", bundle::process),
];

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    found
        .unwrap_or_else(|| panic!("FUZZ_TARGET={name}: no such target"))
        .1
});

libfuzzer_sys::fuzz_target!(
    init: set_up(),
    |data: &[u8]| TARGET(data)
);

fn set_up() {
    // What the start of a Rust program does, and what the threads of the file system device do: a broken pipe and a
    // file that grows too large are errors of a write.
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // Files that a target makes in memory stay small. Profiles of coverage have to fit.
    let limit = libc::rlimit {
        rlim_cur: 16 << 20,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a whole structure, alive during the call. Without privileges it may fail, and nothing is lost.
    unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
}
