use proptest::prelude::*;

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn name(text: &str) -> NamePattern {
    text.parse().unwrap()
}

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;
const ICMP: Protocol = Protocol::Icmp;

/// Policies with what they say to whom: protocol, address, port, names, and what decides.
#[test]
fn the_table() {
    use By::{Base as B, Rule as R};
    use Verdict::{Allowed as Yes, Denied as No};
    let (none, public, all) = (NetworkPolicy::none(), NetworkPolicy::public(), NetworkPolicy::all());
    let ordered = NetworkPolicy::public()
        .rule(Rule::deny().net(cidr("93.184.0.0/16")).protocol(TCP).ports("1-1023".parse::<Ports>().unwrap()))
        .rule(Rule::allow().net(cidr("10.1.0.0/16")).ports(5432))
        .rule(Rule::deny().net(cidr("10.0.0.0/8")))
        .rule(Rule::allow().net(cidr("10.2.0.0/16")));
    let named = NetworkPolicy::none()
        .rule(Rule::deny().name(name("bad.example.com")))
        .rule(Rule::allow().name(name(".example.com")).ports(443))
        .rule(Rule::allow().name(name("db.corp")).net(cidr("10.0.0.0/8")));
    let local = NetworkPolicy::public().rule(Rule::allow().net(cidr("127.0.0.1")).protocol(TCP).ports(8080));
    type Row<'a> = (&'a NetworkPolicy, Protocol, &'a str, u16, &'a [&'a str], Verdict);
    let table: &[Row<'_>] = &[
        (&none, TCP, "1.1.1.1", 443, &[], No(B(Base::None))),
        (&none, ICMP, "1.1.1.1", 0, &["one.one"], No(B(Base::None))),
        (&public, TCP, "1.1.1.1", 443, &[], Yes(B(Base::Public))),
        (&public, UDP, "1.1.1.1", 53, &[], Yes(B(Base::Public))),
        (&public, ICMP, "2606:4700::1111", 0, &[], Yes(B(Base::Public))),
        (&public, TCP, "127.0.0.1", 22, &[], No(B(Base::Public))),
        (&public, TCP, "::ffff:127.0.0.1", 22, &[], No(B(Base::Public))),
        (&public, TCP, "192.168.1.1", 80, &["router"], No(B(Base::Public))),
        (&public, TCP, "169.254.169.254", 80, &[], No(B(Base::Public))),
        (&public, UDP, "224.0.0.251", 5353, &[], No(B(Base::Public))),
        (&all, TCP, "127.0.0.1", 22, &[], Yes(B(Base::All))),
        (&all, UDP, "224.0.0.251", 5353, &[], Yes(B(Base::All))),
        // The first rule that is about it decides.
        (&ordered, TCP, "93.184.1.1", 80, &[], No(R(0))),
        (&ordered, TCP, "93.184.1.1", 1024, &[], Yes(B(Base::Public))),
        (&ordered, UDP, "93.184.1.1", 80, &[], Yes(B(Base::Public))),
        (&ordered, TCP, "10.1.2.3", 5432, &[], Yes(R(1))),
        (&ordered, TCP, "::ffff:10.1.2.3", 5432, &[], Yes(R(1))),
        (&ordered, TCP, "10.1.2.3", 5433, &[], No(R(2))),
        (&ordered, ICMP, "10.1.2.3", 0, &[], No(R(2))),
        (&ordered, TCP, "10.2.2.3", 80, &[], No(R(2))),
        // By name: only what the name has led to, and only to public addresses.
        (&named, TCP, "93.184.1.1", 443, &["example.com"], Yes(R(1))),
        (&named, TCP, "93.184.1.1", 443, &["other.org", "WWW.example.com."], Yes(R(1))),
        (&named, TCP, "93.184.1.1", 443, &[], No(B(Base::None))),
        (&named, TCP, "93.184.1.1", 80, &["example.com"], No(B(Base::None))),
        (&named, TCP, "93.184.1.1", 443, &["bad.example.com"], No(R(0))),
        (&named, TCP, "93.184.1.1", 443, &["www.example.com", "bad.example.com"], No(R(0))),
        (&named, TCP, "127.0.0.1", 443, &["www.example.com"], No(B(Base::None))),
        (&named, TCP, "10.0.0.5", 5432, &["db.corp"], Yes(R(2))),
        (&named, TCP, "10.0.0.5", 5432, &[], No(B(Base::None))),
        (&named, TCP, "93.184.1.1", 5432, &["db.corp"], No(B(Base::None))),
        (&local, TCP, "127.0.0.1", 8080, &[], Yes(R(0))),
        (&local, TCP, "127.0.0.1", 8081, &[], No(B(Base::Public))),
        (&local, UDP, "127.0.0.1", 8080, &[], No(B(Base::Public))),
        (&local, ICMP, "127.0.0.1", 0, &[], No(B(Base::Public))),
    ];
    for (policy, protocol, address, port, names, expected) in table {
        let flow = Flow::outbound(*protocol, ip(address), *port).named(names);
        assert_eq!(policy.decide(&flow), *expected, "{flow:?} by {policy:?}");
    }
}

#[test]
fn published_ports_are_open_unless_a_rule_or_no_network_closes_them() {
    let from = |address| Flow::inbound(TCP, ip(address), 80);
    assert!(NetworkPolicy::public().decide(&from("127.0.0.1")).is_allowed());
    assert!(NetworkPolicy::all().decide(&from("192.168.1.1")).is_allowed());
    assert!(!NetworkPolicy::none().decide(&from("127.0.0.1")).is_allowed());
    let closed = NetworkPolicy::all().rule(Rule::deny().inbound().net(cidr("192.168.0.0/16")));
    assert_eq!(closed.decide(&from("192.168.1.1")), Verdict::Denied(By::Rule(0)));
    assert!(closed.decide(&from("10.0.0.1")).is_allowed());
    assert!(closed.decide(&Flow::outbound(TCP, ip("192.168.1.1"), 80)).is_allowed());
}

#[test]
fn names_are_looked_up_when_a_rule_or_the_base_allows() {
    let named = NetworkPolicy::none()
        .rule(Rule::deny().name(name("bad.example.com")))
        .rule(Rule::deny().name(name("mail.example.com")).ports(25))
        .rule(Rule::allow().name(name(".example.com")));
    for (policy, asked, allowed) in [
        (&named, "example.com", true),
        (&named, "Bad.example.com", false),
        (&named, "mail.example.com", true),
        (&named, "example.org", false),
        (&NetworkPolicy::none(), "example.org", false),
        (&NetworkPolicy::none().rule(Rule::allow().net(cidr("1.1.1.1"))), "example.org", false),
        (&NetworkPolicy::public(), "example.org", true),
        (&NetworkPolicy::public().rule(Rule::deny().name(name("*.org"))), "example.org", false),
        (&NetworkPolicy::public().rule(Rule::deny().inbound().name(name("*.org"))), "example.org", true),
    ] {
        assert_eq!(policy.decide_name(asked).is_allowed(), allowed, "{asked} by {policy:?}");
    }
}

#[test]
fn answers_lead_only_where_the_guest_may_go() {
    let named = NetworkPolicy::none()
        .rule(Rule::allow().name(name("example.com")).ports(443))
        .rule(Rule::allow().name(name("db.corp")).net(cidr("10.0.0.0/8")));
    let split = NetworkPolicy::public()
        .rule(Rule::deny().net(cidr("1.0.0.0/8")).ports(80))
        .rule(Rule::deny().net(cidr("2.0.0.0/8")));
    for (policy, asked, address, allowed) in [
        (&named, "example.com", "93.184.1.1", true),
        (&named, "example.com", "127.0.0.1", false),
        (&named, "example.com", "10.0.0.1", false),
        (&named, "db.corp", "10.0.0.1", true),
        (&named, "db.corp", "192.168.0.1", false),
        (&split, "a.b", "1.1.1.1", true),
        (&split, "a.b", "2.1.1.1", false),
        (&split, "a.b", "::ffff:2.1.1.1", false),
        (&split, "a.b", "169.254.169.254", false),
        (&NetworkPolicy::all(), "a.b", "127.0.0.1", true),
    ] {
        assert_eq!(policy.may_answer(asked, ip(address)), allowed, "{asked} {address} by {policy:?}");
    }
}

#[test]
fn json_is_a_word_or_rules_and_nothing_unknown() {
    let read = |text: &str| serde_json::from_str::<NetworkPolicy>(text);
    assert_eq!(read(r#""public""#).unwrap(), NetworkPolicy::public());
    assert_eq!(serde_json::to_string(&NetworkPolicy::none()).unwrap(), r#""none""#);
    let text = r#"{"base":"none","rules":[{"action":"allow","direction":"outbound","net":"10.0.0.0/8","name":"*.corp","protocol":"tcp","ports":"80-81"}]}"#;
    let policy = read(text).unwrap();
    assert_eq!(serde_json::to_string(&policy).unwrap(), text);
    assert_eq!(policy.explain(By::Rule(0)), "rule 0: allow tcp *.corp 10.0.0.0/8 port 80-81");
    for wrong in [
        r#""open""#,
        r#"{"base":"none"}"#,
        r#"{"base":"none","rules":[{"action":"allow","uid":1}]}"#,
        r#"{"base":"none","rules":[{"action":"allow","net":"10.0.0.0/40"}]}"#,
        r#"{"base":"none","rules":[],"exceptions":[]}"#,
    ] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}

proptest! {
    /// Nothing that the default policy allows is an address of the host or of its networks, however it is written.
    #[test]
    fn the_default_reaches_nothing_private(bits: u32) {
        let v4 = std::net::Ipv4Addr::from_bits(bits);
        let mapped = IpAddr::V6(v4.to_ipv6_mapped());
        let decide = |address| NetworkPolicy::default().decide(&Flow::outbound(TCP, address, 80)).is_allowed();
        let private = v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast()
            || v4.is_broadcast() || v4.is_unspecified() || v4.is_documentation();
        prop_assert!(!(private && decide(IpAddr::V4(v4))));
        prop_assert_eq!(decide(IpAddr::V4(v4)), decide(mapped));
    }
}
