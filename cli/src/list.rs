//! `ls` and `inspect`: what sandboxes there are, and what they are made of.

use std::time::SystemTime;

use cubbyhole::{Error, Inspection, Sandbox, Status};
use serde_json::{Value, json};

use crate::failure::{Failure, complain, explain};
use crate::output::{self, Colour};
use crate::table::{self, Cell};
use crate::terminal;
use crate::time::{ago, rfc3339};

/// `cubby ls`
pub async fn list(quiet: bool, as_json: bool) -> Result<u8, Failure> {
    let handles = Sandbox::list().await?;
    if quiet {
        let names: String = handles.iter().map(|handle| format!("{}\n", handle.name())).collect();
        return output::print(names.as_bytes());
    }
    let mut inspections = Vec::new();
    for handle in &handles {
        match inspected(handle.name()).await {
            Ok(inspection) => inspections.push(inspection),
            // Removed since.
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if as_json {
        return output::print_json(&inspections.iter().map(summary).collect());
    }
    let now = SystemTime::now();
    let rows: Vec<[Cell; 4]> = inspections.iter().map(|inspection| row(inspection, now)).collect();
    let header = ["NAME", "IMAGE", "STATUS", "CREATED"];
    let text = table::render(header, &rows, terminal::width_of_stdout(), output::colour_on_stdout());
    output::print(text.as_bytes())
}

/// `cubby inspect`
pub async fn inspect(names: Vec<String>) -> Result<u8, Failure> {
    let mut found = Vec::new();
    let mut code = 0;
    for name in names {
        match inspected(&name).await {
            Ok(inspection) => found.push(whole(&inspection)?),
            Err(error) => {
                complain(&explain(&error));
                code = 1;
            }
        }
    }
    output::print_json(&found.into())?;
    Ok(code)
}

async fn inspected(name: &str) -> Result<Inspection, Error> {
    Sandbox::get(name).await?.inspect().await
}

fn row(inspection: &Inspection, now: SystemTime) -> [Cell; 4] {
    let colour = match inspection.status {
        Status::Running => Some(Colour::Green),
        Status::Crashed => Some(Colour::Red),
        Status::Stopped => None,
        Status::Creating | Status::Paused | Status::Draining => Some(Colour::Yellow),
    };
    let created = now.duration_since(inspection.created_at).unwrap_or_default();
    [
        Cell::from(&inspection.name),
        Cell::from(&inspection.config.image.reference),
        Cell::coloured(&inspection.status.to_string(), colour),
        Cell::from(ago(created)),
    ]
}

fn summary(inspection: &Inspection) -> Value {
    json!({
        "name": inspection.name,
        "image": inspection.config.image.reference,
        "status": inspection.status.to_string(),
        "created_at": rfc3339(inspection.created_at),
        "labels": inspection.config.labels,
    })
}

fn whole(inspection: &Inspection) -> Result<Value, Failure> {
    let unreadable = |error| Failure::new(format!("sandbox {:?} cannot be shown: {error}", inspection.name));
    let config = serde_json::to_value(&inspection.config).map_err(unreadable)?;
    let exit = inspection.exit.as_ref().map(|exit| {
        json!({
            "reason": serde_json::to_value(&exit.reason).unwrap_or_default(),
            "message": exit.reason.to_string(),
            "at": rfc3339(exit.at),
            "console_tail": exit.console_tail,
        })
    });
    Ok(json!({
        "name": inspection.name,
        "status": inspection.status.to_string(),
        "created_at": rfc3339(inspection.created_at),
        "started_at": rfc3339(inspection.started_at),
        "pid": inspection.pid,
        "exit": exit,
        "config": config,
    }))
}
