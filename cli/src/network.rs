//! `network`: whom a sandbox may talk to, now, and what happens there.

use cubbyhole::network::{Direction, Protocol};
use cubbyhole::{DeniedBy, NetworkEvent, NetworkEventKind, NetworkFlow, Sandbox};
use serde_json::{Value, json};

use crate::arguments::Network;
use crate::events::ended;
use crate::failure::{Failure, clean, complain};
use crate::output;
use crate::time::rfc3339;

/// `cubby network`
pub async fn network(what: Network) -> Result<u8, Failure> {
    match what {
        Network::Set(set) => {
            Sandbox::get(&set.name).await?.set_network_policy(set.policy).await?;
            Ok(0)
        }
        Network::Show { name } => {
            let policy = Sandbox::get(&name).await?.inspect().await?.config.network;
            let json = serde_json::to_value(&policy).map_err(|error| Failure::new(error.to_string()))?;
            output::print_json(&json)
        }
        Network::Events { name, json } => events(&name, json).await,
    }
}

/// Until the sandbox ends.
async fn events(name: &str, as_json: bool) -> Result<u8, Failure> {
    let mut events = Sandbox::get(name).await?.network_events().await?;
    let mut told = 0;
    while let Some(event) = events.next().await {
        let lost = events.dropped() - told;
        if lost > 0 {
            told += lost;
            complain(&format!("{lost} events were lost here: more happened than could be read"));
        }
        match event {
            Ok(event) if as_json => drop(output::print(format!("{}\n", object(&event)).as_bytes())?),
            Ok(event) => drop(output::print(format!("{}\n", line(&event)).as_bytes())?),
            Err(error) => ended(name, error).await?,
        }
    }
    Ok(0)
}

fn protocol(flow: &NetworkFlow) -> &'static str {
    match flow.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Icmp => "icmp",
    }
}

fn direction(flow: &NetworkFlow) -> &'static str {
    match flow.direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

/// An event in words. Names may be the guest's.
fn line(event: &NetworkEvent) -> String {
    let between = |flow: &NetworkFlow| {
        let name = flow.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        format!("{} {} {}{name}", direction(flow), protocol(flow), flow.peer)
    };
    let what = match &event.kind {
        NetworkEventKind::Connected(flow) => format!("connected {}", between(flow)),
        NetworkEventKind::Denied { flow, by } => format!("denied {}: {}", between(flow), by.why),
        NetworkEventKind::NameDenied { name, by } => format!("denied name {name}: {}", by.why),
        NetworkEventKind::AnswerDropped { name, address } => {
            format!("dropped answer {name} as {address}: the guest may not talk to that address")
        }
        other => format!("{other:?}"),
    };
    clean(&format!("{} {}", rfc3339(event.at), what.replace(['\n', '\t'], " ")))
}

/// An event for programs.
fn object(event: &NetworkEvent) -> Value {
    let at = rfc3339(event.at);
    let by = |by: &DeniedBy| json!({ "rule": by.rule, "why": by.why });
    let of = |kind: &str, flow: &NetworkFlow, by: Option<Value>| {
        json!({
            "at": at,
            "event": kind,
            "protocol": protocol(flow),
            "direction": direction(flow),
            "peer": flow.peer.to_string(),
            "name": flow.name,
            "by": by,
        })
    };
    match &event.kind {
        NetworkEventKind::Connected(flow) => of("connected", flow, None),
        NetworkEventKind::Denied { flow, by: denier } => of("denied", flow, Some(by(denier))),
        NetworkEventKind::NameDenied { name, by: denier } => {
            json!({ "at": at, "event": "name_denied", "name": name, "by": by(denier) })
        }
        NetworkEventKind::AnswerDropped { name, address } => {
            json!({ "at": at, "event": "answer_dropped", "name": name, "address": address.to_string() })
        }
        other => json!({ "at": at, "event": format!("{other:?}") }),
    }
}
