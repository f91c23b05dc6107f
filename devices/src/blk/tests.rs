//! A disk in memory behind real rings.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::Transport;
use crate::testing::{Buffer, Guest, Line, Ring, bring_up, read_register};

const SECTORS: u64 = 64;

/// Bytes in memory, and what was asked of them.
#[derive(Debug)]
struct Bytes {
    data: Vec<u8>,
    flushes: u32,
    discards: Vec<(u64, u64)>,
    unmapped: u32,
    broken: bool,
}

impl Bytes {
    fn check(&self) -> io::Result<()> {
        if self.broken { Err(io::Error::other("broken")) } else { Ok(()) }
    }
}

impl Backend for Bytes {
    fn len(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_at(&mut self, offset: u64, to: &[Slice<'_>]) -> io::Result<()> {
        self.check()?;
        let mut at = usize::try_from(offset).unwrap();
        for slice in to {
            slice.copy_from(&self.data[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[Slice<'_>]) -> io::Result<()> {
        self.check()?;
        let mut at = usize::try_from(offset).unwrap();
        for slice in from {
            slice.copy_to(&mut self.data[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        self.check()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.discards.push((offset, len));
        self.check()
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let (offset, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        self.data[offset..offset + len].fill(0);
        self.unmapped += u32::from(unmap);
        self.check()
    }
}

struct Rig {
    guest: Guest,
    ring: Ring,
    transport: Transport,
    disk: Arc<Mutex<Blk<Bytes>>>,
}

impl Rig {
    fn new(options: Options, features: u64) -> Self {
        let data = (0..SECTORS * SECTOR).map(|i| u8::try_from(i / SECTOR).unwrap()).collect();
        let bytes = Bytes { data, flushes: 0, discards: vec![], unmapped: 0, broken: false };
        let disk = Arc::new(Mutex::new(Blk::new(bytes, options)));
        let mut guest = Guest::new(16 << 20);
        let ring = Ring::new(&mut guest, 128, features & RING_EVENT_IDX != 0);
        let line: Arc<Line> = guest.line.clone();
        let mut transport = Transport::new(disk.clone(), guest.memory.clone(), line);
        bring_up(&mut transport, features, &[&ring]);
        assert!(transport.is_active());
        Self { guest, ring, transport, disk }
    }

    fn kick(&self) -> Progress {
        self.disk.lock().unwrap().kick(0)
    }

    /// One request; returns the status, the bytes the device says it wrote, and the data afterwards.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], writable: bool) -> (u8, u32, Vec<u8>) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header = self.guest.alloc_with(&header);
        let at = self.guest.alloc_with(data);
        let status = self.guest.alloc_with(&[0xff]);
        let mut buffers = vec![Buffer::readable(header, 16)];
        if !data.is_empty() {
            buffers.push(Buffer { writable, ..Buffer::readable(at, data.len()) });
        }
        buffers.push(Buffer::writable(status, 1));
        let head = self.ring.submit(&buffers);
        assert_eq!(self.kick(), Progress::Idle);
        let (id, written) = self.ring.completion().unwrap();
        assert_eq!(id, head);
        (self.guest.read(status, 1)[0], written, self.guest.read(at, data.len()))
    }
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn each_request_kind_does_what_it_says() {
    let options = Options { id: *b"cubbyhole-disk-00001", ..Options::default() };
    let mut rig = Rig::new(options, u64::MAX);
    let (status, written, data) = rig.request(request::IN, 3, &[0xee; 1024], true);
    assert_eq!((status, written), (0, 1025));
    assert_eq!(data, [[3; 512], [4; 512]].concat());

    assert_eq!(rig.request(request::OUT, 5, &[0xaa; 512], false).0, 0);
    assert_eq!(rig.disk.lock().unwrap().backend().data[5 * 512..6 * 512], [0xaa; 512]);
    assert_eq!(rig.disk.lock().unwrap().backend().flushes, 0);
    assert_eq!(rig.request(request::FLUSH, 0, &[], false).0, 0);
    assert_eq!(rig.disk.lock().unwrap().backend().flushes, 1);

    let (status, written, id) = rig.request(request::GET_ID, 0, &[0; 20], true);
    assert_eq!((status, written, id.as_slice()), (0, 21, &b"cubbyhole-disk-00001"[..]));

    let two = [range(8, 8, 0), range(32, 4, 0)].concat();
    assert_eq!(rig.request(request::DISCARD, 0, &two, false).0, 0);
    assert_eq!(rig.disk.lock().unwrap().backend().discards, [(4096, 4096), (16384, 2048)]);

    assert_eq!(rig.request(request::WRITE_ZEROES, 0, &range(5, 1, 1), false).0, 0);
    assert_eq!(rig.disk.lock().unwrap().backend().data[5 * 512..6 * 512], [0; 512]);
    assert_eq!(rig.disk.lock().unwrap().backend().unmapped, 1);
    assert_eq!(rig.request(99, 0, &[], false), (2, 1, vec![]));
    assert_eq!(rig.disk.lock().unwrap().refusals(), Refusals { io_errors: 0, unsupported: 1 });
}

#[test]
fn nothing_outside_the_disk_is_touched() {
    let mut rig = Rig::new(Options { block_size: 1024, ..Options::default() }, u64::MAX);
    let wrong = [
        (request::IN, SECTORS, 1024),
        (request::IN, SECTORS - 1, 1024),
        (request::IN, u64::MAX, 1024),
        (request::IN, u64::MAX / 512, 1024),
        (request::IN, 1, 1024),
        (request::IN, 0, 512),
        (request::IN, 0, 1000),
        (request::IN, 0, 0),
        (request::OUT, SECTORS, 1024),
        (request::OUT, u64::MAX - 1, 1024),
    ];
    for (kind, sector, len) in wrong {
        let got = rig.request(kind, sector, &vec![0x55; len], kind == request::IN);
        assert!(got == (1, 1, vec![0x55; len]), "{kind} {sector} {len}: status {}", got.0);
    }
    for kind in [request::DISCARD, request::WRITE_ZEROES] {
        for data in [
            range(SECTORS, 2, 0),
            range(u64::MAX, 2, 0),
            range(1, 2, 0),
            range(0, u32::MAX, 0),
            vec![0; 15],
            vec![],
            range(0, 2, 0).repeat(17),
        ] {
            assert_eq!(rig.request(kind, 0, &data, false).0, 1, "{kind} {data:?}");
        }
        assert_eq!(rig.request(kind, 0, &range(0, 2, 2), false).0, 2);
    }
    assert_eq!(rig.request(request::DISCARD, 0, &range(0, 2, 1), false).0, 2);
    assert_eq!(rig.disk.lock().unwrap().backend().discards, []);
}

#[test]
fn the_last_sector_is_the_last() {
    let mut rig = Rig::new(Options::default(), u64::MAX);
    assert_eq!(rig.request(request::IN, SECTORS - 1, &[0; 512], true).0, 0);
    assert_eq!(rig.request(request::IN, SECTORS, &[0; 512], true).0, 1);
    assert_eq!(rig.request(request::IN, SECTORS - 1, &[0; 1024], true).0, 1);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut rig = Rig::new(Options { read_only: true, ..Options::default() }, u64::MAX);
    assert_ne!(rig.disk.lock().unwrap().features() & feature::RO, 0);
    assert_eq!(rig.request(request::OUT, 0, &[1; 512], false).0, 1);
    assert_eq!(rig.request(request::DISCARD, 0, &range(0, 1, 0), false).0, 1);
    assert_eq!(rig.request(request::WRITE_ZEROES, 0, &range(0, 1, 0), false).0, 1);
    assert_eq!(rig.request(request::IN, 0, &[1; 512], true).0, 0);
    assert!(rig.disk.lock().unwrap().backend().data[..512].iter().all(|byte| *byte == 0));
}

#[test]
fn a_driver_that_cannot_flush_has_its_writes_flushed() {
    let mut rig = Rig::new(Options::default(), !feature::FLUSH);
    assert_eq!(rig.request(request::OUT, 0, &[1; 512], false).0, 0);
    assert_eq!(rig.disk.lock().unwrap().backend().flushes, 1);
}

#[test]
fn an_error_of_the_host_is_an_error_of_the_request() {
    let mut rig = Rig::new(Options::default(), u64::MAX);
    rig.disk.lock().unwrap().backend_mut().broken = true;
    for (kind, data) in [(request::IN, 512), (request::OUT, 512), (request::FLUSH, 0)] {
        assert_eq!(rig.request(kind, 0, &vec![0; data], kind == request::IN).0, 1);
    }
    assert_eq!(rig.disk.lock().unwrap().refusals().io_errors, 3);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let mut rig = Rig::new(Options::default(), u64::MAX);
    let mut header = [0; 16];
    header[8] = 7;
    let header = rig.guest.alloc_with(&header);
    let data = rig.guest.alloc(513);
    let mut buffers: Vec<_> = (0..4).map(|i| Buffer::readable(header + 4 * i, 4)).collect();
    buffers.push(Buffer::writable(data, 100));
    buffers.push(Buffer::writable(data + 100, 413));
    let mut guest = rig.guest.clone();
    rig.ring.submit_indirect(&mut guest, &buffers);
    assert_eq!(rig.kick(), Progress::Idle);
    assert_eq!(rig.ring.completion().unwrap().1, 513);
    assert_eq!(rig.guest.read(data, 513), [&[7; 512][..], &[0]].concat());
}

#[test]
fn a_chain_without_header_or_status_breaks_the_device() {
    for buffers in
        [vec![Buffer::readable(0x8000, 16)], vec![Buffer::readable(0x8000, 15), Buffer::writable(0x9000, 1)]]
    {
        let mut rig = Rig::new(Options::default(), u64::MAX);
        rig.ring.submit(&buffers);
        assert_eq!(rig.kick(), Progress::Idle);
        assert_eq!(read_register(&mut rig.transport, 0x70), 0x4f);
        assert_eq!(read_register(&mut rig.transport, 0x60) & 2, 2);
        assert_eq!(rig.transport.signals().failures(), 1);
        // Until the reset nothing more is processed.
        assert_eq!(rig.kick(), Progress::Idle);
        assert_eq!(rig.transport.signals().failures(), 1);
    }
}

#[test]
fn the_configuration_is_the_disks() {
    let rig = Rig::new(Options { block_size: 4096, ..Options::default() }, u64::MAX);
    let disk = rig.disk.lock().unwrap();
    let mut config = [0; 64];
    disk.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 4096u32.to_le_bytes());
    assert_eq!(config[44..48], 8u32.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    let mut far = [1; 4];
    disk.read_config(u64::MAX - 3, &mut far);
    assert_eq!(far, [0; 4]);
}

/// Makes `n` reads available.
fn reads(rig: &mut Rig, n: usize) {
    let header = rig.guest.alloc_with(&[0; 16]);
    let data = rig.guest.alloc(1024);
    for _ in 0..n {
        let buffers =
            [Buffer::readable(header, 16), Buffer::writable(data, 512), Buffer::writable(data + 512, 1)];
        rig.ring.submit(&buffers);
    }
}

#[test]
fn a_long_batch_does_not_keep_its_first_completions_to_the_end() {
    let mut rig = Rig::new(Options::default(), !RING_EVENT_IDX);
    reads(&mut rig, 40);
    assert_eq!(rig.kick(), Progress::Idle);
    assert_eq!(rig.guest.line.count(), 3);
}

#[test]
fn a_kick_moves_a_bounded_amount_of_data() {
    let mut rig = Rig::new(Options::default(), u64::MAX);
    let mut guest = rig.guest.clone();
    let header = guest.alloc_with(&[0; 16]);
    let data = guest.alloc(32 << 10);
    let status = guest.alloc(1);
    for _ in 0..100 {
        let buffers =
            [Buffer::readable(header, 16), Buffer::writable(data, 32 << 10), Buffer::writable(status, 1)];
        rig.ring.submit_indirect(&mut guest, &buffers);
    }
    assert_eq!(rig.kick(), Progress::More);
    assert_eq!(std::iter::from_fn(|| rig.ring.completion()).count(), 64);
    assert_eq!(rig.kick(), Progress::Idle);
    assert_eq!(std::iter::from_fn(|| rig.ring.completion()).count(), 36);
}

#[test]
fn a_batch_interrupts_once() {
    let mut rig = Rig::new(Options::default(), u64::MAX);
    reads(&mut rig, 5);
    rig.ring.arm_interrupt();
    assert_eq!(rig.kick(), Progress::Idle);
    assert_eq!(rig.guest.line.count(), 1);
    assert_eq!(rig.ring.available_event(), 5);
}

proptest! {
    /// Random requests, many of them wrong, change exactly what a plain array of bytes would.
    #[test]
    fn a_disk_is_an_array_of_bytes(
        requests in prop::collection::vec(
            (prop::sample::select(vec![request::IN, request::OUT, request::WRITE_ZEROES]),
             prop_oneof![8 => 0..SECTORS + 4, 1 => any::<u64>()],
             prop_oneof![8 => (0usize..9).prop_map(|n| n * 512), 1 => 0usize..5000],
             any::<u8>()),
            1..40,
        ),
    ) {
        let mut rig = Rig::new(Options::default(), u64::MAX);
        let mut model = rig.disk.lock().unwrap().backend().data.clone();
        for (kind, sector, len, fill) in requests {
            let at = sector.checked_mul(512).and_then(|at| usize::try_from(at).ok());
            let end = at.and_then(|at| at.checked_add(len)).filter(|end| *end <= model.len());
            let place = match (at, end) {
                (Some(at), Some(end)) if len % 512 == 0 => Some(at..end),
                _ => None,
            };
            let count = u32::try_from(len / 512).unwrap();
            let (status, expected) = match (kind, place) {
                (request::WRITE_ZEROES, _) if len % 512 != 0 => continue,
                (request::WRITE_ZEROES, place) => {
                    let status = rig.request(kind, 0, &range(sector, count, 0), false).0;
                    if let Some(place) = place.clone() {
                        model[place].fill(0);
                    }
                    (status, place.is_some())
                }
                (_, place) => {
                    let (status, _, data) = rig.request(kind, sector, &vec![fill; len], kind == request::IN);
                    let place = place.filter(|_| len > 0);
                    if let Some(place) = place.clone() {
                        match kind {
                            request::IN => prop_assert!(data == model[place]),
                            _ => model[place].fill(fill),
                        }
                    }
                    (status, place.is_some())
                }
            };
            prop_assert_eq!(status == 0, expected, "{} {} {}", kind, sector, len);
        }
        prop_assert!(rig.disk.lock().unwrap().backend().data == model);
    }
}
