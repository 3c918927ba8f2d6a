// SPDX-License-Identifier: Apache-2.0
//! The threads that serve the queues. One leads: it alone waits for kicks and serves what comes. Before something that
//! may take long (an fsync) it hands over to another, and waits for its turn to lead again afterwards. So a request
//! wakes one thread, and a slow one does not hold up the rest until all threads are busy with such.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::server::{Server, Task};
use crate::devices::virtio::chain::{self, Chain};
use crate::devices::virtio::{Activation, GuestFault, Interrupt};
use crate::logging::warn_limited;
use crate::memory::GuestMemory;
use crate::seccomp::{self, ThreadKind};

/// The threads of the device. They are started once, before the guest runs: the thread that hears of DRIVER_OK is that
/// of a vCPU, which can start none. Dropping this stops and joins them.
#[derive(Debug)]
pub(super) struct Workers {
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(count: usize, server: &Arc<Server>) -> io::Result<Workers> {
        let mut workers = Workers {
            pool: Arc::new(Pool {
                server: server.clone(),
                exit: Arc::new(Exit {
                    event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                    wanted: AtomicBool::new(false),
                }),
                shift: Mutex::new(Shift::default()),
                changed: Condvar::new(),
            }),
            threads: Vec::with_capacity(count),
        };
        let (started, starts) = channel();
        for number in 0..count {
            let pool = workers.pool.clone();
            let started = started.clone();
            let thread = std::thread::Builder::new()
                .name(format!("fs{number}"))
                .spawn(move || pool.run(started))?;
            workers.threads.push(thread);
        }
        drop(started);
        for start in starts {
            start?;
        }
        Ok(workers)
    }

    /// The driver is ready: the threads serve its queues until [`Workers::leave`].
    pub(super) fn serve(&self, activation: Activation) {
        let pool = &self.pool;
        pool.exit.wanted.store(false, Ordering::Release);
        // Left by the reset before. Not readable after the first activation.
        let _ = pool.exit.event.read();
        let active = activation.queues.into_iter().enumerate();
        let queues = active
            .filter(|(_, active)| active.queue.ready())
            .map(|(index, active)| SharedQueue {
                index,
                queue: Mutex::new(active.queue),
                kick: active.kick,
            })
            .collect();
        let worker = Worker {
            server: pool.server.clone(),
            queues,
            memory: activation.memory,
            interrupt: activation.interrupt,
            exit: pool.exit.clone(),
            leadership: Mutex::new(()),
        };
        let mut shift = lock(&pool.shift);
        shift.number += 1;
        shift.worker = Some(Arc::new(worker));
        pool.changed.notify_all();
    }

    /// The driver is gone. Returns when no thread uses its queues any more and the server has forgotten it.
    pub(super) fn leave(&self) {
        let pool = &self.pool;
        pool.exit.ask();
        let mut shift = lock(&pool.shift);
        shift.worker = None;
        shift.forget = !self.threads.is_empty();
        pool.changed.notify_all();
        while shift.busy > 0 || shift.forget {
            shift = wait(&pool.changed, shift);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.pool.exit.ask();
        let mut shift = lock(&self.pool.shift);
        shift.worker = None;
        shift.over = true;
        drop(shift);
        self.pool.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What the threads share for as long as there are any.
#[derive(Debug)]
struct Pool {
    server: Arc<Server>,
    exit: Arc<Exit>,
    shift: Mutex<Shift>,
    changed: Condvar,
}

/// What there is to do.
#[derive(Debug, Default)]
struct Shift {
    /// Counts the activations.
    number: u64,
    /// The queues to serve, if the device is active.
    worker: Option<Arc<Worker>>,
    /// Threads that serve.
    busy: usize,
    /// The server is to be told of a reset, once nobody is busy. By one of these threads, who may do what it takes.
    forget: bool,
    over: bool,
}

impl Pool {
    fn run(&self, started: Sender<io::Result<()>>) {
        block_signals();
        let task = self.server.task().and_then(|task| {
            seccomp::confine(ThreadKind::FileServer).map_err(io::Error::other)?;
            Ok(task)
        });
        let mut task = match task {
            Ok(task) => task,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        drop(started);
        let mut served = 0;
        while let Some(worker) = self.next(&mut served) {
            worker.run(&mut task);
            drop(worker);
            lock(&self.shift).busy -= 1;
            self.changed.notify_all();
        }
    }

    /// Waits for an activation that this thread has not served. None: that was all.
    fn next(&self, served: &mut u64) -> Option<Arc<Worker>> {
        let mut shift = lock(&self.shift);
        loop {
            if shift.over {
                return None;
            }
            if shift.forget && shift.busy == 0 {
                self.server.disconnect();
                shift.forget = false;
                self.changed.notify_all();
            }
            match &shift.worker {
                Some(worker) if *served != shift.number => {
                    *served = shift.number;
                    let worker = worker.clone();
                    shift.busy += 1;
                    return Some(worker);
                }
                _ => shift = wait(&self.changed, shift),
            }
        }
    }
}

/// Tells the threads to leave: those that wait, and those whose driver never lets them rest.
#[derive(Debug)]
struct Exit {
    event: EventFd,
    wanted: AtomicBool,
}

impl Exit {
    fn ask(&self) {
        self.wanted.store(true, Ordering::Release);
        // Adding one to a counter that nobody else adds to does not fail. The threads do not read it: all see it.
        let _ = self.event.write(1);
    }
}

#[derive(Debug)]
struct SharedQueue {
    index: usize,
    queue: Mutex<Queue>,
    kick: Arc<EventFd>,
}

/// What the threads of an active device have in common.
#[derive(Debug)]
struct Worker {
    server: Arc<Server>,
    queues: Vec<SharedQueue>,
    memory: GuestMemory,
    interrupt: Interrupt,
    exit: Arc<Exit>,
    leadership: Mutex<()>,
}

/// Held by the thread that leads; `None` when it has handed over.
type Leadership<'a> = Option<MutexGuard<'a, ()>>;

impl Worker {
    fn run(&self, task: &mut Task) {
        if let Err(fault) = self.take_turns(task) {
            warn_limited!("virtio-fs: {fault}");
            self.interrupt.needs_reset();
        }
    }

    fn take_turns(&self, task: &mut Task) -> Result<(), GuestFault> {
        while !self.is_over() {
            let mut leadership = Some(lock(&self.leadership));
            // What came before this thread led, and whose kicks another one may have seen.
            self.drain_all(task, &mut leadership)?;
            while leadership.is_some() && self.wait() {
                self.drain_all(task, &mut leadership)?;
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.exit.wanted.load(Ordering::Acquire)
    }

    /// Waits for a kick; false when it is time to leave.
    fn wait(&self) -> bool {
        let exit: BorrowedFd<'_> = as_fd(&self.exit.event);
        let mut sources = vec![PollFd::from_borrowed_fd(exit, PollFlags::IN)];
        for queue in &self.queues {
            sources.push(PollFd::from_borrowed_fd(as_fd(&queue.kick), PollFlags::IN));
        }
        loop {
            match poll(&mut sources, None) {
                Ok(_) => break,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    // Not with valid arguments; going on would be a busy loop.
                    log::error!("virtio-fs: poll: {error}");
                    self.exit.wanted.store(true, Ordering::Release);
                }
            }
            if self.is_over() {
                return false;
            }
        }
        let kicked = sources.iter().skip(1);
        for (queue, source) in self.queues.iter().zip(kicked) {
            if !source.revents().is_empty() {
                // Only the one that leads reads it, and it is readable.
                let _ = queue.kick.read();
            }
        }
        !self.is_over()
    }

    fn drain_all<'a>(
        &'a self,
        task: &mut Task,
        leadership: &mut Leadership<'a>,
    ) -> Result<(), GuestFault> {
        for queue in &self.queues {
            if leadership.is_some() {
                self.drain(queue, task, leadership)?;
            }
        }
        Ok(())
    }

    /// Serves what is available, until there is nothing more or another thread leads.
    fn drain(
        &self,
        shared: &SharedQueue,
        task: &mut Task,
        leadership: &mut Leadership<'_>,
    ) -> Result<(), GuestFault> {
        loop {
            while let Some(chain) = self.next(shared)? {
                let head = chain.head_index();
                let written = match chain::split(shared.index, chain, &self.memory) {
                    Ok((reader, writer)) => {
                        let hand_over = || *leadership = None;
                        self.server.handle(task, reader, writer, hand_over)
                    }
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
                if leadership.is_none() || self.is_over() {
                    return Ok(());
                }
            }
            let more = lock(&shared.queue).enable_notification(&self.memory);
            if !more.map_err(|source| shared.fault(source))? {
                return Ok(());
            }
        }
    }

    fn next(&self, shared: &SharedQueue) -> Result<Option<Chain<'_>>, GuestFault> {
        let mut queue = lock(&shared.queue);
        queue
            .disable_notification(&self.memory)
            .map_err(|source| shared.fault(source))?;
        chain::pop(shared.index, &mut queue, &self.memory)
    }

    fn complete(&self, shared: &SharedQueue, head: u16, written: usize) -> Result<(), GuestFault> {
        let mut queue = lock(&shared.queue);
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event fd owns the descriptor, which stays open as long as the borrow of it.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Signals are for the event loop; and a write beyond RLIMIT_FSIZE must be an error here, not SIGXFSZ. What tells of a
/// forbidden system call has to come through.
fn block_signals() {
    // SAFETY: `set` is initialized by sigfillset before it is read; the calls change only the mask of this thread.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut set);
        libc::sigdelset(&raw mut set, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
