//! The network card with Linux's own driver, and the agent that sets it up. What is on the other end of the cable sends
//! everything back (`card/mirror.rs`).

mod guest;
mod mirror;

use std::sync::{Arc, Mutex};

use cubby_protocol::message::{Network, SetupStage, Subnet};
use cubby_vmm::devices::net::{Mac, Mtu, Offloads};
use guest::Guest;
use mirror::{Mirror, Watched};

/// What every script begins with.
const PRELUDE: &str = r#"
import os, socket, struct, sys, time
def sockets(kind, protocol=0):
    for family, peer, own in ((socket.AF_INET, '10.7.0.1', '10.7.0.2'), (socket.AF_INET6, 'fd07::1', 'fd07::2')):
        s = socket.socket(family, kind, protocol)
        s.settimeout(60)
        yield s, peer, own
def echo(total):
    for s, peer, _ in sockets(socket.SOCK_STREAM):
        s.connect((peer, 4000))
        # So much may be under way that nobody waits for somebody who waits.
        sent = got = 0
        pattern = bytes(range(251)) * 400
        while got < total:
            while sent < total and sent - got < 60000:
                at = sent % 251
                sent += s.send(pattern[at:at + min(50000, total - sent)])
            bytes_ = s.recv(100000)
            assert bytes_ == pattern[got % 251:][:len(bytes_)], got
            got += len(bytes_)
        s.close()
"#;

fn subnets() -> Network {
    Network {
        mtu: None,
        ipv4: Some(Subnet { address: [10, 7, 0, 2].into(), prefix: 24, gateway: Some([10, 7, 0, 1].into()) }),
        ipv6: Some(Subnet {
            address: "fd07::2".parse().unwrap(),
            prefix: 64,
            gateway: Some("fd07::1".parse().unwrap()),
        }),
    }
}

fn card(offloads: Offloads, mtu: u16) -> (cubby_vmm::Network, Arc<Mutex<Watched>>) {
    let (backend, watched) = Mirror::new(offloads);
    let mac = Mac::try_from([2, 0, 0, 0, 0, 2]).unwrap();
    (cubby_vmm::Network { mac, mtu: Mtu::try_from(mtu).unwrap(), backend }, watched)
}

async fn guest(offloads: Offloads) -> (Guest, Arc<Mutex<Watched>>) {
    let (card, watched) = card(offloads, 1500);
    (Guest::boot(card, subnets()).await.unwrap(), watched)
}

#[tokio::test]
async fn the_card_is_as_the_host_says_when_the_guest_is_ready() {
    let (card, _) = card(Offloads::ALL, 9000);
    let config = Network { mtu: Some(1400), ..subnets() };
    let mut guest = Guest::boot(card, config).await.unwrap();
    let script = r#"
read = lambda path: open(path).read().strip()
for name in 'address', 'mtu', 'carrier', 'operstate':
    print(name, read('/sys/class/net/eth0/' + name))
print('lo', int(read('/sys/class/net/lo/flags'), 16) & 1)
for line in read('/proc/net/route').splitlines()[1:]:
    print(*line.split()[:4], line.split()[7])
for line in read('/proc/net/if_inet6').splitlines():
    fields = line.split()
    print(fields[0], *fields[2:])
for line in read('/proc/net/ipv6_route').splitlines():
    fields = line.split()
    if fields[0] == '0' * 32 and fields[9] == 'eth0':
        print('default', fields[4])
"#;
    let told = guest.python(&[PRELUDE, script].concat());
    let expected = "address 02:00:00:00:00:02\nmtu 1400\ncarrier 1\noperstate up\nlo 1\n\
        eth0 00000000 0100070A 0003 00000000\n\
        eth0 0000070A 00000000 0001 00FFFFFF\n\
        00000000000000000000000000000001 80 10 80 lo\n\
        fd070000000000000000000000000002 40 00 82 eth0\n\
        fe800000000000000000000000000002 40 20 82 eth0\n\
        default fd070000000000000000000000000001\n";
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&told), sorted(expected));
    // The guest learns that its cable is out, and that it is in again.
    let wait = |carrier: u8| {
        format!(
            "{PRELUDE}\nwhile open('/sys/class/net/eth0/carrier').read().strip() != '{carrier}': time.sleep(0.01)"
        )
    };
    guest.vm.set_link(false);
    guest.python(&wait(0));
    guest.vm.set_link(true);
    guest.python(&wait(1));
}

#[tokio::test]
async fn pings_and_datagrams_come_back() {
    let (mut guest, watched) = guest(Offloads::ALL).await;
    let script = r#"
import array, fcntl
def ethtool(data):
    data = array.array('B', data)
    fcntl.ioctl(socket.socket(), 0x8946, struct.pack('16sQ16x', b'eth0', data.buffer_info()[0]))
    return data.tobytes()
# Linux asks for large UDP frames to be turned on (ethtool_netdev_features): their bit is found by its name.
names = ethtool(struct.pack('III', 0x1b, 4, 0) + bytes(32 * 256))
names = [names[at:at + 32].rstrip(bytes(1)) for at in range(12, len(names), 32)]
bit = names.index(b'tx-udp-segmentation')
blocks = [[1 << bit % 32] * 2 if bit // 32 == block else [0, 0] for block in range(2)]
ethtool(struct.pack('II4I', 0x3b, 2, *blocks[0], *blocks[1]))
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
payload = bytes(range(56))
head = struct.pack('!BBHHH', 8, 0, 0, 7, 1)
head = struct.pack('!BBHHH', 8, 0, checksum(head + payload), 7, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.settimeout(60)
s.sendto(head + payload, ('10.7.0.1', 0))
reply = s.recv(2000)[20:]
assert reply[0] == 0 and reply[4:] == head[4:] + payload and checksum(reply) == 0, reply
s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
s.settimeout(60)
s.sendto(struct.pack('!BBHHH', 128, 0, 0, 7, 1) + payload, ('fd07::1', 0))
while True:
    reply = s.recv(2000)
    if reply[0] == 129: break
assert reply[4:] == struct.pack('!HH', 7, 1) + payload, reply
for s, peer, _ in sockets(socket.SOCK_DGRAM):
    for size in (0, 1, 1000, 1452):
        data = os.urandom(size)
        s.sendto(data, (peer, 7))
        assert s.recv(65536) == data, size
    # UDP_SEGMENT: one frame of many datagrams, both ways.
    s.setsockopt(socket.IPPROTO_UDP, 103, 1000)
    data = os.urandom(30000)
    s.sendto(data, (peer, 7))
    assert b''.join(s.recv(65536) for _ in range(30)) == data
"#;
    guest.python(&[PRELUDE, script].concat());
    let watched = *watched.lock().unwrap();
    assert_eq!(watched.accepted, Some(Offloads::ALL));
    assert!(watched.udp > 30_000, "{watched:?}");
    let counters = guest.vm.network_counters().unwrap();
    assert_eq!((counters.transmit_refused, counters.receive_refused), Default::default());
}

#[tokio::test]
async fn streams_are_carried_in_large_frames_both_ways_and_over_a_pause() {
    let (mut guest, watched) = guest(Offloads::ALL).await;
    guest.python(&format!("{PRELUDE}\necho(3000000)"));
    guest.vm.pause();
    let before = guest.vm.network_counters().unwrap();
    guest.vm.resume();
    guest.python(&format!("{PRELUDE}\necho(3000000)"));
    let after = guest.vm.network_counters().unwrap();
    assert!(after.received.bytes > before.received.bytes + 6_000_000, "{after:?}");
    assert_eq!((after.transmit_refused, after.receive_refused), Default::default());
    let watched = *watched.lock().unwrap();
    assert!(watched.tcp4 > 10_000 && watched.tcp6 > 10_000, "{watched:?}");
    // Fewer frames than segments: those of 1500 bytes would be eight thousand.
    assert!(after.received.frames < 4000, "{after:?}");
}

#[tokio::test]
async fn a_driver_without_offloads_is_served_in_packets() {
    let (mut guest, watched) = guest(Offloads::default()).await;
    guest.python(&format!("{PRELUDE}\necho(300000)"));
    let watched = *watched.lock().unwrap();
    assert_eq!((watched.accepted, watched.tcp4, watched.tcp6), (Some(Offloads::default()), 0, 0));
    let counters = guest.vm.network_counters().unwrap();
    assert_eq!((counters.transmit_refused, counters.receive_refused), Default::default());
    assert!(counters.received.bytes / counters.received.frames <= 1514, "{counters:?}");
}

#[tokio::test]
async fn a_network_that_cannot_be_fails_the_boot_and_is_named() {
    let (card, _) = card(Offloads::ALL, 1500);
    let outside = Subnet { address: [10, 7, 0, 2].into(), prefix: 24, gateway: Some([10, 8, 0, 1].into()) };
    let failed =
        Guest::boot(card, Network { ipv4: Some(outside), ..Network::default() }).await.err().unwrap();
    assert_eq!(failed.stage, SetupStage::Network);
    assert_eq!(failed.message, "the IPv4 gateway: Network is unreachable (os error 101)");
}
