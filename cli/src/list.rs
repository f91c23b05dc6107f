//! `ps`, `ls` and `inspect`: what sandboxes there are, and what they are made of.

use std::time::SystemTime;

use cubbyhole::{Error, Inspection, Sandbox, Status};
use serde_json::{Value, json};

use crate::arguments::{Filter, List};
use crate::failure::{Failure, complain, explain};
use crate::images::{familiar, same_image};
use crate::output::{self, Colour};
use crate::table::{self, Cell};
use crate::terminal;
use crate::time::{ago, rfc3339};

/// `cubby ps`, and with all of them `cubby ls`
pub async fn list(list: List) -> Result<u8, Failure> {
    let mut found = Vec::new();
    for handle in Sandbox::list().await? {
        if !(list.all || handle.status().is_live() || asks_for_status(&list.filter)) {
            continue;
        }
        match inspected(handle.name()).await {
            Ok(inspection) if holds(&list.filter, &inspection) => found.push(inspection),
            // Removed since.
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if list.quiet {
        let names: String = found.iter().map(|inspection| format!("{}\n", inspection.name)).collect();
        return output::print(names.as_bytes());
    }
    if list.json {
        return output::print_json(&found.iter().map(summary).collect());
    }
    let now = SystemTime::now();
    let rows: Vec<[Cell; 4]> = found.iter().map(|inspection| row(inspection, now)).collect();
    let header = ["NAME", "IMAGE", "STATUS", "CREATED"];
    let text = table::render(header, &rows, terminal::width_of_stdout(), output::colour_on_stdout());
    output::print(text.as_bytes())
}

/// Whoever asks for a status wants those that have it, whether they run or not.
fn asks_for_status(filters: &[Filter]) -> bool {
    filters.iter().any(|filter| matches!(filter, Filter::Status(_)))
}

/// Whether all that was asked for holds.
fn holds(filters: &[Filter], inspection: &Inspection) -> bool {
    let config = &inspection.config;
    // Of several for the same thing, one; if none is asked for, all are right.
    let any = |asked: &dyn Fn(&Filter) -> Option<bool>| {
        let mut answers = filters.iter().filter_map(asked).peekable();
        answers.peek().is_none() || answers.any(|right| right)
    };
    let name = |filter: &Filter| match filter {
        Filter::Name(text) => Some(inspection.name.contains(text)),
        _ => None,
    };
    let status = |filter: &Filter| match filter {
        Filter::Status(text) => Some(inspection.status.as_str().eq_ignore_ascii_case(text)),
        _ => None,
    };
    let image = |filter: &Filter| match filter {
        Filter::Image(text) => Some(same_image(&config.image.reference, text)),
        _ => None,
    };
    let labelled = |filter: &Filter| match filter {
        Filter::Label(name, value) => {
            config.labels.get(name).is_some_and(|has| value.as_ref().is_none_or(|value| value == has))
        }
        _ => true,
    };
    any(&name) && any(&status) && any(&image) && filters.iter().all(labelled)
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
        Cell::from(familiar(&inspection.config.image.reference)),
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
        "ports": inspection.ports,
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
        "ports": inspection.ports,
        "size_on_disk": inspection.size_on_disk,
        "exit": exit,
        "config": config,
    }))
}
