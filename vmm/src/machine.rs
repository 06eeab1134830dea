//! How a machine comes to be, in three steps that are three types.
//!
//! 1. [`Opened::open`]: everything that has a path or was inherited is opened. Wrong files are told here, before anything
//!    is started. Afterwards no path is needed again, not even for a reset.
//! 2. [`Opened::build`]: guest memory with the kernel in it, the KVM machine, the processors ([`Cpu`], one thread each,
//!    which the caller starts). It reads files of the person who starts the machine, nothing of a guest or a backend, so
//!    it comes before the process is confined.
//! 3. [`Machine::start`], on the confined control thread: greets the backends, fills the PCI slots, and returns the
//!    [`Control`] loop that lets the processors run.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::{self, Scope, ScopedJoinHandle};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;

use crate::acpi::Platform;
use crate::args::{Config, DeviceSpec, Reach, SerialSpec};
use crate::bus::Bus;
use crate::control::socket::ControlSocket;
use crate::control::{self, Board, Control};
use crate::cpu::gate::Gate;
use crate::cpu::{self, Cpu, Shared, cpuid};
use crate::events::Doorbell;
use crate::kernel::{self, Images};
use crate::kvm::{self, Chips, Event, Hypervisor, Vm};
use crate::memory::{self, Memory};
use crate::pci::{self, Allocator, Function, Pci};
use crate::pm::{self, Power};
use crate::serial::{self, Com1, Terminal};
use crate::virtio::remote::{self, FIRST_ROUTE, Remote, Site};
use crate::{cmos, i8042, pvpanic};

/// A machine could not be made or run.
#[derive(Debug, Error)]
pub enum Error {
    /// Kernel or initrd.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] remote::Error),
    /// A device's socket.
    #[error("Cannot reach device {device}")]
    Reach {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor.
    #[error("Cannot use descriptor {fd} as {what}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// For what.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something small the kernel would not give.
    #[error("Cannot {doing}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest cannot go on, and it is not its fault.
    #[error("{0}")]
    Broken(String),
}

pub(crate) fn host(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { doing, source }
}

/// Of threads that help at the start. They call nothing deep; the C library gives their stacks to processors later.
const STACK: usize = 256 * 1024;

/// Step 1: all descriptors, no machine yet.
#[derive(Debug)]
pub struct Opened {
    config: Config,
    kvm: Kvm,
    /// /dev/kvm is there but is served without the processor's help.
    software_kvm: bool,
    images: Images,
    streams: Vec<UnixStream>,
    /// Output and input of COM1.
    serial: Option<(OwnedFd, Option<OwnedFd>)>,
    control: Option<ControlSocket>,
}

impl Opened {
    /// Opens kernel, initrd, /dev/kvm, sockets and descriptors, in the order in which people make mistakes.
    ///
    /// `inherit` takes over a descriptor by its number.
    pub fn open(config: Config, inherit: impl Fn(RawFd) -> io::Result<OwnedFd>) -> Result<Self, Error> {
        let inherit = move |fd, what| inherit(fd).map_err(|source| Error::Descriptor { fd, what, source });
        let images = Images::open(&config.kernel, config.initrd.as_deref(), &config.cmdline)?;
        images.place(config.memory)?;
        let software_kvm = Path::new("/sys/module/kvm_pvm").exists();
        let kvm = kvm::open()?;
        let streams = config.devices.iter().map(|device| reach(device, &inherit)).collect::<Result<_, _>>()?;
        let serial = stdio(&config, &inherit)?;
        let control = config.control_fd.map(|fd| inherit(fd, "the control socket")).transpose()?.map(ControlSocket::new);
        Ok(Self { config, kvm, software_kvm, images, streams, serial, control })
    }

    /// Step 2: memory with the kernel in it, board and processors.
    ///
    /// Three things that take milliseconds are done side by side: copying the kernel, which is work, and giving KVM
    /// memory and chips, which is waiting for other processors to have seen the change. The threads for it have ended when
    /// this returns, so that whoever confines the process still finds it with one.
    pub fn build(self) -> Result<(Machine, Vec<Cpu>, Arc<Shared>), Error> {
        kvm::install_kick_signal().map_err(host("install a signal handler"))?;
        // Lives as long as the process: KVM and the processors' threads refer to it until the very end.
        let memory: &'static Memory = Box::leak(Box::new(Memory::new(self.config.memory)?));
        let vm = Arc::new(Vm::new(&self.kvm)?);
        let supported = cpuid::supported(&self.kvm)?;
        let (cpus, chips, loaded) = thread::scope(|scope| {
            let loading = aside(scope, || self.images.load(memory))?;
            let giving = aside(scope, || vm.add_memory(memory))?;
            vm.add_chips()?;
            let cpus = processors(&self.kvm, &vm, &supported, self.config.cpus)?;
            let chips = vm.snapshot()?;
            done(giving)??;
            Ok::<_, Error>((cpus, chips, done(loading)??))
        })?;
        let platform = Platform {
            cpus: self.config.cpus,
            mmio64: memory::mmio64(self.config.memory, cpuid::physical_bits(&supported)),
            serial: self.serial.is_some(),
        };
        let entry = control::describe(memory, &platform, loaded, &self.config.cmdline)?;
        cpus.iter().try_for_each(|cpu| cpu.enter(&entry))?;
        let doorbell = Arc::new(Doorbell::new().map_err(host("make an event descriptor"))?);
        let shared = Arc::new(Shared { bus: OnceLock::new(), gate: Gate::default(), doorbell });
        let machine = Machine { opened: self, memory, vm, chips, platform, shared: Arc::clone(&shared) };
        Ok((machine, cpus, shared))
    }
}

/// Does a part of the work on another thread.
fn aside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).map_err(host("start a thread"))
}

fn done<T>(part: ScopedJoinHandle<'_, T>) -> Result<T, Error> {
    part.join().map_err(|_| Error::Broken("A part of the machine was not made: this is a bug".to_owned()))
}

/// Takes a descriptor over, for the purpose that is named.
type Inherit<'a> = dyn Fn(RawFd, &'static str) -> Result<OwnedFd, Error> + 'a;

fn processors(kvm: &Kvm, vm: &Vm, supported: &CpuId, count: u8) -> Result<Vec<Cpu>, kvm::Error> {
    let msrs = cpu::msr_indices(kvm)?;
    (0..count).map(|id| Cpu::new(vm, id, &cpuid::of_processor(supported, id, count)?, &msrs)).collect()
}

fn reach(device: &DeviceSpec, inherit: &Inherit<'_>) -> Result<UnixStream, Error> {
    let failed = |source| Error::Reach { device: device.name.clone(), source };
    match &device.reach {
        Reach::Socket(path) => {
            UnixStream::connect(path).map_err(|e| failed(io::Error::new(e.kind(), format!("{}: {e}", path.display()))))
        }
        Reach::Fd(fd) => {
            let socket = inherit(*fd, "the socket of a device")?;
            let kind = rustix::net::sockopt::socket_domain(&socket)
                .and_then(|domain| rustix::net::sockopt::socket_type(&socket).map(|kind| (domain, kind)));
            match kind.map_err(|e| failed(e.into()))? {
                (AddressFamily::UNIX, SocketType::STREAM) => Ok(UnixStream::from(socket)),
                _ => Err(failed(io::Error::other(format!("descriptor {fd} is not a Unix stream socket")))),
            }
        }
    }
}

fn stdio(config: &Config, inherit: &Inherit<'_>) -> Result<Option<(OwnedFd, Option<OwnedFd>)>, Error> {
    let (output, input) = match config.serial {
        SerialSpec::None => return Ok(None),
        SerialSpec::Stdio => (io::stdout().as_fd().try_clone_to_owned(), io::stdin().as_fd().try_clone_to_owned()),
        SerialSpec::Fd(fd) => {
            let both = inherit(fd, "COM1")?;
            (both.try_clone(), Ok(both))
        }
    };
    let output = output.map_err(host("use standard output as COM1"))?;
    Ok(Some((serial::own_description(output), input.ok())))
}

/// Step 3: a machine whose processors wait at the gate.
pub struct Machine {
    opened: Opened,
    memory: &'static Memory,
    vm: Arc<Vm>,
    chips: Chips,
    platform: Platform,
    shared: Arc<Shared>,
}

impl Machine {
    /// Greets every backend and fills the board. Nothing runs yet.
    pub fn start(self) -> Result<Control, Error> {
        let Self { opened, memory, vm, chips, platform, shared } = self;
        if opened.software_kvm {
            tracing::warn!("This machine's KVM (kvm_pvm) works without processor support: many kernels do not run on it");
        }
        let doorbell = Arc::clone(&shared.doorbell);
        let pci = Arc::new(Pci::new(Arc::clone(&doorbell)));
        let remotes = devices(&opened.config.devices, opened.streams, memory, &vm, &doorbell)?;
        let slots = remotes.iter().map(|r| Arc::clone(r.function()) as Arc<dyn Function>).collect();
        pci.populate(slots);

        let power = Arc::new(power(&vm, &doorbell));
        let serial = opened.serial.map(|(out, input)| com1(&vm, out, input)).transpose()?;
        let mut bus = Bus::new(Arc::clone(&pci));
        bus.attach(pci::CONFIG_PORT, 8, Arc::clone(&pci) as _);
        bus.attach(pm::EVENT_PORT, 8, Arc::clone(&power) as _);
        bus.attach(cmos::PORT, 2, Arc::new(cmos::Cmos::default()));
        bus.attach(pvpanic::PORT, 1, Arc::new(pvpanic::PvPanic(Arc::clone(&doorbell))));
        bus.attach(i8042::PORT, 1, Arc::new(i8042::I8042(doorbell)));
        if let Some((com1, _)) = &serial {
            bus.attach(serial::PORT, 8, Arc::clone(com1) as _);
        }
        let _ = shared.bus.set(bus);
        let board = Board { memory, vm, chips, pci, power, images: opened.images, cmdline: opened.config.cmdline, platform };
        let software_kvm = opened.software_kvm;
        Ok(Control::new(board, shared, remotes, serial, opened.control, opened.config.on_reboot, software_kvm))
    }
}

fn devices(
    specs: &[DeviceSpec],
    streams: Vec<UnixStream>,
    memory: &'static Memory,
    vm: &Arc<Vm>,
    doorbell: &Arc<Doorbell>,
) -> Result<Vec<Remote>, Error> {
    let (mut addresses, mut next_route) = (Allocator::default(), FIRST_ROUTE);
    let mut site = Site {
        memory,
        hypervisor: Arc::clone(vm) as Arc<dyn Hypervisor>,
        doorbell: Arc::clone(doorbell),
        addresses: &mut addresses,
        next_route: &mut next_route,
    };
    let pairs = specs.iter().zip(streams);
    Ok(pairs.map(|(spec, stream)| Remote::connect(spec, stream, &mut site)).collect::<Result<_, _>>()?)
}

fn power(vm: &Arc<Vm>, doorbell: &Arc<Doorbell>) -> Power {
    let vm = Arc::clone(vm);
    let line = move |up| vm.fd().set_irq_line(u32::from(pm::SCI), up).map_err(|e| io::Error::from_raw_os_error(e.errno()));
    Power::new(Box::new(line), Arc::clone(doorbell))
}

fn com1(vm: &Vm, output: OwnedFd, input: Option<OwnedFd>) -> Result<(Arc<Com1>, Terminal), Error> {
    let interrupt = Event::new().map_err(host("make an event descriptor"))?;
    vm.attach_irq(&interrupt, serial::IRQ).map_err(host("attach COM1's interrupt"))?;
    let com1 = Arc::new(Com1::new(interrupt).map_err(host("make COM1"))?);
    let terminal = Terminal::new(&com1, output, input);
    Ok((com1, terminal))
}
