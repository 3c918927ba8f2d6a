// SPDX-License-Identifier: Apache-2.0
//! Terminals: a person at one who calls `run` or `exec --tty`, and an engine that takes the master from a console
//! socket.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use harness::runtime::{finish, new_id, wait};
use harness::{Bundle, BundleBuilder, DEADLINE, Runtime};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

/// The master of a pseudo-terminal and what it has shown so far.
struct Screen {
    master: OwnedFd,
    seen: Vec<u8>,
    looked_at: usize,
    over: bool,
}

impl Screen {
    fn new(master: OwnedFd) -> Screen {
        Screen {
            master,
            seen: Vec::new(),
            looked_at: 0,
            over: false,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn type_in(&self, text: &str) {
        let bytes = text.as_bytes();
        assert_eq!(rustix::io::write(&self.master, bytes), Ok(bytes.len()));
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
    }

    /// Waits until `text` is shown, behind what was waited for before.
    fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let new = &self.seen[self.looked_at..];
            if let Some(at) = new.windows(text.len()).position(|w| w == text.as_bytes()) {
                self.looked_at += at + text.len();
                return;
            }
            assert!(!self.over, "ended without {text:?}: {:?}", self.text());
            assert!(self.read(deadline), "no {text:?}: {:?}", self.text());
        }
    }

    /// Reads until the last holder of the slave has let go of it.
    fn expect_end(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.over {
            assert!(self.read(deadline), "does not end: {:?}", self.text());
        }
    }

    /// False: the deadline has passed.
    fn read(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut interest = [PollFd::new(&self.master, PollFlags::IN)];
        let left = Timespec::try_from(left).unwrap();
        if poll(&mut interest, Some(&left)).unwrap() == 0 {
            return false;
        }
        let mut buffer = [0; 16 << 10];
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(0) | Err(Errno::IO) => self.over = true,
            Ok(count) => self.seen.extend_from_slice(&buffer[..count]),
            Err(error) => panic!("read from the terminal: {error}"),
        }
        true
    }
}

/// A terminal with a person at it. The slave is kept open, so that its settings can be looked at in the end.
struct Seat {
    screen: Screen,
    slave: OwnedFd,
}

impl Seat {
    fn new(rows: u16, columns: u16) -> Seat {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let screen = Screen::new(master);
        screen.resize(rows, columns);
        Seat { screen, slave }
    }

    fn settings(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).unwrap())
    }

    /// Starts a command in a session of its own with this as its controlling terminal.
    fn start(&self, command: &Command) -> Child {
        Command::new("setsid")
            .arg("--ctty")
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(self.slave.try_clone().unwrap())
            .stdout(self.slave.try_clone().unwrap())
            .stderr(self.slave.try_clone().unwrap())
            .spawn()
            .expect("needs setsid of util-linux")
    }
}

/// Tells about its terminal, each time its size changes too, and ends with 7 at Ctrl-C.
const TELLER: &str = "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo three terminals
    trap 'stty size' WINCH; trap 'echo interrupted; exit 7' INT
    echo ready; while :; do sleep 0.1; done";

fn with_terminal(script: &str) -> BundleBuilder {
    Bundle::script(script).set("/process/terminal", true)
}

/// What both a person and an engine see of [`TELLER`].
fn look_at_teller(screen: &mut Screen, size: Option<&str>) {
    screen.expect("/dev/");
    if let Some(size) = size {
        screen.expect(&format!("{size}\r\n"));
    }
    screen.expect("three terminals\r\n");
    screen.expect("ready\r\n");
    screen.resize(50, 132);
    screen.expect("50 132\r\n");
    screen.resize(24, 80);
    screen.expect("24 80\r\n");
    screen.type_in("\x03");
    screen.expect("interrupted\r\n");
}

#[test]
fn a_person_at_a_terminal_runs_a_container() {
    let runtime = Runtime::new();
    let bundle = with_terminal(TELLER).build();
    let mut seat = Seat::new(33, 77);
    let before = seat.settings();
    let child = seat.start(&runtime.run_command(&bundle));
    look_at_teller(&mut seat.screen, Some("33 77"));
    assert_ne!(seat.settings(), before, "raw while it runs");
    assert_eq!(wait(child), 7);
    assert_eq!(seat.settings(), before);
}

#[test]
fn typed_lines_are_echoed_and_edited_inside() {
    let runtime = Runtime::new();
    let bundle = with_terminal("echo ready; cat; echo the end; exit 3").build();
    let mut seat = Seat::new(24, 80);
    let child = seat.start(&runtime.run_command(&bundle));
    seat.screen.expect("ready\r\n");
    seat.screen.type_in("helxx\x7f\x7flo\n");
    // The echo, in which the two are wiped out, then the line.
    seat.screen.expect("lo\r\n");
    seat.screen.expect("hello\r\n");
    seat.screen.type_in("\x04");
    seat.screen.expect("the end\r\n");
    assert_eq!(wait(child), 3);
}

#[test]
fn the_last_output_of_a_terminal_is_shown() {
    let runtime = Runtime::new();
    let bundle = with_terminal("seq 1 20000").build();
    let mut seat = Seat::new(24, 80);
    let child = seat.start(&runtime.run_command(&bundle));
    seat.screen.expect("\r\n20000\r\n");
    assert_eq!(wait(child), 0);
    let expected: String = (1..=20000).map(|number| format!("{number}\r\n")).collect();
    assert!(seat.screen.text() == expected, "lines are missing");
}

#[test]
fn a_refused_container_leaves_the_terminal_as_it_was() {
    let runtime = Runtime::new();
    let bundle = Bundle::busybox(&["/bin/nosuch"])
        .set("/process/terminal", true)
        .build();
    let mut seat = Seat::new(24, 80);
    let before = seat.settings();
    let child = seat.start(&runtime.run_command(&bundle));
    seat.screen.expect("no such file or directory");
    assert_eq!(wait(child), 1);
    assert_eq!(seat.settings(), before);
}

#[test]
fn a_terminal_needs_somebody_to_hold_it() {
    let runtime = Runtime::new();
    let bundle = with_terminal("true").build();
    let path = bundle.path().to_str().unwrap();
    for verb in [&["create"][..], &["run", "--detach"]] {
        let outcome = runtime.call(&[verb, &["-b", path, "x"]].concat());
        let line = outcome.refusal();
        assert!(line.contains("socket"), "{line}");
    }
    let plain = Bundle::script("true").build();
    let path = plain.path().to_str().unwrap();
    let outcome = runtime.call(&["create", "-b", path, "--console-socket", "/nosuch", "x"]);
    assert!(outcome.refusal().contains("socket"));
    assert_eq!(std::fs::read_dir(runtime.root()).unwrap().count(), 0);
}

/// An engine's socket for the master of a terminal.
struct ConsoleSocket {
    listener: UnixListener,
    path: String,
}

impl ConsoleSocket {
    fn new(bundle: &Bundle) -> ConsoleSocket {
        let path = bundle.path().join(format!("{}.sock", new_id()));
        ConsoleSocket {
            listener: UnixListener::bind(&path).unwrap(),
            path: path.to_str().unwrap().to_owned(),
        }
    }

    /// The master: the one descriptor of the one message. To be called when the runtime has ended.
    fn master(&self) -> OwnedFd {
        let (stream, _) = self.listener.accept().unwrap();
        let mut text = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut text)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&stream, &mut buffers, &mut control, flags).unwrap();
        assert!(received.bytes > 0, "a message without a text");
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(received) => descriptors.extend(received),
                _ => panic!("not a descriptor"),
            }
        }
        assert_eq!(descriptors.len(), 1);
        let next = rustix::net::recv(&stream, &mut text, RecvFlags::empty()).unwrap();
        assert_eq!(next.0, 0, "a second message");
        descriptors.remove(0)
    }
}

/// Calls a verb with null for its streams: nothing that it leaves behind can hold a pipe of the test's.
fn call_quietly(runtime: &Runtime, arguments: &[&str]) {
    let mut command = runtime.command();
    command
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null());
    assert_eq!(wait(command.spawn().unwrap()), 0, "{arguments:?}");
}

#[test]
fn an_engine_gets_the_master_by_its_console_socket() {
    let runtime = Runtime::new();
    let bundle = with_terminal(TELLER)
        .set(
            "/process/consoleSize",
            serde_json::json!({"height": 33, "width": 77}),
        )
        .build();
    let socket = ConsoleSocket::new(&bundle);
    let path = bundle.path().to_str().unwrap();
    let id = new_id();
    call_quietly(
        &runtime,
        &["create", "-b", path, "--console-socket", &socket.path, &id],
    );
    let mut screen = Screen::new(socket.master());
    runtime.call(&["start", &id]).ok();
    look_at_teller(&mut screen, Some("33 77"));
    screen.expect_end();
    harness::wait_until("the container stops", || {
        let state = runtime.call(&["state", &id]);
        state.ok().contains("\"stopped\"")
    });
    runtime.call(&["delete", &id]).ok();
}

#[test]
fn a_detached_run_sends_its_terminal_too() {
    let runtime = Runtime::new();
    let bundle = with_terminal("echo ready; cat").build();
    let socket = ConsoleSocket::new(&bundle);
    let path = bundle.path().to_str().unwrap();
    let id = new_id();
    let options = ["--detach", "--console-socket", &socket.path];
    call_quietly(
        &runtime,
        &[&["run", "-b", path][..], &options, &[&id]].concat(),
    );
    let mut screen = Screen::new(socket.master());
    screen.expect("ready\r\n");
    screen.type_in("hello\n");
    screen.expect("hello\r\nhello\r\n");
    // The engine goes away: a hang-up does not take the container with it, its deletion does.
    drop(screen);
    runtime.call(&["delete", "--force", &id]).ok();
}

#[test]
fn a_master_that_nobody_reads_keeps_nobody_from_killing() {
    let runtime = Runtime::new();
    let bundle = with_terminal("yes").build();
    let socket = ConsoleSocket::new(&bundle);
    let path = bundle.path().to_str().unwrap();
    let id = new_id();
    let options = ["--detach", "--console-socket", &socket.path];
    call_quietly(
        &runtime,
        &[&["run", "-b", path][..], &options, &[&id]].concat(),
    );
    let mut screen = Screen::new(socket.master());
    screen.expect("y\r\ny\r\n");
    let start = Instant::now();
    runtime.call(&["delete", "--force", &id]).ok();
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn exec_has_a_terminal_of_its_own() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let mut seat = Seat::new(33, 77);
    let before = seat.settings();
    let mut command = runtime.command();
    command.args([
        "exec",
        "--tty",
        container.id(),
        "/bin/sh",
        "-c",
        "tty; echo ready",
    ]);
    let child = seat.start(&command);
    seat.screen.expect("/dev/pts/");
    seat.screen.expect("ready\r\n");
    assert_eq!(wait(child), 0);
    assert_eq!(seat.settings(), before);

    let mut command = runtime.command();
    command.args(["exec", "--tty", container.id(), "/bin/sh", "-c", TELLER]);
    let child = seat.start(&command);
    // runc gives it the size after it has started.
    let size = runtime.is_sandbox().then_some("33 77");
    look_at_teller(&mut seat.screen, size);
    assert_eq!(wait(child), 7);
    assert_eq!(seat.settings(), before);
    assert_eq!(container.status(), "running");
}

#[test]
fn a_detached_exec_sends_its_terminal() {
    let runtime = Runtime::new();
    let container = runtime.create(Bundle::busybox(&["/bin/sleep", "1000"]).build());
    container.start();
    let socket = ConsoleSocket::new(container.bundle());
    let mut all = vec!["exec", "--tty", "--detach", "--console-socket"];
    all.extend([
        socket.path.as_str(),
        container.id(),
        "/bin/sh",
        "-c",
        TELLER,
    ]);
    call_quietly(&runtime, &all);
    let mut screen = Screen::new(socket.master());
    look_at_teller(&mut screen, None);
    screen.expect_end();
    assert_eq!(container.status(), "running");
}

#[test]
fn without_a_terminal_outside_there_is_one_inside() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        // runc wants to make its own stdin raw.
        return;
    }
    let bundle = with_terminal("test -t 1 && echo a terminal").build();
    assert_eq!(
        finish(runtime.run_command(&bundle)).text(),
        "a terminal\r\n"
    );
}
