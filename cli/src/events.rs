//! `events` and `emit`: what programs in a sandbox tell, and what they are told.

use cubbyhole::{Error, Sandbox, Status};
use serde_json::Value;

use crate::failure::{Failure, complain};
use crate::output;

/// `cubby events`: until the sandbox ends.
pub async fn events(name: &str, event: Option<&str>) -> Result<u8, Failure> {
    let mut events = Sandbox::get(name).await?.events(event.unwrap_or("*")).await?;
    let mut told = 0;
    while let Some(event) = events.next().await {
        let lost = events.dropped() - told;
        if lost > 0 {
            told += lost;
            complain(&format!("{lost} events were lost: read faster, or ask for one name"));
        }
        match event {
            Ok(event) => drop(output::print(line(&event)?.as_bytes())?),
            Err(error) => ended(name, error).await?,
        }
    }
    Ok(0)
}

/// The end of whoever watched a sandbox until its end. Nothing is wrong with one that ends as somebody asked, or that
/// somebody has removed before it could be asked how it ended.
pub async fn ended(name: &str, error: Error) -> Result<(), Failure> {
    match error {
        Error::Ended { report, .. } if report.reason.status() == Status::Stopped => Ok(()),
        Error::Process { .. } if matches!(Sandbox::get(name).await, Err(Error::NotFound { .. })) => Ok(()),
        error => Err(error.into()),
    }
}

/// `cubby emit`
pub async fn emit(name: &str, event: &str, data: &str) -> Result<u8, Failure> {
    let data: Value = serde_json::from_str(data).map_err(|error| {
        Failure::new(format!("the data is no JSON: {error}; a text needs quotes: '\"{data}\"'"))
    })?;
    Sandbox::get(name).await?.emit(event, &data).await?;
    Ok(0)
}

fn line(event: &cubbyhole::Event) -> Result<String, Failure> {
    let text = serde_json::to_string(event).map_err(|error| Failure::new(error.to_string()))?;
    Ok(output::json_line(&text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubbyhole::Event;

    #[test]
    fn a_line_is_json_that_a_terminal_can_bear() {
        let event = Event { name: "a\u{9b}2J".into(), data: "\u{1b}[2J\u{7f}é\n".into() };
        let line = line(&event).unwrap();
        assert_eq!(line, "{\"event\":\"a\\u009b2J\",\"data\":\"\\u001b[2J\\u007fé\\n\"}\n");
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}
