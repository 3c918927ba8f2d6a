// SPDX-License-Identifier: Apache-2.0
//! `template`: looks after the booted guests that containers start from. They come and go by themselves; this is for
//! those who want the first container to be quick, or the disk to be empty.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use rustix::event::PollFlags;
use vmm::{Machine, MachineEvent, VmConfig};

use super::create::HostFiles;
use super::{Error, print};
use crate::channel;
use crate::cli::{TableFormat, Template, TemplateCreate, TemplateRemove};
use crate::monitor::order::Deadlines;
use crate::plan::{self, HostFacts, VmShape};
use crate::templates;

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error(
        "templates are off ({}=off, or not root and it names no directory)",
        templates::VARIABLE
    )]
    Off,
    #[error("template directory {path}: must be owned by the user and closed to others", path = .0.display())]
    Directory(PathBuf, #[source] io::Error),
    #[error("template {0:?} does not exist")]
    Missing(String),
    #[error("template: the guest")]
    Machine(#[source] vmm::Error),
    #[error("template: the guest did not come up")]
    Boot(#[source] channel::Error),
    #[error("template: the guest stopped: {0}")]
    Stopped(String),
    #[error("template: {0}")]
    Save(String),
}

pub fn run(arguments: &Template) -> Result<u8, Error> {
    let path = templates::path().ok_or(TemplateError::Off)?;
    let files = HostFiles::open()?;
    let fail = |error| TemplateError::Directory(path.clone(), error);
    match arguments {
        Template::Create(arguments) => create(path, files, arguments)?,
        Template::List(arguments) => {
            let entries = templates::list(&path, &files.kernel, &files.initramfs).map_err(fail)?;
            print(&match arguments.format {
                TableFormat::Json => super::json(&entries)?,
                TableFormat::Table => table(&entries),
            })?;
        }
        Template::Remove(TemplateRemove { all, names }) => {
            let mut names = names.clone();
            if *all {
                let entries =
                    templates::list(&path, &files.kernel, &files.initramfs).map_err(fail)?;
                names = entries.into_iter().map(|entry| entry.name).collect();
            }
            if let Some(name) = templates::remove(&path, &names).map_err(fail)? {
                return Err(TemplateError::Missing(name.to_owned()).into());
            }
        }
        Template::Prune => {
            templates::prune(&path, &files.kernel, &files.initramfs).map_err(fail)?;
        }
    }
    Ok(0)
}

fn table(entries: &[templates::Entry]) -> String {
    let row = |name: &str, vcpus: &str, memory: &str, size: &str, usable: &str| {
        format!("{name:<64} {vcpus:>5} {memory:>10} {size:>8} {usable}\n")
    };
    let mut text = row("NAME", "VCPUS", "MEMORY_MIB", "SIZE_MIB", "USABLE");
    for entry in entries {
        text.push_str(&row(
            &entry.name,
            &entry.vcpus.to_string(),
            &entry.memory_mib.to_string(),
            &(entry.size >> 20).to_string(),
            if entry.usable { "yes" } else { "no" },
        ));
    }
    text
}

/// Boots a guest with nothing of the host in it, and saves it. One that is there already stays.
fn create(path: PathBuf, files: HostFiles, arguments: &TemplateCreate) -> Result<(), Error> {
    let usual = plan::default_shape(&HostFacts::of_machine());
    let shape = VmShape {
        vcpus: arguments.vcpus.unwrap_or(usual.vcpus),
        memory_mib: arguments.memory.unwrap_or(usual.memory_mib),
    };
    let template = templates::Template::find_in(&path, &shape, &files.kernel, &files.initramfs)
        .map_err(|error| TemplateError::Directory(path.clone(), error))?;
    if template.open().is_some() {
        return Ok(());
    }
    let draft = template
        .draft()
        .map_err(|error| TemplateError::Directory(path.clone(), error))?;
    let save = |error: io::Error| TemplateError::Save(error.to_string());
    let mut machine = Machine::new(VmConfig {
        kvm: files.kvm,
        kernel: files.kernel,
        initramfs: files.initramfs,
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        command_line: Vec::new(),
    })
    .map_err(TemplateError::Machine)?;
    machine.save_when_ready(draft.files().map_err(save)?);
    machine.start().map_err(TemplateError::Machine)?;
    machine.resume();
    wait_until_saved(&mut machine)?;
    draft.publish().map_err(save)?;
    Ok(())
}

fn wait_until_saved(machine: &mut Machine) -> Result<(), TemplateError> {
    let deadline = Some(Instant::now() + Deadlines::from_environment().boot);
    loop {
        let due = machine.deadline();
        match channel::wait(machine.as_fd(), PollFlags::IN, due.or(deadline)) {
            Err(channel::Error::TimedOut) if due.is_some() => {}
            waited => waited.map_err(TemplateError::Boot)?,
        }
        for event in machine.dispatch().map_err(TemplateError::Machine)? {
            match event {
                MachineEvent::Saved(result) => return result.map_err(TemplateError::Save),
                MachineEvent::Stopped(reason) => {
                    return Err(TemplateError::Stopped(format!("{reason:?}")));
                }
                MachineEvent::StreamClosed { .. } => {}
            }
        }
    }
}
