//! Metrics as text, in the format of [OpenMetrics 1.0](https://prometheus.io/docs/specs/om/open_metrics_spec/), for
//! whatever scrapes them.

use std::fmt::Write;

use crate::metrics::{InterfaceMetrics, Metrics, NetworkMetrics};

/// One metric family: its name, with its unit as the last word, and what it is.
struct Family {
    name: &'static str,
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    /// Its points of one sandbox.
    points: fn(&Metrics) -> Vec<Point>,
}

struct Point {
    /// Beyond the sandbox's name: another label and its value.
    label: Option<(&'static str, String)>,
    value: Value,
}

enum Value {
    Count(u64),
    /// In nanoseconds; they are told in seconds.
    Time(u128),
}

fn one(value: u64) -> Vec<Point> {
    vec![Point { label: None, value: Value::Count(value) }]
}

fn times(metrics: &Metrics) -> Vec<Point> {
    let cpu = &metrics.cpu;
    [
        ("user", cpu.user_ns),
        ("nice", cpu.nice_ns),
        ("system", cpu.system_ns),
        ("irq", cpu.irq_ns),
        ("softirq", cpu.softirq_ns),
        ("steal", cpu.steal_ns),
        ("iowait", cpu.iowait_ns),
        ("idle", cpu.idle_ns),
    ]
    .map(|(state, time)| Point { label: Some(("state", state.into())), value: Value::Time(time.into()) })
    .into()
}

fn each(metrics: &Metrics, value: impl Fn(&InterfaceMetrics) -> u64) -> Vec<Point> {
    // A guest may name two alike; a series has one value.
    let mut seen = std::collections::HashSet::new();
    let interfaces = metrics.network.iter().filter(|interface| seen.insert(interface.name.as_str()));
    let point = |interface: &InterfaceMetrics| Point {
        label: Some(("interface", interface.name.clone())),
        value: Value::Count(value(interface)),
    };
    interfaces.map(point).collect()
}

/// Of a sandbox without a network there are no points.
fn counted(metrics: &Metrics, value: impl Fn(&NetworkMetrics) -> u64) -> Vec<Point> {
    metrics.host_network.iter().flat_map(|network| one(value(network))).collect()
}

fn labelled<'a>(label: &'static str, values: impl IntoIterator<Item = (&'a str, u64)>) -> Vec<Point> {
    let point =
        |(of, value): (&str, u64)| Point { label: Some((label, of.into())), value: Value::Count(value) };
    values.into_iter().map(point).collect()
}

fn drops(metrics: &Metrics) -> Vec<Point> {
    labelled("cause", metrics.host_network.iter().flat_map(|network| network.dropped.causes()))
}

fn refusals(metrics: &Metrics) -> Vec<Point> {
    let by = |network: &NetworkMetrics| [("policy", network.denied), ("limit", network.limited)];
    labelled("by", metrics.host_network.iter().flat_map(by))
}

fn transports(metrics: &Metrics, values: impl Fn(&NetworkMetrics) -> [u64; 2]) -> Vec<Point> {
    let each =
        metrics.host_network.iter().flat_map(|network| ["tcp", "udp"].into_iter().zip(values(network)));
    labelled("transport", each)
}

macro_rules! families {
    ($($name:literal $kind:ident $unit:literal $help:literal $points:expr;)*) => {
        &[$(Family {
            name: $name, kind: stringify!($kind), unit: $unit, help: $help, points: $points,
        },)*]
    };
}

const FAMILIES: &[Family] = families! {
    "cubby_uptime_seconds" gauge "seconds" "Time since the guest booted, without pauses."
        |m| vec![Point { label: None, value: Value::Time(m.uptime.as_nanos()) }];
    "cubby_cpus" gauge "" "Virtual processors." |m| one(m.cpu.vcpus.into());
    "cubby_cpu_seconds" counter "seconds" "Processor time of the guest, by what was done in it." times;
    "cubby_memory_size_bytes" gauge "bytes" "Memory that the guest manages." |m| one(m.memory.total);
    "cubby_memory_used_bytes" gauge "bytes" "Memory in use, without caches." |m| one(m.memory.used);
    "cubby_memory_available_bytes" gauge "bytes" "Memory that programs can still have." |m| one(m.memory.available);
    "cubby_memory_host_resident_bytes" gauge "bytes" "Resident memory of the sandbox process, by the host's count."
        |m| one(m.memory.host_resident);
    "cubby_disk_size_bytes" gauge "bytes" "Size of the root file system." |m| one(m.disk.total);
    "cubby_disk_used_bytes" gauge "bytes" "What is taken of the root file system." |m| one(m.disk.used);
    "cubby_disk_host_allocated_bytes" gauge "bytes" "What the disk takes on the host, by the host's count."
        |m| one(m.disk.host_allocated);
    "cubby_disk_read_bytes" counter "bytes" "Read from disks since boot." |m| one(m.disk.read);
    "cubby_disk_written_bytes" counter "bytes" "Written to disks since boot." |m| one(m.disk.written);
    "cubby_network_received_bytes" counter "bytes" "Received since boot." |m| each(m, |i| i.received_bytes);
    "cubby_network_received_packets" counter "packets" "Received since boot." |m| each(m, |i| i.received_packets);
    "cubby_network_sent_bytes" counter "bytes" "Sent since boot." |m| each(m, |i| i.sent_bytes);
    "cubby_network_sent_packets" counter "packets" "Sent since boot." |m| each(m, |i| i.sent_packets);
    "cubby_host_network_sent_bytes" counter "bytes" "Frames of the guest, by the host's count."
        |m| counted(m, |n| n.sent_bytes);
    "cubby_host_network_sent_frames" counter "frames" "Frames of the guest, by the host's count."
        |m| counted(m, |n| n.sent_frames);
    "cubby_host_network_received_bytes" counter "bytes" "Frames to the guest, by the host's count."
        |m| counted(m, |n| n.received_bytes);
    "cubby_host_network_received_frames" counter "frames" "Frames to the guest, by the host's count."
        |m| counted(m, |n| n.received_frames);
    "cubby_host_network_dropped_frames" counter "frames" "Frames of the guest that were dropped, by what was wrong."
        drops;
    "cubby_host_network_opened_connections" counter "connections" "Connections and flows that have been opened."
        |m| transports(m, |n| [n.tcp_opened, n.udp_opened]);
    "cubby_host_network_open_connections" gauge "connections" "Connections and flows that are held."
        |m| transports(m, |n| [n.tcp_open, n.udp_open]);
    "cubby_host_network_failed_connections" counter "connections" "TCP connections that the other side, or the host, refused."
        |m| counted(m, |n| n.tcp_failed);
    "cubby_host_network_dropped_datagrams" counter "datagrams" "Datagrams that went nowhere."
        |m| counted(m, |n| n.udp_dropped);
    "cubby_host_network_lookups" counter "" "Names that the guest has asked for." |m| counted(m, |n| n.lookups);
    "cubby_host_network_denied" counter "" "Connections, flows and names that were refused." refusals;
    "cubby_host_network_lost_replies" counter "" "Small frames that the guest did not fetch in time."
        |m| counted(m, |n| n.replies_lost);
    "cubby_processes" gauge "" "Processes in the guest, its agent included." |m| one(m.processes.into());
    "cubby_sessions" gauge "" "Open sessions of all clients." |m| one(m.sessions.into());
    "cubby_clients" gauge "" "Connected clients." |m| one(m.clients.into());
};

/// The metrics of any number of sandboxes as one OpenMetrics text, each sandbox a value of the label `sandbox`. It is
/// served as `application/openmetrics-text; version=1.0.0; charset=utf-8`.
pub fn openmetrics<'a>(sandboxes: impl IntoIterator<Item = &'a Metrics>) -> String {
    let sandboxes: Vec<&Metrics> = sandboxes.into_iter().collect();
    let mut text = String::new();
    for family in FAMILIES {
        // Writing to a string does not fail.
        let _ = write_family(&mut text, family, &sandboxes);
    }
    text + "# EOF\n"
}

fn write_family(text: &mut String, family: &Family, sandboxes: &[&Metrics]) -> std::fmt::Result {
    let Family { name, kind, unit, help, points } = family;
    writeln!(text, "# TYPE {name} {kind}")?;
    if !unit.is_empty() {
        writeln!(text, "# UNIT {name} {unit}")?;
    }
    writeln!(text, "# HELP {name} {help}")?;
    let suffix = if *kind == "counter" { "_total" } else { "" };
    for metrics in sandboxes {
        for Point { label, value } in points(metrics) {
            write!(text, "{name}{suffix}{{sandbox=\"{}\"", escaped(&metrics.name))?;
            if let Some((label, value)) = label {
                write!(text, ",{label}=\"{}\"", escaped(&value))?;
            }
            match value {
                Value::Count(count) => writeln!(text, "}} {count}")?,
                Value::Time(time) => {
                    writeln!(text, "}} {}.{:09}", time / 1_000_000_000, time % 1_000_000_000)?;
                }
            }
        }
    }
    Ok(())
}

/// A label's value: the text of the guest's, too.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Metrics {
    /// This as an OpenMetrics text of its own; [`openmetrics`] puts several sandboxes into one.
    pub fn to_openmetrics(&self) -> String {
        openmetrics([self])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::metrics::tests::example;

    /// Reads the format as its specification has it, for gauges and counters, and gives each series its value.
    fn parse(text: &str) -> HashMap<String, f64> {
        let body = text.strip_suffix("# EOF\n").expect("it ends with EOF");
        let (mut series, mut families) = (HashMap::new(), HashSet::new());
        let (mut family, mut kind) = (String::new(), String::new());
        for line in body.lines() {
            assert!(!line.is_empty() && line.trim() == line, "{line:?}");
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name, rest) =
                    (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
                match what {
                    "TYPE" => {
                        assert!(families.insert(name.to_owned()), "{name} comes twice");
                        assert!(!name.ends_with("_total") && ["gauge", "counter"].contains(&rest), "{line}");
                        (family, kind) = (name.to_owned(), rest.to_owned());
                    }
                    "UNIT" => assert!(name == family && name.ends_with(&format!("_{rest}")), "{line}"),
                    "HELP" => assert!(name == family && !rest.is_empty(), "{line}"),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (name, rest) = line.split_once('{').unwrap();
            assert_eq!(name, if kind == "counter" { format!("{family}_total") } else { family.clone() });
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            let mut rest = labels;
            while !rest.is_empty() {
                let (label, after) = rest.split_once("=\"").unwrap();
                assert!(label.trim_start_matches(',').chars().all(|c| c.is_ascii_lowercase()), "{line}");
                let mut escape = false;
                let end = after.find(|c| match c {
                    _ if escape => {
                        assert!("\\\"n".contains(c), "{line}");
                        escape = false;
                        false
                    }
                    '\\' => {
                        escape = true;
                        false
                    }
                    c => c == '"',
                });
                rest = &after[end.unwrap() + 1..];
                assert!(rest.is_empty() || rest.starts_with(','), "{line}");
            }
            let value: f64 = value.parse().unwrap();
            assert!(value >= 0.0 && value.is_finite());
            assert_eq!(series.insert(format!("{name}{{{labels}}}"), value), None, "{line} comes twice");
        }
        series
    }

    #[test]
    fn the_text_is_open_metrics_and_tells_every_number() {
        let text = openmetrics([&example("a"), &example("b")]);
        let series = parse(&text);
        for name in ["a", "b"] {
            for (key, value) in [
                (format!("cubby_uptime_seconds{{sandbox=\"{name}\"}}"), 1.5),
                (format!("cubby_cpu_seconds_total{{sandbox=\"{name}\",state=\"user\"}}"), 1.23),
                (format!("cubby_cpu_seconds_total{{sandbox=\"{name}\",state=\"idle\"}}"), 5e-9),
                (format!("cubby_memory_used_bytes{{sandbox=\"{name}\"}}"), 400.0),
                (format!("cubby_memory_host_resident_bytes{{sandbox=\"{name}\"}}"), 14.0),
                (format!("cubby_disk_written_bytes_total{{sandbox=\"{name}\"}}"), 12.0),
                (format!("cubby_network_received_bytes_total{{sandbox=\"{name}\",interface=\"lo\"}}"), 3.0),
                (format!("cubby_host_network_sent_frames_total{{sandbox=\"{name}\"}}"), 18.0),
                (
                    format!("cubby_host_network_open_connections{{sandbox=\"{name}\",transport=\"tcp\"}}"),
                    22.0,
                ),
                (format!("cubby_processes{{sandbox=\"{name}\"}}"), 13.0),
                (format!("cubby_clients{{sandbox=\"{name}\"}}"), 17.0),
            ] {
                assert_eq!(series.get(&key), Some(&value), "{key}\n{text}");
            }
        }
        // Some have a series for each label: 7 more of what the guest says, and 8 of what the host has counted.
        assert_eq!(series.len(), 2 * (FAMILIES.len() + 7 + 8));
    }

    #[test]
    fn what_a_guest_names_stays_in_its_quotes() {
        let mut metrics = example("x");
        let evil = InterfaceMetrics { name: "e\"} 1\n# EOF\\".into(), ..InterfaceMetrics::default() };
        metrics.network = vec![evil.clone(), evil];
        let series = parse(&metrics.to_openmetrics());
        assert!(series.contains_key(
            "cubby_network_sent_bytes_total{sandbox=\"x\",interface=\"e\\\"} 1\\n# EOF\\\\\"}"
        ));
    }

    #[test]
    fn no_sandbox_is_a_text_as_well() {
        assert!(parse(&openmetrics([])).is_empty());
    }
}
