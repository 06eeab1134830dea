//! `outboard-peer-rng`: a virtio-rng backend as others write them, on the crates `vhost-user-backend` and `virtio-queue`.
//!
//! Our frontend and our attacks are tried against it, so that our two ends cannot agree on a misreading. It shares no line with
//! our device processes, and is written as that crate's users write theirs: serve one frontend, then begin again.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use clap::Parser;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Guest = GuestMemoryAtomic<GuestMemoryMmap>;

/// Serves random numbers to one frontend after the other (virtio-rng over vhost-user).
#[derive(Debug, Parser)]
#[command(name = "outboard-peer-rng", version)]
struct Args {
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
}

struct Rng {
    source: File,
    memory: Option<Guest>,
    event_idx: bool,
}

impl Rng {
    /// Fills what can be written of one chain; gives the number of bytes.
    fn fill(&mut self, chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>) -> io::Result<u32> {
        let memory = chain.memory().clone();
        let mut written = 0;
        for one in chain.filter(|one| one.is_write_only()) {
            let len = usize::try_from(one.len()).map_err(io::Error::other)?;
            memory.read_exact_volatile_from(one.addr(), &mut self.source, len).map_err(io::Error::other)?;
            written += one.len();
        }
        Ok(written)
    }

    fn serve(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let Some(memory) = self.memory.clone() else { return Ok(()) };
        let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.memory()).map_err(io::Error::other)?.collect();
        if chains.is_empty() {
            return Ok(());
        }
        for chain in chains {
            let head = chain.head_index();
            let written = self.fill(chain).unwrap_or(0);
            vring.add_used(head, written).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }
}

impl VhostUserBackendMut for Rng {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        let ring = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        1 << VIRTIO_F_VERSION_1 | ring | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Guest) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&mut self, event: u16, set: EventSet, vrings: &[VringRwLock], _thread: usize) -> io::Result<()> {
        let vring = vrings.get(usize::from(event)).filter(|_| set == EventSet::IN);
        let vring = vring.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "an event of no queue"))?;
        if !self.event_idx {
            return self.serve(vring);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.serve(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    loop {
        let source = File::open("/dev/urandom").context("Cannot open /dev/urandom")?;
        let rng = Arc::new(Mutex::new(Rng { source, memory: None, event_idx: false }));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("peer-rng".to_owned(), rng, memory);
        let mut daemon = daemon.map_err(|error| anyhow::anyhow!("Cannot make the daemon: {error}"))?;
        if let Err(error) = daemon.serve(&args.socket_path) {
            eprintln!("The connection ended: {error}");
        }
    }
}
