// SPDX-License-Identifier: Apache-2.0
//! Templates: a booted guest without a container, saved once and restored for each container of the same shape.
//!
//! They lie in a directory that only its owner can enter; what is foreign, linked elsewhere or open to others is not used.
//! A name says what a template was made from and in which boot of the host, so that another kernel, another build or
//! another CPU never sees it; those of earlier boots are removed when a new one is made.

use std::fs::{self, DirBuilder, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use vmm::SnapshotFiles;

use crate::identity;
use crate::plan::VmShape;

/// Names another directory, or `off`.
pub const VARIABLE: &str = "SANDBOX_TEMPLATES";

/// How names of drafts begin.
const DRAFT: &str = "draft-";

const DIRECTORY: &str = "/var/cache/sandbox/templates";

/// The directory and the name of one template.
#[derive(Debug)]
pub struct Template {
    directory: OwnedFd,
    boot: String,
    name: String,
}

/// The files of a template that is being made, under names that nobody looks for. Removed on drop.
#[derive(Debug)]
pub struct Draft {
    template: Template,
    /// Of memory and state.
    names: [String; 2],
    state: File,
    memory: File,
}

impl Template {
    /// The template for a shape. None: templates are off, or there is no directory that can be trusted.
    pub fn find(shape: &VmShape, kernel: &File, initramfs: &File) -> Option<Template> {
        let path = match std::env::var_os(VARIABLE) {
            Some(value) if value == "off" => return None,
            Some(path) => PathBuf::from(path),
            None if rustix::process::geteuid().is_root() => PathBuf::from(DIRECTORY),
            None => return None,
        };
        let directory = open_directory(&path)
            .inspect_err(|error| log::debug!("templates: {}: {error}", path.display()))
            .ok()?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let mut hasher = DefaultHasher::new();
        for file in [kernel, initramfs, &File::open("/proc/self/exe").ok()?] {
            let metadata = file.metadata().ok()?;
            (metadata.dev(), metadata.ino(), metadata.len()).hash(&mut hasher);
            (metadata.mtime(), metadata.mtime_nsec()).hash(&mut hasher);
        }
        let boot: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
        let name = format!(
            "{boot}-{:016x}-{}-{}",
            hasher.finish(),
            shape.vcpus,
            shape.memory_mib
        );
        Some(Template {
            directory,
            boot,
            name,
        })
    }

    /// The files, if the template has been made.
    pub fn open(&self) -> Option<SnapshotFiles> {
        let state = self.open_file("state").ok()?;
        let memory = self.open_file("memory").ok()?;
        Some(SnapshotFiles { state, memory })
    }

    fn open_file(&self, kind: &str) -> io::Result<File> {
        let name = format!("{}.{kind}", self.name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(openat(&self.directory, name, flags, Mode::empty())?);
        let metadata = file.metadata()?;
        let own = metadata.uid() == rustix::process::geteuid().as_raw();
        let private = metadata.is_file() && metadata.mode() & 0o077 == 0 && metadata.nlink() == 1;
        match own && private {
            true => Ok(file),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Removes a template that cannot be restored.
    pub fn remove(&self) {
        for kind in ["state", "memory"] {
            let _ = unlinkat(
                &self.directory,
                format!("{}.{kind}", self.name),
                AtFlags::empty(),
            );
        }
    }

    /// Begins to make the template.
    pub fn draft(self) -> io::Result<Draft> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let process = identity::pid_on_host()?;
        let [state, memory] = ["state", "memory"].map(|kind| {
            let name = format!("{DRAFT}{}-{process}.{kind}", self.name);
            openat(&self.directory, &name, flags, mode).map(|file| (name, File::from(file)))
        });
        let (draft_state, state) = state?;
        let (draft_memory, memory) = memory?;
        Ok(Draft {
            template: self,
            names: [draft_memory, draft_state],
            state,
            memory,
        })
    }
}

impl Draft {
    /// What the machine is to fill.
    pub fn files(&self) -> io::Result<SnapshotFiles> {
        Ok(SnapshotFiles {
            state: self.state.try_clone()?,
            memory: self.memory.try_clone()?,
        })
    }

    /// Gives the files their names: the template is there from now on. Another start may have been quicker; then this
    /// one takes its place, which does no harm to whoever has it mapped.
    pub fn publish(self) -> io::Result<()> {
        let Template {
            directory,
            boot,
            name,
        } = &self.template;
        // A state and a memory that do not belong together know it; the state comes last all the same.
        for (from, kind) in self.names.iter().zip(["memory", "state"]) {
            renameat(directory, from, directory, format!("{name}.{kind}"))?;
        }
        remove_other_boots(directory, boot)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        for name in &self.names {
            // Renamed, if all went well.
            let _ = unlinkat(&self.template.directory, name, AtFlags::empty());
        }
    }
}

/// The directory, made if it is missing, owned by this user and closed to others.
fn open_directory(path: &std::path::Path) -> io::Result<OwnedFd> {
    if !path.exists() {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = directory.metadata()?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if !own || metadata.permissions().mode() & 0o077 != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(directory.into())
}

fn remove_other_boots(directory: &OwnedFd, boot: &str) -> io::Result<()> {
    // From where the shared position is, which nobody else moves: the jail allows nothing to be opened.
    for entry in rustix::fs::Dir::new(directory.try_clone()?)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        let of_boot = name.strip_prefix(DRAFT).unwrap_or(&name);
        if name.contains('-') && !of_boot.starts_with(boot) {
            let _ = unlinkat(directory, entry.file_name(), AtFlags::empty());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn template(path: &std::path::Path, name: &str) -> Template {
        Template {
            directory: open_directory(path).unwrap(),
            boot: "b0".into(),
            name: name.into(),
        }
    }

    #[test]
    fn a_published_template_is_found_and_others_boots_go() {
        let path = std::env::temp_dir().join(format!("templates-{}", std::process::id()));
        let stale = template(&path, "a0-1").draft().unwrap();
        stale.publish().unwrap();
        fs::write(path.join("a0-2.state"), "").unwrap();
        assert!(template(&path, "b0-1").open().is_none());
        let mut draft = template(&path, "b0-1").draft().unwrap();
        draft.state.write_all(b"state").unwrap();
        draft.publish().unwrap();
        assert!(template(&path, "b0-1").open().is_some());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
        template(&path, "b0-1").draft().unwrap().publish().unwrap();
        let state = path.join("b0-1.state");
        fs::set_permissions(&state, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(template(&path, "b0-1").open().is_none(), "open to others");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(open_directory(&path).is_err());
        fs::remove_dir_all(&path).unwrap();
    }
}
