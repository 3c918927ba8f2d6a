// SPDX-License-Identifier: Apache-2.0
//! A call that is not on the list of its thread: named, and then the process ends.

use std::cell::Cell;
use std::fmt::Write;
use std::sync::OnceLock;

use super::{ThreadKind, names};

/// As a shell shows a process that SIGSYS has ended.
const STATUS: i32 = 128 + libc::SIGSYS;

static REPORT: OnceLock<fn(&str)> = OnceLock::new();

thread_local! {
    static KIND: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Installs the handler for calls that the filters of [`super::confine`] refuse. `report` gets one line, in a signal
/// handler: it must not allocate, lock, or call anything but write(2).
pub fn report_violations(report: fn(&str)) -> std::io::Result<()> {
    // A second caller means the same log.
    let _ = REPORT.set(report);
    // SAFETY: all zero bits are a valid sigaction; the handler has the three arguments that SA_SIGINFO promises, and
    // does only what a signal handler may.
    let result = unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        let handler: extern "C" fn(_, _, _) = on_violation;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

pub(super) fn name_this_thread(kind: ThreadKind) {
    KIND.set(Some(kind));
}

/// The part of siginfo_t that a seccomp trap fills: asm-generic/siginfo.h, `_sigsys`.
#[repr(C)]
struct Trap {
    signal: i32,
    error: i32,
    code: i32,
    padding: i32,
    address: usize,
    number: i32,
    architecture: u32,
}

extern "C" fn on_violation(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, which is larger and as aligned, to a handler with SA_SIGINFO. For a SIGSYS
    // from elsewhere the fields are some other integers.
    let number = unsafe { (*info.cast::<Trap>()).number };
    // SAFETY: and a ucontext_t, with the registers as they were at the call.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX]
        .map(|register| registers[register.unsigned_abs() as usize]);
    let mut line = Line::default();
    describe(&mut line, KIND.get(), number, arguments);
    if let Some(report) = REPORT.get() {
        report(line.text());
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(STATUS) }
}

fn describe(line: &mut Line, kind: Option<ThreadKind>, number: i32, arguments: [i64; 3]) {
    let kind = kind.map_or("unnamed", ThreadKind::name);
    let name = names::name(number).unwrap_or("unknown");
    let [a, b, c] = arguments;
    // Too long a line is cut.
    let _ = write!(
        line,
        "jail: the {kind} thread made the system call {name} ({number}; {a:#x}, {b:#x}, {c:#x}), which it may not"
    );
}

/// Text on the stack.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; 256],
            length: 0,
        }
    }
}

impl Line {
    fn text(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.length + text.len();
        let room = self.bytes.get_mut(self.length..end);
        room.ok_or(std::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_call_is_named() {
        let mut line = Line::default();
        let number = i32::try_from(libc::SYS_socket).unwrap();
        describe(&mut line, Some(ThreadKind::Vcpu), number, [1, 2, -1]);
        assert_eq!(
            line.text(),
            "jail: the vCPU thread made the system call socket (41; 0x1, 0x2, 0xffffffffffffffff), which it may not"
        );
        let mut line = Line::default();
        describe(&mut line, None, i32::MIN, [i64::MIN; 3]);
        assert!(line.text().contains("unknown (-2147483648;"));
        assert!(line.text().len() < line.bytes.len());
    }
}
