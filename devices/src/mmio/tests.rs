//! The register file, driven as Linux does it and as nobody should.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, Guest, Ring, bring_up, negotiate, read_register, set_up_queue, write_register};
use crate::{DeviceKind, LayoutError, Progress};

const FEATURES: u64 = VERSION_1 | RING_EVENT_IDX | 0x21;

/// Two queues, eight bytes of configuration, and a record of what was asked.
#[derive(Default)]
struct Echo {
    queues: [Option<Queue>; 2],
    config: [u8; 8],
    accepted: u64,
    resets: u32,
}

impl Device for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        if let Some(to) = self.config.get_mut(at..at + data.len()) {
            to.copy_from_slice(data);
        }
    }

    fn acknowledge(&mut self, features: u64) {
        self.accepted = features;
    }

    fn start_queue(&mut self, index: usize, queue: Queue) {
        assert!(self.queues[index].replace(queue).is_none());
    }

    fn stop_queue(&mut self, index: usize) -> Option<QueueState> {
        self.queues[index].take().map(Queue::stop)
    }

    fn kick(&mut self, index: usize) -> Progress {
        let Some(queue) = &mut self.queues[index] else { return Progress::Idle };
        let mut batch = queue.batch();
        while let Some(mut chain) = batch.next() {
            let mut bytes = vec![0; chain.readable_len()];
            chain.read(&mut bytes).unwrap();
            let n = chain.write(&bytes);
            batch.complete(chain, u32::try_from(n).unwrap());
        }
        batch.progress()
    }

    fn driver_gone(&mut self) {
        assert!(self.queues.iter().all(Option::is_none));
        self.resets += 1;
    }
}

struct Rig {
    guest: Guest,
    rings: [Ring; 2],
    device: Arc<Mutex<Echo>>,
    transport: Transport,
}

impl Rig {
    fn new() -> Self {
        let mut guest = Guest::new(1 << 20);
        let rings = [Ring::new(&mut guest, 16, true), Ring::new(&mut guest, 4, true)];
        let device = Arc::new(Mutex::new(Echo::default()));
        let transport = Transport::new(device.clone(), guest.memory.clone(), guest.line.clone());
        Self { guest, rings, device, transport }
    }

    fn up() -> Self {
        let mut rig = Self::new();
        let [a, b] = &rig.rings;
        assert_eq!(bring_up(&mut rig.transport, u64::MAX, &[a, b]), Some(Event::Activated));
        rig
    }

    fn read(&mut self, offset: u64) -> u32 {
        read_register(&mut self.transport, offset)
    }

    fn write(&mut self, offset: u64, value: u32) -> Option<Event> {
        write_register(&mut self.transport, offset, value)
    }

    /// Writes a register that must not take it.
    fn refused(&mut self, offset: u64, value: u32) {
        let before = self.transport.rejected();
        assert_eq!(self.write(offset, value), None);
        assert_eq!(self.transport.rejected(), before + 1, "{offset:#x} {value:#x}");
    }
}

#[test]
fn a_driver_finds_a_device_and_brings_it_up() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(0), 0x7472_6976);
    assert_eq!((rig.read(4), rig.read(8)), (2, 5));
    assert_eq!(negotiate(&mut rig.transport, u64::MAX), FEATURES);
    assert_eq!(rig.read(0x70), 0xb);
    assert_eq!(rig.device.lock().unwrap().accepted, FEATURES);
    rig.write(0x30, 1);
    assert_eq!(rig.read(0x34), 8);
    rig.write(0x30, 2);
    assert_eq!(rig.read(0x34), 0);
    let [a, _] = rig.rings.clone();
    set_up_queue(&mut rig.transport, 0, &a);
    assert_eq!(rig.read(0x44), 1);
    assert_eq!(rig.write(0x70, 0xf), Some(Event::Activated));
    assert!(rig.transport.is_active());
    assert_eq!(rig.transport.started_queues().collect::<Vec<_>>(), [0]);
    assert_eq!(rig.transport.rejected(), 0);
    assert_eq!(rig.write(0x50, 0), Some(Event::Notified(0)));
    rig.refused(0x50, 1);
    rig.refused(0x50, u32::MAX);
}

#[test]
fn the_status_goes_one_step_at_a_time() {
    for wrong in [2, 4, 8, 3, 0xf, 0x10, 0x100, u32::MAX] {
        let mut rig = Rig::new();
        rig.refused(0x70, wrong);
        assert_eq!(rig.read(0x70), 0);
    }
    let mut rig = Rig::new();
    for (status, wrong) in [(1, 9), (3, 7), (0xb, 3), (0xf, 0xb), (0xf, 0x1f)] {
        if status == 0xb {
            negotiate(&mut rig.transport, u64::MAX);
        } else {
            rig.write(0x70, status);
        }
        rig.refused(0x70, wrong);
        assert_eq!(rig.read(0x70), status);
    }
    // FAILED is always possible, and final but for a reset.
    rig.write(0x70, 0x8f);
    assert_eq!(rig.read(0x70), 0x8f);
    rig.refused(0x70, 0x8f | 0x10);
    assert_eq!(rig.write(0x70, 0), Some(Event::Reset));
    assert_eq!(rig.read(0x70), 0);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for (low, high, accepted) in
        [(0x21, 1, true), (0, 1, true), (0x21, 0, false), (2, 1, false), (0, 3, false)]
    {
        let mut rig = Rig::new();
        rig.refused(0x20, 1);
        for status in [1, 3] {
            rig.write(0x70, status);
        }
        rig.write(0x24, 0);
        rig.write(0x20, low);
        rig.write(0x24, 1);
        rig.write(0x20, high);
        rig.write(0x24, 2);
        rig.write(0x20, 0);
        rig.refused(0x20, 1);
        rig.write(0x70, 0xb);
        assert_eq!(rig.read(0x70), if accepted { 0xb } else { 3 }, "{low:#x} {high:#x}");
        rig.write(0x24, 0);
        if accepted {
            rig.refused(0x20, 0);
        }
    }
}

#[test]
fn queue_registers_are_frozen_when_ready_and_when_running() {
    let registers = [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4];
    let mut rig = Rig::new();
    for offset in registers {
        rig.refused(offset, 8);
    }
    rig.refused(0x44, 1);
    negotiate(&mut rig.transport, u64::MAX);
    let [a, _] = rig.rings.clone();
    set_up_queue(&mut rig.transport, 0, &a);
    for offset in registers {
        rig.refused(offset, 8);
    }
    rig.write(0x44, 0);
    rig.write(0x80, 0x7000);
    rig.write(0x80, u32::try_from(a.descriptors).unwrap());
    rig.write(0x44, 1);
    rig.write(0x70, 0xf);
    let before = rig.device.lock().unwrap().queues[0].as_ref().unwrap().state();
    for select in [0, 1] {
        rig.write(0x30, select);
        for offset in registers.into_iter().chain([0x44]) {
            rig.refused(offset, 0);
            rig.refused(offset, 1);
        }
    }
    assert_eq!(rig.device.lock().unwrap().queues[0].as_ref().unwrap().state(), before);
}

#[test]
fn a_queue_that_cannot_be_is_not_ready_and_breaks_the_device() {
    for size in [0, 3, 32, 0x1_0008, u32::MAX] {
        let mut rig = Rig::new();
        negotiate(&mut rig.transport, u64::MAX);
        let [a, _] = rig.rings.clone();
        set_up_queue(&mut rig.transport, 0, &a);
        rig.write(0x44, 0);
        rig.refused(0x38, size);
        rig.refused(0x44, 1);
        assert_eq!(rig.read(0x44), 0);
        assert_eq!(rig.read(0x70), 0x4b);
        rig.refused(0x70, 0xf);
    }
    for offset in [0x84, 0x94, 0xa4] {
        let mut rig = Rig::new();
        negotiate(&mut rig.transport, u64::MAX);
        let [a, _] = rig.rings.clone();
        set_up_queue(&mut rig.transport, 0, &a);
        rig.write(0x44, 0);
        rig.write(offset, u32::MAX);
        rig.refused(0x44, 1);
        assert_eq!(rig.read(0x70), 0x4b);
        assert_eq!(rig.read(0x60), 2);
    }
}

#[test]
fn accesses_of_another_width_or_nowhere_have_no_effect() {
    let mut rig = Rig::up();
    let mut expected = 0;
    for len in [1, 2, 3, 8, 16] {
        let mut data = vec![0xff; len];
        rig.transport.read(0, &mut data);
        assert_eq!(data, vec![0; len]);
        assert_eq!(rig.transport.write(0x70, &vec![0; len]), None);
        expected += 2;
    }
    for offset in [1, 2, 3, 0x71, 0xfd, 0x18, 0x48] {
        let mut data = [0xff; 4];
        rig.transport.read(offset, &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(rig.transport.write(offset, &[0; 4]), None);
        expected += 2;
    }
    for (offset, len) in [(0x101, 2), (0x102, 4), (0x104, 8), (0x100, 3)] {
        rig.transport.read(offset, &mut vec![0; len]);
        rig.transport.write(offset, &vec![0; len]);
        expected += 2;
    }
    assert_eq!(rig.transport.rejected(), expected);
    assert!(rig.transport.is_active());
    assert_eq!(rig.read(0xb0), u32::MAX);
}

#[test]
fn the_configuration_has_its_widths_and_its_generation() {
    let mut rig = Rig::up();
    rig.transport.write(0x100, &[1, 2]);
    rig.transport.write(0x104, &[5]);
    let mut all = [0xff; 8];
    rig.transport.read(0x100, &mut all);
    assert_eq!(all, [1, 2, 0, 0, 5, 0, 0, 0]);
    rig.transport.read(0x108, &mut all);
    assert_eq!(all, [0; 8]);
    let before = rig.read(0xfc);
    rig.transport.signals().config_change();
    assert_ne!(rig.read(0xfc), before);
    assert_eq!(rig.read(0x60), 2);
    assert_eq!(rig.guest.line.count(), 1);
}

#[test]
fn interrupts_are_read_and_acknowledged_while_a_worker_has_the_device() {
    let mut rig = Rig::up();
    let at = rig.guest.alloc_with(b"ping");
    rig.rings[0].submit(&[Buffer::readable(at, 4), Buffer::writable(at + 8, 4)]);
    let device = rig.device.clone();
    assert_eq!(device.lock().unwrap().kick(0), Progress::Idle);
    let worker = device.lock().unwrap();
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 1);
    assert_eq!(rig.read(0x60), 0);
    drop(worker);
    assert_eq!(rig.guest.read(at + 8, 4), b"ping");
}

#[test]
fn a_reset_stops_the_queues_and_a_driver_may_come_again() {
    let mut rig = Rig::up();
    rig.transport.signals().fail();
    assert_eq!(rig.read(0x70), 0x4f);
    assert_eq!(rig.write(0x70, 0), Some(Event::Reset));
    // The driver began with a reset, too.
    assert_eq!(rig.device.lock().unwrap().resets, 2);
    assert_eq!((rig.read(0x70), rig.read(0x60)), (0, 0));
    assert_eq!(rig.transport.started_queues().count(), 0);
    rig.refused(0x50, 0);
    let [a, b] = [Ring::new(&mut rig.guest, 8, true), Ring::new(&mut rig.guest, 8, true)];
    assert_eq!(bring_up(&mut rig.transport, u64::MAX, &[&a, &b]), Some(Event::Activated));
}

#[test]
fn a_saved_transport_continues_elsewhere() {
    let mut rig = Rig::up();
    let at = rig.guest.alloc_with(b"one two ");
    rig.rings[1].submit(&[Buffer::readable(at, 4), Buffer::writable(at + 16, 4)]);
    let _ = rig.device.lock().unwrap().kick(1);
    // Made available, but neither kicked nor acknowledged when the state is taken.
    rig.rings[1].submit(&[Buffer::readable(at + 4, 4), Buffer::writable(at + 20, 4)]);
    let state = rig.transport.stop();
    let json = serde_json::to_string(&state).unwrap();
    let state: TransportState = serde_json::from_str(&json).unwrap();

    let device = Arc::new(Mutex::new(Echo::default()));
    let line = Arc::new(crate::testing::Line::default());
    let mut other = Transport::new(device.clone(), rig.guest.memory.clone(), line.clone());
    other.start(&state).unwrap();
    assert_eq!(other.start(&state), Err(RestoreError::Running));
    assert_eq!(device.lock().unwrap().accepted, FEATURES);
    assert_eq!(read_register(&mut other, 0x70), 0xf);
    for queue in other.started_queues().collect::<Vec<_>>() {
        let _ = device.lock().unwrap().kick(queue);
    }
    let raised = line.count();
    other.raise_pending();
    assert_eq!((line.count(), read_register(&mut other, 0x60)), (raised + 1, 1));
    assert_eq!(std::iter::from_fn(|| rig.rings[1].completion()).count(), 2);
    assert_eq!(rig.guest.read(at + 16, 8), b"one two ");
    assert_eq!(other.stop().running, {
        let mut running = state.running;
        let queue = running[1].as_mut().unwrap();
        queue.next_available += 1;
        queue.next_used += 1;
        running
    });
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut rig = Rig::up();
    let good = rig.transport.stop();
    let mut features = good.clone();
    features.driver_features |= 2;
    assert_eq!(rig.transport.start(&features), Err(RestoreError::Features { features: 2 }));
    let mut queues = good.clone();
    queues.running.pop();
    assert!(matches!(rig.transport.start(&queues), Err(RestoreError::Queues { .. })));
    let mut layout = good.clone();
    layout.running[1].as_mut().unwrap().used = 1 << 40;
    let source = LayoutError::OutsideMemory;
    assert_eq!(rig.transport.start(&layout), Err(RestoreError::Queue { index: 1, source }));
    assert_eq!(rig.transport.started_queues().count(), 0);
    assert_eq!(rig.transport.start(&good), Ok(()));
}

proptest! {
    /// Any sequence of register accesses is survived, and a queue that runs is one that was set up.
    #[test]
    fn random_accesses_never_break_the_register_file(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..0x110, prop_oneof![0u32..0x10, any::<u32>()], prop_oneof![4 => Just(4usize), 1 => 0usize..9]),
            0..200,
        ),
        up in any::<bool>(),
    ) {
        let mut rig = if up { Rig::up() } else { Rig::new() };
        for (write, offset, value, len) in accesses {
            let offset = if len == 4 { offset & !3 } else { offset };
            let data = [value.to_le_bytes(), value.to_le_bytes(), [0; 4]].concat();
            if write {
                if let Some(Event::Notified(queue)) = rig.transport.write(offset, &data[..len]) {
                    let _ = rig.device.lock().unwrap().kick(queue);
                }
            } else {
                rig.transport.read(offset, &mut data.clone()[..len]);
            }
            let running = rig.transport.started_queues().count() > 0;
            prop_assert!(!running || rig.transport.is_active());
        }
    }
}
