// SPDX-License-Identifier: Apache-2.0
//! Pid files: whoever reads one reads all of it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
#[error("pid file {path}", path = .path.display())]
pub struct PidFileError {
    path: PathBuf,
    source: io::Error,
}

/// Writes a file beside it, as runc does, and renames that.
pub fn write(path: &Path, pid: i32) -> Result<(), PidFileError> {
    let fail = |source| PidFileError {
        path: path.to_owned(),
        source,
    };
    let name = path
        .file_name()
        .ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    let temporary = path.with_file_name(hidden);
    let result = create(&temporary, pid).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // What counts is the first error.
        let _ = fs::remove_file(&temporary);
    }
    result.map_err(fail)
}

fn create(path: &Path, pid: i32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o644);
    // The name is guessable: a link in its place leads elsewhere.
    let mut file = options.custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.write_all(pid.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_is_replaced_as_a_whole() {
        let directory = std::env::temp_dir().join(format!("sandbox-pid-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("pid");
        write(&path, 1234567).unwrap();
        write(&path, 42).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let files = fs::read_dir(&directory).unwrap().count();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!((text.as_str(), files), ("42", 1));
        assert!(write(Path::new("/nonexistent/pid"), 1).is_err());
    }
}
