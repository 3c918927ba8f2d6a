// SPDX-License-Identifier: Apache-2.0
//! The threads that serve the queues. They all serve all queues; one is enough until a request waits for a slow disk.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::server::{Server, Task};
use crate::devices::virtio::chain::{self, Chain};
use crate::devices::virtio::{Activation, GuestFault, Interrupt};
use crate::logging::warn_limited;
use crate::memory::GuestMemory;

/// The threads of an active device; dropping it stops and joins them.
#[derive(Debug)]
pub(super) struct Workers {
    exit: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(
        count: usize,
        server: &Arc<Server>,
        activation: Activation,
    ) -> io::Result<Workers> {
        let exit = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut workers = Workers {
            exit,
            threads: Vec::with_capacity(count),
        };
        let active = activation.queues.into_iter().enumerate();
        let queues: Arc<[SharedQueue]> = active
            .filter(|(_, active)| active.queue.ready())
            .map(|(index, active)| SharedQueue {
                index,
                queue: Mutex::new(active.queue),
                kick: active.kick,
            })
            .collect();
        let (started, starts) = channel();
        for number in 0..count {
            let worker = Worker {
                server: server.clone(),
                queues: queues.clone(),
                memory: activation.memory.clone(),
                interrupt: activation.interrupt.clone(),
                exit: workers.exit.clone(),
            };
            let started = started.clone();
            let thread = std::thread::Builder::new()
                .name(format!("fs{number}"))
                .spawn(move || worker.run(started))?;
            workers.threads.push(thread);
        }
        drop(started);
        for start in starts {
            start?;
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Adding one to a counter that nobody else adds to does not fail. It is never read: all threads see it.
        let _ = self.exit.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct SharedQueue {
    index: usize,
    queue: Mutex<Queue>,
    kick: Arc<EventFd>,
}

#[derive(Debug)]
struct Worker {
    server: Arc<Server>,
    queues: Arc<[SharedQueue]>,
    memory: GuestMemory,
    interrupt: Interrupt,
    exit: Arc<EventFd>,
}

impl Worker {
    fn run(&self, started: Sender<io::Result<()>>) {
        block_signals();
        let mut task = match self.server.task() {
            Ok(task) => task,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        drop(started);
        // The driver may have kicked before this thread was there; those kicks are still in the event fds.
        while self.wait() {
            for queue in self.queues.iter() {
                if let Err(fault) = self.drain(queue, &mut task) {
                    warn_limited!("virtio-fs: {fault}");
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    /// Waits for a kick; false when it is time to leave.
    fn wait(&self) -> bool {
        let exit: BorrowedFd<'_> = as_fd(&self.exit);
        let mut sources = vec![PollFd::from_borrowed_fd(exit, PollFlags::IN)];
        for queue in self.queues.iter() {
            sources.push(PollFd::from_borrowed_fd(as_fd(&queue.kick), PollFlags::IN));
        }
        loop {
            match poll(&mut sources, None) {
                Ok(_) => break,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    log::error!("virtio-fs: poll: {error}");
                    return false;
                }
            }
        }
        let mut ready = sources.iter().map(|source| !source.revents().is_empty());
        if ready.next().unwrap_or(true) {
            return false;
        }
        for (queue, ready) in self.queues.iter().zip(ready) {
            if ready {
                // Another thread may have been faster.
                let _ = queue.kick.read();
            }
        }
        true
    }

    /// Serves what is available, until there is nothing more.
    fn drain(&self, shared: &SharedQueue, task: &mut Task) -> Result<(), GuestFault> {
        loop {
            while let Some(chain) = self.next(shared)? {
                let head = chain.head_index();
                let written = match chain::split(shared.index, chain, &self.memory) {
                    Ok((reader, writer)) => self.server.handle(task, reader, writer),
                    Err(fault) => {
                        warn_limited!("virtio-fs: {fault}");
                        Ok(0)
                    }
                };
                let written = written.unwrap_or_else(|short| {
                    warn_limited!("virtio-fs: a request without room for its reply: {short}");
                    0
                });
                self.complete(shared, head, written)?;
            }
            let mut queue = lock(shared);
            let more = queue.enable_notification(&self.memory);
            if !more.map_err(|source| shared.fault(source))? {
                return Ok(());
            }
        }
    }

    fn next(&self, shared: &SharedQueue) -> Result<Option<Chain<'_>>, GuestFault> {
        let mut queue = lock(shared);
        queue
            .disable_notification(&self.memory)
            .map_err(|source| shared.fault(source))?;
        chain::pop(shared.index, &mut queue, &self.memory)
    }

    fn complete(&self, shared: &SharedQueue, head: u16, written: usize) -> Result<(), GuestFault> {
        let mut queue = lock(shared);
        // A reply is at most as long as its chain, and that is less than 4 GiB.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        queue
            .add_used(&self.memory, head, written)
            .map_err(|source| shared.fault(source))?;
        let notify = queue
            .needs_notification(&self.memory)
            .map_err(|source| shared.fault(source))?;
        if notify {
            self.interrupt.used_buffer();
        }
        Ok(())
    }
}

impl SharedQueue {
    fn fault(&self, source: virtio_queue::Error) -> GuestFault {
        GuestFault::Queue {
            queue: self.index,
            source,
        }
    }
}

fn lock(shared: &SharedQueue) -> std::sync::MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event fd owns the descriptor, which stays open as long as the borrow of it.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Signals are for the event loop; and a write beyond RLIMIT_FSIZE must be an error here, not SIGXFSZ.
fn block_signals() {
    // SAFETY: `set` is initialized by sigfillset before it is read; the calls change only the mask of this thread.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
