// SPDX-License-Identifier: Apache-2.0
//! Where the guest's kernel and initramfs are: in `lib/sandbox` beside the directory of the binary.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFiles {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum GuestFilesError {
    #[error("own executable cannot be found")]
    Executable(#[source] io::Error),
    #[error("guest file {path} is missing (not built or not installed)", path = .path.display())]
    Missing { path: PathBuf, source: io::Error },
    #[error("guest file {path}: not a regular file", path = .0.display())]
    NotAFile(PathBuf),
}

impl GuestFiles {
    /// The files that belong to this binary. Both exist.
    pub fn find() -> Result<GuestFiles, GuestFilesError> {
        let executable = std::env::current_exe().map_err(GuestFilesError::Executable)?;
        GuestFiles::beside(&executable)
    }

    fn beside(executable: &Path) -> Result<GuestFiles, GuestFilesError> {
        let directory = executable
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/"))
            .join("lib/sandbox");
        let file = |name: &str| {
            let path = directory.join(name);
            match std::fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => Ok(path),
                Ok(_) => Err(GuestFilesError::NotAFile(path)),
                Err(source) => Err(GuestFilesError::Missing { path, source }),
            }
        };
        Ok(GuestFiles {
            kernel: file("vmlinux")?,
            initramfs: file("initramfs.cpio")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_file_is_named() {
        let error = GuestFiles::beside(Path::new("/nonexistent/bin/sandbox")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/nonexistent/lib/sandbox/vmlinux"),
            "{error}"
        );
    }
}
