// SPDX-License-Identifier: Apache-2.0
//! Signals as something to wait for: blocked, and read from a descriptor.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Those that tell of a fault of this very process, and SIGCHLD and SIGPIPE, stay as they are.
/// SIGRTMIN gets vCPUs out of the guest; glibc keeps the two before it.
const LEFT_ALONE: [i32; 10] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGCHLD,
    libc::SIGPIPE,
];

/// Those by which people and engines end a process.
pub const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The signals that a process on the host takes for one in the guest.
fn forwarded() -> impl Iterator<Item = i32> {
    let standard = (1..32).filter(|signal| !LEFT_ALONE.contains(signal));
    standard.chain(35..=64)
}

/// Blocks the signals that are to be forwarded in this thread and those it starts, and returns the
/// non-blocking descriptor that they are read from.
pub fn take() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set, whose memory is valid; it is read only after that. The
    // signal numbers are valid, and sigprocmask and signalfd get a pointer to the initialized set.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in forwarded() {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just returned this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The next signal that has arrived.
pub fn next(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    // SAFETY: the buffer is valid for writes of its length.
    let count = unsafe { libc::read(fd.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
    if usize::try_from(count) != Ok(info.len()) {
        return None;
    }
    // ssi_signo is the first field.
    let (number, _) = info.split_first_chunk::<4>()?;
    i32::try_from(u32::from_ne_bytes(*number)).ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_signal_is_read_instead_of_handled() {
        // In a thread of its own: the mask is a thread's.
        let thread = std::thread::spawn(|| {
            let fd = take().unwrap();
            assert_eq!(next(fd.as_fd()), None);
            // SAFETY: sends a signal that this thread has blocked to itself.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1) };
            assert_eq!(next(fd.as_fd()), Some(libc::SIGUSR1));
            assert_eq!(next(fd.as_fd()), None);
        });
        thread.join().unwrap();
    }
}
