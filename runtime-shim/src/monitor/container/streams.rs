// SPDX-License-Identifier: Apache-2.0
//! The streams of a process, and the ports of the host that the guest finds them at.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use agent_protocol::Stdio;
use vmm::HostStream;

use super::Container;
use super::action::Action;
use crate::control::Descriptors;

/// Ports below are the protocol's own.
pub(super) const FIRST_PORT: u32 = 1024;

#[derive(Debug)]
pub enum Streams {
    Separate {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// Two descriptors of the same terminal.
    Terminal { input: OwnedFd, output: OwnedFd },
}

pub(super) fn streams(stdio: Descriptors, fds: Vec<OwnedFd>) -> Option<Streams> {
    if fds.len() != stdio.count() {
        return None;
    }
    let mut fds = fds.into_iter();
    Some(match stdio {
        Descriptors::Terminal => {
            let input = fds.next()?;
            Streams::Terminal {
                output: input.try_clone().ok()?,
                input,
            }
        }
        Descriptors::Streams {
            stdin,
            stdout,
            stderr,
        } => {
            let mut next = |is: bool| if is { fds.next() } else { None };
            Streams::Separate {
                stdin: next(stdin),
                stdout: next(stdout),
                stderr: next(stderr),
            }
        }
    })
}

impl Container {
    /// Gives each stream a port.
    pub(super) fn connect(
        &mut self,
        streams: Streams,
        ports: &mut BTreeSet<u32>,
        actions: &mut Vec<Action>,
    ) -> Stdio {
        let mut accept = |stream: HostStream| {
            let port = self.next_port;
            // Wrapping is 4 billion streams away, and a port in use is refused by the VM.
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            ports.insert(port);
            actions.push(Action::Accept { port, stream });
            port
        };
        match streams {
            Streams::Terminal { input, output } => Stdio::Terminal {
                port: accept(HostStream {
                    input: Some(input),
                    output: Some(output),
                }),
            },
            Streams::Separate {
                stdin,
                stdout,
                stderr,
            } => {
                let output = |fd: OwnedFd| HostStream {
                    input: None,
                    output: Some(fd),
                };
                Stdio::Streams {
                    stdin: stdin.map(|fd| {
                        accept(HostStream {
                            input: Some(fd),
                            output: None,
                        })
                    }),
                    stdout: stdout.map(|fd| accept(output(fd))),
                    stderr: stderr.map(|fd| accept(output(fd))),
                }
            }
        }
    }
}
