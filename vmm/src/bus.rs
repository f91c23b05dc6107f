//! Where a guest's access to an I/O port or to device memory goes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cubby_devices::Transport;
use cubby_devices::console::Console;

use crate::arch::layout;
use crate::exit::Exit;

/// A port that the guest writes single bytes to, to say how far it has come. Every write is a VM exit,
/// needs no driver, and runs the embedder's function on the vCPU's thread.
pub struct Marks {
    /// The I/O port.
    pub port: u16,
    /// Called with the byte; it must not block.
    pub on_mark: Box<dyn FnMut(u8) -> Flow + Send>,
}

/// What follows a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The guest goes on.
    Continue,
    /// The VM ends with [`Exit::PowerOff`].
    PowerOff,
}

/// The keyboard controller's status port; its reset line is all that is left of it.
const I8042_COMMAND: u16 = layout::I8042_PORT + 4;
const I8042_RESET: u8 = 0xfe;

pub(crate) struct Bus {
    pub(crate) console: Mutex<Console>,
    pub(crate) marks: Option<Mutex<Marks>>,
    pub(crate) virtio: Vec<Mutex<Transport>>,
}

impl Bus {
    /// A write to an I/O port; ports that nobody has swallow it.
    pub(crate) fn port_out(&self, port: u16, data: &[u8]) -> Option<Exit> {
        let byte = *data.first()?;
        match port {
            layout::SERIAL_PORT..=layout::SERIAL_PORT_LAST => {
                lock(&self.console).write(serial_register(port), byte);
                None
            }
            I8042_COMMAND if byte == I8042_RESET => Some(Exit::Reset),
            _ => {
                let mut marks = lock(self.marks.as_ref()?);
                if port != marks.port {
                    return None;
                }
                match (marks.on_mark)(byte) {
                    Flow::Continue => None,
                    Flow::PowerOff => Some(Exit::PowerOff),
                }
            }
        }
    }

    /// A read from an I/O port; ports that nobody has read as ones, as an empty bus does.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let value = match port {
            layout::SERIAL_PORT..=layout::SERIAL_PORT_LAST => lock(&self.console).read(serial_register(port)),
            // Neither input nor output is pending: a write of the reset command follows.
            layout::I8042_PORT | I8042_COMMAND => 0,
            _ => return,
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    /// A read from device memory; addresses that nobody has read as ones.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((mut device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write to device memory; addresses that nobody has swallow it.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((mut device, offset)) = self.virtio_at(address) {
            device.write(offset, data);
        }
    }

    fn virtio_at(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        let relative = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(relative / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((lock(self.virtio.get(index)?), relative % layout::VIRTIO_MMIO_SIZE))
    }
}

/// Which of the serial port's eight registers a port is.
fn serial_register(port: u16) -> u8 {
    let [register, _] = (port - layout::SERIAL_PORT).to_le_bytes();
    register
}

/// Locks, whoever panicked with the lock held: device state is valid between any two of its writes.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cubby_devices::rng::Rng;
    use cubby_devices::{Interrupt, Memory};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::sys::OsEntropy;

    struct NoLine;

    impl Interrupt for NoLine {
        fn raise(&self) {}
    }

    const MARK: u16 = 0x510;

    /// One device, and marks that end the VM: a write that strays to either is seen.
    fn bus() -> Bus {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let device = Transport::new(Arc::new(Mutex::new(Rng::new(OsEntropy))), memory, Arc::new(NoLine));
        Bus {
            console: Mutex::new(Console::new(Arc::new(NoLine), None)),
            marks: Some(Mutex::new(Marks { port: MARK, on_mark: Box::new(|_| Flow::PowerOff) })),
            virtio: vec![Mutex::new(device)],
        }
    }

    #[test]
    fn ports_that_nobody_has_read_as_ones_and_swallow_writes() {
        let bus = bus();
        let (mut nobody, mut somebody) = (0, 0);
        for port in 0..=u16::MAX {
            let taken = matches!(port, 0x60 | 0x64 | 0x3f8..=0x3ff | MARK);
            for size in [1, 2, 4] {
                let mut data = [0x5a; 4];
                bus.port_in(port, &mut data[..size]);
                // What is wider than a register reads as ones beside it.
                assert_eq!(data[1..size], [0xff; 3][..size - 1], "port {port:#x}");
                assert_eq!(data[size..], [0x5a; 3][..4 - size], "port {port:#x}");
                let end = bus.port_out(port, &[0; 4][..size]);
                if taken {
                    somebody += 1;
                } else {
                    assert_eq!(data[0], 0xff, "port {port:#x}");
                    assert_eq!(end, None, "port {port:#x}");
                    nobody += 1;
                }
            }
            assert_eq!(bus.port_out(port, &[]), None);
        }
        assert_eq!((nobody, somebody), ((0x10000 - 11) * 3, 33));
        assert_eq!(bus.port_out(MARK, &[0]), Some(Exit::PowerOff));
        assert_eq!(bus.port_out(0x64, &[0xfe]), Some(Exit::Reset));
    }

    #[test]
    fn addresses_that_nobody_has_read_as_ones_and_swallow_writes() {
        let bus = bus();
        let read = |address| {
            let mut data = [0; 4];
            bus.mmio_read(address, &mut data);
            u32::from_le_bytes(data)
        };
        let magic = u32::from_le_bytes(*b"virt");
        assert_eq!(read(layout::VIRTIO_MMIO), magic);
        let end = layout::VIRTIO_MMIO + layout::VIRTIO_MMIO_SIZE;
        let strange = [
            0,
            0xfff,
            layout::VIRTIO_MMIO - 4,
            end,
            end + 0x70,
            0xfee0_0000,
            1 << 40,
            u64::MAX - 3,
            u64::MAX,
        ];
        for address in strange {
            assert_eq!(read(address), u32::MAX, "{address:#x}");
            bus.mmio_write(address, &1_u32.to_le_bytes());
            bus.mmio_write(address, &[]);
            bus.mmio_read(address, &mut []);
        }
        // The device has seen nothing of it: its status is still that of its reset.
        assert_eq!((read(layout::VIRTIO_MMIO), read(layout::VIRTIO_MMIO + 0x70)), (magic, 0));
    }
}
