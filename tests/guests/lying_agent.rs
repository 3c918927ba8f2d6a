// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the guests of `tests/lying_agent.rs`: an agent that speaks the protocol well until it is told to lie. The file
//! `/first` says how it begins; the first two arguments of the container's process say when it lies, and how.

use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use agent_protocol::{
    AgentError, CONTROL_PORT, ErrorKind, Event, FromAgent, Reply, Request, Stdio, ToAgent, Usage,
    VERSION, decode, encode,
};

const HOST: u32 = 2;

fn main() {
    // The kernel gives up after two seconds, which an emulated host can take.
    let mut host = loop {
        if let Some(host) = connect(HOST, CONTROL_PORT) {
            break host;
        }
    };
    let first = fs::read_to_string("/first").unwrap_or_default();
    if !first.is_empty() {
        lie(&mut host, &first, 1, "c");
    }
    event(
        &mut host,
        Event::Ready {
            version: VERSION,
            age_ns: 0,
        },
    );
    let mut container = Container::default();
    while let Some(ToAgent { number, request }) = receive(&mut host) {
        container.answer(&mut host, number, request);
    }
    wait_for_ever()
}

#[derive(Default)]
struct Container {
    id: String,
    when: String,
    what: String,
}

impl Container {
    fn answer(&mut self, host: &mut File, number: u64, request: Request) {
        match request {
            Request::Create {
                container,
                plan,
                stdio,
            } => {
                let mut args = plan.process.args.into_iter();
                self.id = container;
                self.when = args.next().unwrap_or_default();
                self.what = args.next().unwrap_or_default();
                match (self.when.as_str(), self.what.as_str()) {
                    ("create", "sweep") => {
                        refuse(host, number, sweep(stdio));
                        wait_for_ever()
                    }
                    ("create", what) => lie(host, what, number, &self.id),
                    _ => {}
                }
                reply(host, number, Reply::Created { pid: 1 });
            }
            Request::Start { .. } => {
                if self.when == "start" {
                    lie(host, &self.what, number, &self.id);
                }
                reply(host, number, Reply::Done);
                if self.when == "run" {
                    // So that the start has been heard of before.
                    std::thread::sleep(Duration::from_secs(1));
                    lie(host, &self.what, number, &self.id);
                }
            }
            Request::Exec { process, plan, .. } => self.exec(host, number, process, &plan.args),
            Request::Usage { .. } => reply(host, number, Reply::Usage(Box::new(absurd_usage()))),
            // As if it had worked; nobody ends.
            Request::Signal { .. } | Request::Prepare { .. } => reply(host, number, Reply::Done),
            Request::Pause { .. } => {}
            _ => refuse(host, number, hostile_text()),
        }
    }

    fn exec(&self, host: &mut File, number: u64, process: u32, args: &[String]) {
        let exited = |process, status| Event::Exited {
            container: self.id.clone(),
            process,
            status,
        };
        match args.first().map(String::as_str) {
            Some("refuse") => refuse(host, number, hostile_text()),
            Some("unknown") => {
                event(host, exited(u32::MAX, 1));
                event(host, exited(process + 1000, 1));
                reply(host, number, Reply::Created { pid: u32::MAX });
                event(host, exited(process, 5));
                event(host, exited(process, 6));
            }
            // Ends before it has begun.
            _ => {
                event(host, exited(process, 7));
                reply(host, number, Reply::Usage(Box::default()));
            }
        }
    }
}

/// Some lies end here, with an agent that does nothing any more; after others all goes on.
fn lie(host: &mut File, what: &str, number: u64, container: &str) {
    let done = || FromAgent::Reply {
        number,
        result: Ok(Reply::Done),
    };
    let frame = encode(&done()).unwrap();
    match what {
        "silent" => {
            // It reads and says nothing.
            while receive(host).is_some() {}
            wait_for_ever()
        }
        "deaf" => wait_for_ever(),
        "close" => {
            // SAFETY: shutdown(2) takes numbers only, and the descriptor is open.
            unsafe { libc::shutdown(std::os::fd::AsRawFd::as_raw_fd(host), libc::SHUT_RDWR) };
            wait_for_ever()
        }
        "huge" => send_last(host, &[0xff; 4]),
        "claimed" => send_last(host, &[0, 0, 0x10, 0]),
        "garbage" => {
            let mut bytes = 4096u32.to_le_bytes().to_vec();
            bytes.resize(4 + 4096, 0xff);
            send_last(host, &bytes)
        }
        "trailing" => {
            let mut bytes = frame;
            bytes[0] += 1;
            bytes.push(0);
            send_last(host, &bytes)
        }
        "drip" => loop {
            // The prefix of a large frame, and then byte by byte.
            send(host, &[0, 0, 0x10, 0]);
            for _ in 0..(1 << 20) {
                send(host, &[0]);
                std::thread::sleep(Duration::from_secs(1));
            }
        },
        "number" => {
            let stranger = FromAgent::Reply {
                number: number + 1000,
                result: Ok(Reply::Done),
            };
            send_last(host, &encode(&stranger).unwrap())
        }
        "twice" => {
            send(
                host,
                &encode(&FromAgent::Reply {
                    number,
                    result: Ok(Reply::Created { pid: 1 }),
                })
                .unwrap(),
            );
            send_last(host, &frame)
        }
        "kind" => {
            reply(host, number, Reply::Usage(Box::new(absurd_usage())));
            wait_for_ever()
        }
        "text" => {
            refuse(host, number, hostile_text());
            wait_for_ever()
        }
        "exited" => {
            let exited = Event::Exited {
                container: container.to_owned(),
                process: 0,
                status: 3,
            };
            event(host, exited);
            wait_for_ever()
        }
        "ready" => event(
            host,
            Event::Ready {
                version: VERSION,
                age_ns: 0,
            },
        ),
        "version" => {
            event(
                host,
                Event::Ready {
                    version: 99,
                    age_ns: 0,
                },
            );
            wait_for_ever()
        }
        "flood" => loop {
            for id in [container, "other", "\u{1b}[2J\n"] {
                let container = id.to_owned();
                event(host, Event::OutOfMemory { container });
            }
        },
        _ => {}
    }
}

/// Ports of the host that accept a connection, and how many do a second time or at another address.
fn sweep(stdio: Stdio) -> String {
    let ports = (0..64)
        .chain(1000..1100)
        .chain([4096, 65_535, 65_536, 1 << 31, u32::MAX - 1]);
    let open: Vec<u32> = ports
        .clone()
        .filter(|&port| connect(HOST, port).is_some())
        .collect();
    let again = ports.filter(|&port| connect(HOST, port).is_some()).count();
    let elsewhere = [0, 4, 1000, u32::MAX - 1];
    let elsewhere = elsewhere
        .into_iter()
        .filter(|&address| connect(address, CONTROL_PORT).is_some());
    let Stdio::Streams {
        stdin,
        stdout,
        stderr,
    } = stdio
    else {
        return "a terminal".to_owned();
    };
    let granted: Vec<u32> = [stdin, stdout, stderr].into_iter().flatten().collect();
    format!(
        "open {open:?} granted {granted:?} again {again} elsewhere {}",
        elsewhere.count()
    )
}

fn hostile_text() -> String {
    format!(
        "\u{1b}[2J\r\nsandbox: all is well\n\0\u{202e}{}",
        "y".repeat(1 << 20)
    )
}

fn absurd_usage() -> Usage {
    let file = |name: &str, content: &str| (name.to_owned(), content.to_owned());
    let huge = "18446744073709551615";
    Usage {
        files: vec![
            file(
                "cpu.stat",
                &format!("usage_usec {huge}\nuser_usec NaN\nsystem_usec -1\nnr_periods"),
            ),
            file("memory.current", huge),
            file("memory.max", "99999999999999999999999999"),
            file("memory.stat", "anon 1e999\nfile \u{1b}[2J\n\n \n"),
            file(
                "memory.events",
                &format!("oom_kill {huge}\noom_kill {huge}"),
            ),
            file("pids.current", "-5"),
            file(
                "io.stat",
                "8:0 rbytes=18446744073709551616 wbytes=\nx:y\n4294967296:1 rios=1",
            ),
            file("../../etc/passwd", "root"),
            file("hugetlb.2MB.current", "\u{0}"),
        ],
        network: format!("lo: {huge} {huge} {huge}\n:::::\n{}", "x".repeat(100_000)),
    }
}

fn event(host: &mut File, event: Event) {
    send(host, &encode(&FromAgent::Event(event)).unwrap());
}

fn reply(host: &mut File, number: u64, reply: Reply) {
    let result = Ok(reply);
    send(host, &encode(&FromAgent::Reply { number, result }).unwrap());
}

fn refuse(host: &mut File, number: u64, message: String) {
    let kind = ErrorKind::System;
    let result = Err(AgentError { kind, message });
    send(host, &encode(&FromAgent::Reply { number, result }).unwrap());
}

fn send(host: &mut File, bytes: &[u8]) {
    if host.write_all(bytes).is_err() {
        wait_for_ever()
    }
}

fn send_last(host: &mut File, bytes: &[u8]) -> ! {
    send(host, bytes);
    wait_for_ever()
}

fn receive(host: &mut File) -> Option<ToAgent> {
    let mut prefix = [0; 4];
    host.read_exact(&mut prefix).ok()?;
    let mut body = vec![0; u32::from_le_bytes(prefix) as usize];
    host.read_exact(&mut body).ok()?;
    decode(&body).ok()
}

/// PID 1 must not end: the kernel would, too.
fn wait_for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn connect(address: u32, port: u32) -> Option<File> {
    // SAFETY: socket(2) takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return None;
    }
    // SAFETY: the call has just made this descriptor, which nobody else knows.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: sockaddr_vm is a plain structure of integers.
    let mut name: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    name.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).ok()?;
    name.svm_cid = address;
    name.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).ok()?;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // As the agent has it: the host answers when the template is saved, and Linux would give it two seconds.
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let timeout = libc::timeval {
        tv_sec: 60,
        tv_usec: 0,
    };
    let size = libc::socklen_t::try_from(size_of_val(&timeout)).ok()?;
    let value = (&raw const timeout).cast();
    // SAFETY: the value outlives the call and its size is passed.
    let set = unsafe {
        libc::setsockopt(
            descriptor,
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            value,
            size,
        )
    };
    if set != 0 {
        return None;
    }
    // SAFETY: the address outlives the call and its size is passed.
    let connected = unsafe { libc::connect(descriptor, (&raw const name).cast(), length) };
    (connected == 0).then(|| File::from(socket))
}
