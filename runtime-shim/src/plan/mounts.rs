// SPDX-License-Identifier: Apache-2.0
//! `mounts`: what is the host's becomes a share of it, the rest is mounted in the guest.

use std::path::Path;

use agent_protocol::{Mount, MountSource};
use oci_spec::runtime as oci;

use super::{
    MountPoint, PlanError, Share, ShareKind, SourceKind, Warnings, devices, invalid, unsupported,
};

/// Each is a mount on the host and one in the guest.
const MAX_MOUNTS: usize = 1024;

/// File systems that the guest kernel has and that have no source on the host.
const GUEST_FILE_SYSTEMS: [&str; 14] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "hugetlbfs",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "fusectl",
    "configfs",
    "binfmt_misc",
];

/// Directories of the kernel itself: the guest's own are meant in a guest.
const KERNEL_DIRECTORIES: [&str; 6] = [
    "/proc",
    "/sys",
    "/sys/fs/cgroup",
    "/dev",
    "/dev/pts",
    "/dev/mqueue",
];

const PROPAGATION: u64 = libc::MS_SHARED | libc::MS_SLAVE | libc::MS_PRIVATE | libc::MS_UNBINDABLE;

/// What the mounts come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    pub guest: Vec<Mount>,
    pub shares: Vec<Share>,
    pub mount_points: Vec<MountPoint>,
    /// The container brings a `/dev` of its own.
    pub own_dev: bool,
}

pub fn is_bind(mount: &oci::Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "bind" || option == "rbind")
}

/// `sources` has an entry for each mount.
pub fn mounts(
    mounts: &[oci::Mount],
    sources: &[Option<SourceKind>],
    bundle: &Path,
    warnings: &mut Warnings,
) -> Result<Mounts, PlanError> {
    if mounts.len() > MAX_MOUNTS {
        return Err(invalid("mounts", format!("more than {MAX_MOUNTS}")));
    }
    let mut plan = Mounts::default();
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("mounts[{index}]");
        let source = Source {
            kind: sources.get(index).copied().flatten(),
            bundle,
            share_name: format!("m{}", plan.shares.len()),
        };
        let (guest, share) = one(&field, mount, &source, warnings)?;
        let kind = share.as_ref().map_or_else(
            || match source.kind {
                None | Some(SourceKind::Directory) => ShareKind::Directory,
                Some(_) => ShareKind::File,
            },
            |share| share.kind,
        );
        // Below another mount the guest makes it there.
        let below = plan
            .guest
            .iter()
            .any(|earlier| is_below(&guest.destination, &earlier.destination));
        if !below && guest.destination != "/" {
            // What the kernel gives a tmpfs that nothing is known of.
            let mode = if guest.kind == "tmpfs" { 0o1777 } else { 0o755 };
            plan.mount_points.push(MountPoint {
                path: guest.destination.clone(),
                kind,
                mode,
            });
        }
        plan.own_dev |= guest.destination == "/dev"
            && matches!(
                guest.source,
                MountSource::Share { .. } | MountSource::Guest { .. }
            );
        plan.guest.push(guest);
        plan.shares.extend(share);
    }
    Ok(plan)
}

fn is_below(path: &str, ancestor: &str) -> bool {
    path.strip_prefix(ancestor)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || ancestor == "/")
}

/// What a mount's source is on the host, and the name it is to be shared under.
#[derive(Debug)]
pub struct Source<'a> {
    /// None: not a bind mount.
    pub kind: Option<SourceKind>,
    /// A relative source starts here.
    pub bundle: &'a Path,
    pub share_name: String,
}

/// One mount, with the share it needs. Also for mounts that are added to a running container.
pub fn one(
    field: &str,
    mount: &oci::Mount,
    source: &Source,
    warnings: &mut Warnings,
) -> Result<(Mount, Option<Share>), PlanError> {
    let destination = destination(field, mount.destination())?;
    let field = format!("{field} ({destination})");
    let options = options(&field, mount)?;
    let kind = mount.typ().clone().unwrap_or_default();
    if !mappings_empty(mount) {
        return Err(unsupported(
            format!("{field}.uidMappings"),
            "shared files cannot be mounted with mapped ids",
        ));
    }
    let mut guest = Mount {
        destination,
        source: MountSource::Cgroup,
        kind: String::new(),
        flags: options.flags,
        propagation: options.propagation.clone(),
        recursive_set: options.recursive_set,
        recursive_clear: options.recursive_clear,
        data: options.data.join(","),
        copy_up: options.copy_up,
        uid_mappings: Vec::new(),
        gid_mappings: Vec::new(),
    };
    if is_bind(mount) {
        guest.flags &= !(libc::MS_BIND | libc::MS_REC);
        let (from, share) = bind(&field, mount, source, &options, warnings)?;
        guest.source = from;
        return Ok((guest, share));
    }
    if options.copy_up && kind != "tmpfs" {
        return Err(invalid(
            format!("{field}.options"),
            "tmpcopyup is for tmpfs only",
        ));
    }
    match kind.as_str() {
        "cgroup" | "cgroup2" => {
            // Options of v1 hierarchies; the guest has v2.
            guest.data.clear();
        }
        "" => return Err(invalid(format!("{field}.type"), "is missing")),
        kind if GUEST_FILE_SYSTEMS.contains(&kind) => {
            let source = mount.source().as_ref().map_or_else(
                || kind.to_owned(),
                |source| source.to_string_lossy().into_owned(),
            );
            guest.source = MountSource::Kernel(source);
            guest.kind = kind.to_owned();
        }
        kind => {
            return Err(unsupported(
                format!("{field}.type"),
                format!(
                    "{kind} of the host cannot be mounted in a guest, mount it on the host and bind it"
                ),
            ));
        }
    }
    Ok((guest, None))
}

fn bind(
    field: &str,
    mount: &oci::Mount,
    source: &Source,
    options: &Options,
    warnings: &mut Warnings,
) -> Result<(MountSource, Option<Share>), PlanError> {
    let given = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| invalid(format!("{field}.source"), "is missing"))?;
    let path = source.bundle.join(given);
    if options.copy_up {
        return Err(invalid(
            format!("{field}.options"),
            "tmpcopyup is for tmpfs only",
        ));
    }
    if let Some(option) = options.data.first() {
        return Err(invalid(
            format!("{field}.options"),
            format!("a bind mount cannot have the file system option {option:?}"),
        ));
    }
    propagation_of_bind(field, options, warnings)?;
    let recursive = options.flags & libc::MS_REC != 0;
    if path == mount.destination().as_path()
        && let Some(kernel) = KERNEL_DIRECTORIES
            .iter()
            .find(|kernel| path == Path::new(kernel))
    {
        warnings.ignored(
            format!("{field}.source"),
            "the guest's own is mounted instead of the host's",
        );
        let path = (*kernel).to_owned();
        return Ok((MountSource::Guest { path, recursive }, None));
    }
    let kind = match of_guest_or_share(&format!("{field}.source"), &path, source.kind)? {
        Bindable::Guest(path) => {
            let path = path.to_owned();
            return Ok((
                MountSource::Guest {
                    path,
                    recursive: false,
                },
                None,
            ));
        }
        Bindable::Share(kind) => kind,
    };
    let share = Share {
        name: source.share_name.clone(),
        source: path,
        kind,
        readonly: options.flags & libc::MS_RDONLY != 0 || options.recursive_set & ATTR_RDONLY != 0,
        recursive,
    };
    let from = MountSource::Share {
        path: share.name.clone(),
        recursive,
    };
    Ok((from, Some(share)))
}

enum Bindable {
    /// The guest has the same at this path.
    Guest(&'static str),
    Share(ShareKind),
}

fn of_guest_or_share(
    field: &str,
    path: &Path,
    kind: Option<SourceKind>,
) -> Result<Bindable, PlanError> {
    let reason = match kind {
        Some(SourceKind::Directory) => return Ok(Bindable::Share(ShareKind::Directory)),
        Some(SourceKind::File) => return Ok(Bindable::Share(ShareKind::File)),
        Some(SourceKind::CharacterDevice { major, minor }) => {
            match devices::guest_path(major, minor) {
                Some(path) => return Ok(Bindable::Guest(path)),
                None => "a character device of the host cannot be given to a guest",
            }
        }
        Some(SourceKind::BlockDevice) => "a block device of the host cannot be given to a guest",
        Some(SourceKind::Socket) => "a Unix socket does not connect a guest with the host",
        Some(SourceKind::Fifo) => "a FIFO does not connect a guest with the host",
        Some(SourceKind::Unreadable) => {
            return Err(invalid(
                field,
                format!("{}: cannot be looked at", path.display()),
            ));
        }
        // podman and dockerd look for these words.
        Some(SourceKind::Missing) | None => {
            return Err(invalid(
                field,
                format!("{}: no such file or directory", path.display()),
            ));
        }
    };
    Err(unsupported(field, format!("{}: {reason}", path.display())))
}

/// Mounts made later on one side do not appear on the other.
fn propagation_of_bind(
    field: &str,
    options: &Options,
    warnings: &mut Warnings,
) -> Result<(), PlanError> {
    for flags in &options.propagation {
        if flags & libc::MS_SHARED != 0 {
            return Err(unsupported(
                format!("{field}.options"),
                "shared: mounts do not propagate between a guest and the host",
            ));
        }
        if flags & libc::MS_SLAVE != 0 {
            warnings.ignored(
                format!("{field}.options"),
                "slave: later mounts of the host do not appear in the guest",
            );
        }
    }
    Ok(())
}

fn mappings_empty(mount: &oci::Mount) -> bool {
    [mount.uid_mappings(), mount.gid_mappings()]
        .into_iter()
        .flatten()
        .all(Vec::is_empty)
}

/// Absolute and normal: what `..` leads to is for the agent to find out, inside the root.
fn destination(field: &str, path: &Path) -> Result<String, PlanError> {
    let text = path
        .to_str()
        .ok_or_else(|| invalid(format!("{field}.destination"), "is not UTF-8"))?;
    if text.is_empty() {
        return Err(invalid(format!("{field}.destination"), "is missing"));
    }
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            // Lexically, as runc: it cannot lead out of the root.
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    // A relative destination is one below the root, which the specification still allows.
    Ok(format!("/{}", parts.join("/")))
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: u64,
    propagation: Vec<u64>,
    recursive_set: u64,
    recursive_clear: u64,
    data: Vec<String>,
    copy_up: bool,
}

enum Action {
    Set(u64),
    Clear(u64),
    Propagation(u64),
    /// mount_setattr(2) attributes to set, and to clear first.
    Recursive(u64, u64),
    CopyUp,
    Nothing,
    Refused(&'static str),
}

fn options(field: &str, mount: &oci::Mount) -> Result<Options, PlanError> {
    let mut options = Options::default();
    for option in mount.options().iter().flatten() {
        match action(option) {
            Some(Action::Set(flags)) => options.flags |= flags,
            Some(Action::Clear(flags)) => options.flags &= !flags,
            Some(Action::Propagation(flags)) => options.propagation.push(flags),
            Some(Action::Recursive(set, clear)) => {
                options.recursive_set = options.recursive_set & !clear | set;
                options.recursive_clear = options.recursive_clear & !set | clear;
            }
            Some(Action::CopyUp) => options.copy_up = true,
            Some(Action::Nothing) => {}
            Some(Action::Refused(why)) => {
                return Err(unsupported(
                    format!("{field}.options"),
                    format!("{option}: {why}"),
                ));
            }
            None => options.data.push(option.clone()),
        }
    }
    Ok(options)
}

/// MOUNT_ATTR_*, linux/mount.h.
const ATTR_RDONLY: u64 = 0x01;
const ATTR_NOSUID: u64 = 0x02;
const ATTR_NODEV: u64 = 0x04;
const ATTR_NOEXEC: u64 = 0x08;
const ATTR_ATIME: u64 = 0x70;
const ATTR_RELATIME: u64 = 0x00;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// None: an option of the file system.
fn action(option: &str) -> Option<Action> {
    use Action::{Clear, Propagation, Recursive, Set};
    Some(match option {
        "defaults" => Action::Nothing,
        "async" => Clear(libc::MS_SYNCHRONOUS),
        "atime" => Clear(libc::MS_NOATIME),
        "bind" => Set(libc::MS_BIND),
        "dev" => Clear(libc::MS_NODEV),
        "diratime" => Clear(libc::MS_NODIRATIME),
        "dirsync" => Set(libc::MS_DIRSYNC),
        "exec" => Clear(libc::MS_NOEXEC),
        "iversion" => Set(libc::MS_I_VERSION),
        "lazytime" => Set(libc::MS_LAZYTIME),
        "loud" => Clear(libc::MS_SILENT),
        "mand" => Set(libc::MS_MANDLOCK),
        "noatime" => Set(libc::MS_NOATIME),
        "nodev" => Set(libc::MS_NODEV),
        "nodiratime" => Set(libc::MS_NODIRATIME),
        "noexec" => Set(libc::MS_NOEXEC),
        "noiversion" => Clear(libc::MS_I_VERSION),
        "nolazytime" => Clear(libc::MS_LAZYTIME),
        "nomand" => Clear(libc::MS_MANDLOCK),
        "norelatime" => Clear(libc::MS_RELATIME),
        "nostrictatime" => Clear(libc::MS_STRICTATIME),
        "nosuid" => Set(libc::MS_NOSUID),
        "nosymfollow" => Set(libc::MS_NOSYMFOLLOW),
        "rbind" => Set(libc::MS_BIND | libc::MS_REC),
        "relatime" => Set(libc::MS_RELATIME),
        "remount" => Set(libc::MS_REMOUNT),
        "ro" => Set(libc::MS_RDONLY),
        "rw" => Clear(libc::MS_RDONLY),
        "silent" => Set(libc::MS_SILENT),
        "strictatime" => Set(libc::MS_STRICTATIME),
        "suid" => Clear(libc::MS_NOSUID),
        "symfollow" => Clear(libc::MS_NOSYMFOLLOW),
        "sync" => Set(libc::MS_SYNCHRONOUS),
        "private" => Propagation(libc::MS_PRIVATE),
        "rprivate" => Propagation(libc::MS_PRIVATE | libc::MS_REC),
        "shared" => Propagation(libc::MS_SHARED),
        "rshared" => Propagation(libc::MS_SHARED | libc::MS_REC),
        "slave" => Propagation(libc::MS_SLAVE),
        "rslave" => Propagation(libc::MS_SLAVE | libc::MS_REC),
        "unbindable" => Propagation(libc::MS_UNBINDABLE),
        "runbindable" => Propagation(libc::MS_UNBINDABLE | libc::MS_REC),
        "rro" => Recursive(ATTR_RDONLY, 0),
        "rrw" => Recursive(0, ATTR_RDONLY),
        "rnosuid" => Recursive(ATTR_NOSUID, 0),
        "rsuid" => Recursive(0, ATTR_NOSUID),
        "rnodev" => Recursive(ATTR_NODEV, 0),
        "rdev" => Recursive(0, ATTR_NODEV),
        "rnoexec" => Recursive(ATTR_NOEXEC, 0),
        "rexec" => Recursive(0, ATTR_NOEXEC),
        "rnodiratime" => Recursive(ATTR_NODIRATIME, 0),
        "rdiratime" => Recursive(0, ATTR_NODIRATIME),
        // The access time attributes are one field of values, not of bits: it is cleared as a whole.
        "rrelatime" | "rnostrictatime" | "ratime" => Recursive(ATTR_RELATIME, ATTR_ATIME),
        "rnorelatime" | "rstrictatime" => Recursive(ATTR_STRICTATIME, ATTR_ATIME),
        "rnoatime" => Recursive(ATTR_NOATIME, ATTR_ATIME),
        "rnosymfollow" => Recursive(ATTR_NOSYMFOLLOW, 0),
        "rsymfollow" => Recursive(0, ATTR_NOSYMFOLLOW),
        "tmpcopyup" => Action::CopyUp,
        "idmap" | "ridmap" => Action::Refused("shared files cannot be mounted with mapped ids"),
        "copy-symlink" | "src-nofollow" | "dest-nofollow" => {
            Action::Refused("links are always followed, inside the root file system")
        }
        _ => return None,
    })
}

/// Every option that is understood, for `features`.
pub const OPTIONS: [&str; 60] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "rshared",
    "tmpcopyup",
    "unbindable",
];

/// `linux.rootfsPropagation`.
pub fn rootfs_propagation(text: Option<&str>) -> Result<u64, PlanError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(0);
    };
    match action(text) {
        Some(Action::Propagation(flags)) => {
            debug_assert!(flags & PROPAGATION != 0);
            Ok(flags)
        }
        _ => Err(invalid(
            "linux.rootfsPropagation",
            format!("{text:?} is not a kind of propagation"),
        )),
    }
}

#[cfg(test)]
mod tests;
