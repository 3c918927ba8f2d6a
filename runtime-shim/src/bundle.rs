// SPDX-License-Identifier: Apache-2.0
//! A bundle: config.json, read with limits and checked as far as it can be without planning.
//!
//! Whoever wrote it may be hostile: size, depth, NUL characters and types are dealt with here, so that
//! nothing after it meets them.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Spec};
use serde_json::{Map, Value};

/// Engines write some ten KiB; there is room for the largest arguments and environment.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_ID: usize = 1024;

#[derive(Debug)]
pub struct Bundle {
    /// Absolute, links resolved.
    pub directory: PathBuf,
    /// Absolute, links resolved. A directory.
    pub rootfs: PathBuf,
    pub spec: Spec,
    /// The sections of other platforms and of virtual machines, which [`Spec`] is read without.
    pub platforms: Map<String, Value>,
    /// The configuration as it was read, for the state directory.
    pub config: Vec<u8>,
    /// What was left out on reading, one line each.
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("bundle {path}", path = .path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("{path}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: not a regular file", path = .0.display())]
    NotAFile(PathBuf),
    #[error("{path}: larger than {} MiB", MAX_CONFIG >> 20, path = .0.display())]
    TooLarge(PathBuf),
    #[error("{path}", path = .path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{path}: {field}: contains a NUL character", path = .path.display())]
    Nul { path: PathBuf, field: String },
    #[error("{path}: ociVersion: {reason}", path = .path.display())]
    Version { path: PathBuf, reason: String },
    #[error("{path}: {field} is missing", path = .path.display())]
    Missing { path: PathBuf, field: &'static str },
    #[error("root.path: {path}", path = .path.display())]
    Rootfs { path: PathBuf, source: io::Error },
    #[error("root.path: {path}: not a directory", path = .0.display())]
    RootfsNotADirectory(PathBuf),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("container id cannot be empty")]
    Empty,
    #[error("invalid container ID format: {0:?}")]
    Format(String),
    #[error("invalid container ID format: longer than {MAX_ID} characters")]
    TooLong,
}

/// runc's rule: letters, digits and `_+-.`, but neither `.` nor `..`.
pub fn validate_id(id: &str) -> Result<(), IdError> {
    if id.is_empty() {
        return Err(IdError::Empty);
    }
    if id.len() > MAX_ID {
        return Err(IdError::TooLong);
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id == "." || id == ".." || !id.chars().all(allowed) {
        return Err(IdError::Format(id.to_owned()));
    }
    Ok(())
}

impl Bundle {
    /// Reads `config.json` of the bundle, or the file given instead. A relative `root.path` belongs
    /// to the bundle in both cases.
    pub fn load(directory: &Path, config: Option<&Path>) -> Result<Bundle, BundleError> {
        let given = directory;
        let directory = given
            .canonicalize()
            .map_err(|source| BundleError::Directory {
                path: given.to_owned(),
                source,
            })?;
        let path = match config {
            Some(config) => config.to_owned(),
            None => directory.join("config.json"),
        };
        let bytes = read(&path)?;
        let Document {
            value: spec,
            platforms,
            warnings,
        } = parse::<Spec>(&path, &bytes)?;
        let warnings = check_version(&path, spec.version(), warnings)?;
        let root = spec.root().as_ref().ok_or_else(|| BundleError::Missing {
            path: path.clone(),
            field: "root",
        })?;
        if root.path().as_os_str().is_empty() {
            return Err(BundleError::Missing {
                path: path.clone(),
                field: "root.path",
            });
        }
        let rootfs = resolve_rootfs(&directory.join(root.path()))?;
        Ok(Bundle {
            directory,
            rootfs,
            spec,
            platforms,
            config: bytes,
            warnings,
        })
    }
}

/// The process of `exec --process`, and what was left out on reading.
pub fn load_process(path: &Path) -> Result<(Process, Vec<String>), BundleError> {
    let bytes = read(path)?;
    let document = parse::<Process>(path, &bytes)?;
    Ok((document.value, document.warnings))
}

/// The configuration that a container was created from, out of its state directory.
pub fn parse_spec(path: &Path, bytes: &[u8]) -> Result<Spec, BundleError> {
    Ok(parse::<Spec>(path, bytes)?.value)
}

fn resolve_rootfs(path: &Path) -> Result<PathBuf, BundleError> {
    let rootfs = path.canonicalize().map_err(|source| BundleError::Rootfs {
        path: path.to_owned(),
        source,
    })?;
    let metadata = rootfs.metadata().map_err(|source| BundleError::Rootfs {
        path: rootfs.clone(),
        source,
    })?;
    if !metadata.is_dir() {
        return Err(BundleError::RootfsNotADirectory(rootfs));
    }
    Ok(rootfs)
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    use std::os::unix::fs::OpenOptionsExt;
    let fail = |source| BundleError::Read {
        path: path.to_owned(),
        source,
    };
    // Non-blocking: the open of a FIFO would wait for its writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(fail)?;
    if !file.metadata().map_err(fail)?.is_file() {
        return Err(BundleError::NotAFile(path.to_owned()));
    }
    let mut bytes = Vec::new();
    let length = file
        .take(MAX_CONFIG + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    if length as u64 > MAX_CONFIG {
        return Err(BundleError::TooLarge(path.to_owned()));
    }
    Ok(bytes)
}

struct Document<T> {
    value: T,
    platforms: Map<String, Value>,
    warnings: Vec<String>,
}

/// serde_json itself refuses documents nested deeper than 128.
fn parse<T: serde::de::DeserializeOwned>(
    path: &Path,
    bytes: &[u8],
) -> Result<Document<T>, BundleError> {
    let json = |source| BundleError::Json {
        path: path.to_owned(),
        source,
    };
    let mut document: Value = serde_json::from_slice(bytes).map_err(json)?;
    if let Some(field) = find_nul(&document) {
        return Err(BundleError::Nul {
            path: path.to_owned(),
            field,
        });
    }
    let platforms = take_platforms(&mut document);
    let mut warnings = Vec::new();
    let changed = normalize(&mut document, &mut warnings);
    let value = if platforms.is_empty() && !changed {
        drop(document);
        // From the text, so that an error names its line, and duplicate fields are seen.
        serde_json::from_slice(bytes).map_err(json)?
    } else {
        serde_json::from_value(document).map_err(json)?
    };
    Ok(Document {
        value,
        platforms,
        warnings,
    })
}

fn take_platforms(document: &mut Value) -> Map<String, Value> {
    let mut platforms = Map::new();
    if let Some(top) = document.as_object_mut() {
        for section in ["vm", "windows", "solaris", "zos", "freebsd"] {
            if let Some(value) = top.remove(section).filter(|value| !value.is_null()) {
                platforms.insert(section.to_owned(), value);
            }
        }
    }
    platforms
}

/// Adapts what the types refuse but the ecosystem sends. Returns whether anything was changed.
fn normalize(document: &mut Value, warnings: &mut Vec<String>) -> bool {
    let process = if document.get("process").is_some() {
        document.get_mut("process")
    } else {
        Some(document)
    };
    let Some(process) = process.and_then(Value::as_object_mut) else {
        return false;
    };
    let mut changed = false;
    // As in runc: a capability that this program does not know is left out.
    if let Some(sets) = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut)
    {
        for (set, names) in sets {
            let Some(names) = names.as_array_mut() else {
                continue;
            };
            names.retain(|name| {
                let known = name
                    .as_str()
                    .is_none_or(|name| crate::plan::capability(name).is_some());
                if !known {
                    changed = true;
                    warnings.push(format!(
                        "process.capabilities.{set}: unknown capability {name} left out"
                    ));
                }
                known
            });
        }
    }
    if let Some(flags) = process
        .get_mut("scheduler")
        .and_then(|scheduler| scheduler.get_mut("flags"))
        .and_then(Value::as_array_mut)
    {
        for flag in flags {
            // The types have these misspelt.
            let misspelt = match flag.as_str() {
                Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
                Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
                _ => continue,
            };
            *flag = misspelt.into();
            changed = true;
        }
    }
    changed
}

/// The path of the first string or key that has a NUL character: nothing that the kernel is given can.
fn find_nul(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if text.contains('\0') => Some(String::new()),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(index, item)| find_nul(item).map(|rest| join(&format!("[{index}]"), rest))),
        Value::Object(fields) => fields.iter().find_map(|(key, item)| {
            if key.contains('\0') {
                return Some(key.escape_debug().to_string());
            }
            find_nul(item).map(|rest| join(key, rest))
        }),
        _ => None,
    }
}

fn join(head: &str, rest: String) -> String {
    if rest.is_empty() || rest.starts_with('[') {
        format!("{head}{rest}")
    } else {
        format!("{head}.{rest}")
    }
}

/// 1.0.0 and later within major version 1: minor versions only add optional fields.
fn check_version(
    path: &Path,
    version: &str,
    mut warnings: Vec<String>,
) -> Result<Vec<String>, BundleError> {
    let refuse = |reason: String| BundleError::Version {
        path: path.to_owned(),
        reason,
    };
    if version.is_empty() {
        return Err(refuse("is missing".to_owned()));
    }
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Option<Vec<u64>> = core.split('.').map(|part| part.parse().ok()).collect();
    let Some([major, minor, _]) = numbers.as_deref() else {
        return Err(refuse(format!("{version:?} is not a version")));
    };
    if *major != 1 {
        return Err(refuse(format!("{version} is not supported, only 1.x is")));
    }
    if *minor > 3 {
        warnings.push(format!(
            "ociVersion: {version} is newer than {}: fields that it added are ignored",
            crate::cli::OCI_VERSION
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests;
