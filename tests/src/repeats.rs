//! What a guest had to send again. Its kernel counts that, and on a machine of any speed: a refusal that comes at the
//! first asking leaves the counts as they are, one that is lost or late does not.

/// Python that defines `repeats()`: segments that were sent again, and SYNs among them, as the guest's kernel has counted
/// them for all of its TCP (RFC 4022 tcpRetransSegs; Linux Documentation/networking/snmp_counter.rst).
pub const REPEATS: &str = r#"
def repeats():
    counted = {}
    for table in '/proc/net/snmp', '/proc/net/netstat':
        lines = open(table).read().splitlines()
        for names, values in zip(lines[::2], lines[1::2]):
            protocol, *names = names.split()
            counted.update(zip([protocol + name for name in names], values.split()[1:]))
    return [int(counted[name]) for name in ('Tcp:RetransSegs', 'TcpExt:TCPSynRetrans')]
"#;
