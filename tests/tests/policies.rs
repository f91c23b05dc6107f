//! Whom a policy lets a guest talk to, end to end: one table, in which somebody who would answer is at every address
//! ([`cubby_tests::internet`]). What is refused is refused at once, and the other side
//! has not heard of it.

use cubby_tests::internet::Internet;
use cubby_tests::{REPEATS, builder, discard, name, python, within};
use cubbyhole::network::NetworkPolicy;

/// How it went, as a program of the guest sees it.
const YES: &str = "answered";
/// TCP: a reset.
const RESET: &str = "ECONNREFUSED";
/// What is no TCP: an error of ICMP (type 3, code 13), or of ICMPv6 (type 1, code 1).
const FILTERED: &str = "EHOSTUNREACH";
const FILTERED6: &str = "EACCES";
/// The name stands for nothing that may be known.
const NO_NAME: &str = "no name";

/// What carries it, to whom, to which port, and how that goes.
type Row = (&'static str, &'static str, u16, &'static str);

/// A policy as it is written, and what it comes to. Rows are tried from first to last.
const TABLE: &[(&str, &[Row])] = &[
    (
        r#""public""#,
        &[
            ("tcp", "web.test", 7000, YES),
            ("udp", "web.test", 7000, YES),
            ("icmp", "web.test", 0, YES),
            ("tcp", "93.184.215.14", 7000, YES),
            ("udp", "93.184.215.14", 7000, YES),
            ("tcp", "2606:2800:21f:cb07::14", 7000, YES),
            ("udp", "2606:2800:21f:cb07::14", 7000, YES),
            ("icmp", "2606:2800:21f:cb07::14", 0, YES),
            // Nobody is there: that too is said at once.
            ("tcp", "web.test", 7009, "ECONNREFUSED"),
            ("udp", "web.test", 7009, "ECONNREFUSED"),
            ("tcp", "10.1.2.3", 7000, RESET),
            ("udp", "10.1.2.3", 7000, FILTERED),
            ("icmp", "10.1.2.3", 0, FILTERED),
            ("tcp", "192.168.1.1", 7000, RESET),
            ("udp", "192.168.1.1", 7000, FILTERED),
            ("tcp", "172.17.0.1", 7000, RESET),
            ("udp", "172.17.0.1", 7000, FILTERED),
            ("tcp", "100.64.0.1", 7000, RESET),
            ("udp", "100.64.0.1", 7000, FILTERED),
            ("tcp", "203.0.113.1", 7000, RESET),
            ("udp", "203.0.113.1", 7000, FILTERED),
            ("tcp", "169.254.169.254", 7000, RESET),
            ("udp", "169.254.169.254", 7000, FILTERED),
            ("icmp", "169.254.169.254", 0, FILTERED),
            ("tcp", "fd00::1", 7000, RESET),
            ("udp", "fd00::1", 7000, FILTERED6),
            ("icmp", "fd00::1", 0, FILTERED6),
            ("tcp", "fec0::1", 7000, RESET),
            ("udp", "fec0::1", 7000, FILTERED6),
            ("tcp", "fe80::1%eth0", 7000, RESET),
            ("udp", "fe80::1%eth0", 7000, FILTERED6),
            // The guest's own loopback, where nobody listens.
            ("tcp", "127.0.0.1", 7000, "ECONNREFUSED"),
            ("udp", "127.0.0.1", 7000, "ECONNREFUSED"),
            ("tcp", "::1", 7000, "ECONNREFUSED"),
            ("udp", "::1", 7000, "ECONNREFUSED"),
            // The host's, by the name and the address that it has here.
            ("tcp", "host.cubbyhole.internal", 7000, RESET),
            ("tcp", "198.18.0.254", 7000, RESET),
            ("udp", "198.18.0.254", 7000, FILTERED),
            ("tcp", "fd63:7562:6279::fe", 7000, RESET),
            ("udp", "fd63:7562:6279::fe", 7000, FILTERED6),
            // Nobody's addresses on the guest's own link.
            ("tcp", "198.18.0.77", 7000, RESET),
            ("udp", "198.18.0.77", 7000, FILTERED),
            ("tcp", "fd63:7562:6279::77", 7000, RESET),
            // Public names of what is not public.
            ("tcp", "loopback.test", 7000, NO_NAME),
            ("tcp", "loopback6.test", 7000, NO_NAME),
            ("tcp", "mapped.test", 7000, NO_NAME),
            ("tcp", "linklocal6.test", 7000, NO_NAME),
            ("tcp", "private.test", 7000, NO_NAME),
            ("udp", "private.test", 7000, NO_NAME),
            ("tcp", "metadata.test", 7000, NO_NAME),
            ("tcp", "unique.test", 7000, NO_NAME),
            ("tcp", "nothing.test", 7000, NO_NAME),
        ],
    ),
    (
        r#"{"base": "none", "rules": [
            {"action": "allow", "name": "web.test", "ports": "7000"},
            {"action": "allow", "name": "metadata.test"},
            {"action": "allow", "name": "private.test", "net": "10.0.0.0/8", "protocol": "tcp"},
            {"action": "allow", "net": "fd00::/8", "protocol": "udp", "ports": "7001-7009"}]}"#,
        &[
            // A literal address gets past no name, until the name has led to it.
            ("tcp", "93.184.215.14", 7000, RESET),
            ("udp", "93.184.215.14", 7000, FILTERED),
            ("tcp", "web.test", 7000, YES),
            ("udp", "web.test", 7000, YES),
            ("tcp", "93.184.215.14", 7000, YES),
            ("tcp", "web.test", 7001, RESET),
            ("udp", "web.test", 7001, FILTERED),
            // A rule about ports is not about what has none.
            ("icmp", "web.test", 0, FILTERED),
            // Another name of the same address is another name.
            ("tcp", "other.test", 7000, NO_NAME),
            ("tcp", "v6.test", 7000, NO_NAME),
            ("tcp", "2606:2800:21f:cb07::14", 7000, YES),
            // Who owns a name does not own the network that it points to.
            ("tcp", "metadata.test", 7000, NO_NAME),
            ("tcp", "169.254.169.254", 7000, RESET),
            ("udp", "169.254.169.254", 7000, FILTERED),
            // Unless a rule has both.
            ("tcp", "10.1.2.3", 7000, RESET),
            ("tcp", "private.test", 7000, YES),
            ("udp", "private.test", 7000, FILTERED),
            ("tcp", "fd00::1", 7001, RESET),
            ("udp", "fd00::1", 7001, YES),
            ("udp", "fd00::1", 7000, FILTERED6),
            ("tcp", "198.18.0.254", 7000, RESET),
        ],
    ),
    (
        r#"{"base": "public", "rules": [
            {"action": "allow", "net": "10.1.2.3", "ports": "7000"},
            {"action": "deny", "name": ".test", "protocol": "udp"},
            {"action": "deny", "name": "other.test"},
            {"action": "deny", "net": "2606:2800::/32"},
            {"action": "allow", "net": "127.0.0.0/8", "protocol": "tcp"}]}"#,
        &[
            ("tcp", "10.1.2.3", 7000, YES),
            ("udp", "10.1.2.3", 7000, YES),
            ("tcp", "10.1.2.3", 7001, RESET),
            ("tcp", "private.test", 7000, YES),
            ("tcp", "192.168.1.1", 7000, RESET),
            // To deny a name confines nobody who knows an address, and everybody who has asked for the name.
            ("udp", "93.184.215.14", 7000, YES),
            ("tcp", "web.test", 7000, YES),
            ("udp", "web.test", 7001, FILTERED),
            ("tcp", "other.test", 7000, NO_NAME),
            ("tcp", "v6.test", 7000, NO_NAME),
            ("tcp", "2606:2800:21f:cb07::14", 7000, RESET),
            ("udp", "2606:2800:21f:cb07::14", 7000, FILTERED6),
            // The name has an address of each kind, and the rule is about one.
            ("tcp", "host.cubbyhole.internal", 7000, RESET),
            ("tcp", "198.18.0.254", 7000, YES),
            ("udp", "198.18.0.254", 7000, FILTERED),
            ("tcp", "169.254.169.254", 7000, RESET),
        ],
    ),
    (
        r#"{"base": "all", "rules": [
            {"action": "deny", "net": "169.254.0.0/16"},
            {"action": "deny", "protocol": "icmp"},
            {"action": "deny", "name": "private.test"}]}"#,
        &[
            ("tcp", "192.168.1.1", 7000, YES),
            ("udp", "192.168.1.1", 7000, YES),
            ("tcp", "172.17.0.1", 7000, YES),
            ("tcp", "100.64.0.1", 7000, YES),
            ("udp", "fd00::1", 7000, YES),
            ("tcp", "fec0::1", 7000, YES),
            ("tcp", "host.cubbyhole.internal", 7000, YES),
            ("udp", "host.cubbyhole.internal", 7000, YES),
            ("tcp", "fd63:7562:6279::fe", 7000, YES),
            ("tcp", "169.254.169.254", 7000, RESET),
            ("udp", "169.254.169.254", 7000, FILTERED),
            ("icmp", "web.test", 0, FILTERED),
            ("icmp", "2606:2800:21f:cb07::14", 0, FILTERED6),
            ("tcp", "private.test", 7000, NO_NAME),
            ("tcp", "unique.test", 7000, YES),
        ],
    ),
    (
        r#""none""#,
        &[
            ("tcp", "93.184.215.14", 7000, "ENETUNREACH"),
            ("udp", "2606:2800:21f:cb07::14", 7000, "ENETUNREACH"),
            ("tcp", "web.test", 7000, NO_NAME),
            ("tcp", "127.0.0.1", 7000, "ECONNREFUSED"),
        ],
    ),
];

/// Answers everybody on two ports of every address, and says who has come: what they have sent.
const SERVER: &str = r#"
import socket, sys, threading
def tcp(listener):
    while True:
        stream = listener.accept()[0]
        told = stream.recv(100)
        print(told.decode(), flush=True)
        stream.sendall(told)
        stream.close()
def udp(s):
    while True:
        told, peer = s.recvfrom(100)
        print(told.decode(), flush=True)
        s.sendto(told, peer)
for port in 7001, 7000:
    for family, address in (socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::'):
        s = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind((address, port))
        threading.Thread(target=udp, args=(s,)).start()
        threading.Thread(target=tcp, args=(socket.create_server((address, port), family=family),)).start()
"#;

/// Tries `rows`, of which `first` is the number of the first one, and prints how each went, whether the guest had to say
/// something again for that, and the milliseconds that it took. No name is looked up for an address.
const PROBE: &str = r#"
import errno, socket, struct, time
open('/proc/sys/net/ipv4/ping_group_range', 'w').write('0 0')
def find(host, port):
    try: return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror: return None
def talk(protocol, host, port, told):
    found = find(host, port)
    if not found: return 'no name'
    family, address = found[0], found[4]
    icmp = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    kind = socket.SOCK_STREAM if protocol == 'tcp' else socket.SOCK_DGRAM
    with socket.socket(family, kind, icmp if protocol == 'icmp' else 0) as s:
        s.settimeout(10)
        try:
            s.connect(address)
            if protocol == 'icmp': told = struct.pack('!BBHHH', 8 if family == socket.AF_INET else 128, 0, 0, 0, 1) + told
            s.send(told)
            back = s.recv(100)
        except TimeoutError: return 'silence'
        except OSError as error: return errno.errorcode[error.errno]
    return 'answered' if back[8 if protocol == 'icmp' else 0:] == told[8 if protocol == 'icmp' else 0:] else f'{back}'
for row, (protocol, host, port) in enumerate(rows, first):
    before, begin = repeats(), time.monotonic()
    went = talk(protocol, host, port, f'{policy}.{row};'.encode())
    took, after = round((time.monotonic() - begin) * 1000), repeats()
    print(went, 'first' if after == before else f'{before}..{after}', took, sep='\t')
"#;

/// In how many milliseconds an answer is there, on the slowest machine. A refusal of TCP has to come before the guest has
/// asked again, too, which its kernel counts; nobody asks again by UDP and ICMP here, and for a name after five seconds
/// (resolv.conf(5), `timeout`).
const AT_ONCE: u32 = 2500;

/// How many rows one program tries: the slowest machine takes most of a second for each.
const TRIED: usize = 20;

/// One policy of the table; what has gone otherwise than it says.
async fn try_policy(internet: &'static Internet, index: usize) -> Vec<String> {
    let (written, rows) = TABLE[index];
    let policy: NetworkPolicy = serde_json::from_str(written).unwrap();
    let building = internet.place(builder(&name(&format!("policy{index}"))).network(policy));
    let sandbox = within("create", building.create()).await.unwrap();
    let mut told = String::new();
    for (first, rows) in (0..).step_by(TRIED).zip(rows.chunks(TRIED)) {
        let tried = rows.iter().map(|(what, whom, port, _)| format!("('{what}', '{whom}', {port}), "));
        let tried: String = tried.collect();
        told += &python(
            &sandbox,
            &format!("{REPEATS}policy, first, rows = {index}, {first}, [{tried}]\n{PROBE}"),
        )
        .await;
    }
    discard(sandbox).await;
    assert_eq!(told.lines().count(), rows.len(), "{told}");
    let judged = rows.iter().zip(told.lines()).filter_map(|((what, whom, port, expected), told)| {
        let [went, asked, took] = told.split('\t').collect::<Vec<_>>()[..] else { panic!("{told}") };
        // Who is answered may have had to wait for somebody else.
        let at_once = took.parse::<u32>().unwrap() < AT_ONCE && (asked == "first" || *expected == YES);
        let row = format!(
            "{written}: {what} {whom} {port}: {went} after {took} ms, asked {asked}, and not {expected} at once"
        );
        (went != *expected || !at_once).then_some(row)
    });
    judged.collect()
}

#[tokio::test]
async fn policies_let_through_what_their_table_says_and_refuse_the_rest_at_once() {
    let internet = Internet::get().await;
    let mut server = internet.serve(&["python3", "-c", SERVER], 7000).await;
    let mut wrong = Vec::new();
    for index in 0..TABLE.len() {
        wrong.extend(try_policy(internet, index).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Whoever was let through has come, and nobody else.
    let said = server.said();
    let mut came: Vec<&str> = said.split(['\n', ';']).filter(|line| !line.is_empty()).collect();
    let let_through = |index: usize, rows: &'static [Row]| {
        let rows = rows.iter().enumerate().filter(|(_, row)| row.3 == YES && row.0 != "icmp");
        rows.map(move |(row, _)| format!("{index}.{row}"))
    };
    let mut expected: Vec<String> =
        TABLE.iter().enumerate().flat_map(|(index, (_, rows))| let_through(index, rows)).collect();
    came.sort_unstable();
    expected.sort_unstable();
    assert_eq!(came, expected);
}
