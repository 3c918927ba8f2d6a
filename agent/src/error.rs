// SPDX-License-Identifier: Apache-2.0
//! Errors on their way to the host: one line that names the stage or field.

use std::fmt::Display;
use std::io;

use agent_protocol::{AgentError, ErrorKind};

pub(crate) type Result<T> = std::result::Result<T, AgentError>;

pub(crate) fn error(kind: ErrorKind, message: impl Into<String>) -> AgentError {
    AgentError {
        kind,
        message: message.into(),
    }
}

/// A field of the plan that cannot be applied.
pub(crate) fn refused(message: impl Into<String>) -> AgentError {
    error(ErrorKind::Plan, message)
}

/// What the error number says, in the words that engines match on: those of Go, which are those of
/// the C library in lower case.
pub(crate) fn reason(error: impl Into<io::Error>) -> String {
    let text = error.into().to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_lowercase().chain(characters).collect(),
        None => String::new(),
    }
}

/// Names the stage at which a system call failed, or the field that asked for it.
pub(crate) trait Stage<T> {
    fn stage(self, name: impl Display) -> Result<T>;
    fn field(self, name: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Stage<T> for std::result::Result<T, E> {
    fn stage(self, name: impl Display) -> Result<T> {
        self.map_err(|cause| error(ErrorKind::System, format!("{name}: {}", reason(cause))))
    }

    fn field(self, name: impl Display) -> Result<T> {
        self.map_err(|cause| error(ErrorKind::Plan, format!("{name}: {}", reason(cause))))
    }
}

/// Says in which field of the plan an error arose.
pub(crate) trait Within<T> {
    fn within(self, name: impl Display) -> Result<T>;
}

impl<T> Within<T> for Result<T> {
    fn within(self, name: impl Display) -> Result<T> {
        self.map_err(|inner| AgentError {
            kind: inner.kind,
            message: format!("{name}: {}", inner.message),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn reasons_are_worded_as_engines_expect() {
        for (errno, expected) in [
            (Errno::NOENT, "no such file or directory"),
            (Errno::ACCESS, "permission denied"),
            (Errno::NOEXEC, "exec format error"),
            (Errno::ISDIR, "is a directory"),
        ] {
            assert_eq!(reason(errno), expected);
        }
    }
}
