// SPDX-License-Identifier: Apache-2.0
//! Boots a kernel and an initramfs with no container around them: for device work, and to tell whether it is the VM
//! or the container that fails. `vmm CONFIG.json`; the guest's console goes to standard output; exit status 0 when
//! the guest reset itself.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use vmm::{Machine, MachineEvent, StopReason, VmConfig};

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    kernel: PathBuf,
    initramfs: PathBuf,
    #[serde(default = "one")]
    vcpus: u8,
    #[serde(default = "default_memory")]
    memory_mib: u64,
    #[serde(default)]
    command_line: Vec<String>,
}

fn one() -> u8 {
    1
}

fn default_memory() -> u64 {
    256
}

fn main() -> ExitCode {
    match boot() {
        Ok(StopReason::Reset) => ExitCode::SUCCESS,
        Ok(StopReason::Failed(reason)) => {
            eprintln!("vmm: {reason}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprint!("vmm: {error}");
            let mut source = error.source();
            while let Some(error) = source {
                eprint!(": {error}");
                source = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn boot() -> Result<StopReason, Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: vmm CONFIG.json")?;
    let config: Config = serde_json::from_slice(&fs::read(path)?)?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let mut machine = Machine::new(VmConfig {
        kvm,
        kernel: File::open(config.kernel)?,
        initramfs: File::open(config.initramfs)?,
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        command_line: config.command_line,
    })?;
    let stdout: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned()?;
    machine.echo_console(File::from(stdout));
    machine.start()?;
    machine.resume();
    loop {
        poll(&mut [PollFd::new(&machine, PollFlags::IN)], None)?;
        for event in machine.dispatch()? {
            if let MachineEvent::Stopped(reason) = event {
                return Ok(reason);
            }
        }
    }
}
