// SPDX-License-Identifier: Apache-2.0
//! The agent says what kind of thing went wrong; the words that engines look for in order to choose
//! between exit codes 126 and 127 are made here, not by the guest.

use agent_protocol::{AgentError, ErrorKind};

/// What an executable can be refused for. The first one found in the agent's text is used.
const REASONS: [&str; 5] = [
    "is a directory",
    "not a directory",
    "exec format error",
    "permission denied",
    "operation not permitted",
];

/// The error of a process that could not be started, in runc's words.
pub fn start_error(args: &[String], error: AgentError) -> AgentError {
    let name = args.first().map_or("", String::as_str);
    let reason = match error.kind {
        ErrorKind::ExecutableNotFound if name.contains('/') => {
            format!(
                "exec: {name:?}: stat {}: no such file or directory",
                shown(name)
            )
        }
        ErrorKind::ExecutableNotFound => {
            format!("exec: {name:?}: executable file not found in $PATH")
        }
        ErrorKind::ExecutableRefused => {
            let text = error.message.to_lowercase();
            let known = REASONS.into_iter().find(|reason| text.contains(reason));
            format!("exec: {name:?}: {}", known.unwrap_or("permission denied"))
        }
        _ => error.message,
    };
    AgentError {
        kind: error.kind,
        message: format!("unable to start container process: {reason}"),
    }
}

/// As in the quotes, without them.
fn shown(name: &str) -> String {
    name.escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_find_their_words() {
        use ErrorKind::*;
        for (name, kind, message, expected) in [
            (
                "nosuch",
                ExecutableNotFound,
                "",
                "exec: \"nosuch\": executable file not found in $PATH",
            ),
            (
                "/bin/x",
                ExecutableNotFound,
                "",
                "exec: \"/bin/x\": stat /bin/x: no such file or directory",
            ),
            (
                "/etc",
                ExecutableRefused,
                "execve: Is a directory (os error 21)",
                "exec: \"/etc\": is a directory",
            ),
            (
                "/x",
                ExecutableRefused,
                "whatever",
                "exec: \"/x\": permission denied",
            ),
            (
                "/x",
                Plan,
                "cwd: no such directory",
                "cwd: no such directory",
            ),
        ] {
            let message = message.to_owned();
            let error = start_error(&[name.into()], AgentError { kind, message });
            let prefix = "unable to start container process: ";
            assert_eq!(error.message, format!("{prefix}{expected}"));
        }
    }
}
