//! Protocol features (vhost-user, "Protocol features"): the bits, and what each end of ours asks for or offers.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Bits;

/// The virtio feature bit that says "this peer knows protocol features". It never reaches the guest.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// The virtio feature bit `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// The device has several queues (`GET_QUEUE_NUM`).
pub const MQ: u64 = Bits::MQ.bits();
/// A request may ask for an acknowledgement.
pub const REPLY_ACK: u64 = Bits::REPLY_ACK.bits();
/// The backend may ask the frontend for something on a second socket.
pub const BACKEND_REQ: u64 = Bits::BACKEND_REQ.bits();
/// The configuration space is read and written by messages.
pub const CONFIG: u64 = Bits::CONFIG.bits();
/// Requests that are in flight are kept in shared memory and survive the backend.
pub const INFLIGHT_SHMFD: u64 = Bits::INFLIGHT_SHMFD.bits();
/// `RESET_DEVICE` exists.
pub const RESET_DEVICE: u64 = Bits::RESET_DEVICE.bits();
/// Memory regions are added and removed one by one.
pub const CONFIGURE_MEM_SLOTS: u64 = Bits::CONFIGURE_MEM_SLOTS.bits();

/// Written pages are noted in memory that the frontend gives.
pub const LOG_SHMFD: u64 = Bits::LOG_SHMFD.bits();
/// What a device's successor on another host has to know is written to, and read from, a pipe.
pub const DEVICE_STATE: u64 = Bits::DEVICE_STATE.bits();
/// A ring is stopped at once, whatever of it is not done: the in-flight log has it.
pub const GET_VRING_BASE_INFLIGHT: u64 = Bits::GET_VRING_BASE_INFLIGHT.bits();

/// What our backend offers. One bit, one test that uses it.
pub const OFFERED: u64 = WANTED | LOG_SHMFD | DEVICE_STATE | GET_VRING_BASE_INFLIGHT;

/// What our frontend asks for. Bits that we do not know are masked per backend: their meaning has moved between versions
/// of the protocol.
pub const WANTED: u64 = MQ | REPLY_ACK | CONFIG | BACKEND_REQ | CONFIGURE_MEM_SLOTS | INFLIGHT_SHMFD | RESET_DEVICE;

/// The names of the features in `bits`, for people; unknown bits by their number.
pub fn names(bits: u64) -> Vec<String> {
    (0..64)
        .filter(|bit| bits & (1 << bit) != 0)
        .map(|bit| {
            Bits::from_bits(1 << bit)
                .and_then(|one| one.iter_names().next().map(|(name, _)| name.to_owned()))
                .unwrap_or_else(|| format!("bit {bit}"))
        })
        .collect()
}
