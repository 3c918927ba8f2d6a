// SPDX-License-Identifier: Apache-2.0
//! The boot recipe and the event loop of one VM.

use std::borrow::Cow;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use linux_loader::loader::{Cmdline, load_cmdline};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::arch::boot_params::Range;
use crate::arch::{boot_params, cpuid, layout, mptable, registers};
use crate::boot::{initramfs, kernel};
use crate::bus::Bus;
use crate::config::{ConfigError, VmConfig};
use crate::devices::ioapic::Ioapic;
use crate::devices::uart::Uart;
use crate::devices::virtio::balloon::{Balloon, REPORTING as BALLOON_REPORTING};
use crate::devices::virtio::fs::{Fs, SavedFiles};
use crate::devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET, TransportState};
use crate::devices::virtio::net::{Net, NetworkCard};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{HostStream, TX as VSOCK_TRANSMIT, Vsock};
use crate::devices::virtio::{Kicks, VirtioDevice};
use crate::memory::{self, GuestMemory};
use crate::plan::{self, NETWORK_CARDS, Slot, SlotKind, VmPlan};
use crate::snapshot::{
    self, Content, MachineState, MemoryId, Running, SnapshotError, SnapshotFiles,
};
use crate::vcpu::{StopReason, VcpuShared, VcpuThreads};
use crate::vcpu_state::VcpuState;
use crate::vm::{Vm, VmError, failed};
use crate::working_set::WorkingSet;

/// The address of the guest on the vsock device: the first that is not reserved. Each VM has a device of its own, so
/// all guests can have the same.
const GUEST_CID: u64 = 3;

/// Between the last report of free memory, of which there may be several, and the snapshot.
const REST_AFTER_REPORT: Duration = Duration::from_millis(50);
/// Between the call of the agent and the snapshot, if there is no report: a small guest has nothing to report.
const REST_WITHOUT_REPORT: Duration = Duration::from_secs(3);

/// The mount tag of the file system device.
pub const SHARE_TAG: &str = "share";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("vm configuration")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("guest memory")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("guest files")]
    Boot(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot create {0}")]
    Create(&'static str, #[source] std::io::Error),
    #[error("cannot share files")]
    Share(#[source] std::io::Error),
    #[error("files of the container")]
    Files(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("more than {NETWORK_CARDS} network cards")]
    TooManyCards,
    #[error("cannot connect a stream to port {0}")]
    Stream(u32, #[source] std::io::Error),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("event loop")]
    EventLoop(#[source] std::io::Error),
}

/// What happened in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// Both directions of a stream are over and its bytes are with the host's file descriptor.
    StreamClosed { port: u32 },
    /// The VM does not run any more.
    Stopped(StopReason),
    /// The snapshot that [`Machine::save_when_ready`] asked for is written, or could not be.
    Saved(Result<(), String>),
}

/// Who an epoll event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    VcpuStop,
    Device { slot: usize },
    Kick { slot: usize, queue: usize },
}

/// One virtual machine. Owned by the thread that runs its event loop. Dropping it ends the VM.
#[derive(Debug)]
pub struct Machine {
    vcpu_threads: Option<VcpuThreads>,
    vcpus: Vec<VcpuFd>,
    shared: Arc<VcpuShared>,
    uart: Arc<Uart>,
    files: Arc<Mutex<Fs>>,
    vsock: Arc<Mutex<Vsock>>,
    balloon: Arc<Mutex<Balloon>>,
    /// Slot and device.
    network: Vec<(usize, Arc<Mutex<Net>>)>,
    transports: Vec<Arc<MmioTransport>>,
    epoll: Epoll,
    sources: Vec<Source>,
    stop_reported: bool,
    vsock_transport: Arc<MmioTransport>,
    ioapic: Arc<Ioapic>,
    plan: VmPlan,
    /// To be filled when the agent has called the host and the guest has come to rest.
    pending_save: Option<SnapshotFiles>,
    /// When that will be.
    save_at: Option<Instant>,
    /// The guest has reported free memory.
    reported: bool,
    /// The devices of a restored VM, until it is started.
    restored: Option<Vec<TransportState>>,
    /// What the vCPU threads of a restored VM begin with.
    working_set: Option<WorkingSet>,
    /// The file server's part of a restored VM with a container in it, until it has its root.
    restored_files: Option<SavedFiles>,
    /// The devices have been in use when they were saved.
    was_running: bool,
    /// The registers of the vCPUs, while they are frozen.
    frozen: Option<Vec<VcpuState>>,
    content: Content,
    vm: Vm,
    memory: GuestMemory,
}

/// Where a VM begins.
enum Origin {
    Boot { entry: u64 },
    Snapshot(Box<MachineState>),
}

impl Machine {
    /// Builds the VM with kernel and initramfs in place. Nothing runs.
    pub fn new(config: VmConfig) -> Result<Machine, Error> {
        let plan = plan::plan(config.vcpus, config.memory_mib, &config.command_line)?;
        let memory = memory::create(&plan.memory).map_err(|error| Error::Memory(error.into()))?;
        let entry = load_guest(&memory, &plan, &config)?;
        Machine::build(config.kvm, plan, memory, Origin::Boot { entry }, None)
    }

    /// Builds the VM that [`Machine::save_when_ready`] has saved: the same configuration, the same host. Nothing runs.
    /// The memory file stays mapped, and must not change as long as the VM lives. `working_set` is what
    /// [`Machine::working_set`] has written of another one; anything else in it is taken for an empty one.
    pub fn restore(
        config: VmConfig,
        mut files: SnapshotFiles,
        working_set: &[u8],
    ) -> Result<Machine, Error> {
        let state = MachineState::read(&mut files.state)?;
        if state.running.is_some() {
            return Err(SnapshotError::Shape.into());
        }
        let mut machine = Machine::from_snapshot(config, state, files.memory)?;
        machine.working_set = WorkingSet::decode(working_set, &machine.memory).ok();
        Ok(machine)
    }

    /// Which pages the guest has used since it was restored, for those that are restored after it.
    pub fn working_set(&self) -> Result<Vec<u8>, Error> {
        Ok(WorkingSet::of(&self.memory, &self.content)?.encode()?)
    }

    /// Builds the VM that [`Machine::save`] has saved, and returns what its owner had to say then. Each stream that was
    /// open goes on when [`Machine::accept_stream`] gives its port a host end, and is reset if it gets none before the
    /// start.
    pub fn restore_running(
        config: VmConfig,
        mut files: SnapshotFiles,
    ) -> Result<(Machine, Vec<u8>), Error> {
        let mut state = MachineState::read(&mut files.state)?;
        let Some(running) = &mut state.running else {
            return Err(SnapshotError::NotRunning.into());
        };
        let owner = std::mem::take(&mut running.owner);
        let machine = Machine::from_snapshot(config, state, files.memory)?;
        Ok((machine, owner))
    }

    fn from_snapshot(
        config: VmConfig,
        state: MachineState,
        memory_file: File,
    ) -> Result<Machine, Error> {
        let plan = plan::plan(config.vcpus, config.memory_mib, &config.command_line)?;
        if state.plan != format!("{plan:?}")
            || state.vcpus.len() != usize::from(plan.vcpus)
            || state.transports.len() != plan.slots.len()
        {
            return Err(SnapshotError::Shape.into());
        }
        let memory = memory::create(&plan.memory).map_err(|error| Error::Memory(error.into()))?;
        map_snapshot(&memory, &plan, &memory_file, &state.memory_id)?;
        let origin = Origin::Snapshot(Box::new(state));
        Machine::build(config.kvm, plan, memory, origin, Some(memory_file))
    }

    fn build(
        kvm: File,
        plan: VmPlan,
        memory: GuestMemory,
        origin: Origin,
        memory_file: Option<File>,
    ) -> Result<Machine, Error> {
        let vm = Vm::new(kvm, &memory)?;
        let vcpus = create_vcpus(&vm, &plan, &origin)?;
        let devices = Devices::new(&plan, &memory)?;
        let epoll = Epoll::new().map_err(Error::EventLoop)?;
        let ioapic = Arc::new(Ioapic::new(vm.route_setter()));
        let bus = wire(&vm, &plan, &devices.transports, &ioapic)?;
        let (restored, running) = match origin {
            Origin::Boot { .. } => (None, None),
            Origin::Snapshot(state) => {
                ioapic.restore(&state.ioapic);
                vm.set_clock(&state.clock)?;
                (Some(state.transports), state.running)
            }
        };
        let was_running = running.is_some();
        let mut restored_files = None;
        if let Some(running) = running {
            if !lock(&devices.vsock).restore_streams(running.streams) {
                return Err(SnapshotError::Damaged.into());
            }
            restored_files = Some(running.files);
        }
        let content =
            Content::new(memory_file).map_err(|error| Error::Create("a page map", error))?;
        let uart = Arc::new(Uart::default());
        let shared = VcpuShared::new(bus, uart.clone(), vm.saved_msrs().to_vec())
            .map_err(|error| Error::Create("an event fd", error))?;
        let mut machine = Machine {
            vcpu_threads: None,
            vcpus,
            shared: Arc::new(shared),
            uart,
            files: devices.files,
            vsock: devices.vsock,
            balloon: devices.balloon,
            network: devices.network,
            vsock_transport: devices.transports[slot_of(&plan, SlotKind::Vsock)].clone(),
            transports: devices.transports,
            epoll,
            sources: Vec::new(),
            stop_reported: false,
            ioapic,
            plan,
            pending_save: None,
            save_at: None,
            reported: false,
            restored,
            working_set: None,
            restored_files,
            was_running,
            frozen: None,
            content,
            vm,
            memory,
        };
        machine.register_sources().map_err(Error::EventLoop)?;
        Ok(machine)
    }

    /// Plugs the file system slot: `root` becomes the root of the share [`SHARE_TAG`]. Nobody but the guest is expected to
    /// change files below the names in `private`, so that it may cache them for long. To be called in the jail, when
    /// the limit of open files is final.
    pub fn share_files(&mut self, root: OwnedFd, private: &[&str]) -> Result<(), Error> {
        let mut files = lock(&self.files);
        files.plug(root, private).map_err(Error::Share)?;
        match self.restored_files.take() {
            Some(saved) => files
                .restore_files(&saved)
                .map_err(|error| Error::Files(error.into())),
            None => Ok(()),
        }
    }

    /// The container is over. What its guest has not written yet it still writes, but as with any process that has
    /// ended, the host brings it to its disks in its own time: a busy disk must not hold up the exit.
    pub fn leave_disks_to_host(&self) {
        lock(&self.files).leave_disks_to_host();
    }

    /// Plugs a network card, whether the guest runs or not. Drivers see it when the guest has called the host. Returns the number of its slot, which the guest's driver is
    /// then to be bound to: `virtio-mmio.N` on its platform bus.
    pub fn plug_network(&mut self, card: NetworkCard) -> Result<usize, Error> {
        let free = |(_, device): &&(usize, Arc<Mutex<Net>>)| !lock(device).is_plugged();
        let (slot, device) = self.network.iter().find(free).ok_or(Error::TooManyCards)?;
        let (slot, device) = (*slot, device.clone());
        let transport = self.transports[slot].clone();
        connect(&self.vm, &self.plan.slots[slot], &transport)?;
        let tap = lock(&device).plug(card);
        self.watch_kicks(slot).map_err(Error::EventLoop)?;
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.watch(tap, Source::Device { slot }, edges)
            .map_err(Error::EventLoop)?;
        Ok(slot)
    }

    /// Lets the guest connect once to `port` of the host; bytes go between that connection and `stream`.
    pub fn accept_stream(&mut self, port: u32, stream: HostStream) -> Result<(), Error> {
        lock(&self.vsock)
            .accept_stream(port, stream)
            .map_err(|error| Error::Stream(port, error))
    }

    /// Forgets a stream and resets its connection.
    pub fn close_stream(&mut self, port: u32) {
        lock(&self.vsock).close_stream(port);
    }

    /// Forgets a stream if the guest has not connected to its port; says whether.
    pub fn close_unopened(&mut self, port: u32) -> bool {
        lock(&self.vsock).close_unopened(port)
    }

    /// Asks the guest to give `mib` MiB of its memory back and leave it alone. It does so in its own time.
    pub fn set_balloon(&mut self, mib: u32) {
        const PAGES_OF_A_MIB: u32 = 256;
        lock(&self.balloon).set_target(mib.saturating_mul(PAGES_OF_A_MIB));
    }

    /// Saves the VM when the guest has called the host over vsock, so that it is up and nothing of the host is in it yet,
    /// and has then come to rest. [`MachineEvent::Saved`] tells the end; the VM goes on in any case.
    pub fn save_when_ready(&mut self, files: SnapshotFiles) {
        self.pending_save = Some(files);
    }

    /// Starts all threads there will be, to be called in the jail, and the devices of a restored VM. The threads are
    /// confined; the caller's own is its business. No vCPU runs until [`Machine::resume`].
    pub fn start(&mut self) -> Result<(), Error> {
        lock(&self.files)
            .start()
            .map_err(|error| Error::Create("a file server thread", error))?;
        lock(&self.vsock).abandon_unclaimed();
        for (transport, state) in self
            .transports
            .iter()
            .zip(self.restored.take().iter().flatten())
        {
            transport.restore(state).map_err(|_| SnapshotError::Shape)?;
            if self.was_running {
                // One may have been on its way when the vCPUs were saved.
                transport.raise_again();
            }
        }
        let vcpus = std::mem::take(&mut self.vcpus);
        let working_set = self.working_set.take().unwrap_or_default();
        let first = Arc::new((working_set, self.memory.clone()));
        let prepare = move |vcpu: &VcpuFd, part| first.0.prepare(&first.1, vcpu, part);
        let threads = VcpuThreads::start(vcpus, self.shared.clone(), prepare)
            .map_err(|error| Error::Create("a vCPU thread", error))?;
        self.vcpu_threads = Some(threads);
        Ok(())
    }

    /// Stops the vCPUs, and everything that is done for the guest, until [`Machine::thaw`].
    pub fn freeze(&mut self) -> Result<(), Error> {
        let Some(threads) = &self.vcpu_threads else {
            return Err(SnapshotError::Busy.into());
        };
        let vcpus = match threads.pause_and_save() {
            Ok(vcpus) => vcpus,
            Err(error) => {
                threads.resume();
                return Err(error.into());
            }
        };
        self.frozen = Some(vcpus);
        lock(&self.files).hold();
        self.vsock_transport.process_queue(VSOCK_TRANSMIT);
        Ok(())
    }

    /// Saves the frozen VM. `owner` comes back when it is restored.
    pub fn save(&mut self, files: SnapshotFiles, owner: Vec<u8>) -> Result<(), Error> {
        let vcpus = self.frozen.take().ok_or(SnapshotError::NotRunning)?;
        let saved = lock(&self.files).save_files();
        let running = Running {
            cpuid: self.vm.cpuid().as_slice().to_vec(),
            streams: lock(&self.vsock).save_streams(),
            files: saved.map_err(|error| Error::Files(error.into()))?,
            owner,
        };
        self.write(files, vcpus, Some(running))
    }

    /// The VM goes on.
    pub fn thaw(&mut self) {
        self.frozen = None;
        lock(&self.files).release();
        self.resume();
    }

    /// Returns when no vCPU is in the guest.
    pub fn pause(&mut self) {
        if let Some(threads) = &self.vcpu_threads {
            threads.pause();
        }
    }

    pub fn resume(&mut self) {
        if let Some(threads) = &self.vcpu_threads {
            threads.resume();
        }
    }

    /// Writes what the guest prints on its boot console to `file`: for debugging, since it is as much as the guest likes.
    pub fn echo_console(&mut self, file: File) {
        self.uart.echo(file);
    }

    /// The last output of the guest on its boot console, printable characters only.
    pub fn console_tail(&self) -> String {
        self.uart.tail()
    }

    /// Does what is to be done now; to be called when the machine's file descriptor is readable. Never blocks.
    pub fn dispatch(&mut self) -> Result<Vec<MachineEvent>, Error> {
        let mut ready = [EpollEvent::default(); 16];
        let count = loop {
            match self.epoll.wait(0, &mut ready) {
                Ok(count) => break count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::EventLoop(error)),
            }
        };
        let mut events = Vec::new();
        for event in &ready[..count] {
            let token = usize::try_from(event.data()).unwrap_or(usize::MAX);
            match self.sources.get(token) {
                Some(Source::Kick { slot, queue }) => {
                    let (slot, queue) = (*slot, *queue);
                    self.kicked(slot, queue);
                    self.await_rest(slot, queue);
                }
                Some(Source::Device { slot }) => self.transports[*slot].process_event(),
                Some(Source::VcpuStop) | None => self.report_stop(&mut events),
            }
        }
        events.extend(self.save_if_due());
        let closed = lock(&self.vsock).take_closed();
        events.extend(
            closed
                .into_iter()
                .map(|port| MachineEvent::StreamClosed { port }),
        );
        Ok(events)
    }

    /// Until the snapshot is made, the vsock device is left alone: it must not know of the guest's call.
    fn kicked(&self, slot: usize, queue: usize) {
        let transport = &self.transports[slot];
        let vsock = Arc::ptr_eq(transport, &self.vsock_transport);
        if vsock && self.pending_save.is_some() {
            let _ = transport.kicks()[queue].read();
            return;
        }
        if vsock && queue == VSOCK_TRANSMIT {
            self.show_cards();
        }
        transport.process_queue(queue);
    }

    /// The agent calls the host: the guest has booted.
    fn show_cards(&self) {
        for (_, device) in &self.network {
            lock(device).show();
        }
    }

    /// The guest has not booted in this VM.
    pub fn is_restored(&self) -> bool {
        self.content.has_base()
    }

    /// When [`Machine::dispatch`] has something to do without an event.
    pub fn deadline(&self) -> Option<Instant> {
        self.save_at
    }

    /// Two seconds after its start, Linux goes through all free memory once to report it, and each restored guest would
    /// do so again if it was saved before: in memory that it would then need copies of.
    fn await_rest(&mut self, slot: usize, queue: usize) {
        let kind = self.plan.slots[slot].kind;
        let reports = kind == SlotKind::Balloon && queue == BALLOON_REPORTING;
        if self.pending_save.is_none() {
            return;
        }
        self.reported |= reports;
        if self.vsock_transport.has_chains(VSOCK_TRANSMIT) && (reports || self.save_at.is_none()) {
            let wait = match self.reported {
                true => REST_AFTER_REPORT,
                false => REST_WITHOUT_REPORT,
            };
            self.save_at = Some(Instant::now() + wait);
        }
    }

    fn save_if_due(&mut self) -> Option<MachineEvent> {
        self.save_at.take_if(|at| *at <= Instant::now())?;
        let files = self.pending_save.take()?;
        let result = self.save_ready(files).map_err(|error| error.to_string());
        self.show_cards();
        // The call that was waited for is now to be answered.
        for queue in 0..=VSOCK_TRANSMIT {
            self.vsock_transport.process_queue(queue);
        }
        Some(MachineEvent::Saved(result))
    }

    fn save_ready(&self, files: SnapshotFiles) -> Result<(), Error> {
        let Some(threads) = &self.vcpu_threads else {
            return Err(SnapshotError::Busy.into());
        };
        let saved = threads.pause_and_save().map_err(Error::from);
        let result = saved.and_then(|vcpus| self.write(files, vcpus, None));
        threads.resume();
        result
    }

    fn write(
        &self,
        mut files: SnapshotFiles,
        mut vcpus: Vec<VcpuState>,
        running: Option<Running>,
    ) -> Result<(), Error> {
        VcpuState::share_tsc(&mut vcpus);
        let transports = self.transports.iter().map(|transport| transport.save());
        let state = MachineState {
            plan: format!("{:?}", self.plan),
            memory_id: self.content.write(&self.memory, &files.memory)?,
            vcpus,
            clock: self.vm.clock()?,
            ioapic: self.ioapic.save(),
            transports: transports
                .collect::<Result<_, _>>()
                .map_err(|_| SnapshotError::Busy)?,
            running,
        };
        Ok(state.write(&mut files.state)?)
    }

    fn report_stop(&mut self, events: &mut Vec<MachineEvent>) {
        let _ = self.shared.stop_event.read();
        if let (Some(reason), false) = (self.shared.stop_reason(), self.stop_reported) {
            self.stop_reported = true;
            events.push(MachineEvent::Stopped(reason));
        }
    }

    fn register_sources(&mut self) -> std::io::Result<()> {
        use std::os::fd::AsRawFd;
        let stop = self.shared.stop_event.as_raw_fd();
        self.watch(stop, Source::VcpuStop, EventSet::IN)?;
        for slot in 0..self.transports.len() {
            if self.plan.slots[slot].kind == SlotKind::Network {
                continue;
            }
            let (kicks, event_source) = {
                let device = self.transports[slot].device();
                (device.kicks(), device.event_source())
            };
            if kicks == Kicks::EventLoop {
                self.watch_kicks(slot)?;
            }
            if let Some(fd) = event_source {
                self.watch(fd, Source::Device { slot }, EventSet::IN)?;
            }
        }
        Ok(())
    }

    fn watch_kicks(&mut self, slot: usize) -> std::io::Result<()> {
        use std::os::fd::AsRawFd;
        let transport = self.transports[slot].clone();
        for (queue, kick) in transport.kicks().iter().enumerate() {
            let source = Source::Kick { slot, queue };
            self.watch(kick.as_raw_fd(), source, EventSet::IN)?;
        }
        Ok(())
    }

    fn watch(&mut self, fd: RawFd, source: Source, events: EventSet) -> std::io::Result<()> {
        let token = self.sources.len() as u64;
        self.sources.push(source);
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}

impl AsFd for Machine {
    /// Readable when [`Machine::dispatch`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the epoll instance is open as long as `self`, from which the lifetime comes.
        unsafe { BorrowedFd::borrow_raw(self.epoll.as_raw_fd()) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Brings kernel, initramfs, command line and tables into guest memory. Returns the entry point.
fn load_guest(memory: &GuestMemory, plan: &VmPlan, config: &VmConfig) -> Result<u64, Error> {
    let top = plan.low_memory_end();
    let kernel =
        kernel::load(memory, &config.kernel, top).map_err(|error| Error::Boot(error.into()))?;
    let initramfs = initramfs::load(memory, &config.initramfs, kernel.end, top)
        .map_err(|error| Error::Boot(error.into()))?;
    let mut command_line =
        Cmdline::new(layout::COMMAND_LINE_SIZE).map_err(|error| Error::Boot(error.into()))?;
    command_line
        .insert_str(&plan.command_line)
        .map_err(|error| Error::Boot(error.into()))?;
    load_cmdline(memory, GuestAddress(layout::COMMAND_LINE), &command_line)
        .map_err(|error| Error::Boot(error.into()))?;
    let table = mptable::mptable(plan.vcpus);
    memory
        .write_slice(&table, GuestAddress(layout::MPTABLE))
        .and_then(|()| boot_params::write(memory, initramfs, &plan.ram))
        .map_err(|error| Error::Memory(error.into()))?;
    Ok(kernel.entry)
}

/// The guest's memory becomes a private view of a snapshot's memory file. Where the file has holes it stays anonymous:
/// a page that is first written there costs one page and no copy, and the file's cache does not grow.
fn map_snapshot(
    memory: &GuestMemory,
    plan: &VmPlan,
    file: &File,
    id: &MemoryId,
) -> Result<(), Error> {
    let size = plan.memory.iter().map(|range| range.size).sum();
    snapshot::check_memory(file, size, id)?;
    let mut offset = 0;
    for range in &plan.memory {
        for extent in snapshot::extents(file, offset, range.size)? {
            let part = Range {
                start: range.start + (extent.start - offset),
                size: extent.end - extent.start,
            };
            memory::map_file(memory, part, file, extent.start)
                .map_err(|error| Error::Memory(error.into()))?;
        }
        offset += range.size;
    }
    Ok(())
}

fn slot_of(plan: &VmPlan, kind: SlotKind) -> usize {
    plan.slots
        .iter()
        .position(|slot| slot.kind == kind)
        .expect("each VM has one slot of each kind")
}

fn create_vcpus(vm: &Vm, plan: &VmPlan, origin: &Origin) -> Result<Vec<VcpuFd>, Error> {
    let mut vcpus = Vec::with_capacity(usize::from(plan.vcpus));
    let supported = supported_cpuid(vm, origin)?;
    for index in 0..plan.vcpus {
        let vcpu = vm.create_vcpu(index)?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, index, plan.vcpus))
            .map_err(failed("set the CPUID of a vCPU"))?;
        match origin {
            Origin::Boot { entry } => boot_vcpu(&vcpu, index, *entry)?,
            Origin::Snapshot(state) => state.vcpus[usize::from(index)].restore(&vcpu)?,
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// What the guest may be told that its vCPUs can do: what it was told before, if this host has that.
fn supported_cpuid<'a>(vm: &'a Vm, origin: &Origin) -> Result<Cow<'a, CpuId>, Error> {
    let running = match origin {
        Origin::Boot { .. } => None,
        Origin::Snapshot(state) => state.running.as_ref(),
    };
    let Some(running) = running else {
        return Ok(Cow::Borrowed(vm.cpuid()));
    };
    cpuid::check(&running.cpuid, vm.cpuid()).map_err(SnapshotError::Cpu)?;
    CpuId::from_entries(&running.cpuid)
        .map(Cow::Owned)
        .map_err(|_| SnapshotError::Damaged.into())
}

fn boot_vcpu(vcpu: &VcpuFd, index: u8, entry: u64) -> Result<(), VmError> {
    registers::set_msrs(vcpu).map_err(failed("set the MSRs of a vCPU"))?;
    if index == 0 {
        registers::set_boot_registers(vcpu, entry)
            .map_err(failed("set the registers of the boot CPU"))?;
    }
    Ok(())
}

/// The virtio devices: those that the machine talks to by their own type, and the transport of each slot.
struct Devices {
    files: Arc<Mutex<Fs>>,
    vsock: Arc<Mutex<Vsock>>,
    balloon: Arc<Mutex<Balloon>>,
    network: Vec<(usize, Arc<Mutex<Net>>)>,
    transports: Vec<Arc<MmioTransport>>,
}

impl Devices {
    fn new(plan: &VmPlan, memory: &GuestMemory) -> Result<Devices, Error> {
        let size = plan.memory.iter().map(|range| range.size).sum();
        let files = Fs::new(SHARE_TAG, size)
            .map_err(|error| Error::Create("the file system device", error))?;
        let vsock =
            Vsock::new(GUEST_CID).map_err(|error| Error::Create("the vsock device", error))?;
        let files = Arc::new(Mutex::new(files));
        let vsock = Arc::new(Mutex::new(vsock));
        let balloon = Arc::new(Mutex::new(Balloon::new()));
        let mut network = Vec::new();
        let mut transports = Vec::with_capacity(plan.slots.len());
        for (index, slot) in plan.slots.iter().enumerate() {
            let device: Arc<Mutex<dyn VirtioDevice>> = match slot.kind {
                SlotKind::Files => files.clone(),
                SlotKind::Vsock => vsock.clone(),
                SlotKind::Entropy => Arc::new(Mutex::new(Rng::new())),
                SlotKind::Balloon => balloon.clone(),
                SlotKind::Network => {
                    let card = Arc::new(Mutex::new(Net::new()));
                    network.push((index, card.clone()));
                    card
                }
            };
            let transport = MmioTransport::new(device, memory.clone())
                .map_err(|error| Error::Create("an event fd", error))?;
            transports.push(Arc::new(transport));
        }
        Ok(Devices {
            files,
            vsock,
            balloon,
            network,
            transports,
        })
    }
}

/// Puts the devices on the bus and connects their event fds to KVM: the last calls before the vCPUs run.
fn wire(
    vm: &Vm,
    plan: &VmPlan,
    transports: &[Arc<MmioTransport>],
    ioapic: &Arc<Ioapic>,
) -> Result<Bus, Error> {
    let mut bus = Bus::default();
    for (slot, transport) in plan.slots.iter().zip(transports) {
        bus.add(slot.address, layout::VIRTIO_SLOT_SIZE, transport.clone());
        if slot.kind != SlotKind::Network {
            connect(vm, slot, transport)?;
        }
    }
    bus.add(layout::IOAPIC, layout::IOAPIC_SIZE, ioapic.clone());
    Ok(bus)
}

fn connect(vm: &Vm, slot: &Slot, transport: &MmioTransport) -> Result<(), Error> {
    vm.connect_interrupt(transport.interrupt().line(), slot.pin)?;
    for (queue, kick) in (0u32..).zip(transport.kicks()) {
        vm.connect_kick(kick, slot.address + QUEUE_NOTIFY_OFFSET, queue)?;
    }
    Ok(())
}
