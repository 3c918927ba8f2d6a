// SPDX-License-Identifier: Apache-2.0
//! One thread a vCPU: KVM_RUN and what its exits ask for.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::layout;
use crate::bus::Bus;
use crate::devices::uart::Uart;
use crate::logging::warn_limited;
use crate::seccomp::{self, ThreadKind};
use crate::vcpu_state::VcpuState;
use crate::vm::VmError;

/// Why a VM does not run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The guest reset itself: reboot, or a panic with `panic=-1`.
    Reset,
    /// KVM could not go on; says why.
    Failed(String),
}

/// What all vCPU threads of a VM share.
#[derive(Debug)]
pub(crate) struct VcpuShared {
    pub(crate) bus: Bus,
    pub(crate) uart: Arc<Uart>,
    control: Mutex<Control>,
    changed: Condvar,
    /// What of a vCPU's MSRs is saved.
    msrs: Vec<u32>,
    /// Signalled when `stopped` is set.
    pub(crate) stop_event: EventFd,
}

#[derive(Debug)]
struct Control {
    wanted: Wanted,
    /// vCPUs that are not in KVM_RUN.
    parked: usize,
    /// The registers of vCPUs that were asked to save them, by index.
    saved: Vec<Option<Result<VcpuState, VmError>>>,
    stopped: Option<StopReason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Exit,
}

/// What one exit means for the loop.
enum Verdict {
    Continue,
    Stop(StopReason),
}

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs, for the signal handler.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Makes the KVM_RUN that is under way, or the next one, return at once.
extern "C" fn interrupt_run(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: set by `run` to a byte of the mapped kvm_run of this very thread, cleared before it is unmapped.
        unsafe { byte.write_volatile(1) };
    }
}

impl VcpuShared {
    pub(crate) fn new(bus: Bus, uart: Arc<Uart>, msrs: Vec<u32>) -> std::io::Result<VcpuShared> {
        Ok(VcpuShared {
            bus,
            uart,
            msrs,
            control: Mutex::new(Control {
                wanted: Wanted::Pause,
                parked: 0,
                saved: Vec::new(),
                stopped: None,
            }),
            changed: Condvar::new(),
            stop_event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    pub(crate) fn stop_reason(&self) -> Option<StopReason> {
        self.lock().stopped.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, reason: StopReason) {
        self.lock().stopped.get_or_insert(reason);
        // Fails only if the counter is at its maximum, and then the loop is awake already.
        let _ = self.stop_event.write(1);
    }

    /// Waits while a pause is wanted. False: the thread is to end.
    fn may_run(&self, vcpu: &VcpuFd, index: usize) -> bool {
        let mut control = self.lock();
        if let Some(place) = control.saved.get_mut(index) {
            *place = Some(VcpuState::save(vcpu, &self.msrs));
        }
        control.parked += 1;
        self.changed.notify_all();
        while control.wanted == Wanted::Pause {
            control = self
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
        control.parked -= 1;
        control.wanted == Wanted::Run
    }

    fn handle(&self, exit: VcpuExit<'_>) -> Verdict {
        match exit {
            VcpuExit::MmioRead(address, data) => self.bus.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.bus.write(address, data),
            VcpuExit::IoIn(port, data) => self.port_read(port, data),
            VcpuExit::IoOut(layout::RESET_PORT, [layout::RESET_COMMAND, ..])
            | VcpuExit::Shutdown => return Verdict::Stop(StopReason::Reset),
            VcpuExit::IoOut(port, data) => self.port_write(port, data),
            VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IoapicEoi(_) => {}
            VcpuExit::SystemEvent(..) => return Verdict::Stop(StopReason::Reset),
            VcpuExit::FailEntry(reason, _) => {
                let text = format!("the CPU refused to enter the guest, reason {reason:#x}");
                return Verdict::Stop(StopReason::Failed(text));
            }
            VcpuExit::InternalError => {
                let text = "KVM could not emulate an instruction of the guest".to_owned();
                return Verdict::Stop(StopReason::Failed(text));
            }
            other => {
                warn_limited!("unexpected exit of a vCPU: {other:?}");
            }
        }
        Verdict::Continue
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            match uart_register(port) {
                Some(register) => *byte = self.uart.read(register),
                None if port == layout::NMI_STATUS_PORT => *byte = 0,
                None => {}
            }
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if let (Some(register), [byte]) = (uart_register(port), data) {
            self.uart.write(register, *byte);
        }
    }
}

fn uart_register(port: u16) -> Option<u16> {
    port.checked_sub(layout::UART_PORT)
        .filter(|register| *register < layout::UART_PORTS)
}

/// A share of work that all vCPU threads do together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) index: usize,
    pub(crate) of: usize,
}

impl Part {
    pub(crate) fn share_of<T>(self, all: &[T]) -> impl Iterator<Item = &T> {
        all.iter().skip(self.index).step_by(self.of)
    }
}

/// The threads of all vCPUs of a VM; ended and joined on drop.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    shared: Arc<VcpuShared>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. They are paused. Each begins with `prepare`, which is told which one of how many
    /// it is, and is confined after that.
    pub(crate) fn start(
        vcpus: Vec<VcpuFd>,
        shared: Arc<VcpuShared>,
        prepare: impl Fn(&VcpuFd, Part) + Clone + Send + 'static,
    ) -> Result<VcpuThreads, std::io::Error> {
        register_signal_handler(SIGRTMIN(), interrupt_run)
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        let mut all = VcpuThreads {
            shared,
            threads: Vec::with_capacity(vcpus.len()),
        };
        let of = vcpus.len();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = all.shared.clone();
            let prepare = prepare.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    prepare(&vcpu, Part { index, of });
                    run(vcpu, index, &shared);
                })?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Returns when no vCPU is in the guest any more.
    pub(crate) fn pause(&self) {
        self.want(Wanted::Pause);
        let mut control = self.shared.lock();
        while control.parked < self.threads.len() && control.stopped.is_none() {
            control = self
                .shared
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Pauses, and returns the registers of all vCPUs.
    pub(crate) fn pause_and_save(&self) -> Result<Vec<VcpuState>, VmError> {
        self.shared.lock().saved = self.threads.iter().map(|_| None).collect();
        self.pause();
        let saved = std::mem::take(&mut self.shared.lock().saved);
        // None: a vCPU that has stopped for good.
        saved.into_iter().flatten().collect()
    }

    pub(crate) fn resume(&self) {
        self.shared.lock().wanted = Wanted::Run;
        self.shared.changed.notify_all();
    }

    fn want(&self, wanted: Wanted) {
        self.shared.lock().wanted = wanted;
        self.shared.changed.notify_all();
        for thread in &self.threads {
            // SAFETY: the thread is not joined yet, so its pthread_t is valid (ESRCH if it has ended).
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.want(Wanted::Exit);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The body of a vCPU thread.
fn run(vcpu: VcpuFd, index: usize, shared: &VcpuShared) {
    match seccomp::confine(ThreadKind::Vcpu) {
        Ok(()) => run_confined(vcpu, index, shared),
        Err(error) => shared.stop(StopReason::Failed(error.to_string())),
    }
}

fn run_confined(mut vcpu: VcpuFd, index: usize, shared: &VcpuShared) {
    IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
    let reason = if shared.may_run(&vcpu, index) {
        run_until_stopped(&mut vcpu, index, shared)
    } else {
        None
    };
    IMMEDIATE_EXIT.set(std::ptr::null_mut());
    if let Some(reason) = reason {
        shared.stop(reason);
    }
}

/// None: the thread was asked to end.
fn run_until_stopped(vcpu: &mut VcpuFd, index: usize, shared: &VcpuShared) -> Option<StopReason> {
    loop {
        match vcpu.run() {
            Ok(exit) => {
                if let Verdict::Stop(reason) = shared.handle(exit) {
                    return Some(reason);
                }
            }
            // EAGAIN: an application processor that waits for its start-up message.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                vcpu.set_kvm_immediate_exit(0);
                if !shared.may_run(vcpu, index) {
                    return None;
                }
            }
            Err(error) => return Some(StopReason::Failed(format!("KVM_RUN: {error}"))),
        }
    }
}
