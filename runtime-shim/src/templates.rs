// SPDX-License-Identifier: Apache-2.0
//! Templates: a booted guest without a container, saved once and restored for each container of the same shape.
//!
//! They lie in a directory that only its owner can enter; what is foreign, linked elsewhere or open to others is not used.
//! A name says what a template was made from and in which boot of the host, so that another kernel, another build or
//! another CPU never sees it; those of earlier boots are removed when a new one is made.

use std::fs::{self, DirBuilder, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, flock, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use serde::Serialize;
use vmm::SnapshotFiles;

use crate::identity;
use crate::plan::VmShape;

/// Names another directory, or `off`.
pub const VARIABLE: &str = "SANDBOX_TEMPLATES";

/// How names of drafts begin.
const DRAFT: &str = "draft-";

/// How names of files end: the working set is optional.
const KINDS: [&str; 3] = ["state", "memory", WORKING_SET];
const WORKING_SET: &str = "pages";
/// The most bytes of a working set, which is a list of ranges.
const MAX_WORKING_SET: u64 = 1 << 18;

const DIRECTORY: &str = "/var/cache/sandbox/templates";

/// The directory and the name of one template.
#[derive(Debug)]
pub struct Template {
    directory: OwnedFd,
    boot: String,
    name: String,
}

/// A template as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    pub name: String,
    pub vcpus: u8,
    pub memory_mib: u64,
    /// Bytes on disk.
    pub size: u64,
    /// Whether a container can start from it: made in this boot, of this program and these guest files.
    pub usable: bool,
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

/// Where templates are kept. None: they are off.
pub fn path() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE) {
        Some(value) if value == "off" => None,
        Some(path) => Some(PathBuf::from(path)),
        None if rustix::process::geteuid().is_root() => Some(PathBuf::from(DIRECTORY)),
        None => None,
    }
}

/// The start of the names of all templates that can be used in this boot of the host with these guest files: the boot,
/// and what they were made from.
fn usable(kernel: &File, initramfs: &File) -> io::Result<(String, String)> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let mut hasher = DefaultHasher::new();
    for file in [kernel, initramfs, &File::open("/proc/self/exe")?] {
        let metadata = file.metadata()?;
        (metadata.dev(), metadata.ino(), metadata.len()).hash(&mut hasher);
        (metadata.mtime(), metadata.mtime_nsec()).hash(&mut hasher);
    }
    let boot: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
    let prefix = format!("{boot}-{:016x}", hasher.finish());
    Ok((boot, prefix))
}

/// All templates.
pub fn list(path: &Path, kernel: &File, initramfs: &File) -> io::Result<Vec<Entry>> {
    let directory = open_directory(path)?;
    let (_, prefix) = usable(kernel, initramfs)?;
    let mut entries = Vec::new();
    for name in names(&directory)? {
        let Some(name) = name.strip_suffix(".memory") else {
            continue;
        };
        let Some((made_from, vcpus, memory_mib)) = parse(name) else {
            continue;
        };
        let template = Template {
            directory: directory.try_clone()?,
            boot: String::new(),
            name: name.to_owned(),
        };
        let metadata = rustix::fs::statat(
            &directory,
            format!("{name}.memory"),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        entries.push(Entry {
            name: name.to_owned(),
            vcpus,
            memory_mib,
            size: u64::try_from(metadata.st_blocks).unwrap_or(0) * 512,
            usable: made_from == prefix && template.open().is_some(),
        });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Removes the templates of these names, and returns the first name that there was no template of.
pub fn remove<'a>(path: &Path, names: &'a [String]) -> io::Result<Option<&'a str>> {
    let directory = open_directory(path)?;
    for name in names {
        if parse(name).is_none() {
            return Ok(Some(name));
        }
        let mut found = false;
        for kind in KINDS {
            match unlinkat(&directory, format!("{name}.{kind}"), AtFlags::empty()) {
                Ok(()) => found = true,
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !found {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Removes whatever is not part of a usable template, drafts of processes that are gone among it.
pub fn prune(path: &Path, kernel: &File, initramfs: &File) -> io::Result<()> {
    let keep: Vec<String> = list(path, kernel, initramfs)?
        .into_iter()
        .filter(|entry| entry.usable)
        .map(|entry| entry.name)
        .collect();
    let directory = open_directory(path)?;
    for file in names(&directory)? {
        let name = file.rsplit_once('.').map_or(&*file, |(name, _)| name);
        let is_draft = name.strip_prefix(DRAFT).is_some_and(|draft| {
            let process = draft.rsplit('-').next().unwrap_or_default();
            fs::exists(format!("/proc/{process}")).unwrap_or(true)
        });
        if !is_draft && !keep.iter().any(|keep| keep == name) {
            unlinkat(&directory, file.as_str(), AtFlags::empty())?;
        }
    }
    Ok(())
}

/// What a template was made from, and its shape.
fn parse(name: &str) -> Option<(&str, u8, u64)> {
    let (rest, memory_mib) = name.rsplit_once('-')?;
    let (made_from, vcpus) = rest.rsplit_once('-')?;
    let plain = name.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    let shape = (vcpus.parse().ok()?, memory_mib.parse().ok()?);
    plain.then_some((made_from, shape.0, shape.1))
}

/// Names of the files in the directory.
fn names(directory: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        if entry.file_type() != FileType::Directory
            && let Ok(name) = entry.file_name().to_str()
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

impl Template {
    /// The template for a shape. None: templates are off, or there is no directory that can be trusted.
    pub fn find(shape: &VmShape, kernel: &File, initramfs: &File) -> Option<Template> {
        let path = path()?;
        Template::find_in(&path, shape, kernel, initramfs)
            .inspect_err(|error| log::debug!("templates: {}: {error}", path.display()))
            .ok()
    }

    /// The same in a directory that has to be fit for it.
    pub fn find_in(
        path: &Path,
        shape: &VmShape,
        kernel: &File,
        initramfs: &File,
    ) -> io::Result<Template> {
        let directory = open_directory(path)?;
        let (boot, prefix) = usable(kernel, initramfs)?;
        let name = format!("{prefix}-{}-{}", shape.vcpus, shape.memory_mib);
        Ok(Template {
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

    /// What [`vmm::Machine::working_set`] has written of a machine from this template; empty if there is nothing.
    pub fn working_set(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Ok(file) = self.open_file(WORKING_SET) {
            let _ = file.take(MAX_WORKING_SET).read_to_end(&mut bytes);
        }
        bytes
    }

    /// The file for a working set, for the first that asks. None: another machine is about to fill it, or has.
    pub fn working_set_to_fill(&self) -> Option<File> {
        let flags = OFlags::RDWR | OFlags::CREATE;
        let file = self.open_with(WORKING_SET, flags).ok()?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        (file.metadata().ok()?.len() == 0).then_some(file)
    }

    fn open_file(&self, kind: &str) -> io::Result<File> {
        self.open_with(kind, OFlags::RDONLY)
    }

    fn open_with(&self, kind: &str, flags: OFlags) -> io::Result<File> {
        let name = format!("{}.{kind}", self.name);
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(openat(&self.directory, name, flags, mode)?);
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
        for kind in KINDS {
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
fn open_directory(path: &Path) -> io::Result<OwnedFd> {
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

    fn template(path: &Path, name: &str) -> Template {
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
