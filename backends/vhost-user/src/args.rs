//! Arguments about the frontend that every device process has.

use clap::Args;
use virtio::memory::Trust;

/// What is accepted as guest memory.
#[derive(Args, Clone, Copy, Debug)]
pub struct MemoryArgs {
    /// Accept guest memory that is not sealed against shrinking, such as cloud-hypervisor's or user-mode Linux's, and sockets
    /// in place of event descriptors, as the latter has them. Whoever owns them can then end or stop this process
    #[arg(long)]
    pub allow_unsealed_memory: bool,
}

impl MemoryArgs {
    /// As the backend wants it said.
    pub fn trust(self) -> Trust {
        if self.allow_unsealed_memory { Trust::Unsealed } else { Trust::Sealed }
    }
}
