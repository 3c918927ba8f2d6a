// SPDX-License-Identifier: Apache-2.0
//! The lines in an engine's configuration that make this program one of its runtimes.
//!
//! Pure: the text of a file in, the text that is to be there out. None stands for no file.

mod containerd;
mod docker;
mod podman;

use std::path::{Path, PathBuf};

use crate::cli::Engine;

/// The name that users give to their engine.
pub const RUNTIME: &str = "sandbox";

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("is not JSON that Docker would read: {0}")]
    Json(String),
    #[error("\"runtimes\" is not an object")]
    Runtimes,
    #[error(
        "has configuration version {0}: versions 2 and 3 can be added to, \
         `containerd config migrate` brings it up to date"
    )]
    Version(String),
    #[error(
        "has a runtime named sandbox that was not written by `sandbox install`: remove it first"
    )]
    Foreign,
    #[error("has the line {0:?} without the one that belongs to it")]
    Markers(&'static str),
    #[error("the path of this program has characters that do not go into a configuration: {0:?}")]
    Program(PathBuf),
}

/// The file that an engine reads. Podman has one for each user, the others are root's.
pub fn file(engine: Engine, home: Option<&Path>) -> PathBuf {
    match (engine, home) {
        (Engine::Podman, Some(config)) => config.join("containers/containers.conf.d/sandbox.conf"),
        (Engine::Podman, None) => "/etc/containers/containers.conf.d/sandbox.conf".into(),
        (Engine::Docker, _) => "/etc/docker/daemon.json".into(),
        (Engine::Containerd, _) => "/etc/containerd/config.toml".into(),
    }
}

/// What makes the engine see the change.
pub fn next_step(engine: Engine) -> &'static str {
    match engine {
        Engine::Podman => "podman --runtime sandbox run ...",
        Engine::Docker => "systemctl reload docker; docker run --runtime sandbox ...",
        Engine::Containerd => {
            "systemctl restart containerd; then RuntimeClass handler \"sandbox\", \
             or ctr run --runc-binary with the path of this program"
        }
    }
}

/// The file with this program in it.
pub fn with(
    engine: Engine,
    before: Option<&str>,
    program: &Path,
) -> Result<Option<String>, EngineError> {
    let path = quotable(program)?;
    // Where nothing is, nothing is to be kept.
    let before = before.filter(|text| !text.trim().is_empty());
    match engine {
        Engine::Podman => Ok(Some(podman::text(path))),
        Engine::Docker => docker::with(before, path).map(Some),
        Engine::Containerd => containerd::with(before, path).map(Some),
    }
}

/// The file without what `with` adds.
pub fn without(engine: Engine, before: Option<&str>) -> Result<Option<String>, EngineError> {
    let Some(text) = before else {
        return Ok(None);
    };
    let after = match engine {
        // All of the file is ours.
        Engine::Podman => String::new(),
        Engine::Docker => docker::without(text)?,
        Engine::Containerd => containerd::without(text)?,
    };
    Ok((!after.trim().is_empty()).then_some(after))
}

/// JSON and TOML strings are the same for all that a path should have.
fn quotable(program: &Path) -> Result<&str, EngineError> {
    program
        .to_str()
        .filter(|path| path.starts_with('/'))
        .filter(|path| !path.contains(|c: char| c.is_control() || c == '"' || c == '\\'))
        .ok_or_else(|| EngineError::Program(program.to_owned()))
}

#[cfg(test)]
mod tests;
