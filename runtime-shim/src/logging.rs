// SPDX-License-Identifier: Apache-2.0
//! `--log` and `--log-format`, as engines read them.
//!
//! Podman takes the whole log file for one JSON object, so with that format and no level asked for
//! nothing but the fatal error is written. Without `--log`, messages go to stderr, which without a
//! terminal is the container's own: there only warnings and errors are worth it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::Serialize;

use crate::cli::{Global, LogFormat, LogLevel};
use crate::time;

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("log file {path}", path = .path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("--log {0}: only files can be logged to")]
    Scheme(String),
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

struct Logger {
    format: LogFormat,
    level: LevelFilter,
    /// None: stderr.
    file: Option<Mutex<File>>,
    /// Of the file.
    descriptor: Option<RawFd>,
}

/// Sets up logging for the process. Later calls change nothing.
pub fn init(global: &Global) -> Result<(), LoggingError> {
    let file = match &global.log {
        Some(path) if !path.as_os_str().is_empty() => Some(open(path)?),
        _ => None,
    };
    let logger = LOGGER.get_or_init(|| Logger {
        format: global.log_format,
        level: level(global),
        descriptor: file.as_ref().map(AsRawFd::as_raw_fd),
        file: file.map(Mutex::new),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(logger.level);
    }
    Ok(())
}

/// Reports the error that ends the command: in the log, and on stderr if that is elsewhere.
pub fn fatal(message: &str) {
    match LOGGER.get() {
        Some(logger) if logger.file.is_some() => {
            logger.write(Level::Error, message);
            to_stderr(&text(Level::Error, message));
        }
        Some(logger) => logger.write(Level::Error, message),
        None => to_stderr(&text(Level::Error, message)),
    }
}

/// Reports an error from within a signal handler: without a lock, an allocation, or the time. `message` needs no
/// escaping.
pub fn from_signal_handler(message: &str) {
    let (file, format) = LOGGER.get().map_or((None, LogFormat::Text), |logger| {
        (logger.descriptor, logger.format)
    });
    let [before, after] = match format {
        LogFormat::Json => [r#"{"level":"error","msg":""#, "\"}\n"],
        LogFormat::Text => ["sandbox: ", "\n"],
    };
    let mut line = [0; 512];
    let mut length = 0;
    for part in [before, message, after] {
        if let Some(room) = line.get_mut(length..length + part.len()) {
            room.copy_from_slice(part.as_bytes());
            length += part.len();
        }
    }
    let file = file.unwrap_or(libc::STDERR_FILENO);
    // SAFETY: the buffer is valid for reads of `length`, and the descriptor that of the log, which is never closed. A
    // log that cannot be written cannot be complained about either.
    let _ = unsafe { libc::write(file, line.as_ptr().cast(), length) };
}

fn level(global: &Global) -> LevelFilter {
    match (global.debug, global.log_level, global.log_format) {
        (_, Some(LogLevel::Trace), _) => LevelFilter::Trace,
        (true, ..) | (_, Some(LogLevel::Debug), _) => LevelFilter::Debug,
        (_, Some(LogLevel::Info), _) => LevelFilter::Info,
        (_, Some(LogLevel::Warn), _) | (_, None, LogFormat::Text) => LevelFilter::Warn,
        (_, Some(LogLevel::Error), _) | (_, None, LogFormat::Json) => LevelFilter::Error,
    }
}

/// Appending, and each line on its way to the disk before the command goes on.
fn open(path: &Path) -> Result<File, LoggingError> {
    use std::os::unix::fs::OpenOptionsExt;
    // crun's forms.
    let text = path.to_string_lossy();
    for scheme in ["journald:", "syslog:"] {
        if text.starts_with(scheme) {
            return Err(LoggingError::Scheme(text.into_owned()));
        }
    }
    let path = text
        .strip_prefix("file:")
        .map_or_else(|| path.to_owned(), PathBuf::from);
    File::options()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_SYNC)
        .open(&path)
        .map_err(|source| LoggingError::Open { path, source })
}

impl Logger {
    fn write(&self, level: Level, message: &str) {
        let line = match self.format {
            LogFormat::Json => json(level, message, &time::now()),
            LogFormat::Text if self.file.is_some() => {
                format!("{} {}", time::now(), text(level, message))
            }
            LogFormat::Text => text(level, message),
        };
        match &self.file {
            Some(file) => {
                let mut file = file
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                // A log that cannot be written cannot be complained about either.
                let _ = file.write_all(line.as_bytes());
            }
            None => to_stderr(&line),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            self.write(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

fn to_stderr(line: &str) {
    let _ = io::stderr().write_all(line.as_bytes());
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

fn text(level: Level, message: &str) -> String {
    // A message may quote a guest: no escape sequences, no second line.
    let printable: String = message
        .chars()
        .map(|c| if c.is_control() && c != '\t' { ' ' } else { c })
        .collect();
    match level {
        Level::Error => format!("sandbox: {printable}\n"),
        level => format!("sandbox: {}: {printable}\n", name(level)),
    }
}

fn json(level: Level, message: &str, time: &str) -> String {
    #[derive(Serialize)]
    struct Line<'a> {
        level: &'a str,
        msg: &'a str,
        time: &'a str,
    }
    let line = Line {
        level: name(level),
        msg: message,
        time,
    };
    // Three strings always serialize.
    serde_json::to_string(&line).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(
            json(
                Level::Error,
                "a \"b\"\n\u{1b}[1m",
                "2025-01-01T00:00:00.000000001Z"
            ),
            "{\"level\":\"error\",\"msg\":\"a \\\"b\\\"\\n\\u001b[1m\",\
             \"time\":\"2025-01-01T00:00:00.000000001Z\"}\n"
        );
        assert_eq!(text(Level::Error, "a\n\u{1b}[1mb"), "sandbox: a  [1mb\n");
        assert_eq!(text(Level::Warn, "a"), "sandbox: warning: a\n");
    }

    #[test]
    fn one_json_object_unless_asked_for_more() {
        let json = Global {
            log_format: LogFormat::Json,
            ..Global::default()
        };
        assert_eq!(level(&json), LevelFilter::Error);
        assert_eq!(level(&Global::default()), LevelFilter::Warn);
        assert_eq!(
            level(&Global {
                debug: true,
                ..json
            }),
            LevelFilter::Debug
        );
    }

    #[test]
    fn only_files() {
        assert!(matches!(
            open(Path::new("journald:x")),
            Err(LoggingError::Scheme(_))
        ));
        assert!(matches!(
            open(Path::new("/nonexistent/log")),
            Err(LoggingError::Open { .. })
        ));
    }
}
