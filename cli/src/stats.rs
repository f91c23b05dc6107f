//! `stats`: what sandboxes use, as a table that renews itself on a terminal, as JSON, or for a scraper.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::Duration;

use cubbyhole::{Error, Metrics, NetworkMetrics, Sandbox, Status};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::amount::bytes;
use crate::failure::{Failure, complain, explain};
use crate::output;
use crate::table::{self, Cell};
use crate::terminal;
use crate::time::rfc3339;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long one sandbox may take to answer. One whose guest does not is shown without numbers.
const PATIENCE: Duration = Duration::from_secs(5);

/// How to show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Table {
        /// Even on a terminal.
        once: bool,
    },
    /// For programs.
    Json,
    /// For scrapers.
    OpenMetrics,
}

/// What one look at a sandbox gave.
type Look = Result<Metrics, Error>;

/// `cubby stats`
pub async fn stats(names: Vec<String>, form: Form) -> Result<u8, Failure> {
    let mut links = HashMap::new();
    match form {
        Form::Table { once } => {
            let again = !once && io::stdout().is_terminal();
            table(&names, again, &mut links).await
        }
        form => {
            let (found, code) = complained(look(&names, &mut links).await?);
            let metrics: Vec<Metrics> = found.into_iter().map(|(_, metrics)| metrics).collect();
            match form {
                Form::OpenMetrics => output::print(cubbyhole::openmetrics(&metrics).as_bytes())?,
                _ => output::print_json(&metrics.iter().map(whole).collect())?,
            };
            Ok(code)
        }
    }
}

/// How much of a processor a sandbox uses takes two looks.
async fn table(names: &[String], again: bool, links: &mut HashMap<String, Sandbox>) -> Result<u8, Failure> {
    let mut before = look(names, links).await?;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = look(names, links).await?;
        let rows: Vec<[Cell; 7]> = now
            .iter()
            .map(|(name, look)| {
                row(name, look, before.iter().find(|(other, _)| other == name).map(|(_, look)| look))
            })
            .collect();
        let header = ["NAME", "CPU", "MEMORY / LIMIT", "ON HOST", "DISK", "READ / WRITTEN", "PIDS"];
        let text = table::render(header, &rows, terminal::width_of_stdout(), false);
        if !again {
            output::print(text.as_bytes())?;
            return Ok(complained(now).1);
        }
        // Home, each line to its end, and what is below (ECMA-48, 8.3.21, 8.3.41, 8.3.39).
        let text = text.replace('\n', "\x1b[K\n");
        output::print(format!("\x1b[H{text}\x1b[J").as_bytes())?;
        before = now;
    }
}

/// Looks at all of them, side by side. Who has been removed since is not there.
async fn look(
    names: &[String],
    links: &mut HashMap<String, Sandbox>,
) -> Result<Vec<(String, Look)>, Failure> {
    let all = if names.is_empty() {
        let handles = Sandbox::list().await?;
        let awake = |status| matches!(status, Status::Running | Status::Draining);
        let running = handles.iter().filter(|handle| awake(handle.status()));
        running.map(|handle| handle.name().to_owned()).collect()
    } else {
        names.to_vec()
    };
    let mut tasks = JoinSet::new();
    for (place, name) in all.into_iter().enumerate() {
        // One connection for all looks.
        let link = links.get(&name).cloned();
        tasks.spawn(async move {
            let result = measured(&name, link).await;
            (place, name, result)
        });
    }
    let mut looks = Vec::new();
    while let Some(done) = tasks.join_next().await {
        let (place, name, result) = done.map_err(|error| Failure::new(error.to_string()))?;
        let look = result.map(|(sandbox, metrics)| {
            links.insert(name.clone(), sandbox);
            metrics
        });
        looks.push((place, name, look));
    }
    looks.sort_by_key(|(place, _, _)| *place);
    // A sandbox that nobody has named may have ended in between.
    let ended = |look: &Look| matches!(look, Err(Error::NotFound { .. } | Error::InvalidState { .. }));
    let named = !names.is_empty();
    Ok(looks
        .into_iter()
        .map(|(_, name, look)| (name, look))
        .filter(|(_, look)| named || !ended(look))
        .collect())
}

async fn measured(name: &str, link: Option<Sandbox>) -> Result<(Sandbox, Metrics), Error> {
    let sandbox = match link {
        Some(sandbox) => sandbox,
        None => Sandbox::get(name).await?,
    };
    match tokio::time::timeout(PATIENCE, sandbox.metrics()).await {
        Ok(metrics) => Ok((sandbox, metrics?)),
        Err(_) => Err(Error::Timeout { what: format!("the agent of {name}") }),
    }
}

/// Those that could be looked at; why the others could not is said, and is a failure.
fn complained(looks: Vec<(String, Look)>) -> (Vec<(String, Metrics)>, u8) {
    let mut code = 0;
    let mut found = Vec::new();
    for (name, look) in looks {
        match look {
            Ok(metrics) => found.push((name, metrics)),
            Err(error) => {
                complain(&explain(&error));
                code = 1;
            }
        }
    }
    (found, code)
}

fn row(name: &str, look: &Look, before: Option<&Look>) -> [Cell; 7] {
    let Ok(now) = look else {
        return [name, "-", "-", "-", "-", "-", "-"].map(Cell::from);
    };
    let times = |metrics: &Metrics| (metrics.uptime.as_nanos(), metrics.cpu.usage_ns.into());
    let before = before.and_then(|look| look.as_ref().ok()).map(times);
    let usage = before.and_then(|before| usage(before, times(now), now.cpu.vcpus));
    [
        Cell::from(name),
        Cell::from(usage.map_or("-".into(), |tenths| format!("{}.{}%", tenths / 10, tenths % 10))),
        Cell::from(format!("{} / {}", bytes(now.memory.used), bytes(now.memory.total))),
        Cell::from(bytes(now.memory.host_resident)),
        Cell::from(bytes(now.disk.used)),
        Cell::from(format!("{} / {}", bytes(now.disk.read), bytes(now.disk.written))),
        Cell::from(now.processes.to_string()),
    ]
}

/// What was used between two looks, each an uptime and a processor time in nanoseconds: in tenths of a percent of one
/// processor, as docker counts. `None` for what was started again in between.
fn usage(before: (u128, u128), now: (u128, u128), vcpus: u32) -> Option<u128> {
    let (passed, used) = (now.0.checked_sub(before.0)?, now.1.checked_sub(before.1)?);
    // The guest may say anything, but not that it uses more than it has.
    let most = 1000 * u128::from(vcpus);
    (used * 1000).checked_div(passed).map(|tenths| tenths.min(most))
}

fn host_network(network: &NetworkMetrics) -> Value {
    let dropped: serde_json::Map<String, Value> =
        network.dropped.causes().into_iter().map(|(cause, count)| (cause.into(), count.into())).collect();
    json!({
        "sent_frames": network.sent_frames,
        "sent_bytes": network.sent_bytes,
        "received_frames": network.received_frames,
        "received_bytes": network.received_bytes,
        "dropped_frames": dropped,
        "tcp_opened": network.tcp_opened,
        "tcp_open": network.tcp_open,
        "tcp_failed": network.tcp_failed,
        "udp_opened": network.udp_opened,
        "udp_open": network.udp_open,
        "udp_dropped": network.udp_dropped,
        "lookups": network.lookups,
        "denied": network.denied,
        "limited": network.limited,
        "replies_lost": network.replies_lost,
    })
}

fn whole(metrics: &Metrics) -> Value {
    let network: Vec<Value> = metrics
        .network
        .iter()
        .map(|interface| {
            json!({
                "name": interface.name,
                "received_bytes": interface.received_bytes,
                "received_packets": interface.received_packets,
                "sent_bytes": interface.sent_bytes,
                "sent_packets": interface.sent_packets,
            })
        })
        .collect();
    let (cpu, memory, disk) = (&metrics.cpu, &metrics.memory, &metrics.disk);
    json!({
        "name": metrics.name,
        "at": rfc3339(metrics.at),
        "uptime_seconds": metrics.uptime.as_secs_f64(),
        "cpu": {
            "vcpus": cpu.vcpus,
            "usage_ns": cpu.usage_ns,
            "user_ns": cpu.user_ns,
            "nice_ns": cpu.nice_ns,
            "system_ns": cpu.system_ns,
            "irq_ns": cpu.irq_ns,
            "softirq_ns": cpu.softirq_ns,
            "steal_ns": cpu.steal_ns,
            "iowait_ns": cpu.iowait_ns,
            "idle_ns": cpu.idle_ns,
        },
        "memory": {
            "total": memory.total,
            "used": memory.used,
            "available": memory.available,
            "host_resident": memory.host_resident,
        },
        "disk": {
            "total": disk.total,
            "used": disk.used,
            "host_allocated": disk.host_allocated,
            "read": disk.read,
            "written": disk.written,
        },
        "network": network,
        "host_network": metrics.host_network.as_ref().map(host_network),
        "processes": metrics.processes,
        "sessions": metrics.sessions,
        "clients": metrics.clients,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_of_one_processor_and_within_what_there_is() {
        assert_eq!(usage((1000, 100), (2000, 600), 1), Some(500));
        assert_eq!(usage((1000, 100), (2000, 2100), 2), Some(2000));
        assert_eq!(usage((0, 0), (1, u128::from(u64::MAX)), 2), Some(2000));
        for restarted in [(500, 200), (1500, 50), (1000, 100)] {
            assert_eq!(usage((1000, 100), restarted, 1), None);
        }
    }
}
