// SPDX-License-Identifier: Apache-2.0
//! `install` and `uninstall`: the lines in an engine's configuration that name this program. They are
//! shown, and written unless it is a dry run.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::{Error, print};
use crate::cli::{Engine, Install, Uninstall};
use crate::engines::{self, EngineError};
use crate::store::is_host_root;

/// Configurations have some hundred lines.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{path}", path = .0.display())]
    File(PathBuf, #[source] io::Error),
    #[error("{path}", path = .0.display())]
    Configuration(PathBuf, #[source] EngineError),
    #[error("{path}: is longer than {MAX_FILE} bytes", path = .0.display())]
    TooLong(PathBuf),
    #[error("path of this program")]
    Program(#[source] io::Error),
    #[error("--config needs --engine, which tells what kind of file it is")]
    ConfigAlone,
}

pub fn install(arguments: &Install) -> Result<u8, Error> {
    let program = match &arguments.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().map_err(InstallError::Program)?,
    };
    let path = configuration(arguments.engine, arguments.config.as_deref());
    let change = Change::plan(path, |text| engines::with(arguments.engine, text, &program))?;
    change.apply(arguments.dry_run)?;
    if change.is_one() {
        print(&format!("then: {}\n", engines::next_step(arguments.engine)))?;
    }
    Ok(0)
}

pub fn uninstall(arguments: &Uninstall) -> Result<u8, Error> {
    let engines = match (arguments.engine, &arguments.config) {
        (Some(engine), _) => vec![engine],
        (None, Some(_)) => return Err(InstallError::ConfigAlone.into()),
        (None, None) => vec![Engine::Podman, Engine::Docker, Engine::Containerd],
    };
    for engine in engines {
        let path = configuration(engine, arguments.config.as_deref());
        let change = Change::plan(path, |text| engines::without(engine, text))?;
        change.apply(arguments.dry_run)?;
    }
    Ok(0)
}

fn configuration(engine: Engine, given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let own = || {
        let config = variable("XDG_CONFIG_HOME").map(PathBuf::from);
        config.or_else(|| variable("HOME").map(|home| Path::new(&home).join(".config")))
    };
    let home = if is_host_root() { None } else { own() };
    engines::file(engine, home.as_deref())
}

/// What becomes of one file.
#[derive(Debug)]
struct Change {
    /// With links resolved: what they lead to is written, they stay.
    path: PathBuf,
    before: Option<String>,
    after: Option<String>,
}

impl Change {
    fn plan(
        path: PathBuf,
        edit: impl FnOnce(Option<&str>) -> Result<Option<String>, EngineError>,
    ) -> Result<Change, InstallError> {
        let path = fs::canonicalize(&path).unwrap_or(path);
        let before = read(&path)?;
        let after = edit(before.as_deref())
            .map_err(|error| InstallError::Configuration(path.clone(), error))?;
        Ok(Change {
            path,
            before,
            after,
        })
    }

    fn is_one(&self) -> bool {
        self.before != self.after
    }

    fn apply(&self, dry_run: bool) -> Result<(), Error> {
        if !self.is_one() {
            return print(&format!("{}: nothing to change\n", self.path.display()));
        }
        let title = if dry_run { "would change" } else { "changed" };
        let lines = difference(
            self.before.as_deref().unwrap_or_default(),
            self.after.as_deref().unwrap_or_default(),
        );
        if !dry_run {
            self.write()
                .map_err(|error| InstallError::File(self.path.clone(), error))?;
        }
        print(&format!("{}: {title}\n{lines}", self.path.display()))
    }

    fn write(&self) -> io::Result<()> {
        match &self.after {
            Some(text) => replace(&self.path, text),
            None => fs::remove_file(&self.path),
        }
    }
}

fn read(path: &Path) -> Result<Option<String>, InstallError> {
    let fail = |error| InstallError::File(path.to_owned(), error);
    match fs::metadata(path) {
        Ok(found) if found.len() > MAX_FILE => return Err(InstallError::TooLong(path.to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    }
    fs::read_to_string(path).map(Some).map_err(fail)
}

/// Whoever reads the file, or finds it after a power failure, finds the old text or the new one. Owner
/// and permissions stay.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".sandbox-{}", std::process::id()));
    let temporary = directory.join(name);
    let written = write_new(&temporary, path, text)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(directory)?.sync_all());
    if written.is_err() {
        // What counts is the first error.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_new(temporary: &Path, old: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .open(temporary)?;
    match fs::metadata(old) {
        Ok(found) => {
            fchown(&file, Some(found.uid()), Some(found.gid()))?;
            file.set_permissions(found.permissions())?;
        }
        Err(_) => file.set_permissions(Permissions::from_mode(0o644))?,
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The lines that differ, between those at the beginning and the end that do not.
fn difference(before: &str, after: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let shorter = old.len().min(new.len());
    let same = |(a, b): &(&&str, &&str)| a == b;
    let head = old.iter().zip(&new).take_while(same).count();
    let tail = old.iter().rev().zip(new.iter().rev());
    let tail = tail.take(shorter - head).take_while(same).count();
    let mut text = String::new();
    for (sign, lines) in [
        ("-", &old[head..old.len() - tail]),
        ("+", &new[head..new.len() - tail]),
    ] {
        for line in lines {
            text.push_str(&format!("{sign} {line}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_is_shown() {
        assert_eq!(difference("", "a\nb\n"), "+ a\n+ b\n");
        assert_eq!(difference("a\nb\nc\n", "a\nc\n"), "- b\n");
        assert_eq!(difference("a\na\n", "a\na\na\n"), "+ a\n");
        assert_eq!(difference("a\nx\nc\n", "a\ny\nz\nc\n"), "- x\n+ y\n+ z\n");
    }

    #[test]
    fn a_file_comes_and_goes_and_keeps_its_permissions() {
        let directory =
            std::env::temp_dir().join(format!("sandbox-install-{}", std::process::id()));
        let path = directory.join("below/daemon.json");
        let add = |text: Option<&str>| engines::with(Engine::Docker, text, Path::new("/b/sandbox"));
        let remove = |text: Option<&str>| engines::without(Engine::Docker, text);
        let change = Change::plan(path.clone(), add).unwrap();
        change.apply(true).unwrap();
        assert!(!fs::exists(&directory).unwrap(), "a dry run");
        change.apply(false).unwrap();
        assert!(!Change::plan(path.clone(), add).unwrap().is_one());
        let change = Change::plan(path.clone(), remove).unwrap();
        change.apply(false).unwrap();
        assert!(!fs::exists(&path).unwrap());

        let other = "{\n  \"debug\": true\n}\n";
        fs::write(&path, other).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let link = directory.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let change = Change::plan(link.clone(), add).unwrap();
        change.apply(false).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_ne!(fs::read_to_string(&path).unwrap(), other);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        let change = Change::plan(link, remove).unwrap();
        change.apply(false).unwrap();
        let after = fs::read_to_string(&path).unwrap();
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!((after.as_str(), mode & 0o777, left), (other, 0o600, 1));
    }
}
