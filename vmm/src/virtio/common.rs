//! The common configuration structure (virtio 1.3, 4.1.4.3): features, status and the registers of each queue.
//!
//! Pure registers: what a write means for others is returned as an [`Effect`]. Fields are accessed in their own size
//! (the 64-bit addresses also as two halves); anything else reads as zero and writes nothing.

/// "No vector".
pub const NO_VECTOR: u16 = 0xffff;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;
const VERSION_1: u64 = 1 << 32;

/// What a write has caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing outside.
    None,
    /// Interrupt vectors have changed.
    Vectors,
    /// The driver is ready.
    Start,
    /// The driver wants the device back in its initial state.
    Reset,
}

#[derive(Clone, Debug)]
struct Queue {
    size: u16,
    vector: u16,
    enabled: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

/// The registers.
#[derive(Clone, Debug)]
pub struct Common {
    offered: u64,
    max_size: u16,
    feature_select: u32,
    driver_select: u32,
    accepted: u64,
    config_vector: u16,
    status: u8,
    generation: u8,
    select: u16,
    queues: Vec<Queue>,
    resetting: bool,
}

impl Common {
    /// Registers in their initial state. `size` is the largest ring of each queue.
    pub fn new(offered: u64, queues: u16, size: u16) -> Self {
        let queue = Queue { size, vector: NO_VECTOR, enabled: false, desc: 0, avail: 0, used: 0 };
        Self {
            offered,
            max_size: size,
            feature_select: 0,
            driver_select: 0,
            accepted: 0,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            select: 0,
            queues: vec![queue; usize::from(queues)],
            resetting: false,
        }
    }

    /// Back to the initial state; the generation goes on, because configuration may have changed meanwhile.
    pub fn reset(&mut self) {
        let generation = self.generation;
        *self = Self::new(self.offered, u16::try_from(self.queues.len()).unwrap_or(0), self.max_size);
        self.generation = generation;
    }

    /// From now until [`Common::reset`] the driver sees the old status.
    pub fn begin_reset(&mut self) {
        self.resetting = true;
    }

    /// Whether a reset is waiting for the backend.
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// Tells the driver that the device has failed it. `false`: it was told before.
    pub fn need_reset(&mut self) -> bool {
        let news = self.status & NEEDS_RESET == 0;
        self.status |= NEEDS_RESET;
        news
    }

    /// The configuration space is another one.
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// What the driver has accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Vector of a queue.
    pub fn queue_vector(&self, queue: usize) -> u16 {
        self.queues.get(queue).map_or(NO_VECTOR, |q| q.vector)
    }

    /// The rings the driver has enabled.
    pub fn rings(&self) -> Vec<vhost_user::Ring> {
        let enabled = self.queues.iter().zip(0u16..).filter(|(q, _)| q.enabled);
        let ring =
            |(q, index): (&Queue, u16)| vhost_user::Ring { index, size: q.size, desc: q.desc, avail: q.avail, used: q.used };
        enabled.map(ring).collect()
    }

    /// A field of the structure. Two-step select: an index out of range reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.select));
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let value: u64 = match (offset, data.len()) {
            (0x00, 4) => u64::from(self.feature_select),
            (0x04, 4) => half(self.offered, self.feature_select),
            (0x08, 4) => u64::from(self.driver_select),
            (0x0c, 4) => half(self.accepted, self.driver_select),
            (0x10, 2) => u64::from(self.config_vector),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.status),
            (0x15, 1) => u64::from(self.generation),
            (0x16, 2) => u64::from(self.select),
            (0x18, 2) => queue.map_or(0, |q| u64::from(q.size)),
            (0x1a, 2) => queue.map_or(u64::from(NO_VECTOR), |q| u64::from(q.vector)),
            (0x1c, 2) => queue.map_or(0, |q| u64::from(q.enabled)),
            (0x1e, 2) => queue.map_or(0, |_| u64::from(self.select)),
            (0x20, 4 | 8) => queue.map_or(0, |q| q.desc),
            (0x24, 4) => queue.map_or(0, |q| q.desc >> 32),
            (0x28, 4 | 8) => queue.map_or(0, |q| q.avail),
            (0x2c, 4) => queue.map_or(0, |q| q.avail >> 32),
            (0x30, 4 | 8) => queue.map_or(0, |q| q.used),
            (0x34, 4) => queue.map_or(0, |q| q.used >> 32),
            _ => 0,
        };
        data.fill(0);
        for (byte, new) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = new;
        }
    }

    /// Writes a field.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // The backend is being stopped with these very registers; a driver that writes now breaks the rules.
        if self.resetting {
            return Effect::None;
        }
        match *data {
            [value] if offset == 0x14 => self.set_status(value),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                Effect::None
            }
            [a, b, c, d, e, f, g, h] => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset.saturating_add(4), u32::from_le_bytes([e, f, g, h]));
                Effect::None
            }
            _ => Effect::None,
        }
    }

    fn set_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let mut new = value & !NEEDS_RESET;
        // A driver must not take what was not offered, and this device cannot be driven the legacy way.
        if new & FEATURES_OK != 0 && (self.accepted & !self.offered != 0 || self.accepted & VERSION_1 == 0) {
            new &= !FEATURES_OK;
        }
        // Bits are only ever added; that also keeps DRIVER_OK from starting a running device again.
        let added = new & !self.status;
        self.status |= added;
        let ready = self.status & FEATURES_OK != 0;
        if added & DRIVER_OK != 0 && ready { Effect::Start } else { Effect::None }
    }

    fn write_u16(&mut self, offset: u64, value: u16) -> Effect {
        let vectors = u16::try_from(self.queues.len()).unwrap_or(0);
        let vector = if value <= vectors { value } else { NO_VECTOR };
        let running = self.status & DRIVER_OK != 0;
        let max = self.max_size;
        if offset == 0x10 {
            self.config_vector = vector;
            return Effect::Vectors;
        }
        if offset == 0x16 {
            self.select = value;
            return Effect::None;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.select)) else { return Effect::None };
        match offset {
            0x1a => {
                queue.vector = vector;
                return Effect::Vectors;
            }
            0x18 if !running && value.is_power_of_two() && value <= max => queue.size = value,
            0x1c if !running => queue.enabled = value == 1,
            _ => {}
        }
        Effect::None
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        const LOW: u64 = 0xffff_ffff;
        let low = |old: u64| (old & !LOW) | u64::from(value);
        let high = |old: u64| (old & LOW) | u64::from(value) << 32;
        match offset {
            0x00 => self.feature_select = value,
            0x08 => self.driver_select = value,
            0x0c if self.status & FEATURES_OK == 0 => match self.driver_select {
                0 => self.accepted = low(self.accepted),
                1 => self.accepted = high(self.accepted),
                _ => {}
            },
            _ => {}
        }
        // Where a ring lies is settled once it is enabled.
        let Some(queue) = self.queues.get_mut(usize::from(self.select)).filter(|q| !q.enabled) else { return };
        match offset {
            0x20 => queue.desc = low(queue.desc),
            0x24 => queue.desc = high(queue.desc),
            0x28 => queue.avail = low(queue.avail),
            0x2c => queue.avail = high(queue.avail),
            0x30 => queue.used = low(queue.used),
            0x34 => queue.used = high(queue.used),
            _ => {}
        }
    }
}
