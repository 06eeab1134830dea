//! The function driven as a guest would, against a hypervisor that writes down what it is asked.

use super::*;
use crate::classes;
use crate::pci::config::MEMORY_ENABLE;

#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, text: String) -> io::Result<()> {
        self.0.lock().unwrap().push(text);
        Ok(())
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Hypervisor for Recorder {
    fn route_msi(&self, gsi: u32, address: u64, data: u32) -> io::Result<()> {
        self.note(format!("route {gsi} {address:x} {data:x}"))
    }
    fn attach_irq(&self, _: &Event, gsi: u32) -> io::Result<()> {
        self.note(format!("attach {gsi}"))
    }
    fn detach_irq(&self, _: &Event, gsi: u32) -> io::Result<()> {
        self.note(format!("detach {gsi}"))
    }
    fn attach_kick(&self, _: &Event, addr: u64) -> io::Result<()> {
        self.note(format!("kick {addr:x}"))
    }
    fn detach_kick(&self, _: &Event, addr: u64) -> io::Result<()> {
        self.note(format!("unkick {addr:x}"))
    }
}

const BAR: u64 = 0xc000_0000;
const FEATURES: u64 = 1 << 32 | 1 << 5;
const ROUTE: u32 = 100;

fn device() -> (VirtioPci, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let identity = Identity {
        name: "disk0".to_owned(),
        id: 2,
        class: classes::named("blk").unwrap(),
        features: FEATURES,
        queues: 2,
        queue_size: 256,
        first_route: ROUTE,
    };
    let (lines, _notifiers) = lines(2).unwrap();
    let doorbell = Arc::new(Doorbell::new().unwrap());
    let shadow = Shadow::new(vec![7; 60], 60);
    let device = VirtioPci::new(identity, lines, shadow, BAR, Arc::clone(&recorder) as _, doorbell).unwrap();
    (device, recorder)
}

impl VirtioPci {
    fn put<const N: usize>(&self, offset: u64, bytes: [u8; N]) {
        self.memory_write(offset, &bytes);
    }
    fn get(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory_read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }
    fn set_status(&self, status: u8) {
        self.put(0x14, [status]);
    }
    /// What a driver does up to DRIVER_OK.
    fn bring_up(&self) {
        self.set_status(1);
        self.set_status(3);
        self.put(0x08, 0u32.to_le_bytes());
        self.put(0x0c, (1u32 << 5).to_le_bytes());
        self.put(0x08, 1u32.to_le_bytes());
        self.put(0x0c, 1u32.to_le_bytes());
        self.set_status(11);
        self.put(0x16, 1u16.to_le_bytes());
        self.put(0x18, 64u16.to_le_bytes());
        self.put(0x20, 0x1000u64.to_le_bytes());
        self.put(0x28, 0x2000u32.to_le_bytes());
        self.put(0x2c, 1u32.to_le_bytes());
        self.put(0x30, 0x3000u64.to_le_bytes());
        self.put(0x1c, 1u16.to_le_bytes());
        self.set_status(15);
    }
    fn msix(&self, control: u16) {
        let at = self.inner().msix_at + msix::CONTROL;
        self.config_write(at, &control.to_le_bytes());
    }
}

#[test]
fn a_driver_that_follows_the_rules_gets_its_rings_started() {
    let (device, _) = device();
    device.bring_up();
    assert_eq!(device.get(0x14, 1), 15);
    let (features, rings) = device.work().start.unwrap();
    assert_eq!(features, FEATURES);
    let ring = rings[0];
    assert_eq!((rings.len(), ring.index, ring.size), (1, 1, 64));
    assert_eq!((ring.desc, ring.avail, ring.used), (0x1000, 0x1_0000_2000, 0x3000));
    assert!(device.work().start.is_none(), "started once");
}

#[test]
fn a_reset_is_seen_only_when_the_rings_are_quiet() {
    let (device, _) = device();
    device.bring_up();
    device.work();
    device.set_status(0);
    assert_eq!(device.get(0x14, 1), 15);
    device.set_status(15);
    device.put(0x18, 8u16.to_le_bytes());
    let work = device.work();
    assert!(work.stop && work.start.is_none());
    device.stopped();
    assert_eq!(device.get(0x14, 1), 0);
    assert!(!device.is_live() && !device.work().stop);
}

#[test]
fn a_start_that_was_not_served_yet_falls_away_with_the_reset() {
    let (device, _) = device();
    device.bring_up();
    device.set_status(0);
    let work = device.work();
    assert!(work.stop && work.start.is_none());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let (device, _) = device();
    device.set_status(3);
    device.put(0x08, 1u32.to_le_bytes());
    device.put(0x0c, 0xffff_ffffu32.to_le_bytes());
    device.set_status(11);
    assert_eq!(device.get(0x14, 1), 3);
    device.set_status(15);
    assert!(device.work().start.is_none());
}

#[test]
fn a_vector_is_attached_while_nothing_masks_it() {
    let (device, recorder) = device();
    device.put(0x16, 0u16.to_le_bytes());
    device.put(0x1a, 2u16.to_le_bytes());
    assert_eq!(device.get(0x1a, 2), 2);
    device.msix(1 << 15);
    let entry = TABLE.start + 2 * 16;
    device.put(entry, 0xfee0_0000u64.to_le_bytes());
    device.put(entry + 8, 0x31u32.to_le_bytes());
    assert_eq!(recorder.take(), [""; 0], "still masked");
    device.put(entry + 12, 0u32.to_le_bytes());
    assert_eq!(recorder.take(), ["route 102 fee00000 31", "attach 102"]);
    device.put(entry + 12, 1u32.to_le_bytes());
    assert_eq!(recorder.take(), ["detach 102"]);
    assert_eq!(device.get(PENDING.start, 8), 0);
    device.lines[0].call.signal();
    assert_eq!(device.get(PENDING.start, 8), 1 << 2, "a masked signal is pending");
    device.put(entry + 12, 0u32.to_le_bytes());
    assert_eq!(recorder.take(), ["attach 102"]);
    assert_eq!(device.get(PENDING.start, 8), 0);
    device.msix(0);
    assert_eq!(recorder.take(), ["detach 102"]);
}

#[test]
fn two_queues_may_share_a_vector_and_a_queue_may_have_none() {
    let (device, recorder) = device();
    device.msix(1 << 15);
    device.put(TABLE.start + 16 + 12, 0u32.to_le_bytes());
    for queue in 0..2u16 {
        device.put(0x16, queue.to_le_bytes());
        device.put(0x1a, 1u16.to_le_bytes());
    }
    assert_eq!(recorder.take(), ["route 101 0 0", "attach 101", "attach 101"]);
    device.put(0x1a, 0xffffu16.to_le_bytes());
    assert_eq!(recorder.take(), ["detach 101"]);
    device.put(0x1a, 3u16.to_le_bytes());
    assert_eq!(device.get(0x1a, 2), 0xffff, "there is no vector 3");
}

#[test]
fn doorbells_follow_the_base_address() {
    let (device, recorder) = device();
    assert!(device.memory().is_none());
    device.config_write(COMMAND, &MEMORY_ENABLE.to_le_bytes());
    assert_eq!(recorder.take(), ["kick c0003000", "kick c0003004"]);
    assert_eq!(device.memory(), Some(Span { start: BAR, size: BAR_SIZE }));
    device.config_write(BAR0, &0xd000_0000u32.to_le_bytes());
    assert_eq!(recorder.take().len(), 4);
    device.reset();
    assert_eq!(recorder.take(), ["unkick d0003000", "unkick d0003004"]);
    assert!(device.memory().is_none());
}

#[test]
fn a_kick_that_comes_as_an_exit_reaches_the_queue() {
    let (device, _) = device();
    device.put(NOTIFY.start + 4, [0; 4]);
    assert!(is_signalled(&device.lines[1].kick) && !is_signalled(&device.lines[0].kick));
    device.put(NOTIFY.start + 8, [0; 4]);
}

#[test]
fn configuration_is_served_from_the_copy_and_writes_are_passed_on() {
    let (device, _) = device();
    assert_eq!(device.get(DEVICE.start, 4), 0x0707_0707);
    device.put(DEVICE.start + 32, [1]);
    device.put(DEVICE.start + 34, [2]);
    assert_eq!(device.work().config, Some((32, vec![1, 7, 2])));
    assert_eq!(device.get(0x15, 1), 0);
    device.refresh(Shadow::new(vec![9; 60], 60));
    assert_eq!((device.get(0x15, 1), device.get(DEVICE.start, 1)), (1, 9));
    assert_eq!((device.get(ISR.start, 1), device.get(ISR.start, 1)), (2, 0), "reading clears");
}

#[test]
fn a_failed_device_asks_for_a_reset() {
    let (device, _) = device();
    device.bring_up();
    device.needs_reset();
    assert_eq!(device.get(0x14, 1), 15 | 64);
    assert!(is_signalled(&device.config_changed));
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let (device, _) = device();
    let at = device.inner().access_at;
    device.config_write(at + 8, &0x14u32.to_le_bytes());
    device.config_write(at + 12, &1u32.to_le_bytes());
    device.config_write(at + 16, &[3]);
    assert_eq!(device.get(0x14, 1), 3);
    let mut byte = [0];
    device.config_read(at + 16, &mut byte);
    assert_eq!(byte, [3]);
    device.config_write(at + 8, &u32::MAX.to_le_bytes());
    device.config_read(at + 16, &mut byte);
}

#[test]
fn capabilities_lead_a_driver_to_every_register() {
    let (device, _) = device();
    let read = |at: u16, len: usize| {
        let mut bytes = [0; 4];
        device.config_read(at, &mut bytes[..len]);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(read(0, 4), 0x1042_1af4);
    let (mut at, mut kinds) = (u16::try_from(read(0x34, 1)).unwrap(), Vec::new());
    while at != 0 {
        match read(at, 1) {
            9 => kinds.push(read(at + 3, 1)),
            0x11 => assert_eq!(read(at + 2, 2), 2, "three vectors"),
            other => panic!("{other}"),
        }
        at = u16::try_from(read(at + 1, 1)).unwrap();
    }
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
}

#[test]
fn every_size_at_every_offset_is_harmless() {
    let (device, _) = device();
    device.config_write(COMMAND, &MEMORY_ENABLE.to_le_bytes());
    for value in [0xffu8, 0] {
        for offset in (0..BAR_SIZE + 0x100).chain([u64::MAX - 1, u64::MAX]) {
            for len in [1, 2, 3, 4, 7, 8] {
                device.memory_write(offset, &vec![value; len]);
                device.memory_read(offset, &mut vec![0; len]);
            }
            device.work();
        }
        for offset in 0..4096 {
            for len in 1..=4 {
                device.config_write(offset, &vec![value; len]);
                device.config_read(offset, &mut vec![0; len]);
            }
        }
    }
}
